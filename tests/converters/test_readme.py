"""What the README says of moving models works, on a small one."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import keras_bwetaf
from converters import cli

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.search(
    r"### Moving models.*?(?=\n### )", README.read_text(), re.DOTALL
)[0]
PUBLISHED = "hf://WICKED4950/BwETAFv3-97M"


def example(language, number=0):
    pattern = rf"```{language}\n(.*?)```"
    return re.findall(pattern, SECTION, re.DOTALL)[number]


@pytest.fixture
def in_folder(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny["flax"], tmp_path / "flax-folder")
    shutil.copytree(tiny["torch"], tmp_path / "bwetaf-torch")
    monkeypatch.chdir(tmp_path)


def test_commands(in_folder, monkeypatch, capfd):
    shutil.rmtree("bwetaf-torch")
    for line in example("bash").strip().splitlines():
        arguments = shlex.split(line.replace(PUBLISHED, "flax-folder"))
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
    assert "torch: 32,192 parameters" in capfd.readouterr().out


def test_transformers(in_folder, remote_code):
    names = {}
    exec(example("python"), names)
    inputs = names["tokenizer"]("the night sky", return_tensors="pt")
    with torch.no_grad():
        logits = names["model"](**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 512)


def test_training_goes_on(in_folder):
    names = {"keras_bwetaf": keras_bwetaf}
    exec(example("python", 1), names)
    assert int(names["lm"].optimizer.iterations) == 7
