import filecmp
import json
import shutil
import subprocess
import sys

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import converters
from converters import (
    CheckpointError,
    canonical,
    detect_format,
    files,
    flax_to_safetensors,
    keras_tensors,
    read_config,
    read_flax,
    safetensors_to_flax,
    write_flax,
    write_safetensors,
)
from tests.original import manager

FLAX_FILES = (
    "good_stuff.pkl",
    "understanding_good_stuff.json",
    "tokenizer/yap.json",
    "tokenizer/understanding_yap.json",
    "stats.json",
)
CASES = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "per-layer heads": {"num_heads": (2, 4)},
    "odd widths": {
        "num_heads": 3,
        "attention_dim": 15,
        "gqa_repeats": 3,
        "ff_dim": 7,
    },
    "eleven blocks, options of the original": {
        "num_blocks": 11,
        "attn_chunks": 2,
        "res_scale": 0.5,
        "emb_scaling_factor": 1.0,
        "emb_init_range": None,
        "param_init_rage": 0.01,
    },
}


def assert_same_files(left, right, names):
    for name in names:
        assert filecmp.cmp(left / name, right / name, shallow=False), name


def rewrite_weights(folder, change):
    """Writes the Flax weights again after a change to the arrays."""
    path = folder / "good_stuff.pkl"
    arrays = {
        name: np.array(tensor.array())
        for name, tensor in read_flax(path).items()
    }
    change(arrays)
    write_flax(path, arrays, arrays.get, lambda name, nbytes: None)


def rewrite_tensors(folder, change):
    """Writes the canonical weights again after a change to the arrays."""
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    specs = {name: (each.dtype, each.shape) for name, each in arrays.items()}
    write_safetensors(path, specs, arrays.get, lambda name, nbytes: None)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def trained(trained_checkpoint, tmp_path):
    """A copy of the trained checkpoint that may be damaged."""
    folder = tmp_path / "trained"
    for name in FLAX_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained_checkpoint / name, folder / name)
    return folder


@pytest.fixture
def canonical_folder(trained, tmp_path):
    flax_to_safetensors(trained, tmp_path / "canonical")
    return tmp_path / "canonical"


def test_trained_checkpoint_makes_the_circle(
    trained_checkpoint, canonical_folder, tmp_path
):
    safetensors_to_flax(canonical_folder, tmp_path / "back")
    assert_same_files(trained_checkpoint, tmp_path / "back", FLAX_FILES)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        *("good_stuff.pkl", "stats.json", "tokenizer"),
        "understanding_good_stuff.json",
    ]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_models_of_the_original_make_the_circle(save_flax, tmp_path, changes):
    source = save_flax(**changes)
    flax_to_safetensors(source, tmp_path / "canonical")
    safetensors_to_flax(tmp_path / "canonical", tmp_path / "back")
    assert_same_files(source, tmp_path / "back", FLAX_FILES[:2])
    assert not (tmp_path / "canonical" / "tokenizer.json").exists()


def test_mixed_dtypes_make_the_circle(save_flax, tmp_path):
    dtypes = ("float16", "float32", "float64", ml_dtypes.bfloat16)

    def mix(arrays):
        for index, (path, array) in enumerate(arrays.items()):
            arrays[path] = array.astype(dtypes[index % 4])

    source = save_flax()
    rewrite_weights(source, mix)
    flax_to_safetensors(source, tmp_path / "canonical")
    safetensors_to_flax(tmp_path / "canonical", tmp_path / "back")
    assert_same_files(source, tmp_path / "back", FLAX_FILES[:2])
    assert read_config(tmp_path / "canonical")["dtype"] == "float64"


def test_original_restores_what_we_write(trained_checkpoint, canonical_folder):
    back = canonical_folder.parent / "back"
    safetensors_to_flax(canonical_folder, back)
    config = json.loads((back / "understanding_good_stuff.json").read_text())
    model = manager(**config, dtype="bfloat16")
    restored, expected = (
        flax.serialization.from_bytes(
            model.params, (folder / "good_stuff.pkl").read_bytes()
        )
        for folder in (back, trained_checkpoint)
    )
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_canonical_tensors_by_hand(save_flax, tmp_path):
    source = save_flax(num_blocks=1)
    flax_to_safetensors(source, tmp_path / "canonical")
    found = safetensors.numpy.load_file(
        tmp_path / "canonical" / "model.safetensors"
    )
    params = flax.serialization.msgpack_restore(
        (source / "good_stuff.pkl").read_bytes()
    )["params"]
    block, attention = params["blocks_0"], params["blocks_0"]["attn"]
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": params["emb"]["embedding"],
        f"{layer}input_layernorm.weight": block["ln1"]["scale"],
        f"{layer}self_attn.q_proj.weight": attention["q_dense"]["w"].T,
        f"{layer}self_attn.k_proj.weight": attention["k_dense"]["w"].T,
        f"{layer}self_attn.v_proj.weight": attention["v_dense"]["w"].T,
        f"{layer}self_attn.o_proj.weight": attention["d_out"]["w"].T,
        f"{layer}self_attn.o_proj.bias": attention["d_out"]["b"][0, 0],
        f"{layer}post_attention_layernorm.weight": block["ln2"]["scale"],
        f"{layer}mlp.up_proj.weight": block["d1"]["w"][:, :48].T,
        f"{layer}mlp.up_proj.bias": block["d1"]["b"][0, 0, :48],
        f"{layer}mlp.gate_proj.weight": block["d1"]["w"][:, 48:].T,
        f"{layer}mlp.gate_proj.bias": block["d1"]["b"][0, 0, 48:],
        f"{layer}mlp.down_proj.weight": block["d2"]["w"].T,
        f"{layer}mlp.down_proj.bias": block["d2"]["b"][0, 0],
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_keras_tensors_by_hand(save_flax, tmp_path):
    source = save_flax(num_blocks=1)
    flax_to_safetensors(source, tmp_path / "canonical")
    found = {
        path: np.array(array)
        for path, array in keras_tensors(tmp_path / "canonical")
    }
    params = flax.serialization.msgpack_restore(
        (source / "good_stuff.pkl").read_bytes()
    )["params"]
    block, attention = params["blocks_0"], params["blocks_0"]["attn"]
    layer = "transformer_layer_0/"
    output = f"{layer}self_attention/attention_output"
    expected = {
        "token_embedding/embeddings": params["emb"]["embedding"],
        f"{layer}attention_norm/scale": block["ln1"]["scale"],
        f"{layer}self_attention/query/kernel": attention["q_dense"]["w"].T,
        f"{layer}self_attention/key/kernel": attention["k_dense"]["w"].T,
        f"{layer}self_attention/value/kernel": attention["v_dense"]["w"].T,
        f"{output}/kernel": attention["d_out"]["w"].T,
        f"{output}/bias": attention["d_out"]["b"][0, 0],
        f"{layer}feedforward_norm/scale": block["ln2"]["scale"],
        f"{layer}feedforward/intermediate/kernel": block["d1"]["w"][:, :48].T,
        f"{layer}feedforward/intermediate/bias": block["d1"]["b"][0, 0, :48],
        f"{layer}feedforward/gate/kernel": block["d1"]["w"][:, 48:].T,
        f"{layer}feedforward/gate/bias": block["d1"]["b"][0, 0, 48:],
        f"{layer}feedforward/output/kernel": block["d2"]["w"].T,
        f"{layer}feedforward/output/bias": block["d2"]["b"][0, 0],
    }
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_files_beside_the_weights(trained_checkpoint, canonical_folder):
    tokenizer = trained_checkpoint / "tokenizer" / "yap.json"
    assert filecmp.cmp(tokenizer, canonical_folder / "tokenizer.json", False)
    assert_same_files(trained_checkpoint, canonical_folder, ["stats.json"])
    settings = json.loads(
        (canonical_folder / "tokenizer_config.json").read_text()
    )
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|EOS|>",
        "unk_token": "<|UK|>",
        "pad_token": "<|EOS|>",
        "bos_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    generation = json.loads(
        (canonical_folder / "generation_config.json").read_text()
    )
    assert generation == {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.92,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    assert read_config(canonical_folder)["dtype"] == "bfloat16"


def test_eos_id_comes_from_the_tokenizer(trained, tmp_path):
    settings = trained / "tokenizer" / "understanding_yap.json"
    edit_json(settings, eos_token="<|UK|>")
    flax_to_safetensors(trained, tmp_path / "canonical")
    config = read_config(tmp_path / "canonical")
    assert config["eos_token_id"] == config["pad_token_id"] == 1
    edit_json(settings, eos_token="<|END|>")
    with pytest.raises(CheckpointError, match="eos_token must .*<.END.>"):
        flax_to_safetensors(trained, tmp_path / "other")


def test_flax_folder_without_side_file(
    trained_checkpoint, canonical_folder, tmp_path
):
    (canonical_folder / "flax_extras.json").unlink()
    safetensors_to_flax(canonical_folder, tmp_path / "back")
    config, original = (
        json.loads((folder / "understanding_good_stuff.json").read_text())
        for folder in (tmp_path / "back", trained_checkpoint)
    )
    del original["use_fash_attention"]
    assert list(config.items()) == list(original.items())
    settings, original = (
        json.loads((folder / "tokenizer/understanding_yap.json").read_text())
        for folder in (tmp_path / "back", trained_checkpoint)
    )
    assert settings == original | {"name": "canonical"}


def test_edited_canonical_config_wins_over_side_file(
    canonical_folder, tmp_path
):
    edit_json(
        canonical_folder / "config.json",
        hidden_dropout=0.25,
        initializer_range=0.5,
    )
    side_file = canonical_folder / "flax_extras.json"
    rest = json.loads(side_file.read_text())["config"]
    rest["values"]["dropout_rate"] = 0.75
    edit_json(side_file, config=rest)
    safetensors_to_flax(canonical_folder, tmp_path / "back")
    config = json.loads(
        (tmp_path / "back" / "understanding_good_stuff.json").read_text()
    )
    assert config["dropout_rate"] == 0.25
    assert config["param_init_rage"] == 0.5
    edit_json(side_file, config={"keys": [1]})
    with pytest.raises(CheckpointError, match="must hold a list of keys"):
        safetensors_to_flax(canonical_folder, tmp_path / "other")


def test_progress_counts_every_byte(trained, tmp_path):
    for convert, source, target in [
        (flax_to_safetensors, "trained", "canonical"),
        (safetensors_to_flax, "canonical", "back"),
    ]:
        calls = []
        convert(
            tmp_path / source,
            tmp_path / target,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        done, totals = zip(*calls, strict=True)
        assert set(totals) == {2 * 5_782_528}
        assert done[-1] == totals[0]
        assert list(done) == sorted(set(done))


@pytest.mark.parametrize("step", ["write_files", "write_weights", "rename"])
def test_failure_leaves_nothing(trained, tmp_path, monkeypatch, step):
    flax_to_safetensors(trained, tmp_path / "canonical")
    before = sorted(tmp_path.iterdir())

    class Fails(Exception):
        pass

    def fail(*args, **kwargs):
        raise Fails

    progress = fail if step == "write_weights" else None
    if step == "write_files":
        monkeypatch.setattr(canonical, "write_files", fail)
    if step == "rename":
        monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(Fails):
        flax_to_safetensors(trained, tmp_path / "new", progress=progress)
    with pytest.raises(Fails):
        safetensors_to_flax(
            tmp_path / "canonical", tmp_path / "new", progress=progress
        )
    assert sorted(tmp_path.iterdir()) == before


def test_existing_target_is_kept(trained, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match="target: the target exists alr"):
        flax_to_safetensors(trained, target)
    assert list(target.iterdir()) == []


def test_parents_of_the_target_are_made(save_flax, tmp_path):
    flax_to_safetensors(save_flax(num_blocks=1), tmp_path / "a" / "b" / "c")
    assert detect_format(tmp_path / "a" / "b" / "c") == "safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "good_stuff.pkl",
        "understanding_good_stuff.json",
        "tokenizer/yap.json",
        "tokenizer/understanding_yap.json",
    ],
)
def test_missing_and_damaged_flax_files(trained, tmp_path, name):
    damaged = (trained / name).read_bytes()[:-40]
    (trained / name).write_bytes(damaged)
    expected = "truncated" if name.endswith("pkl") else "expected JSON"
    with pytest.raises(CheckpointError, match=f"{name}: .*{expected}"):
        flax_to_safetensors(trained, tmp_path / "target")
    (trained / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        flax_to_safetensors(trained, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_oversized_json_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000 bytes of JSON"):
        flax_to_safetensors(trained, tmp_path / "target")


def test_flax_problems_are_all_listed(trained, tmp_path):
    def damage(arrays):
        block = ("params", "blocks_3")
        arrays[*block, "extra"] = np.ones(2)
        del arrays[*block, "ln1", "scale"]
        arrays[*block, "d1", "w"] = arrays[*block, "d1", "w"].T
        arrays[*block, "d2", "b"] = np.ones((1, 1, 256), "int32")

    rewrite_weights(trained, damage)
    with pytest.raises(CheckpointError) as error:
        flax_to_safetensors(trained, tmp_path / "target")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{trained / 'good_stuff.pkl'}: 4 problems:"
    assert sorted(lines[1:]) == [
        "- missing tensor params/blocks_3/ln1/scale, expected with shape "
        "(256,)",
        "- tensor params/blocks_3/d1/w has shape (1536, 256), but the "
        "configuration gives (256, 1536)",
        "- tensor params/blocks_3/d2/b has dtype int32, expected one of "
        "float16, bfloat16, float32, float64",
        "- unexpected tensor params/blocks_3/extra of shape (2,)",
    ]


@pytest.mark.parametrize(
    "use",
    [keras_tensors, lambda folder: safetensors_to_flax(folder, folder / "x")],
    ids=["keras_tensors", "safetensors_to_flax"],
)
def test_canonical_problems_are_all_listed(canonical_folder, use):
    def damage(arrays):
        arrays["lm_head.weight"] = np.ones((3, 2))
        del arrays["model.layers.5.mlp.up_proj.bias"]
        name = "model.layers.2.self_attn.k_proj.weight"
        arrays[name] = np.ascontiguousarray(arrays[name].T)
        arrays["model.embed_tokens.weight"] = np.ones((4096, 256), "int8")

    rewrite_tensors(canonical_folder, damage)
    with pytest.raises(CheckpointError) as error:
        use(canonical_folder)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{canonical_folder}: 4 problems:"
    assert sorted(lines[1:]) == [
        "- missing tensor model.layers.5.mlp.up_proj.bias, expected with "
        "shape (768,)",
        "- tensor model.embed_tokens.weight has dtype int8, expected one of "
        "float16, bfloat16, float32, float64",
        "- tensor model.layers.2.self_attn.k_proj.weight has shape (256, "
        "128), but the configuration gives (128, 256)",
        "- unexpected tensor lm_head.weight of shape (3, 2)",
    ]


def test_halves_of_one_flax_tensor_need_one_dtype(canonical_folder, tmp_path):
    def change(arrays):
        name = "model.layers.1.mlp.up_proj.weight"
        arrays[name] = arrays[name].astype("float32")

    rewrite_tensors(canonical_folder, change)
    with pytest.raises(
        CheckpointError,
        match="model.layers.1.mlp.up_proj.weight and model.layers.1.mlp.gate_"
        "proj.weight are one tensor .* Received: float32 and bfloat16",
    ):
        safetensors_to_flax(canonical_folder, tmp_path / "back")


def test_missing_and_damaged_canonical_files(canonical_folder, tmp_path):
    weights = canonical_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors: .*truncated"):
        keras_tensors(canonical_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="safetensors: the file is miss"):
        keras_tensors(canonical_folder)
    edit_json(canonical_folder / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="expected model_type 'bwetaf'"):
        keras_tensors(canonical_folder)
    (canonical_folder / "tokenizer_config.json").unlink()
    (canonical_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: the file is miss"):
        keras_tensors(canonical_folder)


def test_formats_are_detected(trained, canonical_folder, tmp_path):
    assert detect_format(trained) == "flax"
    assert detect_format(canonical_folder) == "safetensors"
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
    with pytest.raises(CheckpointError, match="there is no such folder"):
        detect_format(tmp_path / "nowhere")


def test_needs_no_framework():
    code = (
        "import sys, converters; print({*sys.modules} & "
        "{'jax', 'keras', 'keras_bwetaf', 'flax', 'torch', 'tensorflow'})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=converters.__path__[0] + "/..",
    )
    assert result.stdout == "set()\n"
