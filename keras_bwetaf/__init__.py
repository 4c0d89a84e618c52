"""The BwETAFv3 language model as Keras 3 layers on JAX."""

from keras_bwetaf import _environment  # noqa: F401, I001  must come first

from importlib.metadata import version

from keras_bwetaf import data, distribution, layers, models, training
from keras_bwetaf.generation import BwETAFSampler
from keras_bwetaf.models import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    BwETAFTokenizer,
    train_tokenizer,
)
from keras_bwetaf.preset_files import list_presets
from keras_bwetaf.presets import from_preset
from keras_bwetaf.processes import initialize, is_first_process
from keras_bwetaf.training import recipe
from keras_bwetaf.run.runner import train
from keras_bwetaf.upload import upload_preset

__version__ = version("keras-bwetaf")

__all__ = [
    "BwETAFBackbone",
    "BwETAFCausalLM",
    "BwETAFCausalLMPreprocessor",
    "BwETAFSampler",
    "BwETAFTokenizer",
    "data",
    "distribution",
    "from_preset",
    "initialize",
    "is_first_process",
    "layers",
    "list_presets",
    "models",
    "recipe",
    "train",
    "train_tokenizer",
    "training",
    "upload_preset",
]
