"""What a conversion may change when it is asked to."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from converters import CheckpointError, convert
from tests.converters.folders import (
    FORMATS,
    any_bits,
    assert_same_folders,
    assert_same_tensors,
    canonical_names,
    change_msgpack,
    contents,
    read_json,
    read_msgpack,
    write_original,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = ("float16", "bfloat16", "float32", "float64")


def load(folder, stem="model"):
    """Every tensor of a safetensors folder, by its index if it has one."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return safetensors.numpy.load_file(folder / f"{stem}.safetensors")
    return {
        name: safetensors.numpy.load_file(folder / shard)[name]
        for name, shard in read_json(index)["weight_map"].items()
    }


def weights(folder):
    return canonical_names(read_msgpack(folder / "good_stuff.pkl"))


# === dtype ===


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", FORMATS)
def test_dtype(tiny, tmp_path, to, dtype):
    report = convert(tiny["source"], tmp_path / "new", to=to, dtype=dtype)
    convert(tmp_path / "new", tmp_path / "flax", to="flax")
    convert(tmp_path / "new", tmp_path / "canonical", to="safetensors")
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert_same_tensors(
        weights(tmp_path / "flax"),
        {
            name: array.astype(numpy_dtype)
            for name, array in weights(tiny["source"]).items()
        },
    )
    assert read_json(tmp_path / "canonical" / "config.json")["dtype"] == dtype
    if to == "keras":
        config = read_json(tmp_path / "new" / "config.json")["config"]
        assert config["dtype"]["config"]["name"] == dtype
    name = "make_stuff_better.pkl"
    state, expected = (
        (folder / name).read_bytes()
        for folder in (tmp_path / "flax", tiny["source"])
    )
    assert state == expected
    elements = sum(array.size for array in weights(tiny["source"]).values())
    assert report["bytes"] == elements * (numpy_dtype.itemsize + 8) + 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_strange_numbers(tmp_path, dtype):
    source = write_original(tmp_path / "flax", any_bits("bfloat16"))
    if dtype == "float16":
        with pytest.raises(CheckpointError, match="float16 cannot hold"):
            convert(source, tmp_path / "new", to="torch", dtype=dtype)
        return
    report = convert(source, tmp_path / "new", to="torch", dtype=dtype)
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(invalid="ignore"):
        expected = {
            name: np.ascontiguousarray(array.astype(numpy_dtype))
            for name, array in weights(source).items()
        }
        counts = {
            name: np.count_nonzero(~np.isfinite(array.astype("float64")))
            for name, array in weights(source).items()
        }
    assert_same_tensors(load(tmp_path / "new"), expected)
    assert report["non_finite"] == {
        name: count for name, count in counts.items() if count
    }
    assert sum(counts.values()) > 100


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "dtype, value", [("float16", 65520.0), ("bfloat16", 3.4e38)]
)
def test_dtype_that_cannot_hold_a_value(copy, tmp_path, to, dtype, value):
    folder = copy("source")

    def enlarge(tree):
        tree["params"]["blocks_1"]["d2"]["b"][0, 0, :3] = value, -value, np.inf

    change_msgpack(folder / "good_stuff.pkl", enlarge)
    with pytest.raises(
        CheckpointError,
        match=f"{dtype} cannot hold 2 values of model.layers.1.mlp.down_proj.b",
    ):
        convert(folder, tmp_path / "new", to=to, dtype=dtype)
    assert not (tmp_path / "new").exists()


def test_dtype_makes_halves_of_one_flax_tensor_equal(copy, tmp_path):
    folder = copy("safetensors")
    arrays = load(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name].astype("float64")
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=f"{name} and model.layers.1.mlp.gate_proj.weight are one tensor "
        ".* Received: float64 and float32",
    ):
        convert(folder, tmp_path / "flax", to="flax")
    convert(folder, tmp_path / "flax", to="flax", dtype="float64")
    assert weights(tmp_path / "flax").keys() == arrays.keys()


# === Shards ===


@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("size", [20_000, 100_000])
def test_shards(tiny, tmp_path, to, size):
    folder = tmp_path / "new"
    convert(tiny["source"], folder, to=to, max_shard_size=size)
    for stem in ("model", "optimizer"):
        whole = load(tiny[to], stem)
        assert_same_tensors(load(folder, stem), whole)
        index = read_json(folder / f"{stem}.safetensors.index.json")
        total = sum(array.nbytes for array in whole.values())
        assert index["metadata"] == {"total_size": total}
        shards = sorted(path.name for path in folder.glob(f"{stem}-*"))
        assert shards == sorted({*index["weight_map"].values()})
        assert len(shards) > 1
        for number, shard in enumerate(shards, 1):
            count = len(shards)
            assert shard == f"{stem}-{number:05}-of-{count:05}.safetensors"
            held = safetensors.torch.load_file(folder / shard)
            names = {
                name
                for name, place in index["weight_map"].items()
                if place == shard
            }
            assert held.keys() == names
            sizes = [
                each.numel() * each.element_size() for each in held.values()
            ]
            assert sum(sizes) <= size or len(sizes) == 1
        assert not (folder / f"{stem}.safetensors").exists()
    assert max(each.nbytes for each in load(tiny[to]).values()) == 65_536
    convert(folder, tmp_path / "back", to="flax")
    assert_same_folders(tmp_path / "back", tiny["source"])


def test_shards_that_are_large_enough_for_all(tiny, tmp_path):
    convert(tiny["flax"], tmp_path / "new", to="torch", max_shard_size=10**9)
    assert_same_folders(tmp_path / "new", tiny["torch"])


def test_transformers_loads_shards(tiny, tmp_path):
    """Its own reader of an index, without the model."""
    from transformers.modeling_utils import load_state_dict

    folder = tmp_path / "new"
    convert(tiny["source"], folder, to="torch", max_shard_size=50_000)
    state = {}
    for shard in folder.glob("model-*.safetensors"):
        state |= load_state_dict(shard)
    whole = safetensors.torch.load_file(tiny["torch"] / "model.safetensors")
    assert state.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(state[name], tensor), name


# === The head, written twice ===


@pytest.mark.parametrize("size", [None, 20_000])
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_duplicate_head(tiny, tmp_path, to, size):
    folder = tmp_path / "new"
    convert(
        tiny["source"],
        folder,
        to=to,
        duplicate_head=True,
        max_shard_size=size,
    )
    tensors = load(folder)
    head = {HEAD: tensors[EMBEDDING]}
    assert_same_tensors(tensors, load(tiny[to]) | head)
    assert HEAD not in "".join(load(folder, "optimizer"))
    convert(folder, tmp_path / "back", to=to)
    assert_same_folders(tmp_path / "back", tiny[to])


@pytest.mark.parametrize("change", ["value", "sign of zero", "dtype", "shape"])
def test_head_that_differs(copy, tmp_path, change):
    folder = copy("safetensors")
    arrays = load(folder)
    arrays[EMBEDDING][0, 0] = 0
    arrays[HEAD] = arrays[EMBEDDING].copy()
    if change == "value":
        arrays[HEAD][-1, -1] += 1
    elif change == "sign of zero":
        arrays[HEAD][0, 0] = -0.0
    elif change == "dtype":
        arrays[HEAD] = arrays[HEAD].view("int32")
    else:
        arrays[HEAD] = arrays[HEAD].reshape(-1)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"{HEAD} differs from {EMBEDDING}. Expected: the"
    ):
        convert(folder, tmp_path / "new", to="flax")
    assert not (tmp_path / "new").exists()


# === Without the optimizer ===


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_without_optimizer(copy, tiny, tmp_path, layout, to):
    folder = copy(layout)
    states = ["make_stuff_better.pkl", "optimizer.safetensors"]
    (state,) = [
        folder / name
        for name in [*states, "optimizer.weights.h5"]
        if (folder / name).exists()
    ]
    state.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=state.name):
        convert(folder, tmp_path / "new", to=to)
    report = convert(folder, tmp_path / "new", to=to, optimizer=False)
    assert report["optimizer"] is False
    assert report["tensors"] == 27
    found, whole = contents(tmp_path / "new"), contents(tiny[to])
    missing = whole.keys() - found.keys()
    assert missing <= {*states, "optimizer.weights.h5"} and len(missing) == 1
    assert found == {name: whole[name] for name in found}


# === What is refused ===


def test_wrong_options_are_all_listed(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="3 problems") as error:
        convert(
            tiny["flax"],
            tmp_path / "new",
            to="flax",
            dtype="int8",
            max_shard_size=0,
        )
    for text in (
        "must be one of float16, bfloat16, float32, float64. Received: 'int8'",
        "must be a positive number of bytes. Received: 0",
        "for safetensors and torch only. Received: to='flax'",
    ):
        assert text in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "onnx"}, "one of flax, saf.*, keras, torch. Received: 'onnx'"),
        ({"to": None}, "one of flax, .* Received: None"),
        ({"to": "torch", "max_shard_size": True}, "of bytes. Received: True"),
        ({"to": "torch", "max_shard_size": 1.5}, "of bytes. Received: 1.5"),
        ({"to": "torch", "max_shard_size": "5GB"}, "bytes. Received: '5GB'"),
        ({"to": "torch", "dtype": "float8_e4m3fn"}, "Received: 'float8_e4m3f"),
        ({"to": "torch", "dtype": ["float16"]}, "Received: .'float16'."),
        ({"to": "keras", "duplicate_head": True}, "Received: to='keras'"),
        ({"to": "flax", "max_shard_size": 9}, "Received: to='flax'"),
    ],
)
def test_wrong_options(tiny, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(tiny["flax"], tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_options(tiny, tmp_path):
    with pytest.raises(TypeError, match="shard_size"):
        convert(tiny["flax"], tmp_path / "new", to="torch", shard_size=5)
    with pytest.raises(TypeError, match="'to'"):
        convert(tiny["flax"], tmp_path / "new")
