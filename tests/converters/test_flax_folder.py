import shutil

import flax.serialization
import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from converters import CheckpointError, convert, files
from tests.converters.folders import (
    CONFIG,
    FORMATS,
    adamw_state,
    assert_same_folders,
    assert_same_tensors,
    canonical_names,
    change_msgpack,
    edit_json,
    normal,
    parameters,
    read_json,
    read_msgpack,
    write_msgpack,
    write_original,
)
from tests.trained import FOLDER, KJV

STATE = "make_stuff_better.pkl"
SIDE = "conversion_extras.json"


# === Missing, damaged, wrong ===


@pytest.mark.parametrize(
    "name",
    [
        "good_stuff.pkl",
        "understanding_good_stuff.json",
        "tokenizer/yap.json",
        "tokenizer/understanding_yap.json",
        STATE,
    ],
)
def test_missing_and_damaged_files(copy, tiny, tmp_path, name):
    folder = copy("flax")
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    expected = "truncated" if name.endswith("pkl") else "expected JSON"
    with pytest.raises(CheckpointError, match=f"{name}: .*{expected}"):
        convert(folder, tmp_path / "target", to="torch")
    (folder / name).unlink()
    if name == STATE:
        report = convert(folder, tmp_path / "target", to="torch")
        assert not report["optimizer"]
        return
    message = f"{name}: the file is missing"
    if name == "understanding_good_stuff.json":
        message = "not a model folder"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "target", to="torch")
    assert not (tmp_path / "target").exists()


def test_oversized_json_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100 bytes of JSON"):
        convert(tiny["flax"], tmp_path / "target", to="torch")


@pytest.mark.parametrize("to", FORMATS)
def test_problems_are_all_listed(copy, tmp_path, to):
    folder = copy("flax")

    def damage(tree):
        block = tree["params"]["blocks_1"]
        block["extra"] = np.ones(2)
        del block["ln1"]["scale"]
        block["d1"]["w"] = block["d1"]["w"].T
        block["d2"]["b"] = np.ones((1, 1, 32), "int32")

    change_msgpack(folder / "good_stuff.pkl", damage)
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "target", to=to)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder / 'good_stuff.pkl'}: 4 problems:"
    assert sorted(lines[1:]) == [
        "- missing tensor params/blocks_1/ln1/scale, expected with shape (32,)",
        "- tensor params/blocks_1/d1/w has shape (96, 32), but the "
        "configuration gives (32, 96)",
        "- tensor params/blocks_1/d2/b has dtype int32, expected one of "
        "float16, bfloat16, float32, float64",
        "- unexpected tensor params/blocks_1/extra of shape (2,)",
    ]
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_configuration_of_another_model(copy, tmp_path, num_blocks):
    folder = copy("flax")
    edit_json(folder / "understanding_good_stuff.json", num_blocks=num_blocks)
    with pytest.raises(CheckpointError, match="good_stuff.pkl: 11 problems"):
        convert(folder, tmp_path / "target", to="keras", optimizer=False)


def test_a_key_that_occurs_twice(copy, tmp_path):
    folder = copy("flax")
    path = folder / "good_stuff.pkl"
    data = path.read_bytes()
    assert data.count(b"\xa8blocks_1") == 1
    path.write_bytes(data.replace(b"\xa8blocks_1", b"\xa8blocks_0"))
    with pytest.raises(CheckpointError, match="key 'blocks_0' occurs twice"):
        convert(folder, tmp_path / "target", to="torch")


# === The optimizer ===


@pytest.mark.parametrize("layout", ["safetensors", "torch"])
def test_optimizer_by_hand(every, layout):
    path = every["source"] / STATE
    if not path.exists():
        assert not (every[layout] / "optimizer.safetensors").exists()
        return
    state = read_msgpack(path)
    expected = {
        f"{name}.{key}": array
        for name, moment in (("exp_avg", "mu"), ("exp_avg_sq", "nu"))
        for key, array in canonical_names(state["0"][moment]).items()
    }
    expected["step"] = np.asarray(state["0"]["count"])
    found = safetensors.numpy.load_file(every[layout] / "optimizer.safetensors")
    assert_same_tensors(found, expected)
    is_trained = every["source"] in (FOLDER, KJV)
    assert expected["step"] == (700 if is_trained else 7)


def to_msgpack(state):
    """A state of optax as the original saves it."""
    state = flax.serialization.to_state_dict(state)
    return jax.tree.map(np.asarray, state)


def schedule(step):
    return 1.0 / (1 + step)


def weights():
    return parameters(CONFIG, normal("float32"))


def there_and_back(folder, tmp_path):
    for to in ("torch", "keras", "safetensors", "flax"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    return folder


CHAINS = {
    "adamw": lambda: optax.adamw(schedule),
    "adamw at a constant rate": lambda: optax.adamw(0.1),
    "clipped adamw": lambda: optax.chain(
        optax.clip_by_global_norm(7.0), optax.adamw(schedule, weight_decay=0.1)
    ),
    "adam": lambda: optax.adam(schedule),
    "by parts": lambda: optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(schedule), optax.scale(1)
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("other", [False, True])
def test_chains_of_optax(tmp_path, name, other):
    source = write_original(tmp_path / "source")
    state = to_msgpack(CHAINS[name]().init(weights()))

    def fill(path, leaf):
        if leaf.ndim:
            return normal("bfloat16", seed=len(str(path)))(*leaf.shape)
        # Counts differ after the schedule was started anew.
        in_adam = "mu" in holder(state, path)
        return np.array(4 if other and in_adam else 5, "int32")

    def holder(node, path):
        for key in path[:-1]:
            node = node[key.key]
        return node

    state = jax.tree_util.tree_map_with_path(fill, state)
    write_msgpack(source / STATE, state)
    back = there_and_back(source, tmp_path)
    assert_same_folders(back, source)


@pytest.mark.parametrize(
    "optimizer, messages",
    [
        (
            lambda: optax.sgd(schedule, momentum=0.9),
            [
                "0/trace/params/blocks_0/attn/d_out/b has dtype float32 and "
                "shape (1, 1, 32); only AdamW's state",
                "0/trace/params/emb/embedding has",
                "expected one state of AdamW, a dictionary of count, mu and "
                "nu. Received: 0",
            ],
        ),
        (
            lambda: optax.sgd(0.1),
            ["expected one state of AdamW", "Received: 0"],
        ),
        (
            lambda: optax.chain(optax.adam(0.1), optax.ema(0.9)),
            ["1/ema/params/emb/embedding has dtype float32"],
        ),
        (
            lambda: optax.chain(optax.adam(0.1), optax.adam(0.1)),
            ["expected one state of AdamW", "Received: 2"],
        ),
        (lambda: optax.lion(0.1), ["0/mu/params/emb/embedding has dtype"]),
    ],
    ids=["momentum", "sgd", "ema", "two adams", "lion"],
)
def test_other_optimizers(tmp_path, optimizer, messages):
    source = write_original(tmp_path / "source")
    state = to_msgpack(optimizer().init(weights()))
    write_msgpack(source / STATE, state)
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "new", to="torch")
    assert str(source / STATE) in str(error.value)
    for message in messages:
        assert message in str(error.value)
    assert not (tmp_path / "new").exists()
    convert(source, tmp_path / "new", to="torch", optimizer=False)


def test_problems_of_the_state_are_all_listed(copy, tmp_path):
    folder = copy("flax")

    def damage(state):
        adam = state["0"]
        block = adam["mu"]["params"]["blocks_0"]
        block["d1"]["b"] = block["d1"]["b"][:, :, 1:]
        block["more"] = block["d2"]["b"]
        del adam["nu"]["params"]["emb"]["embedding"]
        adam["nu"]["params"]["blocks_1"]["ln1"]["scale"] = np.ones(32, "int8")
        adam["count"] = np.array(3.0, "float32")

    change_msgpack(folder / STATE, damage)
    with pytest.raises(CheckpointError) as error:
        convert(folder, tmp_path / "new", to="flax")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder / STATE}: 5 problems:"
    assert sorted(lines[1:]) == [
        "- missing tensor nu/params/emb/embedding, expected with shape "
        "(512, 32)",
        "- tensor count has dtype float32, expected one of int32",
        "- tensor mu/params/blocks_0/d1/b has shape (1, 1, 95), but the "
        "configuration gives (1, 1, 96)",
        "- tensor nu/params/blocks_1/ln1/scale has dtype int8, expected one "
        "of float16, bfloat16, float32, float64",
        "- unexpected tensor mu/params/blocks_0/more of shape (1, 1, 32)",
    ]


def test_state_of_another_model(copy, tmp_path):
    folder = copy("flax")
    state = adamw_state(CONFIG | {"num_blocks": 3}, normal("float32"))
    write_msgpack(folder / STATE, state)
    with pytest.raises(CheckpointError, match="22 problems") as error:
        convert(folder, tmp_path / "new", to="flax")
    assert "unexpected tensor mu/params/blocks_2/ln1/scale" in str(error.value)


def test_halves_of_a_moment_need_one_dtype(copy, tmp_path):
    folder = copy("torch")
    path = folder / "optimizer.safetensors"
    arrays = safetensors.numpy.load_file(path)
    name = "exp_avg_sq.model.layers.1.mlp.gate_proj.bias"
    arrays[name] = arrays[name].astype("float16")
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(
        CheckpointError,
        match="exp_avg_sq.model.layers.1.mlp.up_proj.bias and "
        f"{name} are one tensor .* Received: float32 and float16",
    ):
        convert(folder, tmp_path / "new", to="flax")
    convert(folder, tmp_path / "new", to="keras")


# === The chain in the side file ===


def test_chain_is_the_originals_where_none_was_kept(copy, tiny, tmp_path):
    folder = copy("keras")
    (folder / SIDE).unlink()
    convert(folder, tmp_path / "new", to="flax")
    path = tmp_path / "new" / STATE
    assert path.read_bytes() == (tiny["source"] / STATE).read_bytes()


def test_the_originals_chain_needs_no_side_file(tiny):
    assert STATE not in read_json(tiny["torch"] / SIDE)["flax"]


@pytest.mark.parametrize("leaf", ["lion", 2**31, 1.5, None, True, [1]])
def test_damaged_chain(tmp_path, leaf):
    source = write_original(tmp_path / "source", moments=normal("float32"))

    def extend(state):
        state["3"] = {"count": np.array(3, "int32")}

    change_msgpack(source / STATE, extend)
    convert(source, tmp_path / "torch", to="torch")
    side = tmp_path / "torch" / SIDE
    kept = read_json(side)
    assert kept["flax"][STATE]["changes"]["3"] == {"kept": {"count": 3}}
    kept["flax"][STATE]["changes"]["3"]["kept"]["count"] = leaf
    edit_json(side, **kept)
    with pytest.raises(
        CheckpointError, match="kept optimizer chain must .*Remove conversion"
    ):
        convert(tmp_path / "torch", tmp_path / "new", to="flax")
    assert not (tmp_path / "new").exists()
    side.unlink()
    convert(tmp_path / "torch", tmp_path / "new", to="flax")
    shutil.rmtree(tmp_path / "new")
