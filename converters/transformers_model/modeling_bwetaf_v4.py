"""BwETAFv4, a decoder-only mixture of experts, for transformers.

It differs from BwETAFv3, on whose code it builds, in these points:

- The rotary embedding turns each head by itself, and not the embedding.
- The feed-forward network is a mixture of experts. Its auxiliary losses are
  Keras's part: the loss of this model is the cross-entropy alone.
- There is a final norm.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bwetaf_v4 import BwETAFV4Config
from .modeling_bwetaf import (
    CACHE_NAME,
    BwETAFAttention,
    BwETAFDecoderLayer,
    BwETAFForCausalLM,
    BwETAFModel,
    BwETAFPreTrainedModel,
    BwETAFRMSNorm,
    BwETAFRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

# Added to the deviation of a token's logits.
ROUTER_EPSILON = 1e-3


class BwETAFV4Attention(BwETAFAttention):
    """Grouped-query attention, rotated in each head."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_NAME, None)
        query, key, value = (
            project(hidden_states)
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, length, head_dim)
        cos, sin = (each.unsqueeze(1) for each in position_embeddings)
        query = apply_rotary_pos_emb(query, cos, sin)
        key = apply_rotary_pos_emb(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            **kwargs,
        )  # (batch, length, heads, head_dim)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class BwETAFV4Projection(nn.Module):
    """A linear layer for each expert; weights are `(inputs, outputs)`."""

    def __init__(self, num_experts, num_inputs, num_outputs):
        super().__init__()
        shape = num_experts, num_inputs, num_outputs
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_outputs))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return x @ self.weight[expert] + self.bias[expert]


class BwETAFV4Experts(nn.Module):
    """The gated feed-forward networks."""

    def __init__(self, config: BwETAFV4Config):
        super().__init__()
        inner, width = config.intermediate_size, config.hidden_size
        num_experts = config.num_local_experts
        self.gate_proj = BwETAFV4Projection(num_experts, width, inner)
        self.up_proj = BwETAFV4Projection(num_experts, width, inner)
        self.down_proj = BwETAFV4Projection(num_experts, inner, width)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(x, expert))
        return self.down_proj(inner * self.up_proj(x, expert), expert)


class BwETAFV4MLP(nn.Module):
    """Mixture of experts: the likeliest ones, times their probabilities."""

    def __init__(self, config: BwETAFV4Config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.num_chosen = config.num_experts_per_tok
        self.is_exact = config.expert_dispatch == "exact"
        self.experts = BwETAFV4Experts(config)
        if self.num_experts > 1:
            self.router = nn.Linear(
                config.hidden_size, self.num_experts, bias=False
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.num_experts == 1:
            return self.experts(hidden_states, 0)
        x = hidden_states.flatten(0, -2)  # (tokens, hidden_size)
        experts, weights, is_read = self.route(x)
        outputs = torch.zeros_like(x)
        for expert in range(self.num_experts):
            tokens, choices = (experts == expert).nonzero(as_tuple=True)
            inputs = x[tokens] * is_read[tokens, choices, None]
            y = self.experts(inputs, expert)
            y = y * weights[tokens, choices, None].to(y.dtype)
            outputs = outputs.index_add(0, tokens, y)
        return outputs.view_as(hidden_states)

    def route(self, x):
        """Experts, their weights, and whether they read the token or zeros.

        Returns:
            Tuple of three tensors `(tokens, chosen)`.
        """
        logits = nn.functional.linear(x.float(), self.router.weight.float())
        logits = logits - logits.mean(-1, keepdim=True)
        deviation = logits.std(-1, correction=0, keepdim=True)
        probabilities = (logits / (deviation + ROUTER_EPSILON)).softmax(-1)
        # Among equal ones, the last.
        experts = probabilities.argsort(dim=-1, stable=True)[
            :, -self.num_chosen :
        ]
        if self.is_exact:
            is_read = torch.ones_like(experts, dtype=torch.bool)
            return experts, probabilities.gather(-1, experts), is_read
        # The first of the chosen experts works, and the last one of the layer,
        # which reads zeros in place of the others.
        experts = experts.sort(-1).values
        weights = probabilities.gather(-1, experts)
        last = self.num_experts - 1
        is_first = torch.arange(self.num_chosen, device=x.device) == 0
        is_second = torch.arange(self.num_chosen, device=x.device) == 1
        is_read = is_first | (is_second & (experts[:, -1:] == last))
        return experts.where(is_first, last), weights, is_read


class BwETAFV4DecoderLayer(BwETAFDecoderLayer):
    """Pre-norm residual block with a mixture of experts."""

    def __init__(self, config: BwETAFV4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.input_layernorm = BwETAFRMSNorm(
            config.hidden_size, config.rms_norm_eps
        )
        self.self_attn = BwETAFV4Attention(config, layer_idx)
        self.mlp = BwETAFV4MLP(config)


class BwETAFV4PreTrainedModel(BwETAFPreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = BwETAFV4Config
    _no_split_modules = ["BwETAFV4DecoderLayer"]
    _can_compile_fullgraph = False  # An expert's number of tokens is data.
    _can_record_outputs = {
        "hidden_states": BwETAFV4DecoderLayer,
        "attentions": BwETAFV4Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        std = self.config.hidden_size**-0.5 if std is None else std
        if isinstance(module, nn.Linear | nn.Embedding | BwETAFV4Projection):
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class BwETAFV4Model(BwETAFV4PreTrainedModel):
    """The model up to its last hidden states."""

    def __init__(self, config: BwETAFV4Config):
        super().__init__(config)
        # Without `padding_idx`: padding is the end token, which has learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BwETAFV4DecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = BwETAFRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = BwETAFRotaryEmbedding(
            config, config.hidden_size // config.num_attention_heads
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
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)
        cache_name = CACHE_NAME if isinstance(cache, Cache) else "cache"
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{cache_name: cache},
                **kwargs,
            )  # (batch, length, hidden_size)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache}
        )


class BwETAFV4ForCausalLM(BwETAFV4PreTrainedModel, BwETAFForCausalLM):
    """The model with its language-model head, tied to the embeddings."""

    def __init__(self, config: BwETAFV4Config):
        BwETAFV4PreTrainedModel.__init__(self, config)
        self.model = BwETAFV4Model(config)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False
        )
        self.post_init()


__all__ = ["BwETAFV4ForCausalLM", "BwETAFV4Model", "BwETAFV4PreTrainedModel"]
