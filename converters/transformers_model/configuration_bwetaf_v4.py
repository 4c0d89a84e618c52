"""Configuration of BwETAFv4 for transformers."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_bwetaf import BwETAFConfig


@strict
class BwETAFV4Config(PreTrainedConfig):
    """Shape and settings of a BwETAFv4 model; the defaults are the preview's.

    Args:
        intermediate_size: Inner width of an expert.
        num_local_experts: Experts of a layer.
        num_experts_per_tok: Those that a token uses.
        expert_dispatch: "exact", or "original_token", the rule by which the
            original generates. The original's other rule is not for PyTorch.
        expert_capacity: Changes nothing here.
        hidden_dropout: Share of the attention's outputs that are dropped in
            training.
        rope_dtype: Dtype of the rotary angles. "float32" is exact at any
            dtype of the model; `None` rounds them to the model's dtype.
        initializer_range: Standard deviation of initial weights; `None` is
            `hidden_size ** -0.5`.
    """

    model_type = "bwetaf_v4"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 16384
    hidden_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 1536
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    expert_capacity: int | float = 1.25
    expert_dispatch: Literal["exact", "original_token"] = "exact"
    max_position_embeddings: int = 8192
    hidden_act: str = "silu"
    hidden_dropout: int | float = 0.03
    rms_norm_eps: int | float = 1e-8
    rope_theta: int | float = 10000.0
    rope_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    initializer_range: int | float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    heads = BwETAFConfig.heads

    def validate_architecture(self):
        """Checks what numbers of heads and of experts have to do with it."""
        BwETAFConfig.validate_architecture(self)
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                "`num_experts_per_tok` must be at most `num_local_experts`. "
                f"Received: {self.num_experts_per_tok} of "
                f"{self.num_local_experts}"
            )


__all__ = ["BwETAFV4Config"]
