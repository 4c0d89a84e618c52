from keras_bwetaf.exchange.optimizer_state import (
    load_optimizer_state,
    optimizer_state,
)
from keras_bwetaf.training.checkpoints import TrainingCheckpoint
from keras_bwetaf.training.diagnostics import (
    TensorStatistics,
    gradient_statistics,
    parameter_statistics,
    rank_rows,
)
from keras_bwetaf.training.monitor import Monitor
from keras_bwetaf.training.optimizer import AdamW
from keras_bwetaf.training.plots import plot_losses, plot_statistics
from keras_bwetaf.training.recipes import WarmupDecay, recipe
from keras_bwetaf.training.samples import Samples

__all__ = [
    "AdamW",
    "Monitor",
    "Samples",
    "TensorStatistics",
    "TrainingCheckpoint",
    "WarmupDecay",
    "gradient_statistics",
    "load_optimizer_state",
    "optimizer_state",
    "parameter_statistics",
    "plot_losses",
    "plot_statistics",
    "rank_rows",
    "recipe",
]
