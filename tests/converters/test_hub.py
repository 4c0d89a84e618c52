import shutil

import pytest

import converters
from converters import CheckpointError
from tests.converters.folders import FORMATS, assert_same_folders

REPO = "owner/tiny"


@pytest.mark.parametrize("layout", FORMATS)
def test_repositories_convert(hub, hub_client, tiny, tmp_path, layout):
    hub.add(REPO, tiny[layout])
    target = tmp_path / "new"
    report = converters.convert("hf://owner/tiny", target, to="safetensors")
    assert report["source"] == "hf://owner/tiny"
    assert report["from"] == layout
    assert_same_folders(target, tiny["safetensors"])


def test_only_a_models_files_are_downloaded(hub, hub_client, copy, tmp_path):
    folder = copy("flax")
    (folder / "training.log").write_text("...")
    hub.add(REPO, folder)
    converters.convert("hf://owner/tiny", tmp_path / "new", to="keras")
    assert "good_stuff.pkl" in hub.downloads()
    assert "training.log" not in hub.downloads()


def test_revisions(hub, hub_client, tiny, copy, tmp_path):
    hub.add(REPO, tiny["flax"])
    other = copy("flax")
    shutil.rmtree(other / "tokenizer")
    commit = hub.add(REPO, other, branch="other")
    for revision in ("other", commit):
        source = f"hf://owner/tiny@{revision}"
        target = tmp_path / revision
        converters.convert(source, target, to="flax")
        assert_same_folders(target, other)
    with pytest.raises(FileNotFoundError, match="v2.*no such revision"):
        converters.inspect("hf://owner/tiny@v2")


def test_shards_are_downloaded(hub, hub_client, tiny, tmp_path):
    sharded, target = tmp_path / "sharded", tmp_path / "new"
    converters.convert(tiny["flax"], sharded, to="torch", max_shard_size=30_000)
    hub.add(REPO, sharded)
    converters.convert("hf://owner/tiny", target, to="flax")
    assert_same_folders(target, tiny["flax"])


def test_second_time_needs_no_network(hub, hub_client, tiny):
    hub.add(REPO, tiny["keras"])
    first = converters.verify("hf://owner/tiny", tiny["flax"], logits=False)
    hub.stop()
    assert first["same"]
    second = converters.verify("hf://owner/tiny", tiny["flax"], logits=False)
    assert second == first


def test_no_network(hub, hub_client):
    hub.stop()
    with pytest.raises(ConnectionError, match="cannot be reached.*a folder"):
        converters.inspect("hf://owner/tiny")


def test_corrupt_downloads_are_removed(hub, hub_client, tiny, tmp_path):
    hub.add(REPO, tiny["flax"])
    hub.corrupt.add("good_stuff.pkl")
    target = tmp_path / "new"
    with pytest.raises(ValueError, match="the download is corrupt and was"):
        converters.convert("hf://owner/tiny", target, to="flax")
    hub.corrupt.clear()
    converters.convert("hf://owner/tiny", target, to="flax")
    assert_same_folders(target, tiny["flax"])


@pytest.mark.parametrize("source", ["hf://tiny", "hf://a/b/c", "hf://a/b@"])
def test_bad_names(source, tmp_path):
    with pytest.raises(CheckpointError, match="hf://owner/repo or"):
        converters.convert(source, tmp_path / "new", to="flax")
