from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.typing import ArrayLike

from keras_bwetaf.layers.rounding import round_to


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class RMSNormalization(keras.layers.RMSNormalization):
    """Root mean square normalization, `x / sqrt(mean(x²) + ε) · scale`.

    With `precision=None` this is Keras's own layer, which works in float32
    inside. The first norm of a BwETAF model reads the embedding, which the
    original keeps in bfloat16 whatever the model's dtype, and so computes
    everything before the scale in bfloat16: `precision="bfloat16"` rounds
    each of these intermediate results in the same way.

    Args:
        epsilon: float. Added to the mean square.
        precision: str or `None`. Float dtype to which intermediate results
            are rounded.

    Input shape:
        `(..., dim)`.

    Output shape:
        The input's.

    Reference:
     - [Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)
    """

    def __init__(
        self, *, epsilon: float, precision: str | None = None, **kwargs: Any
    ):
        super().__init__(epsilon=epsilon, **kwargs)
        self.precision = precision

    def call(self, inputs: ArrayLike) -> jax.Array:
        if self.precision is None:
            return super().call(inputs).astype(self.compute_dtype)

        def rounded(x):
            return round_to(x, self.precision)

        x = rounded(jnp.asarray(inputs, "float32"))
        # (..., 1)
        mean_square = rounded(jnp.mean(rounded(x * x), axis=-1, keepdims=True))
        rms = rounded(jnp.sqrt(rounded(mean_square + self.epsilon)))
        x = rounded(x / rms) * jnp.asarray(self.scale, "float32")
        return x.astype(self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # Keras turns `axis` into a list when it builds; here it is fixed.
        del config["axis"]
        config["precision"] = self.precision
        return config
