"""A format and an architecture are one object each, in one list."""

import gc
import weakref
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

import converters
from converters import CheckpointError, cli, conversion, formats, verification
from converters.architectures import architecture_of
from converters.checkpoint import check_coverage
from converters.files import read_json
from converters.format import Format
from converters.formats import FORMATS, FormatName
from converters.hub import likeliest
from converters.mapped import View
from converters.safetensors_format import read_safetensors, write_safetensors


class PlainFolder(Format):
    """A format of three files, as somebody might add it."""

    name = entry = "plain"
    sign = "plain.json (plain)"
    runtime = "keras_bwetaf"
    config = "plain.json"
    tokenizer = "tokens.json"
    tokenizer_config = "plain.json"
    required = settings = ("plain.json", "tokens.json")
    heads = weights = ("plain.safetensors",)

    def recognizes(self, folder):
        return (folder / "plain.json").is_file()

    def read_documents(self, folder):
        return {"plain.json": read_json(folder / "plain.json")}

    def special_tokens(self, folder, documents, tokenizer):
        return documents["plain.json"]["special_tokens"]

    def canonical_config(self, folder, documents, eos_token_id=0):
        config = documents["plain.json"]
        architecture = architecture_of(config, source=folder)
        return architecture, architecture.canonical_config(
            config, dtype=config["dtype"], eos_token_id=eos_token_id
        )

    def read_weights(self, folder, rows):
        found = read_safetensors(folder / "plain.safetensors")
        check_coverage(folder, {row.name: row.shape for row in rows}, found)
        return {name: View(tensor) for name, tensor in found.items()}

    def read_optimizer(self, folder, rows):
        return None, {}

    def documents(self, checkpoint):
        special_tokens = {"special_tokens": checkpoint.special_tokens}
        return {"plain.json": checkpoint.config | special_tokens}

    def checked(self, documents, checkpoint):
        return documents

    def write_tensors(self, folder, checkpoint, documents):
        path = folder / "plain.safetensors"
        write_safetensors(path, checkpoint.tensors)


def test_a_new_format_is_one_entry(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "plain", PlainFolder())
    folder, back = tmp_path / "plain", tmp_path / "back"
    source = tmp_path / "source"
    converters.convert(tiny["flax"], source, to="keras", optimizer=False)
    report = converters.convert(source, folder, to="plain")
    assert (report["from"], report["to"]) == ("keras", "plain")
    assert converters.detect_format(folder) == "plain"
    assert converters.inspect(folder)["parameters"] == 32_192
    report = converters.verify(source, folder, logits=False)
    assert report["tensors"] == [] and report["config"] == {}
    assert converters.convert(folder, back, to="flax")["left_behind"] == []
    assert (back / "good_stuff.pkl").read_bytes() == (
        tiny["flax"] / "good_stuff.pkl"
    ).read_bytes()
    with pytest.raises(
        CheckpointError, match="or plain.json .plain.. Received"
    ):
        converters.detect_format(tmp_path)


def test_names_of_formats():
    assert get_args(FormatName) == tuple(FORMATS)
    shown = CliRunner().invoke(cli.app, ["convert", "--help"]).output
    assert all(name in shown for name in FORMATS)
    for name, each in FORMATS.items():
        assert name == each.name
        assert {each.config, each.tokenizer, each.stats} < {*each.files}
        assert {*each.required, *each.heads} < {*each.files}


@pytest.mark.parametrize(
    "names, expected",
    [
        ([], "flax"),
        (["config.json", "tokenizer.json"], "safetensors"),
        (["config.json", "model.safetensors.index.json"], "safetensors"),
        (["config.json", "model.weights.json", "x.h5"], "keras"),
        (["understanding_good_stuff.json", "README.md"], "flax"),
    ],
)
def test_the_likeliest_format_of_a_repository(names, expected):
    assert likeliest(names).name == expected


def test_a_folder_is_looked_at_once(tiny, tmp_path, monkeypatch):
    looks = []

    def find(folder):
        looks.append(folder)
        return formats.find_format(folder)

    monkeypatch.setattr(conversion, "find_format", find)
    monkeypatch.setattr(verification, "find_format", find)
    for to in FORMATS:
        converters.convert(tiny["flax"], tmp_path / to, to=to)
    assert looks == [tiny["flax"]] * len(FORMATS)
    looks.clear()
    converters.verify(tiny["flax"], tiny["keras"], logits=False)
    assert looks == [tiny["flax"], tiny["keras"]]


@pytest.mark.parametrize("model_type", ["llama", None, ["bwetaf"]])
def test_other_architectures(model_type):
    with pytest.raises(
        CheckpointError,
        match="^place: expected model_type 'bwetaf' or .* Received",
    ):
        converters.check_config({"model_type": model_type}, source="place")


def test_a_checkpoint_knows_its_architecture(tiny):
    for name in FORMATS:
        checkpoint = converters.read_checkpoint(tiny[name])
        assert checkpoint.architecture.model_type == "bwetaf"
        assert list(checkpoint.tensors) == [row.name for row in checkpoint.rows]


def test_a_tensor_is_given_back(tiny, monkeypatch):
    """Also where reading it fails."""
    checkpoint = converters.read_checkpoint(tiny["safetensors"])
    row, released = checkpoint.rows[0], []
    monkeypatch.setattr(
        type(checkpoint[row.name].mapped),
        "release",
        lambda self: released.append(self),
    )
    with checkpoint.tensor(row.name) as array:
        assert array.shape == row.shape and not released
    with pytest.raises(ZeroDivisionError), checkpoint.tensor(row.name):
        raise ZeroDivisionError
    assert released == [checkpoint[row.name].mapped] * 2


def test_files_close_with_the_last_tensor(tiny, tmp_path):
    """And not when the collector finds a circle."""
    checkpoint = converters.read_checkpoint(tiny["flax"])
    buffer = weakref.ref(checkpoint[checkpoint.rows[0].name].mapped.buffer)
    gc.disable()
    try:
        converters.write_checkpoint(checkpoint, tmp_path / "new", to="keras")
        del checkpoint
        assert buffer() is None
    finally:
        gc.enable()


def test_a_runtime_that_no_package_brings(tiny, monkeypatch):
    monkeypatch.setattr("converters.runtimes.entry_points", lambda **_: ())
    report = converters.verify(tiny["flax"], tiny["keras"])
    assert report["same"]
    assert report["logits"] == {"skipped": "not installed: keras_bwetaf"}


def test_annotations_are_for_users():
    assert Path(converters.__file__).with_name("py.typed").is_file()
    for name in converters.__all__:
        public = getattr(converters, name)
        if not isinstance(public, type):
            arguments = public.__code__.co_argcount
            arguments += public.__code__.co_kwonlyargcount
            assert len(public.__annotations__) == arguments + 1, name
