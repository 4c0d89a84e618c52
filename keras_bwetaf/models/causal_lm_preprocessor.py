"""Strings to padded token ids and back, for training and generation."""

import keras
import keras_hub

from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.tokenizer import BwETAFTokenizer


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Turns strings into the inputs of a `BwETAFCausalLM`, and back.

    Called on strings, it returns `(x, y, sample_weight)` for training: the
    token ids, each followed by the end token and padded, the same ids one
    position ahead, and a mask of what is not padding. `generate_preprocess()`
    and `generate_postprocess()` serve generation; a prompt gets no end token.

    Args:
        tokenizer: A `BwETAFTokenizer`.
        sequence_length: int. The length of a row of token ids. Defaults to
            `1024`.
        add_start_token: bool. Always `False`: the model knows no start
            token.
        add_end_token: bool. Whether training texts get the end token.
            Defaults to `True`.
        **kwargs: Keywords of `keras_hub.models.CausalLMPreprocessor`.

    Call arguments:
        x: str, list of str, or a string array or tensor of rank 0 or 1.
        sequence_length: int. Replaces the layer's.

    Raises:
        ValueError: If `add_start_token` is `True`.

    Example:

    ```python
    preprocessor = BwETAFCausalLMPreprocessor(tokenizer, sequence_length=8)
    x, y, sample_weight = preprocessor(["the light", "the Word"])
    x["token_ids"].shape  # (2, 8)
    ```
    """

    backbone_cls = BwETAFBackbone
    tokenizer_cls = BwETAFTokenizer

    def __init__(
        self,
        tokenizer,
        sequence_length=1024,
        add_start_token=False,
        add_end_token=True,
        **kwargs,
    ):
        if add_start_token:
            raise ValueError(
                "BwETAFv3 was trained without a start token, so "
                "`add_start_token` must be False. Received: "
                f"add_start_token={add_start_token}"
            )
        super().__init__(
            tokenizer,
            sequence_length=sequence_length,
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.packer.build(input_shape)  # Keras asks whether all layers are.
