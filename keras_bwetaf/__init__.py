"""The BwETAFv3 language model as Keras 3 layers on JAX."""

from keras_bwetaf import _environment  # noqa: I001  must come first

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_bwetaf import (
        data,
        distribution,
        evaluation,
        layers,
        models,
        prompts,
        training,
    )
    from keras_bwetaf.compilation_cache import enable_compilation_cache
    from keras_bwetaf.generation import BwETAFSampler
    from keras_bwetaf.models import (
        BwETAFBackbone,
        BwETAFCausalLM,
        BwETAFCausalLMPreprocessor,
        BwETAFTokenizer,
        BwETAFV2Backbone,
        BwETAFV2CausalLM,
        BwETAFV2CausalLMPreprocessor,
        BwETAFV2Tokenizer,
        BwETAFV4Backbone,
        BwETAFV4CausalLM,
        BwETAFV4CausalLMPreprocessor,
        BwETAFV4Tokenizer,
        train_tokenizer,
    )
    from keras_bwetaf.preset_files import list_presets
    from keras_bwetaf.presets import from_preset
    from keras_bwetaf.processes import initialize, is_first_process
    from keras_bwetaf.run.runner import train
    from keras_bwetaf.training import recipe
    from keras_bwetaf.upload import upload_preset

__version__ = version("keras-bwetaf")

__all__ = [
    "BwETAFBackbone",
    "BwETAFCausalLM",
    "BwETAFCausalLMPreprocessor",
    "BwETAFSampler",
    "BwETAFTokenizer",
    "BwETAFV2Backbone",
    "BwETAFV2CausalLM",
    "BwETAFV2CausalLMPreprocessor",
    "BwETAFV2Tokenizer",
    "BwETAFV4Backbone",
    "BwETAFV4CausalLM",
    "BwETAFV4CausalLMPreprocessor",
    "BwETAFV4Tokenizer",
    "data",
    "distribution",
    "enable_compilation_cache",
    "evaluation",
    "from_preset",
    "initialize",
    "is_first_process",
    "layers",
    "list_presets",
    "models",
    "prompts",
    "recipe",
    "train",
    "train_tokenizer",
    "training",
    "upload_preset",
]

# Where the names are from that are no modules of this package.
_ORIGINS = {
    "BwETAFBackbone": "models",
    "BwETAFCausalLM": "models",
    "BwETAFCausalLMPreprocessor": "models",
    "BwETAFSampler": "generation",
    "BwETAFTokenizer": "models",
    "BwETAFV2Backbone": "models",
    "BwETAFV2CausalLM": "models",
    "BwETAFV2CausalLMPreprocessor": "models",
    "BwETAFV2Tokenizer": "models",
    "BwETAFV4Backbone": "models",
    "BwETAFV4CausalLM": "models",
    "BwETAFV4CausalLMPreprocessor": "models",
    "BwETAFV4Tokenizer": "models",
    "enable_compilation_cache": "compilation_cache",
    "from_preset": "presets",
    "initialize": "processes",
    "is_first_process": "processes",
    "list_presets": "preset_files",
    "recipe": "training",
    "train": "run.runner",
    "train_tokenizer": "models",
    "upload_preset": "upload",
}


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_ORIGINS.get(name, name)}")
    value = getattr(module, name) if name in _ORIGINS else module
    globals()[name] = value
    return value


# Keras finds our classes in saved models once they are imported. In the command
# line nobody else looks for them: each command imports what it needs.
if not _environment.is_command_line():
    for _name in __all__:
        __getattr__(_name)
