"""BwETAFv2, a decoder-only language model, for transformers.

It differs from BwETAFv3, on whose code it builds, in these points:

- Positions are given to the embedding only, and attention knows none.
- Hidden states and logits are float32 in a model of any dtype, and hidden
  states may be scaled before each sum.
- Each head has keys and values of its own. The feed-forward network's inner
  projections have no biases.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bwetaf_v2 import BwETAFV2Config
from .modeling_bwetaf import (
    CACHE_NAME,
    BwETAFAttention,
    BwETAFDecoderLayer,
    BwETAFForCausalLM,
    BwETAFMLP,
    BwETAFModel,
    BwETAFPreTrainedModel,
    BwETAFRMSNorm,
)


class BwETAFV2EmbeddingPosition(nn.Module):
    """Scales embeddings and gives them their positions, in float32.

    Dimension `i` is combined with `i + width // 2` by the angle of pair
    `i // 2`: no rotation. Without `use_rope`, sinusoids are added.
    """

    def __init__(self, config: BwETAFV2Config):
        super().__init__()
        self.width = config.hidden_size
        self.use_rope = config.use_rope
        self.scale = config.embedding_scale
        # Integers, for `model.to(dtype)` rounds every buffer of floats.
        self.register_buffer(
            "frequencies", self.compute_frequencies(), persistent=False
        )

    def compute_frequencies(self) -> torch.Tensor:
        """Frequencies of the pairs, rounded as in float32, times 2**62."""
        indices = torch.arange(self.width // 2, dtype=torch.float32)
        if self.use_rope:
            exponents = 2 * indices / self.width
            frequencies = 1.0 / (10000.0 ** exponents.double()).float()
        else:
            step = torch.tensor(10000.0).log() / self.width
            frequencies = (-2 * indices * step).double().exp().float()
        return (frequencies.double() * 2.0**62).long()

    def forward(self, embeddings, position_ids):
        x = embeddings.float() * self.scale
        frequencies = self.frequencies.float() * 2.0**-62
        # (batch, length, width // 2)
        angles = position_ids[..., None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        if not self.use_rope:
            return x + torch.stack([sin, cos], dim=-1).flatten(-2)
        cos, sin = (each.repeat_interleave(2, dim=-1) for each in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class BwETAFV2RMSNorm(BwETAFRMSNorm):
    """Root mean square norm of float32, in the dtype of its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.float()).to(self.weight.dtype)


class BwETAFV2Attention(BwETAFAttention):
    """Multi-head attention without positions."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # No turn: the cosine of no pair of dimensions.
        nothing = hidden_states.new_empty(0)
        position_embeddings = {hidden_states.shape[-1]: (nothing, nothing)}
        return super().forward(
            hidden_states, position_embeddings, attention_mask, **kwargs
        )


class BwETAFV2MLP(BwETAFMLP):
    """Gated feed-forward network without inner biases."""

    def __init__(self, config: BwETAFV2Config):
        super().__init__(config)
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=False)
        self.up_proj = nn.Linear(*sizes, bias=False)


class BwETAFV2DecoderLayer(BwETAFDecoderLayer):
    """Pre-norm residual block, whose sums are float32."""

    def __init__(self, config: BwETAFV2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.residual_scale = config.residual_scale
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = BwETAFV2RMSNorm(*norm)
        self.self_attn = BwETAFV2Attention(config, layer_idx)
        self.post_attention_layernorm = BwETAFV2RMSNorm(*norm)
        self.mlp = BwETAFV2MLP(config)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        x, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states * self.residual_scale + self.dropout(x)
        x = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states * self.residual_scale + x


class BwETAFV2PreTrainedModel(BwETAFPreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = BwETAFV2Config
    _no_split_modules = ["BwETAFV2DecoderLayer"]
    _can_record_outputs = {
        "hidden_states": BwETAFV2DecoderLayer,
        "attentions": BwETAFV2Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BwETAFV2EmbeddingPosition):
            init.copy_(module.frequencies, module.compute_frequencies())


class BwETAFV2Model(BwETAFV2PreTrainedModel):
    """The model up to its last hidden states."""

    def __init__(self, config: BwETAFV2Config):
        super().__init__(config)
        # Without `padding_idx`: padding is the end token, which has learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_position = BwETAFV2EmbeddingPosition(config)
        self.layers = nn.ModuleList(
            BwETAFV2DecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    find_cache = BwETAFModel.find_cache
    check_keywords = BwETAFModel.check_keywords

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        self.check_keywords(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Specify exactly one of `input_ids` and `inputs_embeds`."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = self.find_cache(cache, past_key_values, use_cache)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = past + torch.arange(
                inputs_embeds.shape[1], device=inputs_embeds.device
            ).unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            # The cache of continuous batching is of another kind, and comes
            # with a mask.
            **{CACHE_NAME: cache if isinstance(cache, Cache) else None},
        )
        hidden_states = self.embedding_position(inputs_embeds, position_ids)
        cache_name = CACHE_NAME if isinstance(cache, Cache) else "cache"
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{cache_name: cache},
                **kwargs,
            )  # (batch, length, hidden_size)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, **{CACHE_NAME: cache}
        )


class BwETAFV2Head(nn.Linear):
    """The tied head, in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states.float(), self.weight.float())


class BwETAFV2ForCausalLM(BwETAFV2PreTrainedModel, BwETAFForCausalLM):
    """The model with its language-model head, tied to the embeddings."""

    def __init__(self, config: BwETAFV2Config):
        BwETAFV2PreTrainedModel.__init__(self, config)
        self.model = BwETAFV2Model(config)
        self.lm_head = BwETAFV2Head(
            config.hidden_size, config.vocab_size, bias=False
        )
        self.post_init()


__all__ = ["BwETAFV2ForCausalLM", "BwETAFV2Model", "BwETAFV2PreTrainedModel"]
