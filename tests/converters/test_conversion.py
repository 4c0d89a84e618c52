"""Every way between the formats keeps every bit."""

import filecmp
import itertools
import json
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch

import converters
from converters import CheckpointError, convert, detect_format
from tests import original
from tests.converters.folders import (
    FORMATS,
    any_bits,
    assert_same_folders,
    assert_same_tensors,
    canonical_names,
    change_msgpack,
    contents,
    convert_to_all,
    read_json,
    read_msgpack,
    write_msgpack,
    write_original,
)

# === No bit changes ===


def test_flax_comes_home(every):
    assert_same_folders(every["flax"], every["source"])


@pytest.mark.parametrize("layout", FORMATS)
def test_every_pair(every, layout, tmp_path):
    for to in FORMATS:
        convert(every[layout], tmp_path / to, to=to)
        assert_same_folders(tmp_path / to, every[to])


def test_full_circle(every, tmp_path):
    folder = every["source"]
    for to in ("safetensors", "keras", "torch", "flax"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    assert_same_folders(folder, every["source"])


@pytest.mark.parametrize("layout", ["safetensors", "torch"])
def test_canonical_tensors_by_hand(every, layout):
    expected = canonical_names(read_msgpack(every["source"] / "good_stuff.pkl"))
    path = every[layout] / "model.safetensors"
    assert_same_tensors(safetensors.numpy.load_file(path), expected)


def read_hdf5(path):
    """Every array of an HDF5 file, as Keras means it."""
    arrays = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            array = item[()]
            if item.attrs.get("dtype") == "bfloat16":
                array = array.view(ml_dtypes.bfloat16)
            arrays[name] = np.asarray(array)

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return arrays


def test_keras_tensors_by_hand(every):
    names = {
        "input_layernorm.weight": "attention_norm/vars/0",
        "self_attn.q_proj.weight": "attention/query/vars/0",
        "self_attn.k_proj.weight": "attention/key/vars/0",
        "self_attn.v_proj.weight": "attention/value/vars/0",
        "self_attn.o_proj.weight": "attention/attention_output/vars/0",
        "self_attn.o_proj.bias": "attention/attention_output/vars/1",
        "post_attention_layernorm.weight": "feedforward_norm/vars/0",
        "mlp.up_proj.weight": "feedforward/intermediate/vars/0",
        "mlp.up_proj.bias": "feedforward/intermediate/vars/1",
        "mlp.gate_proj.weight": "feedforward/gate/vars/0",
        "mlp.gate_proj.bias": "feedforward/gate/vars/1",
        "mlp.down_proj.weight": "feedforward/output_dense/vars/0",
        "mlp.down_proj.bias": "feedforward/output_dense/vars/1",
    }
    expected = {}
    for name, array in canonical_names(
        read_msgpack(every["source"] / "good_stuff.pkl")
    ).items():
        place = "layers/reversible_embedding/vars/0"
        if name != "model.embed_tokens.weight":
            _, _, layer, rest = name.split(".", 3)
            number = f"_{layer}" if int(layer) else ""
            place = f"layers/transformer_block{number}/{names[rest]}"
        expected[place] = array
    assert_same_tensors(
        read_hdf5(every["keras"] / "model.weights.h5"), expected
    )


def test_small_models_hold_what_they_should():
    dtypes = ("float16", "float32", "float64", "bfloat16")
    draw = any_bits(*dtypes)
    for dtype in dtypes:
        array = draw(64, 64)
        assert array.dtype.name == dtype
        with np.errstate(invalid="ignore"):  # a signaling NaN
            assert np.isnan(array[0, 2])
        assert np.signbit(array[0, 0]) and array[0, 0] == 0
        assert 0 < array[0, 1] < ml_dtypes.finfo(dtype).tiny


@pytest.mark.slow
def test_model_that_the_original_saved(save_flax, tmp_path):
    source = save_flax(
        dtype="bfloat16",
        num_heads=(2, 4),
        attn_chunks=2,
        emb_scaling_factor=1.0,
    )
    folders = convert_to_all(source, tmp_path / "to")
    assert_same_folders(folders["flax"], source)


def test_keys_that_nobody_sorted(tmp_path):
    """As the original saves a model that has not made a training step."""
    source = write_original(tmp_path / "flax")
    tree = read_msgpack(source / "good_stuff.pkl")
    tree["params"] = dict(reversed(tree["params"].items()))
    write_msgpack(source / "good_stuff.pkl", tree)
    convert(source, tmp_path / "keras", to="keras")
    convert(tmp_path / "keras", tmp_path / "back", to="flax")
    assert_same_tensors(
        canonical_names(read_msgpack(tmp_path / "back" / "good_stuff.pkl")),
        canonical_names(read_msgpack(source / "good_stuff.pkl")),
    )


# === Others load what we write ===


@pytest.mark.slow
def test_original_runs_what_comes_back(
    trained_checkpoint, validation_rows, tmp_path
):
    rows = validation_rows[:1, :64]
    folder = trained_checkpoint
    for to in ("safetensors", "keras", "torch", "flax"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    models, states, outputs = [], [], []
    for folder in (tmp_path / "flax", trained_checkpoint):
        model = original.BwETAF.load_model(str(folder), "bfloat16")
        optimizer = original.BwETAF.Optimizer(
            optax.adamw,
            model.params,
            {"peaklr": 1e-3, "warmup_percent": 0.1, "total_steps": 10},
        )
        fresh = optimizer.state
        optimizer.load(str(folder))
        assert optimizer.state is not fresh  # It says nothing on failure.
        models.append(flat(model.params))
        states.append(flat(optimizer.state))
        outputs.append(
            model.model_struct.apply(
                model.params, rows, np.ones_like(rows), training=False
            )
        )
    assert_same_tensors(*models)
    assert_same_tensors(*states)
    assert states[0]["[0].count"] == 700
    assert np.isfinite(outputs[0]).all()
    np.testing.assert_array_equal(*outputs)


def flat(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves
    }


@pytest.mark.parametrize("layout", ["safetensors", "torch"])
@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_libraries_load_what_we_write(
    trained_checkpoint, tmp_path, layout, stem
):
    convert(trained_checkpoint, tmp_path / "new", to=layout)
    path = tmp_path / "new" / f"{stem}.safetensors"
    expected = safetensors.numpy.load_file(path)
    in_torch = safetensors.torch.load_file(path)
    in_jax = safetensors.flax.load_file(path)
    bits = {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for name, tensor in in_torch.items()
    }
    assert_same_tensors(bits, expected)
    assert_same_tensors(
        {name: np.asarray(array) for name, array in in_jax.items()}, expected
    )
    config = trained_checkpoint / "understanding_good_stuff.json"
    num_tensors = 1 + 13 * json.loads(config.read_text())["num_blocks"]
    num_moments = 2 * num_tensors + 1  # And the step.
    assert len(expected) == (num_tensors if stem == "model" else num_moments)


# === Files beside the weights ===


def test_files_beside_the_weights(tiny):
    for layout, tokenizer in [
        ("safetensors", "tokenizer.json"),
        ("torch", "tokenizer.json"),
        ("keras", "assets/tokenizer/tokenizer.json"),
    ]:
        folder = tiny[layout]
        assert filecmp.cmp(
            tiny["source"] / "tokenizer" / "yap.json", folder / tokenizer, False
        )
        assert filecmp.cmp(
            tiny["source"] / "stats.json", folder / "stats.json", False
        )
    assert read_json(tiny["safetensors"] / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|EOS|>",
        "unk_token": "<|UK|>",
        "pad_token": "<|EOS|>",
        "bos_token": None,
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "padding_side": "left",
    }
    assert read_json(tiny["safetensors"] / "generation_config.json") == {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.92,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def test_pytorch_folder_is_the_canonical_one_and_code(tiny):
    canonical, pytorch = contents(tiny["safetensors"]), contents(tiny["torch"])
    config = json.loads(pytorch["config.json"])
    modules = {
        f"{place.split('.')[0]}.py": place.split(".")[1]
        for place in config.pop("auto_map").values()
    }
    assert config == json.loads(canonical["config.json"])
    assert pytorch.keys() - canonical.keys() == modules.keys()
    for name, class_name in modules.items():
        assert f"class {class_name}(".encode() in pytorch[name]
    for name in canonical.keys() - {"config.json"}:
        assert pytorch[name] == canonical[name], name


@pytest.mark.parametrize("layout", ["source", "safetensors", "keras", "torch"])
def test_eos_id_comes_from_the_tokenizer(copy, tmp_path, layout):
    folder = copy(layout)
    name, key = {
        "source": ("tokenizer/understanding_yap.json", "eos_token"),
        "keras": ("tokenizer.json", "end_token"),
    }.get(layout, ("tokenizer_config.json", "eos_token"))
    settings = read_json(folder / name)
    holder = settings["config"] if layout == "keras" else settings
    holder[key] = "<|UK|>"
    (folder / name).write_text(json.dumps(settings))
    convert(folder, tmp_path / "new", to="safetensors")
    config = read_json(tmp_path / "new" / "config.json")
    if layout in ("source", "keras"):
        assert config["eos_token_id"] == config["pad_token_id"] == 1
    holder[key] = "<|END|>"
    (folder / name).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="end token must .*<.END.>"):
        convert(folder, tmp_path / "other", to="flax")


@pytest.mark.parametrize("layout", FORMATS)
def test_folder_without_tokenizer_and_optimizer(tmp_path, layout):
    folders = convert_to_all(write_original(tmp_path / "flax"), tmp_path / "to")
    names = "".join(contents(folders[layout]))
    for absent in ("yap", "tokenizer", "optim", "better", "stats", "extras"):
        if absent == "extras" and layout != "flax":
            continue
        assert absent not in names
    convert(folders[layout], tmp_path / "back", to="flax")
    assert_same_folders(tmp_path / "back", tmp_path / "flax")


# === The report, progress ===


def test_report(tiny, tmp_path):
    report = convert(tiny["source"], str(tmp_path / "new"), to="keras")
    weights = 512 * 32 + 2 * (3 * 32 * 48 + 32 * 32 * 3 + 2 * 48 + 4 * 32)
    assert report == {
        "source": str(tiny["source"]),
        "from": "flax",
        "target": str(tmp_path / "new"),
        "to": "keras",
        "tensors": 3 * 27 + 1,
        "bytes": 3 * 4 * weights + 4,
        "optimizer": True,
        "non_finite": {},
        "left_behind": [],
    }


@pytest.mark.parametrize("to", FORMATS)
def test_values_that_are_not_finite_are_counted(copy, tmp_path, to):
    folder = copy("source")
    special = np.array([np.nan, np.inf, -np.inf, -np.nan], "float32")

    def damage(tree):
        tree["params"]["blocks_1"]["d1"]["w"][0, 46:50] = special
        tree["params"]["emb"]["embedding"][0, :2] = special[:2]

    def damage_state(tree):
        tree["0"]["nu"]["params"]["emb"]["embedding"][3, 3] = np.nan

    change_msgpack(folder / "good_stuff.pkl", damage)
    change_msgpack(folder / "make_stuff_better.pkl", damage_state)
    report = convert(folder, tmp_path / "new", to=to)
    assert report["non_finite"] == {
        "model.embed_tokens.weight": 2,
        "model.layers.1.mlp.up_proj.weight": 2,
        "model.layers.1.mlp.gate_proj.weight": 2,
        "exp_avg_sq.model.embed_tokens.weight": 1,
    }
    convert(tmp_path / "new", tmp_path / "back", to="flax")
    assert_same_folders(tmp_path / "back", folder)


@pytest.mark.parametrize("layout", ["source", "safetensors", "keras", "torch"])
def test_files_left_behind_are_reported(copy, tmp_path, layout):
    folder = copy(layout)
    (folder / "README.md").touch()
    (folder / "logs").mkdir()
    (folder / "logs" / "1.txt").touch()
    report = convert(folder, tmp_path / "new", to="flax")
    assert report["left_behind"] == ["README.md", "logs"]
    assert "README.md" not in contents(tmp_path / "new")


@pytest.mark.parametrize("layout, to", [*itertools.product(FORMATS, repeat=2)])
def test_progress_counts_every_byte(tiny, tmp_path, layout, to):
    calls = []
    report = convert(
        tiny[layout],
        tmp_path / "new",
        to=to,
        progress=lambda *call: calls.append(call),
    )
    done, totals = zip(*calls, strict=True)
    assert set(totals) == {report["bytes"]}
    assert done[-1] == report["bytes"]
    assert list(done) == sorted(set(done)) and len(done) == report["tensors"]


# === Formats ===


def test_formats_are_detected(tiny, tmp_path):
    for to in FORMATS:
        assert detect_format(tiny[to]) == to
    preset = tmp_path / "preset"
    preset.mkdir()
    with pytest.raises(CheckpointError, match=r"Received: the files \(none\)"):
        detect_format(preset)
    config = preset / "config.json"
    config.write_text('{"registered_name": "BwETAFBackbone"}')
    assert detect_format(preset) == "keras"
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError,
        match="Expected understanding_good_stuff.json .*files config.json, "
        "and config.json with model_type='llama'",
    ):
        detect_format(preset)
    with pytest.raises(
        CheckpointError, match="expected a folder. Received: nothing there"
    ):
        detect_format(tmp_path / "nowhere")


def test_needs_no_framework(tiny, tmp_path):
    code = (
        "import sys, converters\n"
        "folder = sys.argv[1]\n"
        f"for to in {FORMATS}:\n"
        "    converters.convert(folder, f'{sys.argv[2]}/{to}', to=to)\n"
        "    folder = f'{sys.argv[2]}/{to}'\n"
        "print({*sys.modules} & "
        "{'jax', 'keras', 'keras_bwetaf', 'flax', 'torch', 'tensorflow'})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tiny["source"], tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(converters.__path__[0]).parent,
    )
    assert result.stdout == "set()\n"


IN_LITTLE_MEMORY = """
import re, resource, sys
import converters

status = open("/proc/self/status").read()
used = 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", status)[1])
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
mapped = []

def look(done, total):
    status = open("/proc/self/status").read()
    mapped.append(int(re.search(r"RssFile:\\s+(\\d+) kB", status)[1]))

folder, *targets = sys.argv[2:]
for target in targets:
    to = target.rpartition("/")[2]
    converters.convert(folder, target, to=to, progress=look)
    folder = target
try:
    bytearray(limit)  # more than what was given back leaves room for
except MemoryError:
    print(max(mapped) // 1000, "MB mapped")
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tensor(tmp_path):
    """Private memory, and what a mapped file has in memory."""

    def half(*shape):
        return np.full(shape, 0.5, "float32")

    source = write_original(
        tmp_path / "source",
        half,
        vocab_size=2**17,
        attention_dim=512,
        ff_dim=1024,
    )
    largest = 2**17 * 512 * 4
    allowed = largest + 100_000_000
    assert largest > 250_000_000
    targets = [
        tmp_path / to for to in ("safetensors", "keras", "torch", "flax")
    ]
    result = subprocess.run(
        [
            *(sys.executable, "-c", IN_LITTLE_MEMORY, str(allowed), source),
            *map(str, targets),
        ],
        capture_output=True,
        text=True,
        cwd=Path(converters.__path__[0]).parent,
    )
    assert (result.returncode, result.stderr) == (0, "")
    mapped, rest = result.stdout.split(maxsplit=1)
    assert rest == "MB mapped\n"  # the limit is one
    assert int(mapped) < 200
    name = "good_stuff.pkl"
    assert filecmp.cmp(source / name, targets[-1] / name, shallow=False)
