from keras_bwetaf.training.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
)

__all__ = ["load_optimizer_state", "optimizer_state"]
