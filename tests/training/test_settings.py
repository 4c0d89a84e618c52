"""Settings of a run: files, types, defaults."""

import dataclasses
import json
from pathlib import Path

import pytest

from keras_bwetaf.training.settings import TrainingSettings, read_settings

SETTINGS = {"data": "corpus.txt", "steps": 100, "model": {"num_layers": 2}}
TOML = 'data = "corpus.txt"\nsteps = 100\n[model]\nnum_layers = 2\n'
YAML = "data: corpus.txt\nsteps: 100\nmodel: {num_layers: 2}\n"


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.toml", TOML),
        ("run.yaml", YAML),
        ("run.yml", YAML),
        ("run.json", json.dumps(SETTINGS)),
    ],
)
def test_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert read_settings(path) == SETTINGS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("run.txt", YAML, r"ends with one of .*'.toml'.*Received.*run.txt"),
        ("run.toml", "data =", r"run.toml: "),
        ("run.yaml", "data: [", r"run.yaml: "),
        ("run.json", "{", r"run.json: "),
        ("run.yaml", "just words", r"expected names and values.*str"),
        ("run.yaml", "stepz: 3", r"among \['batch_size'.*Received: \['stepz'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(path)


def test_data_are_as_a_file_holds_them():
    stages = [(Path("first"), 3), ({Path("then"): 0.5, "web": 0.5}, None)]
    settings = TrainingSettings(data=stages, steps=1)
    expected = [["first", 3], [{"then": 0.5, "web": 0.5}, None]]
    assert settings.data == expected
    assert TrainingSettings(data=Path("a.txt"), steps=1).data == "a.txt"


def test_types():
    settings = TrainingSettings(data="a", steps=1, validation_fraction=0)
    assert isinstance(settings.validation_fraction, float)
    with pytest.raises(ValueError) as error:
        TrainingSettings(data=3, steps=True, model="num_layers=2")
    assert str(error.value).splitlines() == [
        "data: expected str or dict or list. Received: data=3",
        "steps: expected int. Received: steps=True",
        "model: expected dict. Received: model='num_layers=2'",
    ]


def test_every_setting_is_explained():
    for field in dataclasses.fields(TrainingSettings):
        assert field.metadata["help"].endswith(".")
