from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.causal_lm import BwETAFCausalLM
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.tokenizer import BwETAFTokenizer, train_tokenizer

__all__ = [
    "BwETAFBackbone",
    "BwETAFCausalLM",
    "BwETAFCausalLMPreprocessor",
    "BwETAFTokenizer",
    "train_tokenizer",
]
