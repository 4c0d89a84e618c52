from typing import Any

import jax
import keras
from jax.typing import ArrayLike
from keras import ops

from keras_bwetaf.layers.dense import dense


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class FeedForward(keras.layers.Layer):
    """Gated feed-forward network, `output(silu(gate(x)) · intermediate(x))`.

    Args:
        intermediate_dim: int. Width of the two inner projections.
        initializer_range: float. Standard deviation of the initial kernels;
            biases start at zero.
        use_inner_bias: bool. Whether the two inner projections have biases.

    Input shape:
        `(batch, length, hidden_dim)`.

    Output shape:
        The input's.

    Reference:
     - [Shazeer, 2020](https://arxiv.org/abs/2002.05202)
    """

    def __init__(
        self,
        *,
        intermediate_dim: int,
        initializer_range: float,
        use_inner_bias: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim
        self.initializer_range = initializer_range
        self.use_inner_bias = use_inner_bias

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        inner_shape = (*input_shape[:-1], self.intermediate_dim)
        inner = self.intermediate_dim, self.use_inner_bias
        self.intermediate = self._dense("intermediate", *inner)
        self.intermediate.build(input_shape)
        self.gate = self._dense("gate", *inner)
        self.gate.build(input_shape)
        self.output_dense = self._dense("output", hidden_dim, use_bias=True)
        self.output_dense.build(inner_shape)
        self.built = True

    def _dense(self, name, units, use_bias):
        return dense(
            name,
            units,
            use_bias=use_bias,
            initializer_range=self.initializer_range,
            dtype=self.dtype_policy,
        )

    def call(self, inputs: ArrayLike) -> jax.Array:
        # (batch, length, intermediate_dim)
        x = ops.silu(self.gate(inputs)) * self.intermediate(inputs)
        return self.output_dense(x)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "intermediate_dim": self.intermediate_dim,
                "initializer_range": self.initializer_range,
                "use_inner_bias": self.use_inner_bias,
            }
        )
        return config
