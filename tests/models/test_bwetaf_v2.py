"""Version 2 beside BwETAF 0.5.1, every tensor random."""

import contextlib

import jax
import keras
import keras_hub
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import (
    BwETAFCausalLM,
    BwETAFV2Backbone,
    BwETAFV2CausalLM,
    BwETAFV2CausalLMPreprocessor,
    BwETAFV2Tokenizer,
)
from keras_bwetaf.layers import EmbeddingPosition
from keras_bwetaf.models.decoder import DecoderBackbone
from keras_bwetaf.training import AdamW
from tests import originals
from tests.keras_hub_checks import KerasHubTestCase
from tests.parity import relative_l2

TINY = {
    "vocabulary_size": 61,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "max_sequence_length": 64,
}
# A value other than the default, and other than TINY's, for every argument.
OTHER = {
    "vocabulary_size": 30,
    "num_layers": 3,
    "num_query_heads": [2, 4, 8],
    "hidden_dim": 24,
    "intermediate_dim": 40,
    "max_sequence_length": 128,
    "dropout": 0.1,
    "use_rope": False,
    "embedding_scale": 2.0,
    "residual_scale": 0.5,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.05,
    "embedding_initializer_range": 0.07,
    "dtype": "bfloat16",
    "name": "other",
    "trainable": False,
}
CONFIGURATIONS = {
    "card": {},
    "scaled": {"emb_scaling_factor": 3.0, "res_scale": 0.7},
    "sinusoids": {"use_rope": False, "emb_scaling_factor": 0.5},
    "heads by block": {"num_heads": [4, 8, 2], "num_blocks": 3},
    "odd widths": {
        "num_heads": 3,
        "attention_dim": 42,
        "ff_dim": 29,
        "vocab_size": 53,
    },
    "one head": {"num_heads": 1, "num_blocks": 1, "res_scale": 1.3},
    "chunks": {"attn_chunks": 4},
}


def token_ids(shape=(3, 40), vocabulary_size=53, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary_size, shape).astype("int32")


def load(folder, dtype="float32", **changes):
    lm = BwETAFV2CausalLM.from_preset(
        folder, dtype=dtype, preprocessor=None, **changes
    )
    assert lm.backbone.compute_dtype == dtype
    return lm


def logits_of(lm, ids, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    logits = lm({"token_ids": ids, "padding_mask": mask})
    assert logits.dtype == "float32"
    return np.asarray(logits)


def prompts(ids, lengths):
    """Rows of different lengths, padded on the right, as `generate` takes."""
    mask = np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]
    return {"token_ids": ids * mask, "padding_mask": mask.astype("int32")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the original's; tests must not change it."""
    folder = tmp_path_factory.mktemp("v2") / "flax"
    originals.run("v2", "save", folder, seed=7, res_scale=0.9)
    return folder


# === Beside the original ===


@pytest.mark.fast
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits(name, tmp_path):
    changes = CONFIGURATIONS[name]
    originals.run("v2", "save", tmp_path / "flax", seed=1, **changes)
    ids = token_ids()
    expected = originals.run("v2", "logits", tmp_path / "flax", ids)
    received = logits_of(load(tmp_path / "flax"), ids)
    difference = relative_l2(received, expected)
    print(f"{name}: {difference:.1e}")
    assert difference <= 1e-5


def test_a_thousand_positions(tmp_path):
    originals.run("v2", "save", tmp_path / "flax", seed=2, max_len=1024)
    ids = token_ids((1, 1024))
    expected = originals.run("v2", "logits", tmp_path / "flax", ids)
    assert relative_l2(logits_of(load(tmp_path / "flax"), ids), expected) < 1e-5


def test_padding(folder):
    """Logits of real tokens, padded on the right and on the left."""
    ids = token_ids((2, 40))
    mask = np.ones_like(ids)
    mask[0, 30:] = mask[1, :10] = 0
    expected = originals.run("v2", "logits", folder, ids, mask)
    received = logits_of(load(folder), ids, mask)
    real = mask.astype("bool")
    assert relative_l2(received[real], expected[real]) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"use_rope": False}])
def test_bfloat16_is_no_farther_from_float64(changes, tmp_path):
    originals.run(
        "v2", "save", tmp_path / "flax", seed=3, dtype="bfloat16", **changes
    )
    ids = token_ids((2, 64))
    lm = load(tmp_path / "flax", "bfloat16")
    exact = float64_logits(lm.backbone, ids)
    theirs = originals.run(
        "v2", "logits", tmp_path / "flax", ids, dtype="bfloat16"
    )
    theirs = relative_l2(theirs, exact)
    ours = relative_l2(logits_of(lm, ids), exact)
    print(f"from float64: ours {ours:.4f}, theirs {theirs:.4f}")
    assert relative_l2(logits_of(load(tmp_path / "flax"), ids), exact) < 1e-5
    # Two orders of the same roundings differ by chance.
    assert ours <= 1.02 * theirs


def float64_logits(backbone, ids):
    """The model in float64, of the weights of a backbone."""
    weights = {
        v.path: np.asarray(v.numpy(), "float64") for v in backbone.weights
    }
    embeddings, dim = weights["token_embedding/embeddings"], backbone.hidden_dim
    length = ids.shape[1]
    angles = np.arange(length)[:, None] * 10000.0 ** (
        -np.arange(0, dim, 2) / dim
    )
    x = embeddings[ids] * backbone.embedding_scale
    if backbone.use_rope:
        cos, sin = (f(angles).repeat(2, axis=-1) for f in (np.cos, np.sin))
        first, second = np.split(x, 2, axis=-1)
        x = x * cos + np.concatenate([-second, first], axis=-1) * sin
    else:
        x[..., 0::2] += np.sin(angles)
        x[..., 1::2] += np.cos(angles)

    def norm(x, name):
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-8)
        return x / rms * weights[f"{name}/scale"]

    def dense(x, name):
        bias = weights.get(f"{name}/bias", 0)
        return x @ weights[f"{name}/kernel"].T + bias

    for i in range(backbone.num_layers):
        block = f"transformer_layer_{i}"
        attention = f"{block}/self_attention"
        y = norm(x, f"{block}/attention_norm")
        query, key, value = (
            dense(y, f"{attention}/{name}")
            .reshape(*ids.shape, backbone.num_query_heads, -1)
            .swapaxes(1, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(length, dtype="bool"), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ value
        y = y.swapaxes(1, 2).reshape(x.shape)
        x = x * backbone.residual_scale
        x = x + dense(y, f"{attention}/attention_output")
        y = norm(x, f"{block}/feedforward_norm")
        gate = dense(y, f"{block}/feedforward/gate")
        y = dense(y, f"{block}/feedforward/intermediate")
        y = y * gate / (1 + np.exp(-gate))
        x = x * backbone.residual_scale
        x = x + dense(y, f"{block}/feedforward/output")
    return x @ embeddings.T


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """What the original's modules give in both dtypes, of the same weights."""
    folder = tmp_path_factory.mktemp("modules") / "flax"
    originals.run("v2", "save", folder, dtype="bfloat16", res_scale=0.9)
    x = np.random.default_rng(0).standard_normal((2, 30, 32))
    x = x.astype("bfloat16").astype("float32")
    return (
        folder,
        x,
        {
            dtype: originals.run("v2", "modules", folder, x, dtype)
            for dtype in ("float32", "bfloat16")
        },
    )


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules(modules, dtype):
    """As close to float32 as the original's are in the same dtype."""
    folder, x, theirs = modules
    block = load(folder, dtype).backbone.transformer_layers[0]
    positions = {
        name: EmbeddingPosition(use_rope=name == "rope", scale=1.0)
        for name in ("rope", "sinusoids")
    }
    assert block.attention_norm(x).dtype == dtype
    assert block(x).dtype == "float32"
    received = {
        **{name: layer(x) for name, layer in positions.items()},
        "norm": block.attention_norm(x),
        "attention": block.attention(x.astype(dtype)),
        "block": block(x),
    }
    assert received.keys() == theirs[dtype].keys()
    for name, result in received.items():
        exact = theirs["float32"][name]
        ours = relative_l2(np.asarray(result, "float32"), exact)
        limit = 1.02 * relative_l2(theirs[dtype][name], exact)
        print(f"{name}: {ours:.2e}, theirs {limit / 1.02:.2e}")
        assert ours <= max(limit, 1e-6), name


@pytest.mark.slow
def test_five_steps(folder, tmp_path):
    """The original's loss under optax, and `fit`."""
    batches = token_ids((5, 4, 32), seed=1)
    expected = originals.run(
        "v2",
        "train",
        *(folder, tmp_path / "trained", batches),
        learning_rate=1.3e-3,
        b1=0.87,
        b2=0.94,
        eps=1e-6,
        weight_decay=0.1,
    )
    lm = load(folder)
    lm.compile(
        AdamW(1.3e-3, beta_1=0.87, beta_2=0.94, epsilon=1e-6, weight_decay=0.1)
    )
    rows = batches.reshape(-1, 32)
    history = lm.fit(
        {"token_ids": rows, "padding_mask": np.ones_like(rows)},
        batch_size=4,
        epochs=1,
        shuffle=False,
        verbose=0,
        callbacks=[losses := Losses()],
    )
    assert len(history.history["loss"]) == 1
    np.testing.assert_allclose(losses.steps, expected, rtol=1e-5)
    assert expected[-1] < expected[0]
    trained = load(tmp_path / "trained")
    for ours, theirs in zip(
        lm.backbone.weights, trained.backbone.weights, strict=True
    ):
        assert relative_l2(ours.numpy(), theirs.numpy()) < 1e-5, ours.path


class Losses(keras.callbacks.Callback):
    """The loss of each step, from the means since the epoch's beginning."""

    def __init__(self):
        super().__init__()
        self.steps, self._sum = [], 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = logs["loss"] * (batch + 1)
        self.steps.append(total - self._sum)
        self._sum = total


# === Used as version 3 is ===


class KerasHubChecks(KerasHubTestCase):
    @pytest.mark.slow
    def test_backbone(self):
        self.run_backbone_test(
            cls=BwETAFV2Backbone,
            init_kwargs=dict(TINY),
            input_data={
                "token_ids": np.ones((2, 5), "int32"),
                "padding_mask": np.ones((2, 5), "int32"),
            },
            expected_output_shape=(2, 5, 32),
            run_mixed_precision_check=False,  # Hidden states are float32.
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=BwETAFV2Backbone,
            init_kwargs=dict(OTHER, dtype="float32"),
            input_data={
                "token_ids": np.arange(10, dtype="int32").reshape(2, 5),
                "padding_mask": np.ones((2, 5), "int32"),
            },
        )


@pytest.mark.fast
def test_config_holds_every_argument():
    backbone = BwETAFV2Backbone(**OTHER)
    config = backbone.get_config()
    assert set(config) == set(OTHER)
    assert {*BwETAFV2Backbone.config_names(), "dtype"} <= set(OTHER)
    for name in set(OTHER) - {"dtype"}:
        assert config[name] == OTHER[name], name
    again = BwETAFV2Backbone.from_config(config)
    assert again.get_config() == config


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_dim": 36, "num_query_heads": 5}, "must divide `hidden_dim`"),
        ({"hidden_dim": 9, "num_query_heads": 3}, "`hidden_dim` must be even"),
        ({"use_rope": 1}, "`use_rope` must be True or False. Received: 1"),
        ({"residual_scale": 0}, "`residual_scale` must be greater than 0"),
        ({"num_query_heads": [4]}, "one int for each of the 2 layers"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        BwETAFV2Backbone(**{**TINY, **changes})


@pytest.mark.fast
def test_unknown_keywords():
    with pytest.raises(TypeError, match="num_key_value_heads"):
        BwETAFV2Backbone(**TINY, num_key_value_heads=2)


def test_initial_weights():
    config = dict(TINY, hidden_dim=256, intermediate_dim=512)
    for variable in BwETAFV2Backbone(**config).weights:
        values = variable.numpy()
        stddev = 256**-0.5 if variable.name == "embeddings" else 0.02
        if variable.name in ("bias", "scale"):
            assert (values == (variable.name == "scale")).all()
        else:
            assert abs(values.std() / stddev - 1) < 0.05, variable.path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_steps_are_one_pass(folder, dtype):
    """Rows of different lengths, each token by the logits of one pass."""
    lm = load(folder, dtype)
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
        gaps = (
            before.max(-1) - np.take_along_axis(before, new[:, None], 1)[:, 0]
        )
        assert gaps.max() <= (1e-4 if dtype == "float32" else 0.1)
        assert (gaps == 0).mean() > 0.9


def test_seeds(folder):
    """A row continues in a batch as alone, and again with the same seed."""
    lm = load(folder)
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


def test_documents_do_not_see_each_other(folder):
    """With numbers; with 1 for all tokens, they do, as in the original."""
    lm, ids = load(folder), token_ids((1, 20))
    numbers = np.where(np.arange(20) < 11, 1, 2)[None].astype("int32")
    others = ids.copy()
    others[0, :11] = token_ids((11,), seed=5)
    first, second = (logits_of(lm, x, numbers)[0, 11:] for x in (ids, others))
    np.testing.assert_array_equal(first, second)
    assert relative_l2(logits_of(lm, ids)[0, 11:], first) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_the_loss_of_hidden_states_is_that_of_logits(dtype):
    """Neither rounds hidden states before the head."""
    keras.utils.set_random_seed(0)
    lm = BwETAFV2CausalLM(BwETAFV2Backbone(**TINY, dtype=dtype))
    ids = token_ids((4, 32))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    logits = jax.nn.log_softmax(lm.predict(inputs, verbose=0)[:, :-1])
    expected = -np.take_along_axis(
        np.asarray(logits), ids[:, 1:, None], axis=2
    ).mean()
    received = lm.evaluate(inputs, verbose=0, return_dict=True)["loss"]
    assert abs(received - expected) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_training_in_bfloat16(dtype):
    keras.utils.set_random_seed(0)
    lm = BwETAFV2CausalLM(BwETAFV2Backbone(**TINY, dropout=0.1, dtype=dtype))
    ids = np.tile(np.arange(32, dtype="int32"), (16, 1))
    lm.compile(AdamW(1e-2))
    history = lm.fit(
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        batch_size=4,
        epochs=4,
        verbose=0,
    )
    first, *_, last = history.history["loss"]
    assert last < 0.7 * first


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "block", "full"])
def test_remat_changes_no_loss(folder, remat):
    ids = token_ids((8, 32))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def losses(remat):
        lm = load(folder)
        lm.compile(AdamW(1e-3), remat=remat)
        history = lm.fit(
            inputs, batch_size=4, epochs=2, shuffle=False, verbose=0
        )
        return history.history["loss"]

    np.testing.assert_allclose(losses(remat), losses("none"), rtol=1e-5)


@pytest.mark.slow
def test_lora(folder, tmp_path):
    lm, ids = load(folder), token_ids((4, 16))
    before = logits_of(lm, ids)
    lm.backbone.enable_lora(2, ["query", "value", "gate"])
    np.testing.assert_allclose(logits_of(lm, ids), before, rtol=1e-5, atol=1e-5)
    lm.compile(AdamW(1e-2))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    lm.fit(inputs, batch_size=4, epochs=3, verbose=0)
    trained = logits_of(lm, ids)
    assert relative_l2(trained, before) > 1e-3
    lm.backbone.save_lora_weights(tmp_path / "lora.safetensors")
    again = load(folder)
    again.backbone.load_lora_weights(tmp_path / "lora.safetensors")
    again.backbone.merge_lora()
    assert relative_l2(logits_of(again, ids), trained) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8(folder, tmp_path, dtype):
    lm, ids = load(folder, dtype), token_ids((2, 16))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    before = np.asarray(lm(inputs), "float32")
    lm.quantize("int8")
    quantized = np.asarray(lm(inputs), "float32")
    assert 1e-3 < relative_l2(quantized, before) < 0.1
    lm.generate(prompts(ids, [4, 7]), max_new_tokens=4, stop_token_ids=None)
    lm.save_to_preset(tmp_path / "int8")
    # Of a quantized model, Keras saves no dtype that all layers have.
    with policy(dtype):
        again = BwETAFV2CausalLM.from_preset(
            tmp_path / "int8", preprocessor=None
        )
    np.testing.assert_array_equal(
        np.asarray(again(inputs), "float32"), quantized
    )


@contextlib.contextmanager
def policy(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    yield
    keras.config.set_dtype_policy(before)


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
@pytest.mark.parametrize(
    "name, count", [("v2-53m", 53_012_480), ("v2-130m", 130_649_088)]
)
def test_names(name, count):
    """Known without the network."""
    from keras_bwetaf.preset_files import load_architecture

    architecture, config = load_architecture(name)
    assert keras_bwetaf.list_presets()[name]["parameters"] == count
    canonical = architecture.config_from_keras(
        BwETAFV2Backbone(**{**config, "vocabulary_size": 8}).get_config()
    )
    canonical["vocab_size"] = config["vocabulary_size"]
    assert architecture.tokenizer(canonical["vocab_size"]) is not None
    shapes = [each.shape for each in architecture.tensors(canonical)]
    assert sum(map(np.prod, shapes)) == count


@pytest.mark.fast
def test_v3_has_two_names():
    presets = keras_bwetaf.list_presets()
    assert presets["v3-97m"] == presets["97m"]


@pytest.mark.fast
def test_the_class_follows_from_the_files(folder):
    with pytest.warns(UserWarning, match="no preprocessor"):
        lm = keras_bwetaf.from_preset(folder, load_weights=False)
    assert type(lm) is BwETAFV2CausalLM
    with pytest.raises(
        ValueError, match="BwETAFv2 model.*BwETAFV2CausalLM.*: BwETAFCausalLM"
    ):
        BwETAFCausalLM.from_preset(folder)
    with pytest.raises(ValueError, match="BwETAFv3 model.*: BwETAFV2CausalLM"):
        BwETAFV2CausalLM.from_preset("tiny")
    with pytest.raises(TypeError, match="num_key_value_heads"):
        keras_bwetaf.from_preset(folder, num_key_value_heads=2)


# === Text ===


def test_bases_find_the_classes(talker):
    """Those of KerasHub and of this package."""
    for base, cls in (
        (keras_hub.models.CausalLM, BwETAFV2CausalLM),
        (keras_hub.models.Backbone, BwETAFV2Backbone),
        (keras_hub.models.CausalLMPreprocessor, BwETAFV2CausalLMPreprocessor),
        (keras_bwetaf.BwETAFCausalLMPreprocessor, BwETAFV2CausalLMPreprocessor),
        (keras_bwetaf.BwETAFTokenizer, BwETAFV2Tokenizer),
        (DecoderBackbone, BwETAFV2Backbone),
    ):
        assert type(base.from_preset(str(talker))) is cls


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A small model with GPT-2's tokenizer, saved in Keras's format."""
    keras.utils.set_random_seed(1)
    backbone = BwETAFV2Backbone(
        **dict(TINY, vocabulary_size=50260, hidden_dim=8)
    )
    preprocessor = BwETAFV2CausalLMPreprocessor(
        BwETAFV2Tokenizer("gpt2"), sequence_length=32
    )
    folder = tmp_path_factory.mktemp("talker")
    BwETAFV2CausalLM(backbone, preprocessor).save_to_preset(folder)
    return folder


def test_text(talker):
    lm = keras_bwetaf.from_preset(talker)
    tokenizer = lm.preprocessor.tokenizer
    assert type(tokenizer) is BwETAFV2Tokenizer
    assert tokenizer.end_token_id == tokenizer.pad_token_id == 50256
    prompt = "And God said unto"
    options = dict(max_new_tokens=8, seed=3)
    text = lm.generate(prompt, **options)
    assert text.startswith(prompt)
    assert "".join([prompt, *lm.stream(prompt, **options)]) == text
    lm.compile(AdamW(1e-3))
    lm.fit(["In the beginning", "And the earth"], epochs=1, verbose=0)


def test_ids_beyond_the_tokenizer_are_never_made(talker):
    """And generation ends at 50256."""
    lm = keras_bwetaf.from_preset(talker)
    table = np.zeros(lm.backbone.token_embedding.embeddings.shape, "float32")
    table[:, 0] = 1.0
    table[50257:, 0] = 1000.0  # By far the likeliest.
    table[50256, 0] = 100.0
    table[40, 0] = -100.0
    lm.backbone.token_embedding.embeddings.assign(table)
    for weight in lm.backbone.weights:
        if weight.name in ("kernel", "bias"):
            weight.assign(np.zeros(weight.shape))
    prompt = {"token_ids": np.array([[5]]), "padding_mask": np.array([[1]])}
    preprocessor, lm.preprocessor = lm.preprocessor, None
    made = lm.generate(
        prompt, max_new_tokens=4, stop_token_ids=None, temperature=0
    )
    assert made["token_ids"][0, 1] >= 50257
    lm.preprocessor = preprocessor
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 1}):
        text = lm.generate("&", max_new_tokens=4, strip_prompt=True, **options)
        assert text in ("", "<|endoftext|>")


def test_a_preset_of_the_original_has_gpt2s_tokenizer(tmp_path):
    originals.run(
        "v2", "save", tmp_path / "flax", vocab_size=50260, attention_dim=8
    )
    lm = keras_bwetaf.from_preset(tmp_path / "flax", dtype="float32")
    assert lm.preprocessor.tokenizer("Hello world").tolist() == [15496, 995]
    tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset(tmp_path / "flax")
    assert type(tokenizer) is BwETAFV2Tokenizer


def test_a_repository_without_a_tokenizer(hub, hub_client, tmp_path):
    """Is whole: GPT-2's is meant. Without room for it, a file is missing."""
    source = tmp_path / "flax"
    originals.run("v2", "save", source, vocab_size=50260, attention_dim=8)
    hub.add("owner/whole", source)
    lm = keras_bwetaf.from_preset("hf://owner/whole", dtype="float32")
    assert type(lm) is BwETAFV2CausalLM
    assert lm.preprocessor.tokenizer("Hello world").tolist() == [15496, 995]
    hub.stop()
    again = keras_bwetaf.from_preset("hf://owner/whole", dtype="float32")
    assert again.preprocessor.tokenizer.end_token_id == 50256


def test_a_repository_that_lacks_its_tokenizer(hub, hub_client, folder):
    hub.add("owner/small", folder)
    with pytest.raises(FileNotFoundError, match="Missing: tokenizer/yap.json"):
        keras_bwetaf.from_preset("hf://owner/small")


def test_names_without_the_network(hub, hub_client, monkeypatch):
    """The configuration is known, and so is the tokenizer."""
    hub.stop()
    lm = keras_bwetaf.from_preset(
        "v2-53m", load_weights=False, num_layers=1, hidden_dim=16
    )
    assert lm.preprocessor.sequence_length == 2048
    assert lm.preprocessor.tokenizer("Hello world").tolist() == [15496, 995]


# === On several devices ===


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["data_parallel", "fully_sharded", "model_parallel"]
)
def test_strategies(tmp_path, strategy):
    """Loss, weights and text on eight devices are those on one."""
    distribution = getattr(keras_bwetaf.distribution, strategy)
    folder = tmp_path / "flax"
    originals.run("v2", "save", folder, vocab_size=64)
    ids = token_ids((16, 32))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def run():
        lm = load(folder)
        lm.compile(AdamW(1e-3))
        history = lm.fit(
            inputs, batch_size=8, epochs=2, shuffle=False, verbose=0
        )
        made = lm.generate(
            prompts(ids[:8, :8], [8, 3, 5, 1, 2, 8, 7, 6]),
            max_new_tokens=8,
            stop_token_ids=None,
            temperature=0,
        )
        weights = [np.asarray(weight.value) for weight in lm.backbone.weights]
        return history.history["loss"], weights, made["token_ids"]

    expected = run()
    arguments = (2,) if strategy == "model_parallel" else ()
    with distribution(*arguments).scope():
        received = run()
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(received[1], expected[1], strict=True):
        assert relative_l2(ours, theirs) < 1e-4
    np.testing.assert_array_equal(received[2], expected[2])


@pytest.mark.fast
def test_no_rows(folder):
    with pytest.raises(ValueError, match="at least one row.*shape"):
        load(folder).backbone.hidden_states(np.zeros((0, 4), "int32"))


def test_layout_map_has_every_weight():
    mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
    layout_map = BwETAFV2Backbone.get_layout_map(mesh)
    for weight in BwETAFV2Backbone(**TINY).weights:
        assert layout_map[weight.path] is not None, weight.path
