"""Version 2: every way between the formats, and what is refused."""

import json
import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import converters
import keras_bwetaf
from converters import CheckpointError, convert, gpt2
from tests import originals
from tests.converters.folders import (
    CONFIG_V2,
    FORMATS,
    any_bits,
    assert_same_folders,
    assert_same_tensors,
    canonical_names,
    convert_to_all,
    edit_json,
    normal,
    read_json,
    read_msgpack,
    write_original,
)
from tests.parity import relative_l2

ALL = ("float16", "float32", "float64", "bfloat16")
# What draws the weights, what draws the moments, changes to the configuration.
CASES = {
    "float32": (normal("float32"), normal("float32", seed=1), {}),
    "bfloat16": (normal("bfloat16"), normal("bfloat16", seed=1), {}),
    "any bits": (any_bits(*ALL), any_bits(*ALL[1:], seed=1), {}),
    "sinusoids, heads of each layer": (
        normal("float32"),
        None,
        {"num_heads": [2, 4], "use_rope": False, "res_scale": 0.5},
    ),
    "odd inner width, defaults": (
        normal("float16"),
        normal("float32", seed=1),
        dict(attention_dim=42, num_heads=3, ff_dim=7, emb_init_range=None),
    ),
    "GPT-2's tokenizer": (
        normal("bfloat16"),
        normal("float32", seed=1),
        dict(vocab_size=50260, attention_dim=4, num_heads=2, ff_dim=6),
    ),
}


def without_head_bias(names):
    return {
        name: array
        for name, array in names.items()
        if not name.endswith(("up_proj.bias", "gate_proj.bias"))
    }


@pytest.fixture(scope="module", params=CASES)
def every(request, tmp_path_factory):
    """All kinds of models in each format; tests must not change them."""
    folder = tmp_path_factory.mktemp("every")
    draw, moments, changes = CASES[request.param]
    source = write_original(
        folder / "source",
        draw,
        moments=moments,
        settings=CONFIG_V2,
        **changes,
    )
    return convert_to_all(source, folder)


# === No bit changes ===


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
def test_every_pair(every, layout, tmp_path):
    for to in FORMATS:
        convert(every[layout], tmp_path / to, to=to)
        assert_same_folders(tmp_path / to, every[to])


def test_full_circle(every, tmp_path):
    assert_same_folders(every["flax"], every["source"])
    folder = every["source"]
    for to in ("safetensors", "keras", "torch", "flax"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    assert_same_folders(folder, every["source"])


def test_canonical_tensors_by_hand(every):
    tree = read_msgpack(every["source"] / "good_stuff.pkl")
    for i in range(len(tree["params"]) - 1):
        # By the rule of version 3, with biases that nothing has.
        inner = tree["params"][f"blocks_{i}"]["d1"]
        inner["b"] = np.zeros((1, 1, inner["w"].shape[1]))
    expected = without_head_bias(canonical_names(tree))
    path = every["safetensors"] / "model.safetensors"
    assert_same_tensors(safetensors.numpy.load_file(path), expected)


@pytest.mark.fast
def test_keras_loads_what_we_write(tmp_path):
    source = write_original(tmp_path / "flax", settings=CONFIG_V2)
    convert(source, tmp_path / "keras", to="keras")
    with pytest.warns(UserWarning, match="no preprocessor"):
        lm = keras_bwetaf.from_preset(tmp_path / "keras", dtype="float32")
    lm.save_to_preset(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "home", to="flax")
    assert (tmp_path / "home" / "good_stuff.pkl").read_bytes() == (
        source / "good_stuff.pkl"
    ).read_bytes()


# === The original loads what we write ===


@pytest.mark.slow
def test_the_original_loads_what_we_write(tmp_path):
    """And computes equal logits, with the configuration that it wrote."""
    source = tmp_path / "source"
    originals.run(
        "v2", "save", source, optimizer=True, num_heads=(4, 2), res_scale=0.5
    )
    folders = convert_to_all(source, tmp_path / "to")
    assert_same_folders(folders["flax"], source)
    # Also without what was kept of the original's own settings.
    (folders["keras"] / "conversion_extras.json").unlink(missing_ok=True)
    convert(folders["keras"], tmp_path / "plain", to="flax")
    ids = np.random.default_rng(0).integers(0, 61, (2, 20))
    expected = originals.run("v2", "logits", source, ids)
    for folder in (folders["flax"], tmp_path / "plain"):
        received = originals.run("v2", "logits", folder, ids)
        np.testing.assert_array_equal(received, expected)
    settings = originals.run("v2", "settings", tmp_path / "plain")
    expected = originals.run("v2", "settings", source)
    for each in (settings, expected):
        del each["possible_opt_path"]
    assert settings == expected


# === PyTorch ===


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory, remote_code):
    """A function that loads a Flax folder in PyTorch, by its own code."""

    def load(flax, dtype="float32"):
        folder = tmp_path_factory.mktemp("torch") / "torch"
        convert(flax, folder, to="torch", optimizer=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            return AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, dtype=dtype
            ).eval()

    return load


def keras_logits(folder, ids, dtype="float32"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = keras_bwetaf.from_preset(folder, dtype=dtype)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return np.asarray(lm(inputs))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rope": False, "emb_scaling_factor": 2.0},
        {"num_heads": [2, 4], "res_scale": 0.7},
    ],
)
def test_pytorch(tmp_path, torch_model, changes):
    source = write_original(
        tmp_path / "flax", normal("float32"), settings=CONFIG_V2, **changes
    )
    model = torch_model(source)
    ids = np.random.default_rng(0).integers(0, 512, (2, 60)).astype("int32")
    with torch.no_grad():
        received = model(torch.from_numpy(ids).long()).logits.numpy()
    assert relative_l2(received, keras_logits(source, ids)) < 1e-5


@pytest.mark.slow
def test_pytorch_in_bfloat16(tmp_path, torch_model):
    """Float32 logits, and no farther from float32 than Keras's."""
    source = write_original(
        tmp_path / "flax", normal("bfloat16"), settings=CONFIG_V2
    )
    ids = np.random.default_rng(0).integers(0, 512, (2, 60)).astype("int32")
    with torch.no_grad():
        outputs = torch_model(source, "bfloat16")(torch.from_numpy(ids).long())
    assert outputs.logits.dtype == torch.float32
    exact = keras_logits(source, ids)
    ours = relative_l2(keras_logits(source, ids, "bfloat16"), exact)
    theirs = relative_l2(outputs.logits.numpy(), exact)
    assert theirs < 1.1 * ours


def test_pytorch_continues_padded_prompts(tmp_path, torch_model):
    """Cached, and padded on the left, as each prompt alone without a cache."""
    source = write_original(
        tmp_path / "flax", normal("float32"), settings=CONFIG_V2
    )
    model = torch_model(source)
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 512, length) for length in (9, 4, 1)]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    ids = np.zeros((3, 9), "int64")
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :] = row
        mask[i, 9 - len(row) :] = 1
    together = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options
    )
    for made, row in zip(together, rows, strict=True):
        alone = model.generate(
            torch.from_numpy(row)[None], **options, use_cache=False
        )
        assert made[9:].tolist() == alone[0, len(row) :].tolist()


def test_pytorch_trains_and_saves(tmp_path, torch_model):
    source = write_original(
        tmp_path / "flax", normal("float32"), settings=CONFIG_V2
    )
    model = torch_model(source).train()
    model.activation_checkpointing_enable()
    ids = torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    model.save_pretrained(tmp_path / "saved")
    converted = converters.read_checkpoint(tmp_path / "saved")
    assert converted.architecture.name == "BwETAFv2"


@pytest.mark.slow
def test_verify(tmp_path):
    source = write_original(
        tmp_path / "flax", normal("float32"), settings=CONFIG_V2
    )
    convert(source, tmp_path / "torch", to="torch")
    report = converters.verify(source, tmp_path / "torch")
    assert report["same"], report
    assert report["logits"]["relative_l2"] < 1e-5


# === The tokenizer ===


def gpt2_folder(folder, **changes):
    return write_original(
        folder,
        settings=CONFIG_V2,
        **dict(vocab_size=50260, attention_dim=4, num_heads=2, ff_dim=6)
        | changes,
    )


@pytest.mark.parametrize("to", ["safetensors", "keras", "torch"])
def test_folders_get_gpt2s_tokenizer(tmp_path, to):
    convert(gpt2_folder(tmp_path / "flax"), tmp_path / to, to=to)
    checkpoint = converters.read_checkpoint(tmp_path / to)
    assert checkpoint.tokenizer == gpt2.gpt2_tokenizer().content
    assert checkpoint.config["eos_token_id"] == gpt2.END_ID
    lm = keras_bwetaf.from_preset(tmp_path / to)
    assert lm.preprocessor.tokenizer("Hello").tolist() == [15496]
    if to == "torch":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / to)
        assert tokenizer("Hello world")["input_ids"] == [15496, 995]
        assert tokenizer.eos_token_id == gpt2.END_ID


def test_another_tokenizer_stays(tmp_path, tokenizer_folder):
    """That of a model that was trained with one; also in a Flax folder."""
    source = write_original(
        tmp_path / "flax", settings=CONFIG_V2, tokenizer=tokenizer_folder
    )
    folders = convert_to_all(source, tmp_path / "to")
    assert_same_folders(folders["flax"], source)
    lm = keras_bwetaf.from_preset(folders["keras"])
    assert lm.preprocessor.tokenizer.end_token == "<|EOS|>"


@pytest.mark.fast
def test_small_vocabularies_have_no_tokenizer(tmp_path):
    source = gpt2_folder(tmp_path / "flax", vocab_size=50256)
    checkpoint = converters.read_checkpoint(source)
    assert checkpoint.tokenizer is None
    assert checkpoint.config["eos_token_id"] == 0


# === Configurations ===


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_fash_attention": True}, "must be false.*is not causal.*True"),
        ({"use_fash_attention": 1}, "use_fash_attention must be false"),
        ({"use_rope": "yes"}, "use_rope must be true or false. Rec.*'yes'"),
        ({"attention_dim": 33, "num_heads": 3}, "attention_dim must be even"),
        ({"num_heads": 5}, "must be divisible by every num_heads"),
        ({"num_heads": [4]}, "one number for each of 2 layers"),
        ({"res_scale": 0}, "res_scale must be a positive number"),
        ({"emb_scaling_factor": "1"}, "emb_scaling_factor must be a positive"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    source = write_original(tmp_path / "flax", settings=CONFIG_V2)
    edit_json(source / "understanding_good_stuff.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        converters.read_checkpoint(source)


@pytest.mark.fast
def test_the_generation_follows_from_the_files(tmp_path):
    """With settings that version 3 may have, too; and not by weights."""
    source = write_original(tmp_path / "flax", settings=CONFIG_V2)
    path = source / "understanding_good_stuff.json"
    settings = read_json(path)
    assert _name(settings) == "BwETAFv2"
    assert _name({"emb_splt": 256, "res_scale": 1}) == "BwETAFv2"
    assert _name(settings | {"gqa_repeats": 1}) == "BwETAFv3"
    assert _name({"num_heads": 4, "res_scale": 1}) == "BwETAFv3"
    path.write_text(json.dumps(settings | {"gqa_repeats": 1}))
    with pytest.raises(CheckpointError, match="missing tensor.*d1/b"):
        converters.read_checkpoint(source)


def _name(settings):
    from converters.architectures import architecture_of_flax

    return architecture_of_flax(settings).name


@pytest.mark.fast
def test_every_setting_is_optional_but_the_shapes(tmp_path):
    """Without one, it is what the original takes it to be."""
    optional = (
        *("possible_opt_path", "attn_chunks", "use_fash_attention"),
        *("emb_init_range", "use_rope", "emb_scaling_factor", "res_scale"),
    )
    source = write_original(tmp_path / "flax", settings=CONFIG_V2)
    path = source / "understanding_good_stuff.json"
    settings = {
        name: value
        for name, value in read_json(path).items()
        if name not in optional
    }
    path.write_text(json.dumps(settings))
    config = converters.read_checkpoint(source).config
    assert config["use_rope"] is False
    assert config["residual_scale"] == config["embedding_scale"] == 1
    for name in set(settings) - {"emb_splt"}:
        path.write_text(
            json.dumps({k: v for k, v in settings.items() if k != name})
        )
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            converters.read_checkpoint(source)


@pytest.mark.fast
def test_what_the_original_cannot_express(tmp_path):
    source = write_original(tmp_path / "flax", settings=CONFIG_V2)
    convert(source, tmp_path / "plain", to="safetensors")
    shutil.rmtree(source)
    edit_json(tmp_path / "plain" / "config.json", rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="rms_norm_eps must be 1e-08"):
        convert(tmp_path / "plain", source, to="flax")
