from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.bwetaf_v2 import (
    BwETAFV2Backbone,
    BwETAFV2CausalLM,
    BwETAFV2CausalLMPreprocessor,
    BwETAFV2Tokenizer,
)
from keras_bwetaf.models.bwetaf_v4 import (
    BwETAFV4Backbone,
    BwETAFV4CausalLM,
    BwETAFV4CausalLMPreprocessor,
    BwETAFV4Tokenizer,
)
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
    "BwETAFV2Backbone",
    "BwETAFV2CausalLM",
    "BwETAFV2CausalLMPreprocessor",
    "BwETAFV2Tokenizer",
    "BwETAFV4Backbone",
    "BwETAFV4CausalLM",
    "BwETAFV4CausalLMPreprocessor",
    "BwETAFV4Tokenizer",
    "train_tokenizer",
]
