"""What `upload_preset` gives to a hub that takes everything."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import kagglehub
import pytest

import keras_bwetaf
from tests.models.test_lora import make_lm


class Hub:
    """Files by repository."""

    def __init__(self):
        self.repositories = {}

    def create_repo(self, repo_id, exist_ok):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repositories.setdefault(repo_id, {})
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, filename):
        return filename in self.repositories[repo_id]

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        self.repositories[repo_id][path_in_repo] = path_or_fileobj

    def upload_folder(self, repo_id, folder_path):
        self.repositories[repo_id] |= contents(folder_path)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "stories"
    make_lm().save_to_preset(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "stories")


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    for name in ("create_repo", "file_exists", "upload_file", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


def test_the_card_says_what_loads_the_model(folder, hub):
    files = contents(folder)
    keras_bwetaf.upload_preset("hf://stories", folder)
    uploaded = hub.repositories["me/stories"]
    card = uploaded.pop("README.md").decode()
    assert uploaded == files == contents(folder)
    assert card.startswith("---\nlibrary_name: keras-hub\n")
    assert 'keras_bwetaf.from_preset("hf://me/stories")' in card
    assert "| hidden_dim | 32 |\n" in card
    assert "http" not in card and "| dtype" not in card


def test_a_card_of_ones_own(folder, hub):
    (folder / "README.md").write_text("Fairy tales.")
    files = contents(folder)
    keras_bwetaf.upload_preset("hf://me/stories", str(folder))
    assert hub.repositories["me/stories"] == files == contents(folder)


def test_a_card_that_the_hub_has(folder, hub):
    hub.repositories["me/stories"] = {"README.md": b"Fairy tales."}
    keras_bwetaf.upload_preset("hf://me/stories", folder)
    uploaded = hub.repositories["me/stories"]
    assert uploaded == {"README.md": b"Fairy tales.", **contents(folder)}


def test_other_hubs(folder, hub, monkeypatch):
    calls = []
    monkeypatch.setattr(
        kagglehub, "model_upload", lambda *arguments: calls.append(arguments)
    )
    keras_bwetaf.upload_preset("kaggle://me/stories/keras/a", folder)
    assert calls == [("me/stories/keras/a", str(folder))]
    with pytest.raises(ValueError, match="Unknown URI"):
        keras_bwetaf.upload_preset("me/stories", folder)
    assert not hub.repositories


def test_other_folders(tmp_path, hub):
    tiny = Path(keras_bwetaf.__file__).parent / "assets" / "tiny"
    with pytest.raises(ValueError, match="Only a folder that `save_to.*tiny"):
        keras_bwetaf.upload_preset("hf://me/stories", tiny)
    with pytest.raises(ValueError, match="nothing there"):
        keras_bwetaf.upload_preset("hf://me/stories", tmp_path / "missing")
    assert not hub.repositories
