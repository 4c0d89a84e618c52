"""Version 4 beside BwETAF 0.7.4, every tensor random."""

import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import BwETAFV4Backbone, BwETAFV4CausalLM
from keras_bwetaf.hardware import flops_per_token, num_idle_params
from keras_bwetaf.layers import MixtureOfExperts
from keras_bwetaf.preset_files import load_architecture
from keras_bwetaf.training import AdamW
from tests import originals
from tests.keras_hub_checks import KerasHubTestCase
from tests.models.float64_v4 import float64_logits
from tests.parity import relative_l2

TINY = {
    "vocabulary_size": 61,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 24,
    "num_experts": 8,
    "num_experts_per_token": 2,
    "max_sequence_length": 64,
}
# A value other than the default, and other than TINY's, for every argument.
OTHER = {
    "vocabulary_size": 30,
    "num_layers": 3,
    "num_query_heads": 6,
    "num_key_value_heads": 3,
    "hidden_dim": 24,
    "intermediate_dim": 40,
    "num_experts": 4,
    "num_experts_per_token": 3,
    "max_sequence_length": 128,
    "expert_dispatch": "original_token",
    "expert_capacity": 2.0,
    "balance_loss_weight": 0.5,
    "unused_loss_weight": 0.25,
    "router_noise_steps": 10,
    "dropout": 0.1,
    "rope_max_wavelength": 500.0,
    "rope_dtype": None,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.05,
    "dtype": "bfloat16",
    "name": "other",
    "trainable": False,
}
CONFIGURATIONS = {
    "card": {},
    "one choice": {"top_k": 1, "num_experts": 4, "gqa_repeats": 1},
    "one expert": {"top_k": 1, "num_experts": 1},
    "two experts": {"num_experts": 2, "capacity": 0.5},
    "three of six": {"num_experts": 6, "top_k": 3, "capacity": 2.0},
    "odd widths": {
        "num_heads": 3,
        "attention_dim": 45,
        "gqa_repeats": 3,
        "ff_dim": 29,
        "vocab_size": 53,
        "theeta": 500,
    },
    "all experts": {"num_experts": 4, "top_k": 4, "capacity": 1.0},
}
# The others take as long.
SOME = [
    name
    if name in ("card", "odd widths")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGURATIONS
]
# The only ones whose whole-sequence rule is exact.
EXACT = {
    "one choice": {"top_k": 1, "num_experts": 4, "capacity": 4},
    "one choice of eight": {"top_k": 1, "capacity": 8, "gqa_repeats": 4},
    "one expert": {"top_k": 1, "num_experts": 1},
}


def token_ids(shape=(3, 40), vocabulary_size=53, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary_size, shape).astype("int32")


def load(folder, dtype="float32", **changes):
    lm = BwETAFV4CausalLM.from_preset(
        folder, dtype=dtype, preprocessor=None, **changes
    )
    assert lm.backbone.compute_dtype == dtype
    return lm


def logits_of(lm, ids, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    logits = lm({"token_ids": ids, "padding_mask": mask})
    return np.asarray(logits, "float32")


def prompts(ids, lengths):
    """Rows of different lengths, padded on the right, as `generate` takes."""
    mask = np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]
    return {"token_ids": ids * mask, "padding_mask": mask.astype("int32")}


def batch_of(ids):
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the original's; tests must not change it."""
    folder = tmp_path_factory.mktemp("v4") / "flax"
    originals.run("v4", "save", folder, seed=7)
    return folder


# === Beside the original ===


@pytest.mark.fast
@pytest.mark.parametrize("name", SOME)
def test_whole_sequences(name, tmp_path):
    changes = CONFIGURATIONS[name]
    originals.run("v4", "save", tmp_path / "flax", seed=1, **changes)
    ids = token_ids()
    expected, _ = originals.run("v4", "logits", tmp_path / "flax", ids)
    lm = load(tmp_path / "flax", expert_dispatch="original_batch")
    difference = relative_l2(logits_of(lm, ids), expected)
    print(f"{name}: {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("name", SOME)
def test_the_generators_rule(name, tmp_path):
    """All rows and tokens at once, as each row and token by itself."""
    changes = CONFIGURATIONS[name]
    originals.run("v4", "save", tmp_path / "flax", seed=2, **changes)
    ids = token_ids((2, 16))
    expected = originals.run("v4", "decode", tmp_path / "flax", ids)
    lm = load(tmp_path / "flax", expert_dispatch="original_token")
    assert relative_l2(logits_of(lm, ids), expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_exact_dispatch(name, tmp_path):
    originals.run("v4", "save", tmp_path / "flax", seed=3, **EXACT[name])
    ids = token_ids()
    expected, _ = originals.run("v4", "logits", tmp_path / "flax", ids)
    received = logits_of(load(tmp_path / "flax"), ids)
    assert relative_l2(received, expected) <= 1e-5


@pytest.mark.parametrize("name", SOME)
def test_exact_dispatch_is_that_of_all_experts(name, tmp_path):
    """In float64, where each token's experts are computed one by one."""
    changes = CONFIGURATIONS[name]
    originals.run("v4", "save", tmp_path / "flax", seed=4, **changes)
    lm, ids = load(tmp_path / "flax"), token_ids()
    expected = float64_logits(lm.backbone, ids)
    assert relative_l2(logits_of(lm, ids), expected) <= 1e-5


def test_padding(tmp_path):
    """Logits of real tokens, padded on the right and on the left.

    By a rule that is exact in the original, too: by another, what it makes of
    padding changes all other tokens.
    """
    changes = EXACT["one choice"]
    originals.run("v4", "save", tmp_path / "flax", seed=5, **changes)
    ids = token_ids((2, 40))
    mask = np.ones_like(ids)
    mask[0, 30:] = mask[1, :10] = 0
    expected, _ = originals.run("v4", "logits", tmp_path / "flax", ids, mask)
    real = mask.astype("bool")
    received = logits_of(load(tmp_path / "flax"), ids, mask)
    assert relative_l2(received[real], expected[real]) <= 1e-5


def test_documents(folder):
    """As the original trains: token 0 ends a document."""
    ids = token_ids((2, 40), vocabulary_size=6)
    expected, _ = originals.run("v4", "logits", folder, ids, training=True)
    is_end = (ids == 0).astype("int32")
    numbers = 1 + np.cumsum(is_end, axis=1) - is_end
    lm = load(folder, expert_dispatch="original_batch")
    assert relative_l2(logits_of(lm, ids, numbers), expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"top_k": 1, "num_experts": 4}])
def test_bfloat16_is_no_farther_from_float64(changes, tmp_path):
    originals.run(
        "v4", "save", tmp_path / "flax", seed=6, dtype="bfloat16", **changes
    )
    ids = token_ids((1, 32))
    rule = {"expert_dispatch": "original_token"}
    lm = load(tmp_path / "flax", "bfloat16", **rule)
    exact = float64_logits(lm.backbone, ids)
    theirs = originals.run(
        "v4", "decode", tmp_path / "flax", ids, dtype="bfloat16"
    )
    theirs = relative_l2(theirs, exact)
    ours = relative_l2(logits_of(lm, ids), exact)
    print(f"from float64: ours {ours:.4f}, theirs {theirs:.4f}")
    in_float32 = logits_of(load(tmp_path / "flax", **rule), ids)
    assert relative_l2(in_float32, exact) < 1e-5
    # Two orders of the same roundings differ by chance.
    assert ours <= 1.02 * theirs


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules(dtype, tmp_path):
    """As close to float32 as the original's are in the same dtype."""
    originals.run(
        "v4",
        "save",
        *(tmp_path / "flax", 8, "bfloat16"),
        **{"top_k": 1, "num_experts": 4, "capacity": 4},
    )
    x = np.random.default_rng(0).standard_normal((2, 30, 32))
    x = x.astype("bfloat16").astype("float32")
    exact, theirs = (
        originals.run("v4", "modules", tmp_path / "flax", x, each)
        for each in ("float32", dtype)
    )
    block = load(tmp_path / "flax", dtype).backbone.transformer_layers[0]
    received = {
        "norm": block.attention_norm(x),
        "attention": block.attention(x.astype(dtype)),
        "experts": block.feedforward(x.astype(dtype)),
    }
    assert received.keys() == theirs.keys()
    for name, result in received.items():
        ours = relative_l2(np.asarray(result, "float32"), exact[name])
        limit = 1.02 * relative_l2(theirs[name], exact[name])
        print(f"{name}: {ours:.2e}, theirs {limit / 1.02:.2e}")
        assert ours <= max(limit, 1e-6), name


def test_auxiliary_losses(folder):
    """The original's, of a batch, summed over layers, in training only."""
    ids = token_ids()
    _, expected = originals.run("v4", "logits", folder, ids)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        lm = load(
            folder,
            expert_dispatch="original_batch",
            balance_loss_weight=weights[0],
            unused_loss_weight=weights[1],
        )
        inputs = batch_of(ids)
        lm.backbone(inputs, training=False)
        assert not lm.backbone.losses
        lm.backbone(inputs, training=True)
        received = sum(map(float, lm.backbone.losses))
        assert abs(received - np.dot(weights, expected)) < 1e-5


@pytest.mark.slow
def test_a_written_folder_loads_in_the_original(folder, tmp_path):
    import converters

    converters.convert(folder, tmp_path / "keras", to="keras")
    converters.convert(tmp_path / "keras", tmp_path / "again", to="flax")
    expected, received = (
        originals.run("v4", "loads", each)
        for each in (folder, tmp_path / "again")
    )
    np.testing.assert_array_equal(received, expected)


# === Used as version 3 is ===


class KerasHubChecks(KerasHubTestCase):
    @pytest.mark.slow
    def test_backbone(self):
        self.run_backbone_test(
            cls=BwETAFV4Backbone,
            init_kwargs=dict(TINY),
            input_data=batch_of(np.ones((2, 5), "int32")),
            expected_output_shape=(2, 5, 32),
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=BwETAFV4Backbone,
            init_kwargs=dict(OTHER, dtype="float32"),
            input_data=batch_of(np.arange(10, dtype="int32").reshape(2, 5)),
        )


@pytest.mark.fast
def test_config_holds_every_argument():
    backbone = BwETAFV4Backbone(**OTHER)
    config = backbone.get_config()
    assert set(config) == set(OTHER)
    assert {*BwETAFV4Backbone.config_names(), "dtype"} <= set(OTHER)
    for name in set(OTHER) - {"dtype"}:
        assert config[name] == OTHER[name], name
    again = BwETAFV4Backbone.from_config(config)
    assert again.get_config() == config


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 1}, "`num_experts_per_token` must be at most"),
        ({"num_experts": 0}, "`num_experts` must be a positive int"),
        ({"expert_dispatch": "decode"}, "`expert_dispatch` must be one of"),
        ({"rope_dtype": "int8"}, "`rope_dtype` must be one of"),
        ({"balance_loss_weight": -1}, "`balance_loss_weight` must be 0 or"),
        ({"router_noise_steps": 1.5}, "`router_noise_steps` must be an int"),
        ({"expert_capacity": 0}, "`expert_capacity` must be greater than 0"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        BwETAFV4Backbone(**{**TINY, **changes})


def test_initial_weights():
    config = dict(TINY, hidden_dim=128, intermediate_dim=64, num_layers=1)
    for variable in BwETAFV4Backbone(**config).weights:
        values = variable.numpy()
        if variable.name.endswith("bias") or variable.name == "scale":
            assert (values == (variable.name == "scale")).all()
        else:
            assert abs(values.std() / 128**-0.5 - 1) < 0.05, variable.path


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["exact", "original_token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_steps_are_one_pass(folder, dtype, rule):
    """Rows of different lengths, each token by the logits of one pass."""
    lm = load(folder, dtype, expert_dispatch=rule)
    lengths = [5, 12, 1, 9]
    inputs = prompts(token_ids((4, 12)), lengths)
    made = lm.generate(
        inputs, max_new_tokens=20, stop_token_ids=None, temperature=0
    )
    logits = logits_of(lm, made["token_ids"], made["padding_mask"])
    for row, length in enumerate(lengths):
        end = length + 20
        new = made["token_ids"][row, length:end]
        before = logits[row, length - 1 : end - 1]
        # What was chosen is the likeliest, or as likely up to rounding.
        chosen = np.take_along_axis(before, new[:, None], 1)[:, 0]
        gaps = before.max(-1) - chosen
        if dtype == "float32":
            assert gaps.max() <= 1e-4
        assert (gaps == 0).mean() > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["exact", "original_token"])
def test_seeds(folder, rule):
    """A row continues in a batch as alone, and again with the same seed."""
    lm = load(folder, expert_dispatch=rule)
    inputs = prompts(token_ids((3, 8)), [8, 3, 6])
    options = dict(max_new_tokens=12, stop_token_ids=None, seed=[5, 6, 7])
    together = lm.generate(inputs, **options)
    again = lm.generate(inputs, **options)
    np.testing.assert_array_equal(together["token_ids"], again["token_ids"])
    row = {name: value[1:2, :3] for name, value in inputs.items()}
    alone = lm.generate(row, **{**options, "seed": 6})
    width = alone["token_ids"].shape[1]
    np.testing.assert_array_equal(
        alone["token_ids"][0], together["token_ids"][1, :width]
    )


def losses_of_fit(lm, ids, batch_size=4, **compile_options):
    lm.compile(AdamW(1e-3), **compile_options)
    history = lm.fit(
        batch_of(ids),
        batch_size=batch_size,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    return history.history["loss"]


def all_experts(layer, inputs, weights, experts, projections, expert_axes):
    """In place of `MixtureOfExperts._mix`: all experts, masked."""
    gate, intermediate, output = projections
    share = jax.nn.one_hot(experts, layer.num_experts) * weights[..., None]
    share = jnp.sum(share, axis=2)  # (batch, length, experts)
    hidden = jax.nn.silu(
        jnp.einsum("bti,eio->bteo", inputs, gate[0]) + gate[1]
    ) * (jnp.einsum("bti,eio->bteo", inputs, intermediate[0]) + intermediate[1])
    outputs = jnp.einsum("bteo,eoi->btei", hidden, output[0]) + output[1]
    return jnp.einsum("btei,bte->bti", outputs, share)


@pytest.mark.slow
def test_five_steps(folder, monkeypatch):
    """Of `fit`, auxiliary losses included, beside all experts, masked."""
    ids = token_ids((20, 32))

    def run():
        lm = load(folder, balance_loss_weight=0.1, unused_loss_weight=0.1)
        lm.compile(AdamW(1e-3, epsilon=1e-6))
        history = lm.fit(
            batch_of(ids), batch_size=4, epochs=1, shuffle=False, verbose=0
        )
        return history.history["loss"], [w.numpy() for w in lm.weights]

    received = run()
    monkeypatch.setattr(MixtureOfExperts, "_mix", all_experts)
    expected = run()
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(received[1], expected[1], strict=True):
        assert relative_l2(ours, theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "block", "full"])
def test_remat_changes_no_loss(folder, remat):
    """Nor do auxiliary losses and noise get lost."""
    ids = token_ids((8, 32))
    received, expected = (
        losses_of_fit(load(folder, balance_loss_weight=1.0), ids, remat=each)
        for each in (remat, "none")
    )
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    without = losses_of_fit(
        load(folder, balance_loss_weight=0.0, unused_loss_weight=0.0), ids
    )
    assert expected[0] > without[0] + 1.5  # 1 or more in each layer.


@pytest.mark.slow
def test_noise_fades(folder):
    ids = token_ids((4, 16))
    quiet = load(folder).backbone(batch_of(ids), training=True)
    backbone = load(folder, router_noise_steps=3).backbone
    distances = [
        relative_l2(backbone(batch_of(ids), training=True), quiet)
        for _ in range(4)
    ]
    assert distances[0] > 0.1 and distances[3] == 0, distances
    noiseless = backbone(batch_of(ids), training=False)
    assert relative_l2(noiseless, quiet) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_training_in_bfloat16(dtype):
    keras.utils.set_random_seed(0)
    config = dict(TINY, dropout=0.1, router_noise_steps=8)
    lm = BwETAFV4CausalLM(BwETAFV4Backbone(**config, dtype=dtype))
    ids = np.tile(np.arange(32, dtype="int32"), (16, 1))
    lm.compile(AdamW(1e-2))
    history = lm.fit(batch_of(ids), batch_size=4, epochs=4, verbose=0)
    first, *_, last = history.history["loss"]
    assert last < 0.7 * first


@pytest.mark.slow
def test_lora(folder, tmp_path):
    lm, ids = load(folder), token_ids((4, 16))
    before = logits_of(lm, ids)
    with pytest.raises(ValueError, match="must be a list of names among"):
        lm.backbone.enable_lora(2, ["gate"])
    lm.backbone.enable_lora(2, ["query", "value"])
    np.testing.assert_allclose(logits_of(lm, ids), before, rtol=1e-5, atol=1e-5)
    lm.compile(AdamW(1e-2))
    lm.fit(batch_of(ids), batch_size=4, epochs=3, verbose=0)
    trained = logits_of(lm, ids)
    assert relative_l2(trained, before) > 1e-3
    lm.backbone.save_lora_weights(tmp_path / "lora.safetensors")
    again = load(folder)
    again.backbone.load_lora_weights(tmp_path / "lora.safetensors")
    again.backbone.merge_lora()
    assert relative_l2(logits_of(again, ids), trained) < 1e-5


@pytest.mark.slow
def test_int8(folder, tmp_path):
    """Attention and embeddings are quantized; experts stay floats."""
    lm, ids = load(folder), token_ids((2, 16))
    inputs = batch_of(ids)
    lm.quantize("int8")
    dtypes = {w.dtype for w in lm.backbone.transformer_layers[0].weights}
    assert "int8" in dtypes
    for weight in lm.backbone.transformer_layers[0].feedforward.weights:
        assert weight.dtype == "float32"
    quantized = logits_of(lm, ids)
    lm.generate(prompts(ids, [4, 7]), max_new_tokens=4, stop_token_ids=None)
    lm.save_to_preset(tmp_path / "int8")
    again = BwETAFV4CausalLM.from_preset(tmp_path / "int8", preprocessor=None)
    np.testing.assert_array_equal(np.asarray(again(inputs)), quantized)


def test_clone_and_saved_model(folder, tmp_path):
    lm, ids = load(folder, "bfloat16"), token_ids((2, 16))
    expected = logits_of(lm, ids)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    np.testing.assert_array_equal(logits_of(again, ids), expected)
    clone = keras.models.clone_model(lm)
    clone.set_weights(lm.get_weights())
    np.testing.assert_array_equal(logits_of(clone, ids), expected)


# === Names and classes ===


@pytest.mark.fast
def test_name():
    """Known without the network."""
    architecture, config = load_architecture("v4-preview")
    count = keras_bwetaf.list_presets()["v4-preview"]["parameters"]
    assert count == 253_545_216
    others = {"rope_max_wavelength": 10000.0, "layer_norm_epsilon": 1e-8}
    canonical = architecture.config_from_keras(config | others)
    shapes = [each.shape for each in architecture.tensors(canonical)]
    assert sum(map(np.prod, shapes)) == count
    recipe = keras_bwetaf.recipe("v4-preview", total_steps=100)
    assert float(np.max([recipe._learning_rate(i) for i in range(9)])) == (
        pytest.approx(7e-4)
    )


def test_parameters_at_work():
    """Those of two experts, which is what a token's FLOPs are counted of."""
    lm = BwETAFV4CausalLM(BwETAFV4Backbone(**TINY))
    two = BwETAFV4CausalLM(BwETAFV4Backbone(**{**TINY, "num_experts": 2}))
    routers = TINY["num_layers"] * 6 * 32
    active = lm.count_params() - num_idle_params(lm)
    assert active == two.count_params() + routers
    assert flops_per_token(lm, 64) == flops_per_token(two, 64) + 6 * routers
    lm.backbone.enable_lora(2, ["query"])
    two.backbone.enable_lora(2, ["query"])
    assert flops_per_token(lm, 64) == flops_per_token(two, 64) + 4 * routers


@pytest.mark.fast
def test_parameters_at_work_of_the_preview():
    """From the shapes; 253 million weights would take a gigabyte."""
    of_expert = 3 * 768 * 1536 + 2 * 1536 + 768
    assert 253_545_216 - 8 * 6 * of_expert == 83_491_584


@pytest.mark.fast
def test_the_class_follows_from_the_files(folder):
    with pytest.warns(UserWarning, match="no preprocessor"):
        lm = keras_bwetaf.from_preset(folder, load_weights=False)
    assert type(lm) is BwETAFV4CausalLM
    assert lm.backbone.max_sequence_length == 8192
    lm = load(folder, max_sequence_length=128)
    assert lm.backbone.max_sequence_length == 128
    with pytest.raises(ValueError, match="BwETAFv4 model"):
        keras_bwetaf.BwETAFCausalLM.from_preset(folder)


# === On several devices ===


def run_on_devices(folder):
    """Losses of training, trained weights, and what the model then makes."""
    lm, ids = load(folder), token_ids((16, 32))
    losses = losses_of_fit(lm, ids, batch_size=8)
    made = lm.generate(
        prompts(ids[:8, :8], [8, 3, 5, 1, 2, 8, 7, 6]),
        max_new_tokens=8,
        stop_token_ids=None,
        temperature=0,
    )
    weights = [np.asarray(weight.value) for weight in lm.backbone.weights]
    return losses, weights, made["token_ids"]


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "flax"
    changes = dict(vocab_size=64, gqa_repeats=1, num_heads=8)
    originals.run("v4", "save", folder, **changes)
    return folder, run_on_devices(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, arguments",
    [
        ("data_parallel", ()),
        ("fully_sharded", ()),
        ("model_parallel", (2,)),
        ("model_parallel", (4,)),
        ("model_parallel", (8,)),
        ("model_parallel", (2, True)),
    ],
)
def test_strategies(on_one_device, strategy, arguments):
    """Loss, weights and text on eight devices are those on one."""
    folder, expected = on_one_device
    distribution = getattr(keras_bwetaf.distribution, strategy)
    with distribution(*arguments).scope():
        received = run_on_devices(folder)
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(received[1], expected[1], strict=True):
        assert relative_l2(ours, theirs) < 1e-4
    np.testing.assert_array_equal(received[2], expected[2])


def test_every_variable_matches_one_pattern():
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
    layout_map = BwETAFV4Backbone.get_layout_map(mesh)
    backbone = BwETAFV4Backbone(**TINY, dropout=0.1, router_noise_steps=5)
    for variable in BwETAFV4CausalLM(backbone).variables:
        matched = [p for p in layout_map if re.fullmatch(p, variable.path)]
        assert len(matched) == 1, (variable.path, matched)
    block = "transformer_layer_0/feedforward"
    axes = layout_map[f"{block}/gate_kernel"].axes
    assert axes == ("model", "batch", None)
