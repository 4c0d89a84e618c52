"""How good a model is: perplexity, and the tasks of lm-evaluation-harness."""

import importlib
from typing import TYPE_CHECKING

from keras_bwetaf.evaluation.perplexity import (
    Document,
    Perplexity,
    perplexity,
)
from keras_bwetaf.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from keras_bwetaf.evaluation.harness import (
        HarnessModel,
        evaluate_tasks,
        make_table,
    )

__all__ = [
    "Document",
    "HarnessModel",
    "Perplexity",
    "Scorer",
    "evaluate_tasks",
    "make_table",
    "perplexity",
]


def __getattr__(name):
    """What needs lm-evaluation-harness, which not everybody has."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("keras_bwetaf.evaluation.harness")
    return getattr(module, name)
