"""Shared set-up: environment before imports, then fixtures."""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"


def pytest_configure():
    """Sharding tests are worth nothing on one device."""
    if jax.device_count() != 8:
        raise RuntimeError(
            f"The tests need 8 CPU devices, found {jax.device_count()}."
        )


@pytest.fixture(scope="session")
def trained_checkpoint():
    """Folder of a model that the original package trained and saved."""
    folder = SHARED / "kjv-6m"
    if not folder.is_dir():
        pytest.skip(f"the trained checkpoint is not at {folder}")
    return folder
