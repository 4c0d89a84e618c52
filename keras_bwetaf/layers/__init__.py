from keras_bwetaf.layers.attention import attention_kernel, chosen_attention
from keras_bwetaf.layers.embedding_position import EmbeddingPosition
from keras_bwetaf.layers.feed_forward import FeedForward
from keras_bwetaf.layers.grouped_query_attention import GroupedQueryAttention
from keras_bwetaf.layers.mixture_of_experts import MixtureOfExperts
from keras_bwetaf.layers.rms_normalization import RMSNormalization
from keras_bwetaf.layers.rotary_embedding import RotaryEmbedding
from keras_bwetaf.layers.transformer_block import TransformerBlock

__all__ = [
    "EmbeddingPosition",
    "FeedForward",
    "GroupedQueryAttention",
    "MixtureOfExperts",
    "RMSNormalization",
    "RotaryEmbedding",
    "TransformerBlock",
    "attention_kernel",
    "chosen_attention",
]
