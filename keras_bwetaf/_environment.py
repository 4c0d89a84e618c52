"""What has to be settled before Keras is imported.

Imported first by `keras_bwetaf`, for its effects.
"""

import contextlib
import os
import re
import sys
import tempfile

# What TensorFlow, which KerasHub imports, writes to the terminal by itself.
# No environment variable turns it off.
_CHATTER = re.compile(
    r"WARNING: All log messages before absl::InitializeLog"
    r"|[IWE]\d{4} [\d:. ]+ (port|cudart_stub|cuda_\w+|computation_placer"
    r"|cpu_feature_guard)\.cc:"
    r"|To enable the following instructions: "
)


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


@contextlib.contextmanager
def without_chatter():
    """Keeps TensorFlow's own log lines from the terminal, and only those."""
    try:
        terminal = os.dup(2)
    except OSError:  # No standard error, as under pythonw.
        yield
        return
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                if not _CHATTER.match(line):
                    print(line, file=sys.stderr)


def import_keras_hub():
    """Imports KerasHub, and keeps the TensorFlow it brings off the GPU."""
    # Whoever imported TensorFlow without KerasHub has a use for it.
    is_ours = "tensorflow" not in sys.modules or "keras_hub" in sys.modules
    # TensorFlow only cuts texts into batches here, and complains of oneDNN.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with without_chatter():
        import keras_hub  # noqa: F401

        tensorflow = sys.modules.get("tensorflow")
        if is_ours and tensorflow is not None:
            with contextlib.suppress(RuntimeError):  # It is in use already.
                tensorflow.config.set_visible_devices([], "GPU")


choose_backend()
import_keras_hub()
