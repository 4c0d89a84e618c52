"""BwETAFv3: what it is beyond a decoder in general, as parts of one."""

import types
from collections.abc import Sequence
from typing import Any

import keras

from converters.bwetaf_v3 import BWETAF_V3
from keras_bwetaf.layers import (
    FeedForward,
    GroupedQueryAttention,
    RotaryEmbedding,
    TransformerBlock,
    initializers,
)
from keras_bwetaf.models.decoder import DecoderBackbone, per_layer

ROPE_DTYPES = (None, "float32", "bfloat16", "float16")


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFBackbone(DecoderBackbone):
    """The BwETAFv3 decoder-only transformer, up to its last hidden states.

    Token embeddings, rotated by position over their whole width, run through
    `num_layers` pre-norm blocks of grouped-query attention (with a rotary
    embedding that spans heads) and a gated feed-forward network. There is no
    final norm. `BwETAFCausalLM` puts the tied language-model head on top.

    A row may hold several documents, one after the other: `padding_mask`
    numbers them, and a token sees earlier tokens of its own document only.
    Positions count from the start of the row.

    Args:
        vocabulary_size: int. Number of token ids.
        num_layers: int. Number of transformer blocks.
        num_query_heads: int, or a list with one int per layer. `hidden_dim`
            must be a multiple of each.
        num_key_value_heads: int, or a list with one int per layer. The query
            heads of its layer must be a multiple of each.
        hidden_dim: int. Width of the hidden states.
        intermediate_dim: int. Inner width of the feed-forward network.
        max_sequence_length: int. The context: the longest sequence that
            `BwETAFCausalLM.generate` works on.
        dropout: float. Share of attention's outputs that is dropped in
            training.
        rope_max_wavelength: float. Base of the rotary frequencies.
        rope_dtype: str or `None`. Dtype of the rotary angles. `"float32"` is
            exact at any compute dtype; `None` rounds them to the compute
            dtype, as the original does, and is what an imported model has.
        layer_norm_epsilon: float. Epsilon of every norm.
        initializer_range: float. Standard deviation of the initial kernels.
        embedding_initializer_range: float or `None`. Standard deviation of
            the initial embeddings; `None` is `1 / sqrt(hidden_dim)`.
        dtype: str or `keras.DTypePolicy`. Dtype of computation and weights.

    Call arguments:
        token_ids: int tensor `(batch, length)`.
        padding_mask: int tensor `(batch, length)`. 0 for padding, otherwise
            the number of the token's document.

    Returns:
        float tensor `(batch, length, hidden_dim)`. What it holds where
        `padding_mask` is 0 has no meaning.

    Raises:
        ValueError: If an argument is out of range or arguments contradict
            each other.
        TypeError: If there is an unknown keyword.

    Example:

    ```python
    backbone = keras_bwetaf.models.BwETAFBackbone(
        vocabulary_size=16384,
        num_layers=12,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=768,
        intermediate_dim=2304,
        max_sequence_length=2048,
    )
    backbone.count_params()  # 97,609,728
    ```

    Reference:
     - [The original model](https://huggingface.co/WICKED4950/BwETAFv3-97M)
    """

    architecture = BWETAF_V3

    rope_max_wavelength: float
    rope_dtype: str | None
    layer_norm_epsilon: float
    initializer_range: float
    embedding_initializer_range: float | None

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int | Sequence[int],
        num_key_value_heads: int | Sequence[int],
        hidden_dim: int,
        intermediate_dim: int,
        max_sequence_length: int,
        dropout: float = 0.0,
        rope_max_wavelength: float = 10000.0,
        rope_dtype: str | None = "float32",
        layer_norm_epsilon: float = 1e-8,
        initializer_range: float = 0.002,
        embedding_initializer_range: float | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        self.check_keras_keywords(kwargs)
        arguments = self.checked_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            max_sequence_length=max_sequence_length,
            dropout=dropout,
            rope_max_wavelength=rope_max_wavelength,
            rope_dtype=rope_dtype,
            layer_norm_epsilon=layer_norm_epsilon,
            initializer_range=initializer_range,
            embedding_initializer_range=embedding_initializer_range,
        )
        config = types.SimpleNamespace(**arguments)

        # === Layers ===
        token_embedding = _token_embedding(config, dtype)
        embedding_rotary = _rotary("embedding_rotary", config, dtype)
        transformer_layers = [
            _transformer_block(i, config, dtype)
            for i in range(config.num_layers)
        ]

        # === Functional Model, Config ===
        super().__init__(
            token_embedding=token_embedding,
            embedding_rotary=embedding_rotary,
            transformer_layers=transformer_layers,
            config=arguments,
            dtype=dtype,
            **kwargs,
        )

    @classmethod
    def checked_config(
        cls,
        *,
        rope_dtype: str | None = "float32",
        embedding_initializer_range: float | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """See `DecoderBackbone.checked_config`."""
        if rope_dtype not in ROPE_DTYPES:
            raise ValueError(
                f"`rope_dtype` must be one of {ROPE_DTYPES}. Received: "
                f"rope_dtype={rope_dtype!r}"
            )
        if embedding_initializer_range is not None:
            arguments["embedding_initializer_range"] = (
                embedding_initializer_range
            )
        return {
            "rope_dtype": rope_dtype,
            "embedding_initializer_range": None,
            **super().checked_config(**arguments),
        }


# === Parts ===


def _token_embedding(config, dtype):
    stddev = config.embedding_initializer_range or config.hidden_dim**-0.5
    return keras.layers.ReversibleEmbedding(
        config.vocabulary_size,
        config.hidden_dim,
        embeddings_initializer=initializers.normal(stddev),
        dtype=dtype,
        name="token_embedding",
    )


def _rotary(name, config, dtype):
    """RoPE over the whole of a vector: embeddings, queries or keys."""
    return RotaryEmbedding(
        max_wavelength=config.rope_max_wavelength,
        rope_dtype=config.rope_dtype,
        dtype=dtype,
        name=name,
    )


def _transformer_block(i, config, dtype):
    return TransformerBlock(
        _attention(i, config, dtype),
        FeedForward(
            intermediate_dim=config.intermediate_dim,
            initializer_range=config.initializer_range,
            dtype=dtype,
            name="feedforward",
        ),
        dropout=config.dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        # The original keeps the embedding in bfloat16, always.
        input_precision="bfloat16" if i == 0 else None,
        dtype=dtype,
        name=f"transformer_layer_{i}",
    )


def _attention(i, config, dtype):
    query_heads = per_layer(config.num_query_heads, config.num_layers)
    key_value_heads = per_layer(config.num_key_value_heads, config.num_layers)
    return GroupedQueryAttention(
        num_query_heads=query_heads[i],
        num_key_value_heads=key_value_heads[i],
        query_rotary=_rotary("query_rotary", config, dtype),
        key_rotary=_rotary("key_rotary", config, dtype),
        initializer_range=config.initializer_range,
        dtype=dtype,
        name="self_attention",
    )
