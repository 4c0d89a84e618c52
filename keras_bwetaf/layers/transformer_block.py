from collections.abc import Mapping
from typing import Any, Self

import jax
import keras
from jax.typing import ArrayLike

from keras_bwetaf.layers.parts import serialized_parts, with_parts
from keras_bwetaf.layers.rms_normalization import RMSNormalization
from keras_bwetaf.layers.rounding import round_to

PARTS = ("attention", "feedforward")
# What a training step computes a second time, instead of keeping it for the
# gradient: everything but products with weights; everything.
REMAT_POLICIES = {
    "block": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT = ("none", "attention", *REMAT_POLICIES)


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class TransformerBlock(keras.layers.Layer):
    """Pre-norm residual block around an attention and a feed-forward layer.

    `x = x + dropout(attention(norm(x)))`, then `x = x + feedforward(norm(x))`.
    The sums are of the block's dtype, which may be wider than that of the
    layers in it.

    The attribute `remat` says what a training step computes a second time,
    instead of keeping it for the gradient: `"none"`; `"attention"`, the weight
    of each pair of tokens in attention; `"block"`, everything but products
    with weights; `"full"`, everything, from the block's input.

    Args:
        attention: layer. Called as `GroupedQueryAttention` is.
        feedforward: layer. Maps `(batch, length, hidden_dim)` to itself.
        dropout: float. Share of the attention's outputs that is dropped in
            training.
        layer_norm_epsilon: float. Epsilon of both norms.
        input_precision: str or `None`. Dtype to which the block's input, and
            the norm that reads it, are rounded.
        residual_scale: float. What `x` is multiplied by in both sums.

    Call arguments:
        hidden_states: float tensor `(batch, length, hidden_dim)`.
        **attention_arguments: Passed on to `attention`.

    Returns:
        float tensor `(batch, length, hidden_dim)`; with a cache, a tuple of
        it and the updated cache.
    """

    def __init__(
        self,
        attention: keras.layers.Layer,
        feedforward: keras.layers.Layer,
        *,
        dropout: float,
        layer_norm_epsilon: float,
        input_precision: str | None = None,
        residual_scale: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.attention = attention
        self.feedforward = feedforward
        self.dropout = dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.input_precision = input_precision
        self.residual_scale = residual_scale
        # A wider block leaves the cache, which is the attention's, as it is.
        self.autocast = self.compute_dtype == attention.compute_dtype
        self.remat = "none"

    @property
    def remat(self) -> str:
        return self._remat

    @remat.setter
    def remat(self, value: str) -> None:
        if value not in REMAT:
            raise ValueError(
                f"`remat` must be one of {REMAT}. Received: remat={value!r}"
            )
        self.attention.keep_weights = value != "attention"
        self._remat = value

    def build(self, input_shape):
        dtype = self.attention.dtype_policy
        self.attention_norm = RMSNormalization(
            epsilon=self.layer_norm_epsilon,
            precision=self.input_precision,
            autocast=self.autocast,
            dtype=dtype,
            name="attention_norm",
        )
        self.attention_norm.build(input_shape)
        self.attention.build(input_shape)
        self.attention_dropout = keras.layers.Dropout(
            self.dropout, dtype=dtype, name="attention_dropout"
        )
        self.feedforward_norm = RMSNormalization(
            epsilon=self.layer_norm_epsilon,
            autocast=self.autocast,
            dtype=dtype,
            name="feedforward_norm",
        )
        self.feedforward_norm.build(input_shape)
        self.feedforward.build(input_shape)
        self.built = True

    def call(
        self,
        hidden_states: ArrayLike,
        padding_mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        cache: Any = None,
        cache_index: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        training: bool | None = None,
    ) -> Any:
        if training and cache is None and self.remat in REMAT_POLICIES:
            return self._rematerialized(hidden_states, padding_mask, positions)
        return self._forward(
            hidden_states,
            training,
            padding_mask=padding_mask,
            positions=positions,
            cache=cache,
            cache_index=cache_index,
            attention_mask=attention_mask,
        )

    def _rematerialized(self, hidden_states, padding_mask, positions):
        """`call` in training, with what `remat` says computed again.

        Weights are arguments of the function that JAX differentiates, and
        changed counters and losses its results: a variable that is assigned
        inside of it would leak a tracer.
        """
        # State that a step changes, such as dropout's seeds, holds ints.
        counters = [
            variable
            for variable in self.non_trainable_variables
            if not keras.backend.is_float_dtype(variable.dtype)
        ]

        def forward(values, hidden_states):
            mapping = zip(self.variables, values, strict=True)
            with keras.StatelessScope(
                state_mapping=list(mapping), collect_losses=True
            ) as scope:
                outputs = self._forward(
                    hidden_states,
                    training=True,
                    padding_mask=padding_mask,
                    positions=positions,
                )
            counts = [scope.get_current_value(v) for v in counters]
            return outputs, counts, scope.losses

        forward = jax.checkpoint(forward, policy=REMAT_POLICIES[self.remat])
        outputs, counts, losses = forward(
            [variable.value for variable in self.variables], hidden_states
        )
        for variable, count in zip(counters, counts, strict=True):
            variable.assign(count)
        self.add_loss(losses)
        return outputs

    def _forward(
        self,
        hidden_states,
        training,
        *,
        padding_mask=None,
        positions=None,
        cache=None,
        cache_index=None,
        attention_mask=None,
    ):
        if self.input_precision is not None:
            hidden_states = round_to(hidden_states, self.input_precision)

        x = self.attention(
            self.attention_norm(hidden_states),
            padding_mask=padding_mask,
            positions=positions,
            cache=cache,
            cache_index=cache_index,
            attention_mask=attention_mask,
        )
        if cache is not None:
            x, cache = x
        x = self.attention_dropout(x, training=training)
        hidden_states = self._scaled(hidden_states) + x

        x = self.feedforward(self.feedforward_norm(hidden_states))
        hidden_states = self._scaled(hidden_states) + x
        return hidden_states if cache is None else (hidden_states, cache)

    def _scaled(self, hidden_states):
        if self.residual_scale == 1:
            return hidden_states
        return hidden_states * self.residual_scale

    def compute_output_shape(self, hidden_states_shape):
        return hidden_states_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                **serialized_parts(self, PARTS),
                "dropout": self.dropout,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "input_precision": self.input_precision,
                "residual_scale": self.residual_scale,
            }
        )
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**with_parts(config, PARTS))
