import keras

from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.decoder_lm import CausalLM
from keras_bwetaf.models.registry import register


@register
@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFCausalLM(CausalLM):
    """The BwETAFv3 language model: a backbone and its tied head.

    Called on `{"token_ids", "padding_mask"}` it returns logits. With a
    preprocessor, `fit`, `evaluate` and `predict` take plain strings, and
    `generate` and `stream` continue them.

    Args:
        backbone: `BwETAFBackbone`.
        preprocessor: `BwETAFCausalLMPreprocessor` or `None`. Without one,
            inputs are token ids.

    Call arguments:
        token_ids: int tensor `(batch, length)`.
        padding_mask: int tensor `(batch, length)`. See `BwETAFBackbone`.

    Returns:
        float tensor `(batch, length, vocabulary_size)`.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("97m")
    lm.generate("The night sky", max_new_tokens=64)
    for text in lm.stream("The night sky", max_new_tokens=64):
        print(text, end="", flush=True)
    ```
    """

    backbone_cls = BwETAFBackbone
    preprocessor_cls = BwETAFCausalLMPreprocessor
