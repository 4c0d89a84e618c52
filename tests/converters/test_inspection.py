import hashlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import converters
from converters import CheckpointError
from tests.converters.folders import FORMATS, canonical_names, read_msgpack


@pytest.mark.parametrize("layout", FORMATS)
def test_every_tensor_is_listed(tiny, layout):
    report = converters.inspect(tiny[layout])
    params = read_msgpack(tiny["flax"] / "good_stuff.pkl")
    count = sum(array.size for array in canonical_names(params).values())
    assert report["path"] == str(tiny[layout])
    assert report["format"] == layout
    assert report["problem"] is None
    assert report["parameters"] == count
    # The weights and two moments, in float32, and the step.
    rows = report["tensors"]
    assert report["bytes"] == sum(row["bytes"] for row in rows)
    steps = 2 if layout == "flax" else 1
    assert report["bytes"] == 3 * 4 * count + 4 * steps
    assert {row["dtype"] for row in rows} == {"float32", "int32"}


def test_facts_of_a_tensor(copy):
    path = copy("safetensors") / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays[name][0, :5] = np.nan
    arrays[name][1, :2] = np.inf, -np.inf
    safetensors.numpy.save_file(arrays, path)
    rows = {row["name"]: row for row in converters.inspect(path)["tensors"]}
    assert rows.keys() == arrays.keys()
    assert rows.pop(name) == {
        "file": "model.safetensors",
        "name": name,
        "dtype": "float32",
        "shape": [16, 32],
        "bytes": 2048,
        "sha256": hashlib.sha256(arrays[name].tobytes()).hexdigest(),
        "nan": 5,
        "inf": 2,
    }
    assert all(row["nan"] == row["inf"] == 0 for row in rows.values())


def test_names_are_the_formats_own(tiny):
    path = tiny["flax"] / "make_stuff_better.pkl"
    report = converters.inspect(path)
    names = {row["name"] for row in report["tensors"]}
    assert "0/nu/params/blocks_0/attn/d_out/b" in names
    report = converters.inspect(tiny["keras"])
    names = {(row["file"], row["name"]) for row in report["tensors"]}
    place = "layers/transformer_block_1/attention/key/vars/0"
    assert ("model.weights.h5", place) in names


def test_problems_do_not_hide_the_tensors(copy):
    folder = copy("safetensors")
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    del arrays["model.embed_tokens.weight"]
    safetensors.numpy.save_file(arrays, path)
    report = converters.inspect(folder)
    assert "missing tensor model.embed_tokens.weight" in report["problem"]
    assert len(report["tensors"]) == 26 + 1 + 2 * 27
    (folder / "config.json").write_text('{"model_type": "bwetaf"}')
    problem = converters.inspect(folder)["problem"]
    assert "vocab_size is missing" in problem


def test_shards_are_listed(tiny, tmp_path):
    target = tmp_path / "sharded"
    converters.convert(tiny["flax"], target, to="torch", max_shard_size=30_000)
    report, whole = map(converters.inspect, (target, tiny["torch"]))
    files = {row["file"] for row in report["tensors"]}
    assert len(files) > 4
    assert report["parameters"] == whole["parameters"]
    digests, expected = (
        {row["name"]: row["sha256"] for row in each["tensors"]}
        for each in (report, whole)
    )
    assert digests == expected


def test_progress_counts_every_byte(tiny):
    calls = []
    report = converters.inspect(
        tiny["keras"], progress=lambda *call: calls.append(call)
    )
    assert len(calls) == len(report["tensors"])
    assert calls[-1] == (report["bytes"], report["bytes"])


def test_what_cannot_be_inspected(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="Received: nothing there"):
        converters.inspect(tmp_path / "nowhere")
    shutil.copy(tiny["flax"] / "stats.json", tmp_path)
    with pytest.raises(CheckpointError, match="ends in .safetensors, .h5,"):
        converters.inspect(tmp_path / "stats.json")
    with pytest.raises(CheckpointError, match="not a model folder"):
        converters.inspect(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match="the file is empty"):
        converters.inspect(tmp_path / "empty.safetensors")
