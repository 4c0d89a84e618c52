import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from converters import CheckpointError, convert
from converters.hugging_face_folder import read_config
from tests.converters.folders import (
    FORMATS,
    assert_same_folders,
    edit_json,
    read_json,
)


def change_tensors(folder, change, stem="model"):
    path = folder / f"{stem}.safetensors"
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize("layout", ["safetensors", "torch"])
@pytest.mark.parametrize("to", FORMATS)
def test_problems_are_all_listed(copy, tmp_path, layout, to):
    folder = copy(layout)

    def damage(arrays):
        arrays["model.layers.2.mlp.up_proj.bias"] = np.ones((3, 2))
        del arrays["model.layers.1.mlp.up_proj.bias"]
        name = "model.layers.0.self_attn.k_proj.weight"
        arrays[name] = np.ascontiguousarray(arrays[name].T)
        arrays["model.embed_tokens.weight"] = np.ones((512, 32), "int8")

    change_tensors(folder, damage)
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "target", to=to)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder}: 4 problems:"
    assert sorted(lines[1:]) == [
        "- missing tensor model.layers.1.mlp.up_proj.bias, expected with "
        "shape (48,)",
        "- tensor model.embed_tokens.weight has dtype int8, expected one of "
        "float16, bfloat16, float32, float64",
        "- tensor model.layers.0.self_attn.k_proj.weight has shape (32, 16), "
        "but the configuration gives (16, 32)",
        "- unexpected tensor model.layers.2.mlp.up_proj.bias of shape (3, 2)",
    ]
    assert not (tmp_path / "target").exists()


def test_problems_of_the_optimizer_are_all_listed(copy, tmp_path):
    folder = copy("torch")

    def damage(arrays):
        arrays["lm_head.weight"] = np.ones((3, 2))
        arrays["step"] = arrays["step"].astype("int64")
        del arrays["exp_avg.model.embed_tokens.weight"]

    change_tensors(folder, damage, "optimizer")
    with pytest.raises(CheckpointError, match="3 problems") as error:
        convert(folder, tmp_path / "new", to="flax")
    for text in (
        "missing tensor exp_avg.model.embed_tokens.weight, expected",
        "tensor step has dtype int64, expected one of int32",
        "unexpected tensor lm_head.weight",
    ):
        assert text in str(error.value)


def test_a_tensor_that_occurs_twice(copy, tmp_path):
    """In the header of one file: JSON keeps the last one of the two."""
    folder = copy("safetensors")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    name = b"model.layers.1.input_layernorm.weight"
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, name.replace(b"1", b"0")))
    with pytest.raises(CheckpointError, match="a key occurs twice"):
        convert(folder, tmp_path / "new", to="flax")


def test_a_tensor_in_two_shards(tiny, tmp_path):
    folder = tmp_path / "shards"
    convert(tiny["source"], folder, to="torch", max_shard_size=70_000)
    shards = sorted(folder.glob("model-*"))
    assert len(shards) == 2
    first, second = map(safetensors.numpy.load_file, shards)
    name = next(iter(first))
    second[name] = first[name] + 1
    safetensors.numpy.save_file(second, shards[1])
    with pytest.raises(
        CheckpointError,
        match=f"index.json: tensor '{name}' is in model-00002-of-00002.safeten"
        "sors, but the index does not say so",
    ):
        convert(folder, tmp_path / "new", to="flax")


@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_missing_and_damaged_shards(tiny, tmp_path, stem):
    folder = tmp_path / "shards"
    convert(tiny["source"], folder, to="safetensors", max_shard_size=70_000)
    shard = folder / f"{stem}-00002-of-00002.safetensors"
    shard = shard if stem == "model" else sorted(folder.glob("optimizer-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: .*truncated"):
        convert(folder, tmp_path / "new", to="flax")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}.*is missing"):
        convert(folder, tmp_path / "new", to="flax")
    (folder / f"{stem}.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="index.json: weight_map must"):
        convert(folder, tmp_path / "new", to="flax")


def test_missing_and_damaged_files(copy, tmp_path):
    folder = copy("torch")

    def message(text):
        return pytest.raises(CheckpointError, match=text)

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with message("model.safetensors: .*truncated"):
        convert(folder, tmp_path / "new", to="flax")
    weights.unlink()
    with message("model.safetensors: the file is missing"):
        convert(folder, tmp_path / "new", to="flax")
    (folder / "tokenizer.json").write_text("[1]")
    with message("tokenizer.json: expected a JSON object. Received: list"):
        convert(folder, tmp_path / "new", to="flax")
    (folder / "generation_config.json").write_text("{")
    with message("generation_config.json: expected JSON"):
        convert(folder, tmp_path / "new", to="flax")
    edit_json(folder / "config.json", hidden_act="gelu", num_hidden_layers=0)
    with message("config.json: num_hidden_layers must be an integer"):
        convert(folder, tmp_path / "new", to="flax")
    edit_json(folder / "config.json", num_hidden_layers=2)
    with message("config.json: hidden_act must be 'silu'"):
        convert(folder, tmp_path / "new", to="flax")
    edit_json(folder / "config.json", model_type="llama")
    with message("expected model_type 'bwetaf' or .* Received: 'llama'"):
        read_config(folder)
    (folder / "config.json").unlink()
    with message("config.json: the file is missing"):
        read_config(folder)


def test_optional_files(copy, tiny, tmp_path):
    """Without settings, the end token is the one of the configured id."""
    folder = copy("safetensors")
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=1)
    convert(folder, tmp_path / "flax", to="flax")
    settings = read_json(tmp_path / "flax/tokenizer/understanding_yap.json")
    assert settings["eos_token"] == "<|UK|>"
    convert(tmp_path / "flax", tmp_path / "back", to="safetensors")
    assert_same_folders(tmp_path / "back", folder)
    edit_json(folder / "config.json", eos_token_id=10**6)
    with pytest.raises(CheckpointError, match="end token must be .* None"):
        convert(folder, tmp_path / "other", to="flax")


@pytest.mark.parametrize("as_object", [False, True])
def test_tokens_of_the_settings(copy, tmp_path, as_object):
    """transformers writes a token as a text or as an object."""
    folder = copy("torch")
    token = {"content": "<|UK|>", "lstrip": False} if as_object else "<|UK|>"
    edit_json(folder / "tokenizer_config.json", eos_token=token)
    convert(folder, tmp_path / "flax", to="flax")
    settings = read_json(tmp_path / "flax/tokenizer/understanding_yap.json")
    assert settings["eos_token"] == "<|UK|>"
    convert(tmp_path / "flax", tmp_path / "back", to="torch")
    assert_same_folders(tmp_path / "back", folder)


def test_dtype_of_the_config_is_that_of_the_tensors(copy, tmp_path):
    """Whatever the configuration claims, which comes home as it was."""
    folder = copy("safetensors")
    edit_json(folder / "config.json", dtype="float16")
    convert(folder, tmp_path / "keras", to="keras")
    config = read_json(tmp_path / "keras" / "config.json")["config"]
    assert config["dtype"]["config"]["name"] == "float32"
    convert(tmp_path / "keras", tmp_path / "back", to="safetensors")
    assert_same_folders(tmp_path / "back", folder)


def test_dtype_by_its_older_name(copy, tmp_path):
    folder = copy("safetensors")
    config = read_json(folder / "config.json")
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "new", to="torch", dtype="bfloat16")
    config = read_json(tmp_path / "new" / "config.json")
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


@pytest.mark.parametrize("end", [0, [0, 1]])
def test_end_token_by_its_id(copy, tiny, tmp_path, end):
    folder = copy("safetensors")
    edit_json(folder / "config.json", eos_token_id=end)
    settings = read_json(folder / "tokenizer_config.json")
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "flax", to="flax")
    settings = read_json(tmp_path / "flax/tokenizer/understanding_yap.json")
    assert settings["eos_token"] == "<|EOS|>"


def test_one_file_or_shards(copy, tmp_path):
    folder = copy("torch")
    for stem in ("model", "optimizer"):
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "new", to="flax")
    for stem in ("model", "optimizer"):
        expected = f"expected {stem}.safetensors, or {stem}.safetensors.index"
        assert expected in str(error.value)


def test_tokenizer_beyond_the_vocabulary(copy, tmp_path):
    folder = copy("flax")
    path = folder / "tokenizer/yap.json"
    content = read_json(path)
    content["model"]["vocab"]["extra"] = 512
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ids up to 512, but .* has 512"):
        convert(folder, tmp_path / "new", to="torch")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "optimizer.safetensors",
    ],
)
def test_pointers_of_git_lfs(copy, tmp_path, name):
    folder = copy("safetensors")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"{name}.*Run `git lfs pull`"):
        convert(folder, tmp_path / "new", to="flax")


@pytest.mark.parametrize("to", ["torch", "safetensors"])
@pytest.mark.parametrize("where", ["side file", "folder"])
def test_references_to_code_are_dropped(copy, tmp_path, to, where):
    """`trust_remote_code=True` trusts the code that we write, and no other."""
    hostile = {
        "auto_map": {"AutoTokenizer": ["evil/repo--code.Class", None]},
        "attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "evil"},
        "nested": [{"auto_map": "evil", "kept": 1}],
    }
    names = ("config.json", "tokenizer_config.json", "generation_config.json")
    if where == "folder":
        folder = copy("torch")
        for name in names:
            edit_json(folder / name, **hostile)
    else:
        folder = copy("flax")
        changes = {key: {"kept": value} for key, value in hostile.items()}
        change = {"order": [], "changes": changes}
        side_file = {"hugging_face": dict.fromkeys(names, change)}
        (folder / "conversion_extras.json").write_text(json.dumps(side_file))
    convert(folder, tmp_path / "new", to=to)
    for name in names:
        text = (tmp_path / "new" / name).read_text()
        assert "evil" not in text
        assert json.loads(text)["nested"] == [{"kept": 1}]
    auto_map = read_json(tmp_path / "new" / "config.json").get("auto_map")
    ours = {
        "AutoConfig": "configuration_bwetaf.BwETAFConfig",
        "AutoModel": "modeling_bwetaf.BwETAFModel",
        "AutoModelForCausalLM": "modeling_bwetaf.BwETAFForCausalLM",
    }
    assert auto_map == (ours if to == "torch" else None)


def test_dtype_of_a_mixture_holds_each(every):
    config = read_json(every["torch"] / "config.json")
    path = every["torch"] / "model.safetensors"
    dtypes = {each.dtype for each in safetensors.numpy.load_file(path).values()}
    holder = np.dtype(getattr(ml_dtypes, config["dtype"], config["dtype"]))
    if len(dtypes) == 1:
        assert dtypes == {holder}
    for dtype in dtypes:
        small = ml_dtypes.finfo(dtype).smallest_subnormal
        assert holder.type(small).astype(dtype) == small
        assert holder.itemsize >= dtype.itemsize


def test_code_is_not_run(copy, tmp_path):
    folder = copy("torch")
    (folder / "modeling_bwetaf.py").write_text("raise SystemExit('run')")
    convert(folder, tmp_path / "new", to="torch")
    assert (
        "SystemExit"
        not in (tmp_path / "new" / "modeling_bwetaf.py").read_text()
    )
    assert json.dumps(read_json(tmp_path / "new" / "config.json"))
