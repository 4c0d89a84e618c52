"""The frameworks that can run a model folder, imported only to do so."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from converters.bwetaf_v3_config import CANONICAL_NAMES
from converters.formats import read_checkpoint


@dataclass(frozen=True)
class Runtime:
    """A framework that computes logits.

    Args:
        name: str. For people.
        packages: tuple of str. What has to be installed.
        load: callable. Takes a folder, returns a `KerasModel` or something
            that has the same methods.
    """

    name: str
    packages: tuple
    load: Callable


def is_installed(runtime):
    """Whether the packages of a runtime can be imported."""
    return all(map(importlib.util.find_spec, runtime.packages))


def prepare(runtimes):
    """Imports PyTorch's compiler, if needed, before anything else.

    With it comes Triton, where it is installed, which ends the process if
    TensorFlow, which KerasHub imports, was there first (TensorFlow 2.21,
    Triton 3.7). Then PyTorch does without it, which is for GPUs.
    """
    if TORCH not in runtimes:
        return
    is_late = "tensorflow" in sys.modules and "triton" not in sys.modules
    if is_late:
        sys.modules["triton"] = None  # To import it is an ImportError.
    try:
        importlib.import_module("torch._dynamo")
    finally:
        if is_late:
            del sys.modules["triton"]


class KerasModel:
    """A folder's model in Keras, in float32.

    Args:
        folder: path.
    """

    def __init__(self, folder):
        import keras_bwetaf

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A tokenizer is not needed.
            lm = keras_bwetaf.from_preset(folder, dtype="float32")
        self._lm = keras_bwetaf.BwETAFCausalLM(lm.backbone)

    def logits(self, token_ids):
        """Logits in one pass.

        Args:
            token_ids: int array `(batch, length)`.

        Returns:
            float64 array `(batch, length, vocabulary)`.
        """
        token_ids = token_ids.astype("int32")
        inputs = {"token_ids": token_ids, "padding_mask": token_ids * 0 + 1}
        return self._lm(inputs).__array__().astype("float64")

    def generate(self, prompts, choose, num_tokens):
        """Continues a batch of prompts, as users do: with a cache.

        Args:
            prompts: list of int arrays `(length,)`; lengths may differ.
            choose: callable. Takes the logits of a step, a float64 array
                `(batch, vocabulary)`, and returns the next tokens, an int
                array `(batch,)`.
            num_tokens: int. How many times to call it.
        """
        import jax
        import keras_hub
        from jax.experimental import io_callback

        class Sampler(keras_hub.samplers.Sampler):
            def compute_probabilities(self, logits):
                return logits

            def get_next_token(self, logits):
                tokens = jax.ShapeDtypeStruct(logits.shape[:1], "int32")
                return io_callback(
                    lambda x: choose(np.asarray(x, "float64")).astype("int32"),
                    tokens,
                    logits,
                )

        self._lm.compile(sampler=Sampler())
        lengths = np.array([len(prompt) for prompt in prompts])
        mask = np.arange(lengths.max()) < lengths[:, None]
        token_ids = np.zeros(mask.shape, "int32")
        token_ids[mask] = np.concatenate(prompts)
        self._lm.generate(
            {"token_ids": token_ids, "padding_mask": mask.astype("int32")},
            max_new_tokens=num_tokens,
            stop_token_ids=None,
        )


class TorchModel:
    """A folder's model in PyTorch: see `KerasModel`.

    It runs this package's own code, and nothing of the folder but checked
    values to configure it.
    """

    def __init__(self, folder):
        import torch

        from converters.transformers_model import (
            configuration_bwetaf,
            modeling_bwetaf,
        )

        checkpoint = read_checkpoint(folder, optimizer=False)
        config = configuration_bwetaf.BwETAFConfig(
            **{name: checkpoint.config[name] for name in CANONICAL_NAMES},
            attn_implementation="eager",
            eos_token_id=None,  # Nothing ends a continuation early.
        )
        self._model = modeling_bwetaf.BwETAFForCausalLM(config).eval()
        with torch.inference_mode():
            for name, parameter in self._model.named_parameters():
                array = checkpoint[name].array().astype("float32")
                parameter.copy_(torch.from_numpy(array))

    def logits(self, token_ids):
        import torch

        with torch.inference_mode():
            outputs = self._model(torch.from_numpy(token_ids))
        return outputs.logits.double().numpy()

    def generate(self, prompts, choose, num_tokens):
        import torch

        def process(_, logits):
            tokens = torch.from_numpy(choose(logits.double().numpy()))
            chosen = torch.full_like(logits, -torch.inf)
            return chosen.scatter(1, tokens[:, None], 0.0)

        lengths = np.array([len(prompt) for prompt in prompts])
        longest = lengths.max()
        # Padded on the left, so that all rows end where the new tokens begin.
        mask = np.arange(longest) >= longest - lengths[:, None]
        token_ids = np.zeros(mask.shape, "int64")
        token_ids[mask] = np.concatenate(prompts)
        self._model.generate(
            torch.from_numpy(token_ids),
            attention_mask=torch.from_numpy(mask.astype("int64")),
            logits_processor=[process],
            max_new_tokens=num_tokens,
            do_sample=False,
        )


KERAS = Runtime("keras_bwetaf", ("keras_bwetaf",), KerasModel)
TORCH = Runtime("transformers", ("torch", "transformers"), TorchModel)
RUNTIMES = {
    "flax": KERAS,
    "safetensors": KERAS,
    "keras": KERAS,
    "torch": TORCH,
}
