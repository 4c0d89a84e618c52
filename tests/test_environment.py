"""`import keras_bwetaf` in a fresh process."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast


def run(script, **environment):
    environment = {**os.environ, **environment}
    environment = {k: v for k, v in environment.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_import_is_silent_and_chooses_jax():
    done = run(
        "import keras_bwetaf, keras; assert keras.backend.backend() == 'jax'",
        KERAS_BACKEND=None,
        TF_CPP_MIN_LOG_LEVEL=None,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_not_tensorflows_chatter_is_shown():
    done = run(
        "import os; from keras_bwetaf._later import without_chatter\n"
        "with without_chatter():\n"
        "    os.write(2, b'W0000 00:00:1.5 7 port.cc:153] oneDNN is on\\n')\n"
        "    os.write(2, b'Segmentation fault\\n')\n"
    )
    assert done.stderr == "Segmentation fault\n"


def test_another_backend_is_refused():
    done = run("import keras_bwetaf", KERAS_BACKEND="tensorflow")
    assert done.returncode == 1
    assert "ImportError: keras_bwetaf runs on Keras's JAX backend. The " in (
        done.stderr
    )
    assert "KERAS_BACKEND chooses the backend 'tensorflow'" in done.stderr


def test_keras_loaded_before_with_another_backend_is_refused():
    done = run(
        "import os, keras\nos.environ['KERAS_BACKEND'] = 'jax'\n"
        "import keras_bwetaf",
        KERAS_BACKEND="tensorflow",
    )
    assert "Keras was imported before with the backend 'tensorflow'" in (
        done.stderr
    )
