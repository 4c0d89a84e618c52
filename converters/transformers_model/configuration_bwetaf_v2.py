"""Configuration of BwETAFv2 for transformers."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_bwetaf import BwETAFConfig


@strict
class BwETAFV2Config(PreTrainedConfig):
    """Shape and settings of a BwETAFv2 model; the defaults are the 53M one's.

    Args:
        num_attention_heads: int, or a list with one int for each layer. Each
            divides `hidden_size`.
        hidden_dropout: Share of the attention's outputs that are dropped in
            training.
        use_rope: Whether positions combine dimensions of embeddings;
            otherwise, sinusoids are added.
        embedding_scale: What embeddings are multiplied by.
        residual_scale: What hidden states are multiplied by before each sum.
        initializer_range: Standard deviation of initial linear weights.
        embedding_initializer_range: The same of embeddings; `None` is
            `hidden_size ** -0.5`.
    """

    model_type = "bwetaf_v2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
    }

    vocab_size: int = 50260
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int | list[int] = 8
    intermediate_size: int = 1536
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    hidden_dropout: int | float = 0.1
    use_rope: bool = True
    embedding_scale: int | float = 1.0
    residual_scale: int | float = 1.0
    rms_norm_eps: int | float = 1e-8
    initializer_range: int | float = 0.02
    embedding_initializer_range: int | float | None = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50256

    @property
    def num_key_value_heads(self) -> int | list[int]:
        """Each head has keys and values of its own."""
        return self.num_attention_heads

    heads = BwETAFConfig.heads
    validate_architecture = BwETAFConfig.validate_architecture


__all__ = ["BwETAFV2Config"]
