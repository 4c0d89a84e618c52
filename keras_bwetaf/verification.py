"""What `converters.verify` runs a folder with, named in `pyproject.toml`."""

import warnings

import jax
import keras_hub
import numpy as np
from jax.experimental import io_callback

from keras_bwetaf.presets import from_preset


class KerasModel:
    """A `converters.runtimes.Model` in Keras.

    Args:
        folder: path.
    """

    def __init__(self, folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A tokenizer is not needed.
            lm = from_preset(folder, dtype="float32")
        self._lm = type(lm)(lm.backbone)

    def logits(self, token_ids):
        token_ids = token_ids.astype("int32")
        inputs = {"token_ids": token_ids, "padding_mask": token_ids * 0 + 1}
        return self._lm(inputs).__array__().astype("float64")

    def generate(self, prompts, choose, num_tokens):
        self._lm.compile(sampler=_Chooser(choose, len(prompts)))
        lengths = np.array([len(prompt) for prompt in prompts])
        mask = np.arange(lengths.max()) < lengths[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        token_ids[mask] = np.concatenate(prompts)
        self._lm.generate(
            {"token_ids": token_ids, "padding_mask": mask.astype("int32")},
            max_new_tokens=num_tokens,
            stop_token_ids=None,
        )


class _Chooser(keras_hub.samplers.Sampler):
    """A sampler that asks for each token outside of the compiled loop.

    Args:
        choose: callable. See `converters.runtimes.Model`.
        num_rows: int. Of the batch; on several devices, more are generated.
    """

    def __init__(self, choose, num_rows):
        super().__init__()
        self._choose = choose
        self._num_rows = num_rows

    def compute_probabilities(self, logits):
        return logits

    def get_next_token(self, logits):
        tokens = jax.ShapeDtypeStruct(logits.shape[:1], "int32")

        def chosen(logits):
            real = np.asarray(logits[: self._num_rows], "float64")
            others = np.zeros(len(logits) - len(real), "int32")
            return np.append(self._choose(real).astype("int32"), others)

        return io_callback(chosen, tokens, logits)
