import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants

import converters
from converters import CheckpointError
from tests.converters.folders import FORMATS, assert_same_folders

pytestmark = pytest.mark.fast

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


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_without_the_hub(
    hub, hub_client, tiny, copy, tmp_path, layout, stopped, monkeypatch
):
    """What this package or another one downloaded before does as well."""
    folder = copy(layout)
    (folder / "README.md").write_text("Not needed, so not in the cache.")
    hub.add(REPO, folder)
    hub.add("owner/other", folder)
    converters.inspect("hf://owner/tiny")
    huggingface_hub.snapshot_download("owner/other")
    if stopped:
        hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for repo in ("tiny", "other"):
        assert converters.inspect(f"hf://owner/{repo}")["problem"] is None
        converters.convert(f"hf://owner/{repo}", tmp_path / repo, to="keras")
        assert_same_folders(tmp_path / repo, tiny["keras"])
        report = converters.verify(
            f"hf://owner/{repo}@main", folder, logits=False
        )
        assert report["same"]


def test_offline_and_not_in_the_cache(
    hub, hub_client, tiny, tmp_path, monkeypatch
):
    hub.add(REPO, tiny["flax"])
    everything = ["*"]
    weights = ["good_stuff.pkl", "understanding*", "tokenizer/*"]
    message = "not in the cache, or not all of it, and HF_HUB_OFFLINE forbids"
    for patterns in (None, weights, everything):
        if patterns:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            huggingface_hub.snapshot_download(REPO, allow_patterns=patterns)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if patterns == everything:
            break
        with pytest.raises(ConnectionError, match=message):
            # Or the optimizer's state would be left out without a word.
            converters.convert("hf://owner/tiny", tmp_path / "x", to="torch")
    assert converters.inspect("hf://owner/tiny")["problem"] is None


@pytest.mark.parametrize(
    "source, message",
    [
        ("https://huggingface.co/a/b", "Expected hf://a/b. Received: source='"),
        ("https://hf.co/a/b/", "Expected hf://a/b. Received"),
        ("http://www.huggingface.co/a/b/tree/v2/x", "Expected hf://a/b@v2. R"),
        ("https://huggingface.co/datasets/a/b", "hf://owner/repo or hf://own"),
        ("https://example.org/a/b", "downloaded first, or a repository of th"),
        ("kaggle://a/b/keras/c", "downloaded first.*'kaggle://a/b/keras/c'"),
        ("gs://bucket/model", "downloaded first.*Received: source='gs://bu"),
        ("owner/repo", "an existing folder, or hf://owner/repo. Received"),
    ],
)
def test_other_addresses(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (
        lambda: converters.inspect(source),
        lambda: converters.verify(source, "x"),
        lambda: converters.convert(source, "new", to="flax"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_any_case_of_the_scheme(hub, hub_client, tiny, tmp_path, monkeypatch):
    hub.add(REPO, tiny["flax"])
    assert converters.inspect("HF://owner/tiny")["format"] == "flax"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny["keras"], tmp_path / REPO)
    assert converters.inspect(REPO)["format"] == "keras"


@pytest.mark.parametrize("source", ["hf://tiny", "hf://a/b/c", "hf://a/b@"])
def test_bad_names(source, tmp_path):
    with pytest.raises(CheckpointError, match="hf://owner/repo or"):
        converters.convert(source, tmp_path / "new", to="flax")
