"""The frameworks that can run a model folder, imported only to do so.

A package brings one by an entry point of the group `converters.runtimes`,
under the name that a `Format` has for its runtime. The entry point refers to
the callable that becomes `Runtime.load`.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np

from converters.formats import read_checkpoint

GROUP = "converters.runtimes"


class Model(Protocol):
    """A folder's model in a framework, in float32."""

    def logits(self, token_ids):
        """Logits in one pass.

        Args:
            token_ids: int array `(batch, length)`.

        Returns:
            float64 array `(batch, length, vocabulary)`.
        """

    def generate(self, prompts, choose, num_tokens):
        """Continues a batch of prompts, as users do: with a cache.

        Args:
            prompts: list of int arrays `(length,)`; lengths may differ.
            choose: callable. Takes the logits of a step, a float64 array
                `(batch, vocabulary)`, and returns the next tokens, an int
                array `(batch,)`.
            num_tokens: int. How many times to call it.
        """


@dataclass(frozen=True)
class Runtime:
    """A framework that computes logits.

    Args:
        name: str. For people.
        packages: tuple of str. What has to be installed.
        load: callable. Takes a folder, returns a `Model`. None for a
            runtime that no package brings.
    """

    name: str
    packages: tuple
    load: Callable | None


def runtime(name: str) -> Runtime:
    """The runtime of a name; `is_installed` tells whether it is there.

    Args:
        name: str.

    Returns:
        `Runtime`.
    """
    if name == TORCH.name:
        return TORCH
    found = entry_points(group=GROUP, name=name)
    if not found:
        return Runtime(name, (), None)
    entry = next(iter(found))
    package = entry.module.partition(".")[0]
    # Its module is imported when a folder is loaded, not before.
    return Runtime(name, (package,), lambda folder: entry.load()(folder))


def is_installed(runtime):
    """Whether a runtime is there, and all that it needs."""
    return runtime.load is not None and all(
        map(importlib.util.find_spec, runtime.packages)
    )


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


class TorchModel:
    """A `Model` in PyTorch.

    It runs this package's own code, and nothing of the folder but checked
    values to configure it.

    Args:
        folder: path.
    """

    def __init__(self, folder):
        import torch  # slow, and optional

        checkpoint = read_checkpoint(folder, optimizer=False)
        architecture = checkpoint.architecture
        config_class, model_class = (
            _own_class(architecture.auto_map[name])
            for name in ("AutoConfig", "AutoModelForCausalLM")
        )
        config = config_class(
            **{
                name: checkpoint.config[name]
                for name in architecture.config_names
            },
            attn_implementation="eager",
            eos_token_id=None,  # Nothing ends a continuation early.
            pad_token_id=None,
        )
        self._model = model_class(config).eval()
        with torch.inference_mode():
            for name, parameter in self._model.named_parameters():
                with checkpoint.tensor(name) as array:
                    parameter.copy_(torch.from_numpy(array.astype("float32")))

    def logits(self, token_ids):
        import torch  # slow, and optional

        with torch.inference_mode():
            outputs = self._model(torch.from_numpy(token_ids))
        return outputs.logits.double().numpy()

    def generate(self, prompts, choose, num_tokens):
        import torch  # slow, and optional

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


def _own_class(reference):
    """A class of `converters.transformers_model`, named as in `auto_map`."""
    module, _, name = reference.partition(".")
    # It imports PyTorch, which is slow, and optional.
    module = importlib.import_module(f"converters.transformers_model.{module}")
    return getattr(module, name)


TORCH = Runtime("transformers", ("torch", "transformers"), TorchModel)
