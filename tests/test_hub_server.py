import hashlib
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, errors

pytestmark = pytest.mark.fast

REPO = "owner/name"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "good_stuff.pkl").write_bytes(os.urandom(3_000_000))
    (folder / "tokenizer" / "yap.json").write_text("{}")
    return folder


def test_snapshot_equals_the_folder(hub, hub_client, folder):
    commit = hub.add(REPO, folder)

    snapshot = Path(huggingface_hub.snapshot_download(REPO))

    assert snapshot.name == commit
    for name in ("good_stuff.pkl", "tokenizer/yap.json"):
        assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
    assert hub.downloads() == {"good_stuff.pkl": 1, "tokenizer/yap.json": 1}


def test_information_has_sizes_and_hashes(hub, hub_client, folder):
    commit = hub.add(REPO, folder)

    info = HfApi().model_info(REPO, files_metadata=True)

    large, small = info.siblings
    data = (folder / "good_stuff.pkl").read_bytes()
    assert info.sha == commit
    assert large.lfs.sha256 == hashlib.sha256(data).hexdigest()
    assert small.size == 2 and small.lfs is None
    assert small.blob_id == hashlib.sha1(b"blob 2\0{}").hexdigest()


def test_branches_are_commits(hub, hub_client, folder):
    first = hub.add(REPO, folder)
    (folder / "tokenizer" / "yap.json").write_text("[]")
    second = hub.add(REPO, folder, branch="next")

    assert first != second
    assert HfApi().model_info(REPO).sha == first
    assert HfApi().model_info(REPO, revision="next").sha == second
    assert HfApi().model_info(REPO, revision=first).sha == first


def test_dropped_connection_resumes(
    hub,
    hub_client,
    folder,
    monkeypatch,
):
    # A client keeps whole chunks only.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.add(REPO, folder)
    hub.dropped["good_stuff.pkl"] = 1_000_000

    path = huggingface_hub.hf_hub_download(REPO, "good_stuff.pkl")

    assert Path(path).read_bytes() == (folder / "good_stuff.pkl").read_bytes()
    ranges = [headers.get("Range") for method, _, headers in hub.requests][-2:]
    assert ranges == [None, "bytes=1000000-"]


def test_truncated_and_corrupt_bodies(hub, hub_client, folder):
    hub.add(REPO, folder)
    hub.truncated["good_stuff.pkl"] = 1000
    with pytest.raises(OSError, match="should be of size 3000000"):
        huggingface_hub.hf_hub_download(REPO, "good_stuff.pkl")
    hub.truncated.clear()
    hub.corrupt.add("good_stuff.pkl")

    path = huggingface_hub.hf_hub_download(REPO, "good_stuff.pkl")

    data = (folder / "good_stuff.pkl").read_bytes()
    received = Path(path).read_bytes()
    assert sum(a != b for a, b in zip(data, received, strict=True)) == 1


def test_refusals(hub, hub_client, folder):
    hub.add(REPO, folder)
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi().model_info("owner/other")
    with pytest.raises(errors.RevisionNotFoundError):
        HfApi().model_info(REPO, revision="v2")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download(REPO, "model.safetensors")
    hub.gated.add(REPO)
    with pytest.raises(errors.GatedRepoError):
        huggingface_hub.hf_hub_download(REPO, "good_stuff.pkl")
    hub.gated.clear()
    hub.token = "hf_right"
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi().model_info(REPO)
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info(REPO)
    HfApi(token="hf_right").model_info(REPO)


def test_stopped_server_refuses_connections(hub, hub_client, folder):
    hub.add(REPO, folder)
    HfApi().model_info(REPO)  # opens a connection that would be kept

    hub.stop()

    with pytest.raises(errors.HTTPError):
        HfApi().model_info(REPO)
