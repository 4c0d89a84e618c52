"""BwETAFv4: what it is beyond a decoder in general, as parts of one."""

import types
from typing import Any

import keras

from converters.bwetaf_v4 import BWETAF_V4
from keras_bwetaf.checks import checked_int, checked_number
from keras_bwetaf.layers import (
    GroupedQueryAttention,
    MixtureOfExperts,
    RMSNormalization,
    RotaryEmbedding,
    TransformerBlock,
    initializers,
)
from keras_bwetaf.layers.mixture_of_experts import DISPATCHES
from keras_bwetaf.models.backbone import ROPE_DTYPES
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.decoder import DecoderBackbone
from keras_bwetaf.models.decoder_lm import CausalLM
from keras_bwetaf.models.registry import register
from keras_bwetaf.models.tokenizer import BwETAFTokenizer


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV4Backbone(DecoderBackbone):
    """The BwETAFv4 decoder-only transformer, up to its last hidden states.

    Token embeddings run through `num_layers` pre-norm blocks of grouped-query
    attention, with a rotary embedding in each head, and a mixture of experts;
    see `layers.MixtureOfExperts`. A norm follows the last block.
    `BwETAFV4CausalLM` puts the tied language-model head on top.

    Args:
        vocabulary_size: int. Number of token ids.
        num_layers: int. Number of transformer blocks.
        num_query_heads: int. `hidden_dim` must be a multiple.
        num_key_value_heads: int. The query heads must be a multiple.
        hidden_dim: int. Width of the hidden states.
        intermediate_dim: int. Inner width of an expert.
        num_experts: int. Experts of a block.
        num_experts_per_token: int. Those that a token uses, at most all.
        max_sequence_length: int. The context: the longest sequence that
            `BwETAFV4CausalLM.generate` works on.
        expert_dispatch: str. `"exact"`, or a rule of the original's: see
            `layers.MixtureOfExperts`.
        expert_capacity: float. Of the rule `"original_batch"` only.
        balance_loss_weight: float. Weight of the auxiliary loss by which the
            experts are used equally.
        unused_loss_weight: float. Weight of the one by which a token leaves
            no probability to experts that it does not use.
        router_noise_steps: int. The steps in which noise in the choice of
            experts fades in training; 0 is without noise.
        dropout: float. Share of attention's outputs that is dropped in
            training.
        rope_max_wavelength: float. Base of the rotary frequencies.
        rope_dtype: str or `None`. As of `BwETAFBackbone`.
        layer_norm_epsilon: float. Epsilon of every norm.
        initializer_range: float or `None`. Standard deviation of the initial
            kernels and embeddings; `None` is `1 / sqrt(hidden_dim)`.
        dtype: str or `keras.DTypePolicy`. Dtype of computation and weights.

    Call arguments, returns: As of `BwETAFBackbone`.

    Raises:
        ValueError: If an argument is out of range or arguments contradict
            each other.
        TypeError: If there is an unknown keyword.

    Example:

    ```python
    backbone = keras_bwetaf.models.BwETAFV4Backbone(
        vocabulary_size=16384,
        num_layers=8,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=768,
        intermediate_dim=1536,
        num_experts=8,
        num_experts_per_token=2,
        max_sequence_length=8192,
    )
    backbone.count_params()  # 253,545,216
    ```

    Reference:
     - [The original](https://huggingface.co/WICKED4950/BwETAFv4-preview)
    """

    architecture = BWETAF_V4

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int,
        num_experts_per_token: int,
        max_sequence_length: int,
        expert_dispatch: str = "exact",
        expert_capacity: float = 1.25,
        balance_loss_weight: float = 0.01,
        unused_loss_weight: float = 0.01,
        router_noise_steps: int = 0,
        dropout: float = 0.0,
        rope_max_wavelength: float = 10000.0,
        rope_dtype: str | None = "float32",
        layer_norm_epsilon: float = 1e-8,
        initializer_range: float | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        # Long, since it names each argument twice.
        self.check_keras_keywords(kwargs)
        arguments = self.checked_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            max_sequence_length=max_sequence_length,
            expert_dispatch=expert_dispatch,
            expert_capacity=expert_capacity,
            balance_loss_weight=balance_loss_weight,
            unused_loss_weight=unused_loss_weight,
            router_noise_steps=router_noise_steps,
            dropout=dropout,
            rope_max_wavelength=rope_max_wavelength,
            rope_dtype=rope_dtype,
            layer_norm_epsilon=layer_norm_epsilon,
            initializer_range=initializer_range,
        )
        config = types.SimpleNamespace(**arguments)
        deviation = config.initializer_range or config.hidden_dim**-0.5

        # === Layers, Functional Model, Config ===
        super().__init__(
            token_embedding=keras.layers.ReversibleEmbedding(
                config.vocabulary_size,
                config.hidden_dim,
                embeddings_initializer=initializers.normal(deviation),
                dtype=dtype,
                name="token_embedding",
            ),
            transformer_layers=[
                _transformer_block(i, config, deviation, dtype)
                for i in range(config.num_layers)
            ],
            final_norm=RMSNormalization(
                epsilon=config.layer_norm_epsilon,
                dtype=dtype,
                name="final_norm",
            ),
            config=arguments,
            dtype=dtype,
            **kwargs,
        )

    @classmethod
    def checked_config(
        cls,
        *,
        expert_dispatch: str = "exact",
        rope_dtype: str | None = "float32",
        initializer_range: float | None = None,
        router_noise_steps: int = 0,
        **arguments: Any,
    ) -> dict[str, Any]:
        """See `DecoderBackbone.checked_config`."""
        choices = {
            "expert_dispatch": (expert_dispatch, DISPATCHES),
            "rope_dtype": (rope_dtype, ROPE_DTYPES),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}. Received: "
                    f"{name}={value!r}"
                )
        if initializer_range is not None:
            arguments["initializer_range"] = initializer_range
        training = {
            name: checked_number(
                name, arguments.pop(name), lambda x: x >= 0, "0 or more"
            )
            for name in ("balance_loss_weight", "unused_loss_weight")
            if name in arguments
        }
        training["router_noise_steps"] = checked_int(
            "router_noise_steps", router_noise_steps, 0
        )
        config = {
            "expert_dispatch": expert_dispatch,
            "rope_dtype": rope_dtype,
            "initializer_range": None,
            **super().checked_config(**arguments),
            **training,
        }
        if config["num_experts_per_token"] > config["num_experts"]:
            raise ValueError(
                "`num_experts_per_token` must be at most `num_experts`. "
                f"Received: {config['num_experts_per_token']} of "
                f"{config['num_experts']}"
            )
        return config


def _transformer_block(i, config, deviation, dtype):
    def rotary(name, num_heads):
        return RotaryEmbedding(
            max_wavelength=config.rope_max_wavelength,
            rope_dtype=config.rope_dtype,
            num_heads=num_heads,
            dtype=dtype,
            name=name,
        )

    return TransformerBlock(
        GroupedQueryAttention(
            num_query_heads=config.num_query_heads,
            num_key_value_heads=config.num_key_value_heads,
            query_rotary=rotary("query_rotary", config.num_query_heads),
            key_rotary=rotary("key_rotary", config.num_key_value_heads),
            initializer_range=deviation,
            dtype=dtype,
            name="self_attention",
        ),
        MixtureOfExperts(
            num_experts=config.num_experts,
            num_experts_per_token=config.num_experts_per_token,
            intermediate_dim=config.intermediate_dim,
            initializer_range=deviation,
            dispatch=config.expert_dispatch,
            capacity=config.expert_capacity,
            loss_weights=(
                config.balance_loss_weight,
                config.unused_loss_weight,
            ),
            router_noise_steps=config.router_noise_steps,
            dtype=dtype,
            name="feedforward",
        ),
        dropout=config.dropout,
        layer_norm_epsilon=config.layer_norm_epsilon,
        dtype=dtype,
        name=f"transformer_layer_{i}",
    )


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV4Tokenizer(BwETAFTokenizer):
    """As `BwETAFTokenizer`, for a `BwETAFV4CausalLM`."""

    backbone_cls = BwETAFV4Backbone


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV4CausalLMPreprocessor(BwETAFCausalLMPreprocessor):
    """As `BwETAFCausalLMPreprocessor`, for a `BwETAFV4CausalLM`."""

    backbone_cls = BwETAFV4Backbone
    tokenizer_cls = BwETAFV4Tokenizer


@register
@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFV4CausalLM(CausalLM):
    """The BwETAFv4 language model: a backbone and its tied head.

    It is used as a `BwETAFCausalLM`, and has the same methods. In training,
    the auxiliary losses of its experts are added to the loss.

    Args:
        backbone: `BwETAFV4Backbone`.
        preprocessor: `BwETAFV4CausalLMPreprocessor` or `None`. Without one,
            inputs are token ids.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("v4-preview")
    lm.generate("The night sky", max_new_tokens=64)
    ```
    """

    backbone_cls = BwETAFV4Backbone
    preprocessor_cls = BwETAFV4CausalLMPreprocessor
