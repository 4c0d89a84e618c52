"""Settings of a run: files, types, defaults."""

import dataclasses
import json
from pathlib import Path

import pytest

from keras_bwetaf.layers.transformer_block import REMAT
from keras_bwetaf.run.settings import TrainingSettings, read_settings

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
    "text, value",
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5e1", 5.0)]
    + [("1.0e-3", 1e-3), ("3", 3), ("0.5", 0.5), ("e3", "e3"), ("1e", "1e")],
)
def test_yaml_numbers(tmp_path, text, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"recipe: {{peak_learning_rate: {text}}}\n")
    received = read_settings(path)["recipe"]["peak_learning_rate"]
    assert received == value and type(received) is type(value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("run.txt", YAML, r"ends with one of .*'.toml'.*Received.*run.txt"),
        ("run.toml", "data =", r"run.toml: "),
        ("run.yaml", "data: [", r"run.yaml: "),
        ("run.json", "{", r"run.json: "),
        ("run.yaml", "just words", r"expected names and values.*str"),
        ("run.yaml", "stepz: 3", r"stepz \(did you mean steps\?\)"),
        ("run.yaml", "3: 4", "no such settings: 3"),
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


def test_choices_are_those_of_the_model():
    (remat,) = [
        field
        for field in dataclasses.fields(TrainingSettings)
        if field.name == "remat"
    ]
    assert remat.metadata["choices"] == REMAT


def test_one_sample():
    settings = TrainingSettings(data="a", steps=1, sample="Once")
    assert settings.sample == ["Once"]


def test_every_setting_is_explained():
    for field in dataclasses.fields(TrainingSettings):
        assert field.metadata["help"].endswith(".")
