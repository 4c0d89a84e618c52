"""LoRA: what is trained, what is computed, what is in a file."""

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
import keras_bwetaf
from keras_bwetaf import BwETAFBackbone, BwETAFCausalLM
from tests.models.test_fit import PRIME, arrays, compiled_step, packed, rows
from tests.parity import relative_l2
from tests.test_processes import free_address, start

ALL = [
    "query",
    "key",
    "value",
    "attention_output",
    "gate",
    "intermediate",
    "output",
    "token_embedding",
]


def make_lm(dtype="float32", seed=0, vocabulary_size=64, **changes):
    keras.utils.set_random_seed(seed)
    config = dict(
        vocabulary_size=vocabulary_size,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        max_sequence_length=64,
        initializer_range=0.1,
    )
    backbone = BwETAFBackbone(**{**config, **changes}, dtype=dtype)
    return BwETAFCausalLM(backbone)


def randomize(lm, seed=0):
    """Factors as after a training."""
    rng = np.random.default_rng(seed)
    for weight in lm.trainable_weights:
        weight.assign(rng.standard_normal(weight.shape) / 4)


def values(weights):
    return {weight.path: weight.numpy() for weight in weights}


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(received[name], value)


X = packed(rows(4, length=16))


# === Training ===


def test_fit_trains_the_factors_alone():
    lm = make_lm()
    start = values(lm.weights)
    logits = lm.predict(X, verbose=0)
    lm.compile(keras_bwetaf.recipe("97m", 10, peak_learning_rate=0.01))
    lm.backbone.enable_lora(2, ALL, lora_alpha=4)
    np.testing.assert_array_equal(lm.predict(X, verbose=0), logits)
    before = values(lm.trainable_weights)
    factors = {path.split("/")[-2] for path in before}
    assert factors == set(ALL) and len(before) == 2 * 8

    lm.fit(X, epochs=2, verbose=0)
    after = values(lm.weights)
    for path, value in start.items():
        np.testing.assert_array_equal(after[path], value)
    for path, value in before.items():
        assert (after[path] != value).any(), path
    moments = [v for v in lm.optimizer.variables if v.shape]
    assert len(moments) == 2 * len(before)
    assert (lm.predict(X, verbose=0) != logits).any()


def test_the_factor_of_the_inputs_is_random():
    """The other is zero, and after a first step no more."""
    lm = make_lm()
    lm.backbone.enable_lora(4, ["gate"])
    gate = lm.backbone.transformer_layers[0].feedforward.gate
    assert not gate.lora_kernel_a.numpy().any()
    assert gate.lora_kernel_b.shape == (4, 32)
    # Uniform, as `he_uniform` is for 32 inputs.
    limit = (6 / 32) ** 0.5
    largest = np.abs(gate.lora_kernel_b.numpy()).max()
    assert 0.9 * limit < largest <= limit


def test_random_factors_follow_the_seed():
    """And each has numbers of its own, as a layer's kernel has."""

    def random_factors(seed):
        lm = make_lm(seed=seed, num_layers=2)
        lm.backbone.enable_lora(2, ALL)
        return [x for x in values(lm.trainable_weights).values() if x.any()]

    one = random_factors(seed=1)
    assert len(one) == 2 * 7 + 1
    shared = [x.ravel()[:32].tobytes() for x in one]
    assert len(set(shared)) == len(one)
    for x, again, other in zip(
        one, random_factors(seed=1), random_factors(seed=2), strict=True
    ):
        np.testing.assert_array_equal(x, again)
        assert (x != other).any()


@pytest.mark.slow
def test_two_processes_have_the_same_factors(tmp_path):
    address = free_address()
    statuses, outputs = start(
        [
            ["tests.models.lora_in_processes", address, 2, process, tmp_path]
            for process in range(2)
        ],
        tmp_path,
    )
    assert statuses == [0, 0], outputs
    one, two = (dict(np.load(tmp_path / f"factors-{i}.npz")) for i in range(2))
    assert_same(one, two)
    lm = make_lm(num_layers=2)
    lm.backbone.enable_lora(2, ALL)
    for path, value in values(lm.trainable_weights).items():
        np.testing.assert_array_equal(one[f"start {path}"], value)
        assert (one[f"end {path}"] != value).any()
    lm.backbone.load_lora_weights(tmp_path / "lora.safetensors")
    for path, value in values(lm.trainable_weights).items():
        np.testing.assert_array_equal(one[f"end {path}"], value)


def test_a_frozen_table_costs_no_gradient():
    """No loop of the step carries an array for it."""

    def carried(lm):
        lm.compile(keras.optimizers.SGD(0.1))
        step = compiled_step(lm, packed(rows(8, length=64)))
        lines = step.as_text().splitlines()
        (loop,) = [line for line in lines if " while(" in line]
        table = f"f32[{PRIME},32]"
        return loop.split(" while(")[0].count(table), step.cost_analysis()

    lm = make_lm(vocabulary_size=PRIME)
    tables, cost = carried(lm)
    assert tables == 2  # The table and its gradient.
    lm.backbone.token_embedding.trainable = False
    tables, less = carried(lm)
    assert tables == 1 and less["flops"] < cost["flops"]


def test_the_kernels_gradient_is_never_made():
    """The factors' gradients come without it."""
    lm = make_lm(hidden_dim=48, intermediate_dim=80)
    lm.backbone.enable_lora(2, ["gate"])
    lm.compile(keras.optimizers.SGD(0.1))
    step = compiled_step(lm, X)
    kernel = (80, 48)
    assert ("f32", kernel) in arrays(step)  # As an argument.
    text = step.as_text()
    assert "f32[80,2]" in text and "f32[2,48]" in text
    made = [
        line
        for line in text.splitlines()
        if f"= f32[{kernel[0]},{kernel[1]}]" in line and " dot(" in line
    ]
    assert not made


def test_changed_weights_need_a_new_optimizer():
    """Nothing is lost when that is forgotten."""
    lm = make_lm()
    lm.compile(keras.optimizers.SGD(0.1))
    lm.fit(X, verbose=0)
    lm.backbone.enable_lora(2)
    before = values(lm.weights)
    with pytest.raises(ValueError, match="new optimizer. Received.*4 are"):
        lm.fit(X, verbose=0)
    assert_same(values(lm.weights), before)
    lm.compile(keras.optimizers.SGD(0.1))
    lm.fit(X, verbose=0)
    lm.backbone.merge_lora()
    with pytest.raises(ValueError, match="for 4 variables"):
        lm.fit(X, verbose=0)


# === Freezing ===


def test_frozen_layers():
    """As Keras does it: `trainable = False`."""
    lm = make_lm(num_layers=2)
    lm.backbone.token_embedding.trainable = False
    lm.backbone.transformer_layers[0].trainable = False
    lm.compile(keras_bwetaf.recipe("97m", 10, peak_learning_rate=0.01))
    before = values(lm.weights)
    lm.fit(X, epochs=2, verbose=0)
    after = values(lm.weights)
    trained = {path for path in before if (after[path] != before[path]).any()}
    assert trained == {
        w.path for w in lm.backbone.transformer_layers[1].weights
    }
    moments = [v for v in lm.optimizer.variables if v.shape]
    assert len(moments) == 2 * len(trained)


def test_frozen_others_need_a_new_optimizer():
    """As many weights as before, but not the same ones."""
    lm = make_lm(num_layers=2)
    first, second = lm.backbone.transformer_layers
    first.trainable = False
    lm.compile(keras.optimizers.Adam(0.1))
    lm.optimizer.build(lm.trainable_variables)
    first.trainable, second.trainable = True, False
    with pytest.raises(ValueError, match="Compile the model with a new opt"):
        lm.fit(X, verbose=0)


# === Merging ===


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("mixed_bfloat16", 0.05)]
)
def test_merge(dtype, tolerance):
    lm = make_lm(dtype)
    plain = lm.predict(X, verbose=0)
    lm.backbone.enable_lora(4, ALL, lora_alpha=2)
    randomize(lm)
    expected = lm.predict(X, verbose=0)
    lm.backbone.merge_lora()
    received = lm.predict(X, verbose=0)
    assert relative_l2(received, expected) < tolerance
    assert relative_l2(plain, expected) > 0.3
    new = make_lm(dtype)
    assert [w.path for w in lm.weights] == [w.path for w in new.weights]
    assert len(lm.trainable_weights) == len(new.trainable_weights)


def test_merged_weights():
    lm = make_lm()
    before = values(lm.weights)
    lm.backbone.enable_lora(2, ["output", "token_embedding"], lora_alpha=6)
    randomize(lm)
    factors = values(lm.trainable_weights)
    lm.backbone.merge_lora()
    after = values(lm.weights)
    changed = {
        "token_embedding/embeddings",
        "transformer_layer_0/feedforward/output/kernel",
    }
    for path, value in before.items():
        if path in changed:
            stem, name = path.rsplit("/", 1)
            a, b = (factors[f"{stem}/lora_{name}_{x}"] for x in "ab")
            value = value + 3 * a @ b
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_presets_hold_the_merged_weights(tmp_path, dtype, is_merged):
    lm = make_lm(dtype)
    lm.backbone.enable_lora(4, ALL)
    randomize(lm)
    if is_merged:
        lm.backbone.merge_lora()
    before = values(lm.weights)
    lm.save_to_preset(tmp_path / "task")
    lm.backbone.save_to_preset(str(tmp_path / "backbone"))
    assert_same(values(lm.weights), before)
    if not is_merged:
        assert len(lm.backbone._lora_layers()) == 8
        lm.backbone.merge_lora()
    expected = values(lm.backbone.weights)
    task = BwETAFCausalLM.from_preset(
        str(tmp_path / "task"), dtype=dtype, preprocessor=None
    )
    assert_same(values(task.backbone.weights), expected)
    backbone = BwETAFBackbone.from_preset(
        str(tmp_path / "backbone"), dtype=dtype
    )
    assert_same(values(backbone.weights), expected)


def test_export_after_merging(tmp_path):
    lm = make_lm()
    lm.backbone.enable_lora(2)
    randomize(lm)
    lm.export_to_transformers(tmp_path / "before")
    lm.backbone.merge_lora()
    lm.export_to_transformers(tmp_path / "after")
    before, after = (
        converters.read_checkpoint(tmp_path / name)
        for name in ("before", "after")
    )
    for row in before.rows:
        np.testing.assert_array_equal(
            before[row.name].array(), after[row.name].array()
        )
    assert (
        relative_l2(
            after["model.layers.0.self_attn.q_proj.weight"].array(),
            values(make_lm().weights)[
                "transformer_layer_0/self_attention/query/kernel"
            ],
        )
        > 0.1
    )


# === Files ===


@pytest.fixture
def saved(tmp_path):
    """A model with LoRA on, and the file of it."""
    lm = make_lm()
    lm.backbone.enable_lora(2, ["query", "gate", "token_embedding"], 3)
    randomize(lm)
    path = tmp_path / "style.safetensors"
    lm.backbone.save_lora_weights(path)
    return lm, path


@pytest.mark.parametrize("is_on", [False, True])
def test_load(saved, is_on):
    lm, path = saved
    other = make_lm()
    if is_on:
        other.backbone.enable_lora(2, ["query", "gate", "token_embedding"], 3)
    other.backbone.load_lora_weights(path)
    assert_same(values(other.weights), values(lm.weights))
    assert len(other.trainable_weights) == len(lm.trainable_weights)
    np.testing.assert_array_equal(
        other.predict(X, verbose=0), lm.predict(X, verbose=0)
    )
    factors = values(lm.trainable_weights).values()
    assert path.stat().st_size < sum(x.nbytes for x in factors) + 4000
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_load_into_another_dtype(tmp_path):
    """Weights in bfloat16, as published; the file is the same."""
    lm = make_lm("bfloat16")
    other = make_lm()
    other.set_weights([w.numpy().astype("float32") for w in lm.weights])
    for each in (lm, other):
        each.backbone.enable_lora(2)
        randomize(each)
        each.backbone.save_lora_weights(tmp_path / f"{each.name}.safetensors")
    one, two = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert one == two


def test_another_base_is_refused(saved):
    lm, path = saved
    for other in (make_lm(seed=1), make_lm(num_layers=2)):
        before = values(other.weights)
        with pytest.raises(ValueError, match="belongs to another base model"):
            other.backbone.load_lora_weights(path)
        assert_same(values(other.weights), before)
    lm.backbone.merge_lora()
    with pytest.raises(ValueError, match="belongs to another base model"):
        lm.backbone.load_lora_weights(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4, ["query", "gate", "token_embedding"]),
            "file has rank=2.*Received: .*rank=4",
        ),
        (
            (2, ["query", "gate", "token_embedding"], 5),
            "file has lora_alpha=3.*=5",
        ),
        (
            (2, ["query"], 3),
            r"gate/lora_kernel_a: expected None, rec.*\(48, 2\)",
        ),
        ((2, ALL, 3), r"key/lora_kernel_b: expected \(2, 32\), received None"),
    ],
)
def test_other_factors_are_refused(saved, arguments, message):
    _, path = saved
    lm = make_lm()
    lm.backbone.enable_lora(*arguments)
    before = values(lm.weights)
    with pytest.raises(ValueError, match=message):
        lm.backbone.load_lora_weights(path)
    assert_same(values(lm.weights), before)


def test_damaged_files(saved, tmp_path):
    _, path = saved
    content = path.read_bytes()
    lm = make_lm()
    tensors = load_file(path)
    for damaged in (content[:-1], b"", content[:8] + b"[" + content[9:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="that `save_lora_weights` wrote"):
            lm.backbone.load_lora_weights(path)
    for metadata in (None, {"lora_config": "{"}, {"lora_config": "[]"}):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match="that `save_lora_weights` wrote"):
            lm.backbone.load_lora_weights(path)
    with pytest.raises(FileNotFoundError):
        lm.backbone.load_lora_weights(tmp_path / "none.safetensors")
    assert not lm.backbone._lora_layers()


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    lm, path = saved
    content = path.read_bytes()
    randomize(lm, seed=5)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("converters.files.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        lm.backbone.save_lora_weights(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_a_file_would_lose_is_refused(tmp_path):
    lm = make_lm()
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="LoRA is not on"):
        lm.backbone.save_lora_weights(path)
    with pytest.raises(ValueError, match="LoRA is not on"):
        lm.backbone.merge_lora()
    lm.backbone.enable_lora(2)
    lm.backbone.transformer_layers[0].attention_norm.trainable = True
    with pytest.raises(ValueError, match="weights .'transformer_layer_0/att"):
        lm.backbone.save_lora_weights(path)
    for call in (lm.backbone.save_lora_weights, lm.backbone.load_lora_weights):
        with pytest.raises(ValueError, match="must end in '.safetensors'"):
            call(tmp_path / "a.lora.h5")


# === Arguments ===


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "`rank` must be a positive int. Received: rank=0"),
        (dict(rank=2, target_layer_names=["q_proj"]), "Received.*'q_proj'"),
        (dict(rank=2, target_layer_names=[]), r"Received: .*=\[\]"),
        (dict(rank=2, target_layer_names="query"), "must be a list of names"),
        (dict(rank=2, lora_alpha=0), "Received: lora_alpha=0"),
        (dict(rank=2, lora_alpha="1"), "Received: lora_alpha='1'"),
        (dict(rank=True), "`rank` must be a positive int. Received: rank=True"),
    ],
)
def test_wrong_arguments(arguments, message):
    lm = make_lm()
    with pytest.raises(ValueError, match=message):
        lm.backbone.enable_lora(**arguments)
    assert len(lm.trainable_weights) == len(lm.weights)


def test_on_twice():
    lm = make_lm()
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA is on already"):
        lm.backbone.enable_lora(2)


def test_quantization_comes_last():
    lm = make_lm()
    query = lm.backbone.transformer_layers[0].attention.query
    lm.backbone.enable_lora(2, ["query"])
    with pytest.raises(ValueError, match="A layer with LoRA cannot be quant"):
        query.quantize("int8")
    lm.backbone.merge_lora()
    query.quantize("int8")
    with pytest.raises(ValueError, match="Quantize the model last.*int8"):
        lm.backbone.enable_lora(2)


def test_again_after_merging():
    """What was compiled for other factors is not taken for these."""
    lm = make_lm()
    lm.backbone.enable_lora(2, ["gate"])
    randomize(lm)
    lm.predict(X, verbose=0)
    lm.backbone.merge_lora()
    lm.backbone.enable_lora(2, ["intermediate"], lora_alpha=20)
    randomize(lm, seed=1)
    received = lm.predict(X, verbose=0)
    expected = np.asarray(lm(X))
    assert relative_l2(received, expected) < 1e-5
