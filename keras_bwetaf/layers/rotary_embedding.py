import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.typing import ArrayLike

from keras_bwetaf.layers.rounding import round_to


@functools.cache  # Of all layers: each call would compile anew.
def inverse_frequencies(width: int, max_wavelength: float) -> np.ndarray:
    """Frequencies at which the pairs of a vector turn, per position.

    Pair `i` turns at `max_wavelength ** (-i / (width // 2))`. The host
    computes them in one compiled function, as the original does: compiled,
    XLA multiplies by the reciprocal instead of dividing, and its float32
    power is not always correctly rounded. A difference in the last place,
    multiplied by a position of a thousand, would be seen in the logits.

    Args:
        width: int. Of the vectors to rotate.
        max_wavelength: float. The base of the frequencies.

    Returns:
        float32 numpy array `(width // 2,)`.
    """
    num_pairs = width // 2

    def compute():
        exponents = -jnp.arange(num_pairs, dtype="float32") / num_pairs
        return max_wavelength**exponents

    return on_host(compute)


def on_host(compute: Callable[[], jax.Array]) -> np.ndarray:
    """What a function gives that the host compiles and computes."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators only.
        host = None
    with jax.default_device(host):
        return np.asarray(jax.jit(compute)())


def check_not_empty(inputs: ArrayLike) -> None:
    """Refuses inputs without rows, or without tokens in them."""
    if 0 in inputs.shape:
        raise ValueError(
            "Expected at least one row, of at least one token. Received: "
            f"inputs of shape {inputs.shape}"
        )


def rotary_angles(
    positions: ArrayLike, frequencies: ArrayLike, dtype: str
) -> jax.Array:
    """Angles by which the pairs of a vector turn at each position.

    Positions, frequencies and their products are each rounded to `dtype`, as
    in the original, which computes them in the dtype of the activations: in
    bfloat16, a position above 256 becomes a multiple of 2. The device only
    multiplies and rounds, so every device gets the same angles.

    Args:
        positions: int array `(...)`.
        frequencies: float32 array `(num_pairs,)`.
        dtype: str. Float dtype to which the angles are rounded.

    Returns:
        float32 array `(..., num_pairs)`.
    """
    frequencies = round_to(jnp.asarray(frequencies), dtype)
    positions = round_to(jnp.asarray(positions, "float32"), dtype)
    return round_to(positions[..., None] * frequencies, dtype)


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class RotaryEmbedding(keras.layers.Layer):
    """Rotary position embedding (RoPE) over the whole width of a vector.

    Dimension `i` turns with dimension `i + width // 2`. Applied before
    queries and keys are split into heads, a pair therefore spans two heads,
    which is what BwETAFv3 does and most models do not. If the width is odd,
    the last dimension stays as it is.

    ```
    width 6, split in 3 heads:   | 0 1 | 2 3 | 4 5 |
    pairs:                         └─────┘ (0, 3), (1, 4), (2, 5)
    ```

    With `num_heads`, each of as many equal parts of the vector is turned by
    itself, as if it were the whole.

    Args:
        max_wavelength: float. The base of the frequencies.
        rope_dtype: str or `None`. Dtype in which the angles are computed;
            `None` is the layer's compute dtype. The rotation itself always
            runs in float32.
        num_heads: int or `None`. The number of heads that the vector consists
            of, each turned by itself. `None` turns the vector as a whole.

    Call arguments:
        inputs: float tensor `(batch, length, width)`.
        positions: int tensor `(length,)` or `(batch, length)`. Defaults to
            0, 1, 2, ...
        num_shards: int. Inputs are in the order of
            `sharding.halves_to_shards` with this number of shards. Heads that
            are turned by themselves may be in any order.

    Output shape:
        The input's.

    Raises:
        ValueError: If there are no rows, or no tokens in them.

    Reference:
     - [Su et al., 2021](https://arxiv.org/abs/2104.09864)
    """

    def __init__(
        self,
        *,
        max_wavelength: float,
        rope_dtype: str | None,
        num_heads: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.max_wavelength = max_wavelength
        self.rope_dtype = rope_dtype
        self.num_heads = num_heads

    def build(self, input_shape):
        self.frequencies = inverse_frequencies(
            input_shape[-1] // (self.num_heads or 1), self.max_wavelength
        )
        self.built = True

    def call(
        self,
        inputs: ArrayLike,
        positions: ArrayLike | None = None,
        num_shards: int = 1,
    ) -> jax.Array:
        check_not_empty(inputs)
        if positions is None:
            positions = jnp.arange(inputs.shape[1])
        angles = rotary_angles(
            positions, self.frequencies, self.rope_dtype or self.compute_dtype
        )  # ([batch,] length, width // 2)
        # Heads have the same angles, shards their own.
        num_parts, num_angles = num_shards, num_shards
        if self.num_heads is not None:
            num_parts, num_angles = self.num_heads, 1
        # ([batch,] length, num_angles, pairs of a part)
        angles = jnp.reshape(angles, (*angles.shape[:-1], num_angles, -1))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        # (batch, length, num_parts, width // num_parts)
        parts = jnp.asarray(inputs, "float32")
        parts = jnp.reshape(parts, (*inputs.shape[:-1], num_parts, -1))
        half = angles.shape[-1]
        # `rest` is the last dimension of an odd width, or empty.
        first, second, rest = jnp.split(parts, [half, 2 * half], axis=-1)
        rotated = jnp.concatenate(
            [first * cos - second * sin, second * cos + first * sin, rest],
            axis=-1,
        )  # (batch, length, num_parts, width // num_parts)
        return jnp.reshape(rotated, inputs.shape).astype(inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "max_wavelength": self.max_wavelength,
                "rope_dtype": self.rope_dtype,
                "num_heads": self.num_heads,
            }
        )
        return config
