"""A Hub on this machine and a client whose caches are empty."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_client(hub, tmp_path, monkeypatch):
    """Points `huggingface_hub` in this process at the server.

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


def environment(hub, home):
    """The same for a subprocess."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "KERAS_BACKEND": "jax",
    }
