"""BwETAFv2: what it is beyond a decoder in general, as parts of one."""

import types
from collections.abc import Sequence
from typing import Any

import keras
import tokenizers

from converters.bwetaf_v2 import BWETAF_V2
from converters.gpt2 import END, gpt2_tokenizer
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.layers import (
    EmbeddingPosition,
    FeedForward,
    GroupedQueryAttention,
    TransformerBlock,
    initializers,
)
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.decoder import DecoderBackbone, per_layer
from keras_bwetaf.models.decoder_lm import CausalLM
from keras_bwetaf.models.registry import register
from keras_bwetaf.models.tokenizer import BwETAFTokenizer

# The stream of hidden states, and logits, whatever the model's dtype.
STREAM = "float32"


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV2Backbone(DecoderBackbone):
    """The BwETAFv2 decoder-only transformer, up to its last hidden states.

    Token embeddings get their positions once, and run through `num_layers`
    pre-norm blocks of multi-head attention, which knows no positions, and a
    gated feed-forward network. There is no final norm. What blocks add to, the
    hidden states, is float32 at any dtype of the model, and so are logits.
    `BwETAFV2CausalLM` puts the tied language-model head on top.

    `padding_mask` may number documents, which then do not see each other. The
    original knows no documents: with 1 for all tokens, they do.

    Args:
        vocabulary_size: int. Number of token ids.
        num_layers: int. Number of transformer blocks.
        num_query_heads: int, or a list with one int per layer: attention's
            heads. `hidden_dim` must be a multiple of each.
        hidden_dim: int. Width of the hidden states, an even number.
        intermediate_dim: int. Inner width of the feed-forward network.
        max_sequence_length: int. The context: the longest sequence that
            `BwETAFV2CausalLM.generate` works on.
        dropout: float. Share of attention's outputs that is dropped in
            training.
        use_rope: bool. Whether positions combine the dimensions of
            embeddings; otherwise, sinusoids are added. See
            `layers.EmbeddingPosition`.
        embedding_scale: float. What embeddings are multiplied by.
        residual_scale: float. What hidden states are multiplied by before
            each sum of a block.
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
        float32 tensor `(batch, length, hidden_dim)`. What it holds where
        `padding_mask` is 0 has no meaning.

    Raises:
        ValueError: If an argument is out of range or arguments contradict
            each other.
        TypeError: If there is an unknown keyword.

    Example:

    ```python
    backbone = keras_bwetaf.models.BwETAFV2Backbone(
        vocabulary_size=50260,
        num_layers=8,
        num_query_heads=8,
        hidden_dim=512,
        intermediate_dim=1536,
        max_sequence_length=2048,
    )
    backbone.count_params()  # 53,012,480
    ```

    Reference:
     - [The original model](https://huggingface.co/WICKED4950/BwETAFv2-53M)
    """

    architecture = BWETAF_V2

    use_rope: bool
    embedding_scale: float
    residual_scale: float
    layer_norm_epsilon: float
    initializer_range: float
    embedding_initializer_range: float | None

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int | Sequence[int],
        hidden_dim: int,
        intermediate_dim: int,
        max_sequence_length: int,
        dropout: float = 0.0,
        use_rope: bool = True,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        layer_norm_epsilon: float = 1e-8,
        initializer_range: float = 0.02,
        embedding_initializer_range: float | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        # Long, since it names each argument twice.
        self.check_keras_keywords(kwargs)
        arguments = self.checked_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            max_sequence_length=max_sequence_length,
            dropout=dropout,
            use_rope=use_rope,
            embedding_scale=embedding_scale,
            residual_scale=residual_scale,
            layer_norm_epsilon=layer_norm_epsilon,
            initializer_range=initializer_range,
            embedding_initializer_range=embedding_initializer_range,
        )
        config = types.SimpleNamespace(**arguments)

        # === Layers ===
        token_embedding = keras.layers.ReversibleEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            embeddings_initializer=initializers.normal(
                config.embedding_initializer_range or config.hidden_dim**-0.5
            ),
            # The head takes hidden states as they are.
            reverse_dtype=STREAM,
            autocast=False,
            dtype=dtype,
            name="token_embedding",
        )
        embedding_position = EmbeddingPosition(
            use_rope=config.use_rope,
            scale=config.embedding_scale,
            dtype=STREAM,
            name="embedding_position",
        )
        transformer_layers = [
            _transformer_block(i, config, dtype)
            for i in range(config.num_layers)
        ]

        # === Functional Model, Config ===
        super().__init__(
            token_embedding=token_embedding,
            embedding_rotary=embedding_position,
            transformer_layers=transformer_layers,
            config=arguments,
            dtype=dtype,
            **kwargs,
        )

    @classmethod
    def checked_config(
        cls,
        *,
        use_rope: bool = True,
        embedding_initializer_range: float | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """See `DecoderBackbone.checked_config`."""
        if not isinstance(use_rope, bool):
            raise ValueError(
                f"`use_rope` must be True or False. Received: {use_rope!r}"
            )
        if embedding_initializer_range is not None:
            arguments["embedding_initializer_range"] = (
                embedding_initializer_range
            )
        config = super().checked_config(**arguments)
        if config["hidden_dim"] % 2:
            raise ValueError(
                "`hidden_dim` must be even, since positions pair dimensions. "
                f"Received: hidden_dim={config['hidden_dim']}"
            )
        return {
            "use_rope": use_rope,
            "embedding_initializer_range": None,
            **config,
        }


def _transformer_block(i, config, dtype):
    heads = per_layer(config.num_query_heads, config.num_layers)[i]
    return TransformerBlock(
        GroupedQueryAttention(
            num_query_heads=heads,
            num_key_value_heads=heads,
            initializer_range=config.initializer_range,
            dtype=dtype,
            name="self_attention",
        ),
        FeedForward(
            intermediate_dim=config.intermediate_dim,
            initializer_range=config.initializer_range,
            use_inner_bias=False,
            dtype=dtype,
            name="feedforward",
        ),
        dropout=config.dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        residual_scale=config.residual_scale,
        dtype=STREAM,
        name=f"transformer_layer_{i}",
    )


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV2Tokenizer(BwETAFTokenizer):
    """GPT-2's tokenizer, or another one that a BwETAFv2 model was given.

    As `BwETAFTokenizer`, with other special tokens. A text is tokenized as it
    is: nothing is stripped or decomposed.

    Args:
        tokenizer: As of `BwETAFTokenizer`, or `"gpt2"`: GPT-2's, which comes
            with the package.
        end_token: str. Defaults to `"<|endoftext|>"`.
        unk_token: str. Defaults to `"<|endoftext|>"`, as GPT-2 has no other
            special token, and needs none.
        dtype: str. The integer type of token ids. Defaults to `"int32"`.
        **kwargs: Keywords of `keras_hub.models.Tokenizer`.

    Example:

    ```python
    tokenizer = keras_bwetaf.BwETAFV2Tokenizer("gpt2")
    tokenizer("Hello world")  # 15496, 995
    ```
    """

    backbone_cls = BwETAFV2Backbone

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | PathLike | bytes | None = None,
        end_token: str = END,
        unk_token: str = END,
        dtype: str = "int32",
        **kwargs: Any,
    ):
        if isinstance(tokenizer, str) and tokenizer == "gpt2":
            tokenizer = gpt2_tokenizer().content
        super().__init__(tokenizer, end_token, unk_token, dtype, **kwargs)


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV2CausalLMPreprocessor(BwETAFCausalLMPreprocessor):
    """As `BwETAFCausalLMPreprocessor`, for a `BwETAFV2CausalLM`."""

    backbone_cls = BwETAFV2Backbone
    tokenizer_cls = BwETAFV2Tokenizer


@register
@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV2CausalLM(CausalLM):
    """The BwETAFv2 language model: a backbone and its tied head.

    It is used as a `BwETAFCausalLM`, and has the same methods. Logits are
    float32 at any dtype of the model. Ids that the tokenizer does not have are
    never generated.

    Args:
        backbone: `BwETAFV2Backbone`.
        preprocessor: `BwETAFV2CausalLMPreprocessor` or `None`. Without one,
            inputs are token ids.

    Call arguments:
        token_ids: int tensor `(batch, length)`.
        padding_mask: int tensor `(batch, length)`. See `BwETAFV2Backbone`.

    Returns:
        float32 tensor `(batch, length, vocabulary_size)`.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("v2-53m")
    lm.generate("The night sky", max_new_tokens=64)
    ```
    """

    backbone_cls = BwETAFV2Backbone
    preprocessor_cls = BwETAFV2CausalLMPreprocessor
