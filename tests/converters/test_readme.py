"""What the page on converting says works, on a small model."""

import shutil

import pytest
import torch

from tests import pages

PAGE = "docs/converting.md"
PUBLISHED = "hf://WICKED4950/BwETAFv3-97M"


@pytest.fixture
def in_folder(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny["flax"], tmp_path / "flax-folder")
    monkeypatch.chdir(tmp_path)


def test_page(in_folder, remote_code, monkeypatch, capfd):
    names = pages.run(PAGE, monkeypatch, [(PUBLISHED, "flax-folder")])
    assert "torch: 32,192 parameters" in capfd.readouterr().out
    inputs = names["tokenizer"]("the night sky", return_tensors="pt")
    with torch.no_grad():
        logits = names["model"](**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 512)
    assert int(names["lm"].optimizer.iterations) == 7
