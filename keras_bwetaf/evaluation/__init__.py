"""How good a model is: perplexity, and the tasks of lm-evaluation-harness."""

from keras_bwetaf.evaluation.perplexity import (
    Document,
    Perplexity,
    perplexity,
)
from keras_bwetaf.evaluation.scoring import Scorer

__all__ = ["Document", "Perplexity", "Scorer", "perplexity"]
