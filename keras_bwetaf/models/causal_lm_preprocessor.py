"""Strings to padded token ids and back, for training and generation."""

from typing import Any, Self

import keras
import keras_hub
import numpy as np

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int
from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.loading import load_preprocessor
from keras_bwetaf.models.registry import class_for
from keras_bwetaf.models.tokenizer import BwETAFTokenizer
from keras_bwetaf.preset_files import open_preset


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Turns strings into the inputs of a `BwETAFCausalLM`, and back.

    Called on strings, it returns `(x, y, sample_weight)` for training: the
    token ids, each followed by the end token and padded, the same ids one
    position ahead, and a mask of what is not padding. `generate_preprocess()`
    and `generate_postprocess()` serve generation; a prompt gets no end token.
    All of them work on NumPy arrays, also in a process that was forked, such
    as a worker of PyTorch's `DataLoader`; and on tensors in a `tf.data`
    pipeline.

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
        ValueError: If `add_start_token` is `True`, or `sequence_length` is no
            positive int.

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
        tokenizer: BwETAFTokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = False,
        add_end_token: bool = True,
        **kwargs: Any,
    ):
        if add_start_token:
            raise ValueError(
                "BwETAF models were trained without a start token, so "
                "`add_start_token` must be False. Received: "
                f"add_start_token={add_start_token}"
            )
        super().__init__(
            tokenizer,
            sequence_length=positive_int("sequence_length", sequence_length),
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )

    @classmethod
    def from_preset(
        cls, preset: PathLike, *, revision: str | None = None, **options: Any
    ) -> Self:
        """Loads the preprocessor of a preset; no weights are downloaded.

        Args:
            preset: str or path. As for `keras_bwetaf.from_preset`.
            revision: str. As for `keras_bwetaf.from_preset`.
            **options: Arguments of the preprocessor. Its `sequence_length`
                defaults to the saved one, or else the model's context.

        Returns:
            A `BwETAFCausalLMPreprocessor`.

        Raises:
            ValueError: If the preset is unknown or has no tokenizer, or its
                files are damaged.
            Others: As `keras_bwetaf.from_preset`.
        """
        files = open_preset(preset, revision, weights=False)
        found = class_for(cls, files.architecture)
        return load_preprocessor(found, files, **options)

    def build(self, input_shape):
        # The tokenizer may have got its file only now.
        self.packer = _Packer(
            self.sequence_length,
            end_value=self.tokenizer.end_token_id,
            pad_value=self.tokenizer.pad_token_id,
            return_padding_mask=True,
        )
        self.packer.build(input_shape)  # Keras asks whether all layers are.
        self.built = True


class _Packer(keras_hub.layers.StartEndPacker):
    """KerasHub's packer, which gives NumPy arrays and not JAX's.

    JAX's threads are not there in a process that was forked: what slices one
    of its arrays there waits forever.
    """

    def call(
        self,
        inputs,
        sequence_length=None,
        add_start_value=True,
        add_end_value=True,
    ):
        if self._use_tf_workflow():
            return super().call(
                inputs, sequence_length, add_start_value, add_end_value
            )
        is_one = isinstance(inputs, np.ndarray)  # The tokens of one text.
        length = sequence_length or self.sequence_length
        end = self.end_value if add_end_value else []
        rows = [
            [*row[: length - len(end)], *end]
            for row in ([inputs] if is_one else inputs)
        ]
        token_ids = np.full((len(rows), length), self.pad_value, "int32")
        padding_mask = np.zeros(token_ids.shape, "bool")
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = True
        if is_one:
            return token_ids[0], padding_mask[0]
        return token_ids, padding_mask
