"""Configuration of BwETAFv3 for transformers."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class BwETAFConfig(PreTrainedConfig):
    """Shape and settings of a BwETAFv3 model; the defaults are the 97M one's.

    Args:
        num_attention_heads: int, or a list with one int for each layer. Each
            divides `hidden_size`.
        num_key_value_heads: int, or a list with one int for each layer. Each
            divides the attention heads of its layer.
        hidden_dropout: Share of the attention's outputs that are dropped in
            training.
        rope_dtype: Dtype of the rotary angles. "float32" is exact at any
            dtype of the model; `None` rounds them to the model's dtype.
        initializer_range: Standard deviation of initial linear weights.
        embedding_initializer_range: The same of embeddings; `None` is
            `hidden_size ** -0.5`.
    """

    model_type = "bwetaf"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # There is no plan for tensor parallelism, because the rotary embedding
    # spans the heads, and there is no final norm to keep whole.
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
    }

    vocab_size: int = 16384
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int | list[int] = 8
    num_key_value_heads: int | list[int] = 4
    intermediate_size: int = 2304
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    hidden_dropout: int | float = 0.05
    rms_norm_eps: int | float = 1e-8
    rope_theta: int | float = 10000.0
    rope_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    initializer_range: int | float = 0.002
    embedding_initializer_range: int | float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def heads(self, layer_idx: int) -> tuple[int, int]:
        """Attention heads and key/value heads of a layer."""
        attention, key_value = (
            heads[layer_idx] if isinstance(heads, list) else heads
            for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        return attention, key_value

    def validate_architecture(self):
        """Checks what the numbers of layers and heads have to do with it.

        The decorator `strict` calls this when an instance is made.
        """
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(self, name)
            if isinstance(heads, list) and len(heads) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must be an int or hold one int for each of the "
                    f"{self.num_hidden_layers} layers. Received: {name}={heads}"
                )
        for layer_idx in range(self.num_hidden_layers):
            attention, key_value = self.heads(layer_idx)
            if self.hidden_size % attention or attention % key_value:
                raise ValueError(
                    "`num_attention_heads` must divide `hidden_size`, and "
                    "`num_key_value_heads` must divide `num_attention_heads`. "
                    f"Received: {key_value}, {attention} and "
                    f"{self.hidden_size} in layer {layer_idx}"
                )


__all__ = ["BwETAFConfig"]
