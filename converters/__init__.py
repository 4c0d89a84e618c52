"""Checkpoint formats of BwETAF models, and the lossless ways between them.

Flax (the original's folder) <-> safetensors (the canonical folder) -> Keras
variables. Needs neither Keras nor JAX.
"""

from converters.bwetaf_v3_config import (
    check_config,
    config_from_flax,
    config_from_keras,
    config_to_flax,
    config_to_keras,
)
from converters.canonical import (
    detect_format,
    flax_to_safetensors,
    keras_tensors,
    read_config,
    safetensors_to_flax,
)
from converters.errors import CheckpointError
from converters.flax_format import read_flax, write_flax
from converters.safetensors_format import (
    read_safetensors,
    read_safetensors_folder,
    write_safetensors,
)

__all__ = [
    "CheckpointError",
    "check_config",
    "config_from_flax",
    "config_from_keras",
    "config_to_flax",
    "config_to_keras",
    "detect_format",
    "flax_to_safetensors",
    "keras_tensors",
    "read_config",
    "read_flax",
    "read_safetensors",
    "read_safetensors_folder",
    "safetensors_to_flax",
    "write_flax",
    "write_safetensors",
]
