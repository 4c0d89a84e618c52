"""Shared set-up: environment before imports, then fixtures."""

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Many tests compile the same programs, in several processes.
COMPILED = "JAX_COMPILATION_CACHE_DIR"
HAS_OWN_CACHE = COMPILED not in os.environ
if HAS_OWN_CACHE:
    os.environ[COMPILED] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import huggingface_hub  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from huggingface_hub import constants  # noqa: E402

with contextlib.suppress(ImportError):
    # PyTorch's build for CUDA brings it. Its library ends the process if that
    # of TensorFlow was loaded before.
    import triton  # noqa: E402, F401

from tests import trained  # noqa: E402
from tests.hub_server import HubServer  # noqa: E402


def pytest_configure():
    """Sharding tests are worth nothing on one device."""
    if jax.device_count() != 8:
        raise RuntimeError(
            f"The tests need 8 CPU devices, found {jax.device_count()}."
        )


def pytest_unconfigure():
    if HAS_OWN_CACHE:
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


GROWTH = 300 * 2**20  # Bytes.
after_freeing = 0


def resident():
    """Bytes of memory that this process has; 0 where Linux's are unknown."""
    path = Path("/proc/self/statm")
    pages = path.read_text().split()[1] if path.exists() else 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def without_old_programs():
    """Frees what tests compiled, or a process grows to gigabytes.

    What a test still needs is then read from the folder of compiled programs.
    """
    global after_freeing
    yield
    if resident() < after_freeing + GROWTH:
        return
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Or glibc keeps what was freed.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    after_freeing = resident()


@pytest.fixture(scope="session", params=trained.NAMES)
def trained_checkpoint(request):
    """Folder of a model that the original package trained and saved."""
    return trained.checkpoint(request.param)


@pytest.fixture(scope="session")
def trained_documents(trained_checkpoint):
    """Texts that `trained_checkpoint` knows: "train", and not: "val"."""
    return trained.documents(trained_checkpoint)


@pytest.fixture(scope="session")
def validation_rows(trained_checkpoint):
    """Tokens of the documents "val": uint16 (rows, 512), EOS is 0."""
    return trained.validation_rows(trained_checkpoint)


@pytest.fixture
def hub():
    """A Hub on this machine."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_client(hub, tmp_path, monkeypatch):
    """Points `huggingface_hub` in this process at the hub, caches empty.

    It reads its environment when it is imported, so the constants are
    replaced; everything that we call looks them up there.
    """
    home = tmp_path / "huggingface"
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield home
    huggingface_hub.close_session()
