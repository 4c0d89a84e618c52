"""Checkpoint formats of BwETAF models, and the lossless ways between them.

Flax (the original's folder), safetensors (the canonical folder), Keras (a
KerasHub preset) and PyTorch (a `transformers` folder). Needs neither Keras
nor JAX nor PyTorch.
"""

from converters.architectures import (
    check_config,
    config_from_flax,
    config_from_keras,
    config_to_flax,
    config_to_keras,
)
from converters.conversion import convert, write_checkpoint
from converters.errors import CheckpointError
from converters.formats import detect_format, read_checkpoint
from converters.inspection import inspect
from converters.verification import verify

__all__ = [
    "CheckpointError",
    "check_config",
    "config_from_flax",
    "config_from_keras",
    "config_to_flax",
    "config_to_keras",
    "convert",
    "detect_format",
    "inspect",
    "read_checkpoint",
    "verify",
    "write_checkpoint",
]
