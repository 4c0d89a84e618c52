from keras_bwetaf.training.optimizer import AdamW
from keras_bwetaf.training.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
)
from keras_bwetaf.training.recipe import WarmupDecay, recipe

__all__ = [
    "AdamW",
    "WarmupDecay",
    "load_optimizer_state",
    "optimizer_state",
    "recipe",
]
