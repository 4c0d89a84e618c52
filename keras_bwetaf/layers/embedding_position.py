import functools
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.typing import ArrayLike

from keras_bwetaf.layers.rotary_embedding import check_not_empty, on_host


@functools.cache
def _frequencies(width: int, use_rope: bool) -> np.ndarray:
    """`10000 ** (-2i / width)` for `i` below `width / 2`, float32.

    Each kind is computed as the original does, in another order of roundings.
    """

    def compute():
        if use_rope:
            indices = jnp.arange(width // 2, dtype="float32")
            return 1.0 / (10000 ** (2 * indices / width))
        return jnp.exp(-jnp.arange(0, width, 2) * (jnp.log(10000.0) / width))

    return on_host(compute)


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class EmbeddingPosition(keras.layers.Layer):
    """Scales embeddings and gives them their positions, as BwETAFv2 does.

    With `use_rope`, dimension `i` of a vector is combined with dimension
    `i + width // 2`, as in RoPE, but by an angle of its own, that of pair
    `i // 2`. So it is no rotation, and lengths change. Otherwise, sinusoids
    are added, sines at even dimensions and cosines at odd ones.

    Angles and all else are computed in the layer's dtype, float32 in a model
    of any dtype.

    Args:
        use_rope: bool.
        scale: float. What embeddings are multiplied by first.

    Call arguments:
        inputs: float tensor `(batch, length, width)`, of an even width.
        positions: int tensor `(length,)` or `(batch, length)`. Defaults to
            0, 1, 2, ...

    Returns:
        float tensor `(batch, length, width)`.

    Raises:
        ValueError: If there are no rows, or no tokens in them.
    """

    def __init__(self, *, use_rope: bool, scale: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.use_rope = use_rope
        self.scale = scale

    def build(self, input_shape):
        self.frequencies = _frequencies(input_shape[-1], self.use_rope)
        self.built = True

    def call(
        self, inputs: ArrayLike, positions: ArrayLike | None = None
    ) -> jax.Array:
        check_not_empty(inputs)
        x = jnp.asarray(inputs) * self.scale
        if positions is None:
            positions = jnp.arange(inputs.shape[1])
        positions = jnp.asarray(positions, x.dtype)
        # ([batch,] length, width // 2)
        angles = positions[..., None] * self.frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if not self.use_rope:
            sinusoids = jnp.stack([sin, cos], axis=-1)
            return x + jnp.reshape(sinusoids, (*angles.shape[:-1], -1))
        # ([batch,] length, width)
        cos, sin = (jnp.repeat(each, 2, axis=-1) for each in (cos, sin))
        first, second = jnp.split(x, 2, axis=-1)
        return x * cos + jnp.concatenate([-second, first], axis=-1) * sin

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update({"use_rope": self.use_rope, "scale": self.scale})
        return config
