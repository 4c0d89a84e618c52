"""Version 4: every way between the formats, and what is refused."""

import copy
import json
import warnings

import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import converters
import keras_bwetaf
from converters import CheckpointError, convert
from converters.architectures import architecture_of_flax
from tests import originals
from tests.converters.folders import (
    CONFIG_V4,
    FORMATS,
    any_bits,
    assert_same_folders,
    assert_same_tensors,
    convert_to_all,
    edit_json,
    normal,
    read_json,
    read_msgpack,
    write_original_v4,
)
from tests.parity import relative_l2

SETTINGS = "understanding_good_stuff.json"
ALL = ("float16", "float32", "float64", "bfloat16")


def config_with(**changes):
    """`CONFIG_V4` with settings changed by their names."""
    config = copy.deepcopy(CONFIG_V4)
    for name, value in changes.items():
        group = next(g for g in ("arc", "attn", "moe") if name in config[g])
        config[group][name] = value
    return config


# What draws the weights, what draws the moments, the configuration. Layers
# are one tensor in Flax, so all tensors of a case have one dtype.
CASES = {
    "float32": (normal("float32"), normal("float32", seed=1), config_with()),
    "bfloat16": (normal("bfloat16"), normal("bfloat16", seed=1), config_with()),
    "any bits": (any_bits(*ALL), any_bits(*ALL[1:], seed=1), config_with()),
    "one expert": (
        normal("float32"),
        normal("float32", seed=1),
        config_with(num_experts=1, top_k=1),
    ),
    "odd widths, chunks": (
        normal("float16"),
        None,
        config_with(
            num_heads=3,
            attention_dim=45,
            gqa_repeats=3,
            ff_dim=7,
            num_blocks=3,
            attn_chunks=4,
            theeta=500.5,
        ),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def every(request, tmp_path_factory):
    """All kinds of models in each format; tests must not change them."""
    folder = tmp_path_factory.mktemp("every")
    draw, moments, config = CASES[request.param]
    source = write_original_v4(
        folder / "source", draw, moments=moments, config=config
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
    """Written out here, apart from the table, so that one checks the other."""
    params = read_msgpack(every["source"] / "good_stuff.pkl")["params"]
    block = params["blocks"]["block"]
    attention, mixture = block["attn"], block["MoE_FFN"]
    expected = {
        "model.embed_tokens.weight": params["emb"]["embedding"],
        "model.norm.weight": params["f_ln"]["scale"],
    }
    for i in range(len(block["ln1"]["scale"])):
        tensors = {
            "input_layernorm.weight": block["ln1"]["scale"][i],
            "self_attn.q_proj.weight": attention["q_dense"]["w"][i].T,
            "self_attn.k_proj.weight": attention["k_dense"]["w"][i].T,
            "self_attn.v_proj.weight": attention["v_dense"]["w"][i].T,
            "self_attn.o_proj.weight": attention["d_out"]["w"][i].T,
            "self_attn.o_proj.bias": attention["d_out"]["b"][i, 0, 0],
            "post_attention_layernorm.weight": block["ln2"]["scale"][i],
            "mlp.experts.up_proj.weight": mixture["key_kernel"][i],
            "mlp.experts.up_proj.bias": mixture["key_bias"][i],
            "mlp.experts.gate_proj.weight": mixture["gate_kernel"][i],
            "mlp.experts.gate_proj.bias": mixture["gate_bias"][i],
            "mlp.experts.down_proj.weight": mixture["out_kernel"][i],
            "mlp.experts.down_proj.bias": mixture["out_bias"][i],
        }
        if "router" in mixture:
            tensors["mlp.router.weight"] = mixture["router"][i].T
        for name, array in tensors.items():
            expected[f"model.layers.{i}.{name}"] = array
    path = every["safetensors"] / "model.safetensors"
    assert_same_tensors(safetensors.numpy.load_file(path), expected)


@pytest.mark.fast
@pytest.mark.parametrize("num_experts", [1, 4])
def test_keras_loads_what_we_write(tmp_path, num_experts):
    config = config_with(num_experts=num_experts, top_k=1)
    source = write_original_v4(tmp_path / "flax", config=config)
    convert(source, tmp_path / "keras", to="keras")
    with pytest.warns(UserWarning, match="no preprocessor"):
        lm = keras_bwetaf.from_preset(tmp_path / "keras", dtype="float32")
    lm.save_to_preset(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "home", to="flax")
    assert (tmp_path / "home" / "good_stuff.pkl").read_bytes() == (
        source / "good_stuff.pkl"
    ).read_bytes()


@pytest.mark.fast
def test_compiled_programs_are_never_read(tmp_path):
    """The original's folder may have two files that are pickles."""
    source = write_original_v4(tmp_path / "source")
    for name in ("sf.pkl", "vsf.pkl"):
        (source / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        (source / name).chmod(0)
    for to in FORMATS:
        convert(source, tmp_path / to, to=to)
        names = {path.name for path in (tmp_path / to).rglob("*")}
        assert names.isdisjoint({"sf.pkl", "vsf.pkl"})


# === The original loads what we write ===


@pytest.mark.slow
def test_the_original_loads_what_we_write(tmp_path):
    """And computes equal logits, with the configuration that it wrote."""
    source = tmp_path / "source"
    originals.run("v4", "save", source, optimizer=True, num_experts=4)
    folders = convert_to_all(source, tmp_path / "to")
    assert_same_folders(folders["flax"], source)
    # Also without what was kept of the original's own settings.
    (folders["keras"] / "conversion_extras.json").unlink(missing_ok=True)
    convert(folders["keras"], tmp_path / "plain", to="flax")
    assert_same_folders(tmp_path / "plain", source)
    expected, received = (
        originals.run("v4", "loads", each)
        for each in (source, tmp_path / "plain")
    )
    np.testing.assert_array_equal(received, expected)


# === PyTorch ===


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory, remote_code):
    """A function that loads a Flax folder in PyTorch, by its own code."""

    def load(flax, dtype="float32", **changes):
        folder = tmp_path_factory.mktemp("torch") / "torch"
        convert(flax, folder, to="torch", optimizer=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            return AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, dtype=dtype, **changes
            ).eval()

    return load


def keras_logits(folder, ids, dtype="float32", **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = keras_bwetaf.from_preset(folder, dtype=dtype, **changes)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return np.asarray(lm(inputs), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["exact", "original_token"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 6, "top_k": 3, "theeta": 300},
        {"num_heads": 3, "attention_dim": 45, "gqa_repeats": 3},
    ],
)
def test_pytorch(tmp_path, torch_model, changes, rule):
    source = write_original_v4(
        tmp_path / "flax", normal("float32"), config=config_with(**changes)
    )
    model = torch_model(source, expert_dispatch=rule)
    ids = np.random.default_rng(0).integers(0, 512, (2, 60)).astype("int32")
    with torch.no_grad():
        received = model(torch.from_numpy(ids).long()).logits.numpy()
    expected = keras_logits(source, ids, expert_dispatch=rule)
    assert relative_l2(received, expected) < 1e-5


@pytest.mark.slow
def test_pytorch_continues_padded_prompts(tmp_path, torch_model):
    """Cached, and padded on the left, as each prompt alone without a cache."""
    source = write_original_v4(tmp_path / "flax", normal("float32"))
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
    source = write_original_v4(tmp_path / "flax", normal("float32"))
    model = torch_model(source).train()
    model.activation_checkpointing_enable()
    ids = torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    model.save_pretrained(tmp_path / "saved")
    converted = converters.read_checkpoint(tmp_path / "saved")
    assert converted.architecture.name == "BwETAFv4"


def test_pytorch_refuses_the_rule_of_batches(tmp_path, torch_model):
    source = write_original_v4(tmp_path / "flax")
    with pytest.raises(Exception, match="expert_dispatch"):
        torch_model(source, expert_dispatch="original_batch")


@pytest.mark.slow
def test_verify(tmp_path):
    source = write_original_v4(tmp_path / "flax", normal("float32"))
    convert(source, tmp_path / "torch", to="torch")
    report = converters.verify(source, tmp_path / "torch")
    assert report["same"], report
    assert report["logits"]["relative_l2"] < 1e-5


# === Configurations ===


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe": None}, "moe must be an object with num_experts, top_k, cap"),
        ({"attn": []}, "attn must be an object.*Missing: attn_chunks, gqa_r"),
        ({"moe": {"top_k": 1, "capacity": 1}}, "Missing: num_experts"),
        (config_with(top_k=5), "top_k must be at most num_experts. Rec.* 5"),
        (config_with(num_experts=0), "num_experts must be an integer from 1"),
        (config_with(capacity=0), "capacity must be a positive number"),
        (config_with(theeta="1"), "theeta must be a positive number"),
        (config_with(num_heads=[4, 4]), "num_heads must be an integer"),
        (config_with(num_heads=6), "must be divisible by every num_heads"),
        (config_with(gqa_repeats=3), "gqa_repeats must be an integer that"),
        ({"dropout_rate": 1}, "dropout_rate must be a number from 0 to below"),
        (config_with(num_experts=8), "has shape .* but the configuration"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    source = write_original_v4(tmp_path / "flax")
    edit_json(source / SETTINGS, **changes)
    with pytest.raises(CheckpointError, match=message):
        converters.read_checkpoint(source)


@pytest.mark.fast
def test_several_groups_of_weights_are_refused(tmp_path):
    """An optimizer that has a state for each of them."""
    source = write_original_v4(tmp_path / "flax", moments=normal("float32"))
    from tests.converters.folders import change_msgpack

    def add(tree):
        groups = tree["inner_states"]
        groups["norms"] = copy.deepcopy(groups["default"])

    change_msgpack(source / "make_stuff_better.pkl", add)
    with pytest.raises(CheckpointError, match="one state of AdamW.*: 2"):
        converters.read_checkpoint(source)


@pytest.mark.fast
def test_the_generation_follows_from_the_files():
    assert architecture_of_flax(CONFIG_V4).name == "BwETAFv4"
    assert architecture_of_flax({"arc": None}).name == "BwETAFv4"
    assert architecture_of_flax(CONFIG_V4["arc"]).name == "BwETAFv3"


@pytest.mark.fast
def test_what_the_file_does_not_say(tmp_path):
    """Context and rule go to Flax; what the original cannot do does not."""
    source = write_original_v4(tmp_path / "flax")
    convert(source, tmp_path / "plain", to="safetensors")
    path = tmp_path / "plain" / "config.json"
    assert read_json(path)["max_position_embeddings"] == 8192
    edit_json(
        path, max_position_embeddings=64, expert_dispatch="original_token"
    )
    convert(tmp_path / "plain", tmp_path / "again", to="flax")
    assert json.loads((tmp_path / "again" / SETTINGS).read_text()) == CONFIG_V4
    edit_json(path, rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match="rms_norm_eps must be 1e-08"):
        convert(tmp_path / "plain", tmp_path / "other", to="flax")
