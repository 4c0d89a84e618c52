from typing import Any

import jax
import keras
from jax.typing import ArrayLike
from keras import ops

from keras_bwetaf.layers.dense import product


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """Keras's layer of token embeddings, which are the head's weights, too.

    Args:
        **kwargs: See `keras.layers.ReversibleEmbedding`.

    Call arguments:
        inputs: int tensor of token ids, `(batch, length)`; with `reverse`, a
            float tensor of hidden states, `(batch, length, output_dim)`.
        reverse: bool.

    Returns:
        float tensor of embeddings, `(batch, length, output_dim)`; with
        `reverse`, of logits, `(batch, length, input_dim)`.
    """

    def call(self, inputs: ArrayLike, reverse: bool = False) -> jax.Array:
        if not reverse:
            return super().call(inputs)
        return product(inputs, ops.convert_to_tensor(self.embeddings))

    def quantize(
        self, mode: Any = None, type_check: bool = True, config: Any = None
    ) -> None:
        # Keras refuses subclasses, whose computation may be another one.
        super().quantize(mode, type_check=False, config=config)
