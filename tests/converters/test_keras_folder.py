"""The converters' Keras folder and Keras's own, checked against each other."""

import json
import shutil
import warnings

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_bwetaf
from converters import CheckpointError, convert, detect_format, read_checkpoint
from converters.keras_folder import optimizer_names, place
from converters.mapped import DTYPES
from keras_bwetaf.models import BwETAFBackbone, BwETAFCausalLM
from tests.converters.folders import (
    FORMATS,
    assert_same_folders,
    assert_same_tensors,
    read_json,
    read_msgpack,
    write_json,
)

pytestmark = pytest.mark.fast

DOCUMENTS = (
    "config.json",
    "metadata.json",
    "tokenizer.json",
    "preprocessor.json",
    "task.json",
)
OF_THE_MOMENT = ("keras_version", "keras_hub_version", "date_saved")


@pytest.fixture(scope="module")
def lm(tiny):
    # Keras numbers the names of objects; here, these are the first ones.
    keras.backend.clear_session(free_memory=False)
    return keras_bwetaf.from_preset(tiny["flax"])


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    """The folder that Keras writes."""
    folder = tmp_path_factory.mktemp("keras") / "saved"
    lm.save_to_preset(str(folder))
    return folder


def values(lm):
    return {
        weight.path: np.asarray(weight.value) for weight in lm.backbone.weights
    }


# === Documents and places ===


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_those_of_keras(tiny, saved, name):
    ours, keras_own = (
        read_json(each / name) for each in (tiny["keras"], saved)
    )
    for key in OF_THE_MOMENT:
        assert key not in ours
        assert (key in keras_own) == (name == "metadata.json")
        keras_own.pop(key, None)
    assert json.dumps(ours) == json.dumps(keras_own)


def test_files_are_those_of_keras(tiny, saved):
    def names(folder):
        return {
            each.relative_to(folder).as_posix()
            for each in folder.rglob("*")
            if each.is_file()
        }

    more = {"conversion_extras.json", "optimizer.weights.h5", "stats.json"}
    assert names(tiny["keras"]) == names(saved) | more


def test_places_are_those_of_keras(lm, saved):
    """Each variable's place, by writing its path's number into it."""
    rows = {row.keras: row for row in read_checkpoint(saved).rows}
    assert rows.keys() == values(lm).keys()
    config = lm.backbone.get_config()
    backbone = BwETAFBackbone.from_config(config)
    for number, variable in enumerate(backbone.weights):
        variable.assign(np.full(variable.shape, number))
    path = saved.parent / "numbered.weights.h5"
    backbone.save_weights(path)
    with h5py.File(path) as file:
        for number, variable in enumerate(backbone.weights):
            stored = file[place(variable.path)][()]
            assert stored.shape == rows[variable.path].shape
            assert (stored == number).all(), variable.path


@pytest.mark.parametrize("to", FORMATS)
def test_what_keras_saved_converts(tiny, saved, tmp_path, to):
    report = convert(saved, tmp_path / "new", to=to)
    assert report["from"] == "keras" and report["left_behind"] == []
    assert not report["optimizer"]
    convert(tmp_path / "new", tmp_path / "flax", to="flax")
    assert (tmp_path / "flax" / "good_stuff.pkl").read_bytes() == (
        tiny["flax"] / "good_stuff.pkl"
    ).read_bytes()
    convert(tmp_path / "new", tmp_path / "back", to="keras")
    for name in [*DOCUMENTS, "assets/tokenizer/tokenizer.json"]:
        assert (tmp_path / "back" / name).read_bytes() == (
            saved / name
        ).read_bytes(), name
    path = tmp_path / "back" / "model.weights.h5"
    assert path.read_bytes() == (tiny["keras"] / path.name).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_that_keras_saved(lm, tiny, tmp_path, dtype):
    other = keras_bwetaf.from_preset(tiny["flax"], dtype=dtype)
    other.save_to_preset(str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "new", to="keras")
    assert (tmp_path / "saved" / "task.json").read_bytes() == (
        tmp_path / "new" / "task.json"
    ).read_bytes()
    loaded = keras_bwetaf.from_preset(tmp_path / "new", dtype=dtype)
    assert_same_tensors(values(loaded), values(other))


def test_shards_that_keras_saved(lm, tiny, tmp_path):
    folder = tmp_path / "sharded"
    lm.backbone.save_to_preset(str(folder), max_shard_size=7e-5)
    assert len(list(folder.glob("model_*.weights.h5"))) == 2
    assert not (folder / "model.weights.h5").exists()
    convert(folder, tmp_path / "new", to="safetensors")
    assert_same_tensors(
        *(
            safetensors.numpy.load_file(each / "model.safetensors")
            for each in (tmp_path / "new", tiny["safetensors"])
        )
    )


# === Keras loads what we write ===


def test_keras_loads_what_we_write(every, tmp_path):
    """The published classes' own `from_preset`, whatever wrote the folder."""
    expected = read_checkpoint(every["keras"])
    dtype = expected.config["dtype"].replace("float64", "float32")
    with np.errstate(all="ignore"):
        backbone = BwETAFBackbone.from_preset(str(every["keras"]), dtype=dtype)
        assert_same_tensors(
            {each.path: np.asarray(each.value) for each in backbone.weights},
            {
                row.keras: expected[row.name].array().astype(DTYPES[dtype])
                for row in expected.rows
            },
        )


def test_text_is_the_same(trained_checkpoint, tmp_path):
    convert(trained_checkpoint, tmp_path / "torch", to="torch")
    convert(tmp_path / "torch", tmp_path / "keras", to="keras")
    expected = keras_bwetaf.from_preset(trained_checkpoint)
    ours = keras_bwetaf.from_preset(tmp_path / "keras")
    theirs = BwETAFCausalLM.from_preset(str(tmp_path / "keras"))
    texts = [
        lm.generate("And God said", max_length=24, seed=0)
        for lm in (expected, ours, theirs)
    ]
    assert len(set(texts)) == 1 and len(texts[0]) > len("And God said")
    assert_same_tensors(values(ours), values(expected))
    assert_same_tensors(values(theirs), values(expected))


# === The optimizer's state ===


def test_optimizer_by_hand(tiny):
    with h5py.File(tiny["keras"] / "optimizer.weights.h5") as file:
        state = read_msgpack(tiny["source"] / "make_stuff_better.pkl")
        adam = state["0"]
        assert file["iteration"][()] == adam["count"] == 7
        for keras_name, name in (("momentum", "mu"), ("velocity", "nu")):
            block = adam[name]["params"]["blocks_1"]
            layer = file[keras_name]["transformer_layer_1"]
            for place, array in {
                "attention_norm/scale": block["ln1"]["scale"],
                "self_attention/query/kernel": block["attn"]["q_dense"]["w"].T,
                "feedforward/gate/kernel": block["d1"]["w"][:, 48:].T,
                "feedforward/gate/bias": block["d1"]["b"][0, 0, 48:],
                "feedforward/intermediate/bias": block["d1"]["b"][0, 0, :48],
            }.items():
                np.testing.assert_array_equal(layer[place][()], array)


def test_optimizer_variables_are_those_of_keras(lm, tiny):
    """Step, learning rate, and both moments of each variable by its path."""
    optimizer = keras.optimizers.AdamW(name="adam_w")
    optimizer.build(lm.backbone.trainable_variables)
    names = {
        variable.path.removeprefix("adam_w/")
        for variable in optimizer.variables
    } - {"learning_rate"}
    places = optimizer_names(read_checkpoint(tiny["keras"]).rows)
    moments = {"momentum": "momentum", "velocity": "velocity"}
    ours = set()
    for each in places:
        first, _, path = each.partition("/")
        ours.add(f"{path.replace('/', '_')}_{moments[first]}" if path else each)
    assert ours == names


# === Missing, extra, misshapen ===


def test_problems_are_all_listed(copy, tmp_path):
    folder = copy("keras")
    first = "layers/transformer_block"
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        del file[f"{first}/attention_norm/vars/0"]
        del file[f"{first}_1/feedforward/gate/vars/1"]
        file[f"{first}_1/feedforward/gate/vars/1"] = np.ones(7, "float32")
        file[f"{first}_2/feedforward/gate/vars/1"] = np.ones(7, "float32")
        del file["layers/reversible_embedding/vars/0"]
        file["layers/reversible_embedding/vars/0"] = np.ones((512, 32), "int8")
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "new", to="flax")
    lines = str(error.value).splitlines()
    assert lines[0].endswith(": 4 problems:")
    assert str(folder) in lines[0]
    assert sorted(lines[1:]) == [
        f"- missing tensor {first}/attention_norm/vars/0, expected with shape "
        "(32,)",
        "- tensor layers/reversible_embedding/vars/0 has dtype int8, expected "
        "one of float16, bfloat16, float32, float64",
        f"- tensor {first}_1/feedforward/gate/vars/1 has shape (7,), but the "
        "configuration gives (48,)",
        f"- unexpected tensor {first}_2/feedforward/gate/vars/1 of shape (7,)",
    ]
    assert not (tmp_path / "new").exists()


def test_problems_of_the_optimizer_are_all_listed(copy, tmp_path):
    folder = copy("keras")
    with h5py.File(folder / "optimizer.weights.h5", "r+") as file:
        del file["iteration"]
        file["iteration"] = np.int64(3)
        del file["momentum/token_embedding/embeddings"]
        file["momentum/more"] = np.ones(2)
    with pytest.raises(CheckpointError, match="3 problems") as error:
        convert(folder, tmp_path / "new", to="flax")
    for text in (
        "optimizer.weights.h5",
        "tensor iteration has dtype int64, expected one of int32",
        "missing tensor momentum/token_embedding/embeddings",
        "unexpected tensor momentum/more of shape (2,)",
    ):
        assert text in str(error.value)


@pytest.mark.slow
def test_quantized_preset(tiny, tmp_path):
    lm = keras_bwetaf.from_preset(tiny["flax"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`quantize` method")
        lm.backbone.quantize("int8")
    lm.save_to_preset(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match="the weights are quantized"):
        convert(tmp_path / "saved", tmp_path / "new", to="flax")
    assert not (tmp_path / "new").exists()


def test_lora_preset(tiny, tmp_path):
    """Keras saves the sum of kernel and adapter, and that is converted."""
    lm = keras_bwetaf.from_preset(tiny["flax"])
    before = values(lm)
    lm.backbone.enable_lora(2)
    attention = lm.backbone.transformer_layers[1].attention
    attention.query.lora_kernel_a.assign(
        np.ones(attention.query.lora_kernel_a.shape)
    )
    path = "transformer_layer_1/self_attention/query/kernel"
    merged = np.asarray(attention.query.kernel)
    lm.save_to_preset(str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "new", to="torch")
    checkpoint = read_checkpoint(tmp_path / "new")
    assert_same_tensors(
        {row.keras: checkpoint[row.name].array() for row in checkpoint.rows},
        before | {path: merged},
    )
    assert np.abs(merged - before[path]).max() > 1e-3


def test_tensor_in_two_shards(lm, tmp_path):
    folder = tmp_path / "sharded"
    lm.backbone.save_to_preset(str(folder), max_shard_size=7e-5)
    first, *_, last = sorted(folder.glob("model_*.weights.h5"))
    name = "layers/reversible_embedding/vars/0"
    with h5py.File(first) as file, h5py.File(last, "r+") as other:
        other[name] = file[name][()]
    with pytest.raises(
        CheckpointError, match=f"{last.name}: tensors of .* occur again: {name}"
    ):
        convert(folder, tmp_path / "new", to="flax")
    last.unlink()
    with pytest.raises(CheckpointError, match=f"{last.name}: the file is miss"):
        convert(folder, tmp_path / "new", to="flax")


@pytest.mark.parametrize(
    "weight_map",
    [
        3,
        {},
        {"a": "../model_00000.weights.h5"},
        {"a": "/model_00000.weights.h5"},
        {"a": ["model_00000.weights.h5", "other.h5"]},
        {"a": None},
        {"a": {"b": 1}},
    ],
)
def test_index_cannot_leave_the_folder(copy, tmp_path, weight_map):
    folder = copy("keras")
    (folder / "model.weights.h5").unlink()
    content = json.dumps({"weight_map": weight_map})
    (folder / "model.weights.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map must name model_"):
        convert(folder, tmp_path / "new", to="flax")


@pytest.mark.parametrize(
    "name, message",
    [
        ("config.json", "not a model folder"),
        ("model.weights.h5", "model.weights.h5: the file is missing"),
        ("tokenizer.json", "tokenizer.json: the file is missing"),
    ],
)
def test_missing_and_damaged_files(copy, tmp_path, name, message):
    folder = copy("keras")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    expected = "HDF5 file that can" if name.endswith("h5") else "expected JSON"
    with pytest.raises(CheckpointError, match=f"{name}: .*{expected}"):
        convert(folder, tmp_path / "new", to="flax")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "new", to="flax")


def test_documents_that_may_be_missing(copy, tiny, tmp_path):
    folder = copy("keras")
    for name in ("metadata.json", "preprocessor.json", "task.json"):
        (folder / name).unlink()
    convert(folder, tmp_path / "flax", to="flax")
    convert(tmp_path / "flax", tmp_path / "back", to="keras")
    assert_same_folders(tmp_path / "back", folder)
    assert detect_format(folder) == "keras"
    shutil.rmtree(folder / "assets")
    (folder / "tokenizer.json").unlink()
    convert(folder, tmp_path / "torch", to="torch")
    assert not (tmp_path / "torch" / "tokenizer.json").exists()


def test_model_of_another_class(copy, tmp_path):
    folder = copy("keras")
    document = read_json(folder / "config.json")
    for change, message in [
        ({"registered_name": "keras_hub>LlamaBackbone"}, "LlamaBackbone"),
        ({"config": None}, "config of type NoneType"),
        (
            {"config": document["config"] | {"num_layers": "2"}},
            "num_layers must be an integer .* Received: '2'",
        ),
    ]:
        write_json(folder / "config.json", document | change)
        with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
            convert(folder, tmp_path / "new", to="flax")
