"""What has to be settled before Keras is imported.

Imported first by `keras_bwetaf`, for its effects.
"""

import os
import sys
from pathlib import Path

from keras_bwetaf import _later


def choose_backend():
    """Makes JAX the backend if nothing else was chosen.

    Raises:
        ImportError: If another backend was chosen.
    """
    if "keras" in sys.modules:
        backend = sys.modules["keras"].config.backend()
        how = "Keras was imported before with"
    else:
        backend = os.environ.setdefault("KERAS_BACKEND", "jax")
        how = "The environment variable KERAS_BACKEND chooses"
    if backend != "jax":
        raise ImportError(
            f"keras_bwetaf runs on Keras's JAX backend. {how} the backend "
            f"{backend!r}. Set KERAS_BACKEND=jax before Keras is imported, "
            "or import keras_bwetaf first, which does it for you."
        )


def is_command_line():
    """Whether this process was started as the command `keras-bwetaf`."""
    # An embedded interpreter has no arguments.
    return Path([*sys.argv, ""][0]).stem == "keras-bwetaf"


choose_backend()
_later.postpone()
