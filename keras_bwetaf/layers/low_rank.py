"""LoRA's part of a layer: a scaled product of two factors beside a weight."""

import jax
import keras
from keras import ops


def weight_name(layer: keras.layers.Layer) -> str:
    """Name of the weight to which LoRA adds: `"embeddings"` or `"kernel"`."""
    is_embedding = isinstance(layer, keras.layers.Embedding)
    return "embeddings" if is_embedding else "kernel"


def weight_and_factors(
    layer: keras.layers.Layer,
) -> tuple[keras.Variable, list[keras.Variable]]:
    """A layer's weight, and LoRA's two factors beside it."""
    name = weight_name(layer)
    factors = [getattr(layer, f"lora_{name}_{x}") for x in "ab"]
    return getattr(layer, f"_{name}"), factors


def scale(layer: keras.layers.Layer) -> float:
    """What the product of the factors is multiplied by."""
    return layer.lora_alpha / layer.lora_rank


def merged_weight(layer: keras.layers.Layer) -> jax.Array:
    """The sum of a layer's weight and LoRA's product, a float32 array."""
    weight, factors = weight_and_factors(layer)
    return ops.add(weight, scale(layer) * ops.matmul(*factors))
