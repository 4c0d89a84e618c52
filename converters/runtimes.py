"""The frameworks that can run a model folder, imported only to do so."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from converters.bwetaf_v3_config import CANONICAL_NAMES
from converters.formats import read_checkpoint


@dataclass(frozen=True)
class Runtime:
    """A framework that computes logits.

    Args:
        name: str. For people.
        packages: tuple of str. What has to be installed.
        logits: callable. Takes a folder and an int array `(length,)` of token
            ids, returns a float64 array `(length, vocabulary)`, computed in
            float32.
    """

    name: str
    packages: tuple
    logits: Callable


def is_installed(runtime):
    """Whether the packages of a runtime can be imported."""
    return all(map(importlib.util.find_spec, runtime.packages))


def _keras_logits(folder, token_ids):
    import keras_bwetaf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A tokenizer is not needed.
        lm = keras_bwetaf.from_preset(folder, dtype="float32")
    token_ids = token_ids[None].astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": token_ids * 0 + 1}
    return lm(inputs).__array__().astype("float64")[0]


def _torch_logits(folder, token_ids):
    import torch

    # This package's own code, and nothing but checked values to configure it.
    from converters.transformers_model import (
        configuration_bwetaf,
        modeling_bwetaf,
    )

    checkpoint = read_checkpoint(folder, optimizer=False)
    config = configuration_bwetaf.BwETAFConfig(
        **{name: checkpoint.config[name] for name in CANONICAL_NAMES},
        attn_implementation="eager",
    )
    model = modeling_bwetaf.BwETAFForCausalLM(config).eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            array = checkpoint[name].array().astype("float32")
            parameter.copy_(torch.from_numpy(array))
        outputs = model(torch.from_numpy(token_ids)[None])
    return outputs.logits[0].double().numpy()


KERAS = Runtime("keras_bwetaf", ("keras_bwetaf",), _keras_logits)
TORCH = Runtime("transformers", ("torch", "transformers"), _torch_logits)
RUNTIMES = {
    "flax": KERAS,
    "safetensors": KERAS,
    "keras": KERAS,
    "torch": TORCH,
}
