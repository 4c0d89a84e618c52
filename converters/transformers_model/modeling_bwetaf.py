"""BwETAFv3, a decoder-only language model, for transformers.

It differs from Llama in these points:

- The rotary embedding turns the embedding, and then in every layer the whole
  query and the whole key vector, before they are split into heads.
- The rotated embedding, and the norm that reads it, are rounded to bfloat16
  in a model of any dtype.
- Layers may differ in their numbers of heads.
- The output projection of attention and the feed-forward network have
  biases. There is no final norm.
"""

import inspect

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.input_outputs import (
    PagedAttentionArgs,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bwetaf import BwETAFConfig

# The cache is called `cache` from transformers 5.24 on.
CACHE_NAME = (
    "cache"
    if "cache" in BaseModelOutputWithPast.__dataclass_fields__
    else "past_key_values"
)
# Keywords for the loss, for attention and for continuous batching; and what
# `generate` has used for stop strings and hands on.
KEYWORDS = frozenset(
    {
        "tokenizer",
        *TransformersKwargs.__annotations__,
        *PagedAttentionArgs.__annotations__,
        *inspect.signature(ForCausalLMLoss).parameters,
    }
)


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float32 numbers to those that `dtype` has, ties to even.

    A compiler may drop a cast there and back, and ONNX Runtime cannot compute
    in bfloat16. Sums of float32 numbers are rounded everywhere: where `large`
    is added, one unit in the last place is that of `dtype`.
    """
    if torch.finfo(dtype).bits >= 32:
        return x
    shifted = x.detach() * 2.0**24
    next_power = (shifted + x.detach()) - shifted  # of two; 0 if `x` is one
    large = next_power * (1.5 * 2.0**22 * torch.finfo(dtype).eps)
    return (x + large) - large


class BwETAFRMSNorm(nn.Module):
    """Root mean square norm, each step rounded to `inner_dtype`."""

    def __init__(self, hidden_size, eps, inner_dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps
        self.inner_dtype = inner_dtype

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        def rounded(x):
            return round_to(x, self.inner_dtype)

        x = rounded(hidden_states.float())
        # The mean is one step: its sum is never rounded.
        mean_square = rounded(rounded(x * x).mean(-1, keepdim=True))
        rms = rounded(rounded(mean_square + self.eps).sqrt())
        x = rounded(x / rms) * self.weight.float()
        return x.to(hidden_states.dtype)


class BwETAFRotaryEmbedding(nn.Module):
    """Cosine and sine of the angles by which a vector of `width` turns.

    Dimension `i` turns with dimension `i + width // 2`.
    """

    def __init__(self, config: BwETAFConfig, width: int):
        super().__init__()
        self.width = width
        self.theta = config.rope_theta
        self.rope_dtype = config.rope_dtype
        # Integers, for `model.to(dtype)` rounds every buffer of floats.
        self.register_buffer(
            "frequencies", self.compute_frequencies(), persistent=False
        )

    def compute_frequencies(self) -> torch.Tensor:
        """`theta ** (-i / half)`, as XLA computes it in float32, times 2**62.

        XLA multiplies by the reciprocal, and its power is all but always the
        correctly rounded one. One unit in the last place, times a position
        of a thousand, is an angle that the logits show.
        """
        half = torch.tensor(self.width // 2, dtype=torch.float32)
        indices = torch.arange(self.width // 2, dtype=torch.float32)
        exponents = indices * -half.reciprocal()
        frequencies = self.theta ** exponents.double()
        return (frequencies.float().double() * 2.0**62).long()

    def forward(self, position_ids, dtype):
        # Positions, frequencies and their product are rounded one by one.
        dtype = getattr(torch, self.rope_dtype) if self.rope_dtype else dtype
        frequencies = round_to(self.frequencies.float() * 2.0**-62, dtype)
        positions = round_to(position_ids[..., None].float(), dtype)
        # (batch, length, width // 2)
        angles = round_to(positions * frequencies, dtype)
        return angles.cos(), angles.sin()


def apply_rotary_pos_emb(x, cos, sin):
    """Rotates vectors in float32; a last odd dimension stays as it is."""
    half = cos.shape[-1]
    first, second, rest = x.float().split(
        [half, half, x.shape[-1] - 2 * half], dim=-1
    )
    x_rotated = torch.cat(
        [first * cos - second * sin, second * cos + first * sin, rest], dim=-1
    )
    return x_rotated.to(x.dtype)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
    """Attention in plain PyTorch; the other ways are transformers' own."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)

    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    # (batch, heads, length, slots)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BwETAFAttention(nn.Module):
    """Grouped-query attention, rotated before the split into heads."""

    def __init__(self, config: BwETAFConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        num_heads, num_key_value_heads = config.heads(layer_idx)
        self.head_dim = config.hidden_size // num_heads
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        width = config.hidden_size
        key_value_width = num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_value_width, bias=False)
        self.v_proj = nn.Linear(width, key_value_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: dict[int, tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_NAME, None)
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        query = apply_rotary_pos_emb(
            query, *position_embeddings[query.shape[-1]]
        )
        key = apply_rotary_pos_emb(key, *position_embeddings[key.shape[-1]])

        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            x.view(heads_shape).transpose(1, 2) for x in (query, key, value)
        )  # (batch, heads, length, head_dim)
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
        output = self.o_proj(output.reshape(hidden_states.shape))
        return output, weights


class BwETAFMLP(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: BwETAFConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BwETAFDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block; dropout comes after attention only."""

    def __init__(self, config: BwETAFConfig, layer_idx: int):
        super().__init__()
        # The first layer reads the embedding, which is in bfloat16.
        self.input_layernorm = BwETAFRMSNorm(
            config.hidden_size,
            eps=config.rms_norm_eps,
            inner_dtype=torch.float32 if layer_idx else torch.bfloat16,
        )
        self.self_attn = BwETAFAttention(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.post_attention_layernorm = BwETAFRMSNorm(
            config.hidden_size, eps=config.rms_norm_eps
        )
        self.mlp = BwETAFMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        x, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(x)
        x = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + x


class BwETAFPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = BwETAFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BwETAFDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": BwETAFDecoderLayer,
        "attentions": BwETAFAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module):
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            std = config.embedding_initializer_range
            std = config.hidden_size**-0.5 if std is None else std
            init.normal_(module.weight, std=std)
        elif isinstance(module, BwETAFRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, BwETAFRotaryEmbedding):
            # `from_pretrained` makes the model without memory: there, the
            # buffer gets its values here.
            init.copy_(module.frequencies, module.compute_frequencies())


class BwETAFModel(BwETAFPreTrainedModel):
    """The model up to its last hidden states."""

    def __init__(self, config: BwETAFConfig):
        super().__init__(config)
        # Without `padding_idx`: padding is the end token, which has learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            BwETAFDecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        # Queries are as wide as the embedding; keys may differ by layer.
        widths = {config.hidden_size}
        widths |= {layer.self_attn.k_proj.out_features for layer in self.layers}
        self.rotary_embs = nn.ModuleDict(
            {
                str(width): BwETAFRotaryEmbedding(config, width)
                for width in sorted(widths)
            }
        )
        self.gradient_checkpointing = False
        self.post_init()

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
        dtype = inputs_embeds.dtype
        position_embeddings = {
            rotary_emb.width: rotary_emb(position_ids, dtype)
            for rotary_emb in self.rotary_embs.values()
        }
        hidden_states = apply_rotary_pos_emb(
            inputs_embeds, *position_embeddings[self.config.hidden_size]
        )
        hidden_states = round_to(hidden_states.float(), torch.bfloat16)
        hidden_states = hidden_states.to(dtype)
        # Before transformers 5.24, functions for attention update the cache of
        # continuous batching, which they call `cache`.
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
            last_hidden_state=hidden_states, **{CACHE_NAME: cache}
        )

    def find_cache(self, cache, past_key_values, use_cache):
        """The cache that is given under one of its names, or a new one."""
        if cache is not None and past_key_values is not None:
            raise ValueError(
                "Specify only one of `cache` and `past_key_values`, which are "
                "the new and the old name of the same."
            )
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return cache

    def check_keywords(self, kwargs):
        """Refuses keywords that nothing reads, which would have no effect.

        A function for attention that a server such as vLLM has registered
        names those that it reads.
        """
        unknown = kwargs.keys() - KEYWORDS
        if not unknown:
            return
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        unknown -= inspect.signature(attention_interface).parameters.keys()
        if unknown:
            known = inspect.signature(self.forward).parameters.keys()
            known |= TransformersKwargs.__annotations__.keys()
            raise TypeError(
                f"{type(self).__name__} expected keywords among "
                f"{', '.join(sorted(known - {'kwargs'}))}. Received: "
                f"{', '.join(sorted(unknown))}"
            )


class BwETAFForCausalLM(BwETAFPreTrainedModel, GenerationMixin):
    """The model with its language-model head, tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BwETAFConfig):
        super().__init__(config)
        self.model = BwETAFModel(config)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False
        )
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        config = self.config
        heads = [config.num_attention_heads, config.num_key_value_heads]
        if any(isinstance(each, list) for each in heads):
            raise ValueError(
                "Continuous batching has one shape of cache for all layers, "
                "and the heads of this model differ by layer. Use `generate`. "
                f"Received: num_attention_heads={heads[0]}, "
                f"num_key_value_heads={heads[1]}"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the loss.

        Args:
            labels: `(batch, length)`, token ids; they are shifted here. -100
                is ignored.
            logits_to_keep: How many last positions, or which ones, to compute
                logits of. 0 is all.
            past_key_values: What `cache` was called before transformers 5.24.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(
            outputs.last_hidden_state, logits_to_keep
        )
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["BwETAFForCausalLM", "BwETAFModel", "BwETAFPreTrainedModel"]
