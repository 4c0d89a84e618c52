import keras
import keras_hub
import numpy as np
import pytest

from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    BwETAFSampler,
    from_preset,
    train_tokenizer,
)
from tests import original, parity
from tests.keras_hub_checks import KerasHubTestCase
from tests.models.test_backbone import OTHER, TINY

TEXTS = ["the light of the day", "the night and the stars of the night"]
LENGTH = 1024

# One change each to a small model: hidden 96, 8 heads, 4 key/value heads.
SMALL = dict(
    num_heads=8,
    attention_dim=96,
    vocab_size=512,
    num_blocks=3,
    ff_dim=160,
    gqa_repeats=2,
)
CONFIGURATIONS = {
    "one key/value head each": dict(gqa_repeats=1),
    "two query heads share": dict(gqa_repeats=2),
    "all query heads share": dict(gqa_repeats=8),
    "heads per layer": dict(num_heads=(2, 4, 8)),
    "odd widths": dict(num_heads=3, attention_dim=63, gqa_repeats=3),
    "odd key width": dict(num_heads=6, attention_dim=90, gqa_repeats=2),
    "odd feed-forward": dict(ff_dim=161),
}


class KerasHubChecks(KerasHubTestCase):
    def setUp(self):
        tokenizer = train_tokenizer(TEXTS * 6, 300)
        self.preprocessor = BwETAFCausalLMPreprocessor(
            tokenizer, sequence_length=8
        )
        config = {**TINY, "vocabulary_size": tokenizer.vocabulary_size()}
        self.init_kwargs = {
            "preprocessor": self.preprocessor,
            "backbone": BwETAFBackbone(**config),
        }
        self.train_data = (TEXTS,)
        self.input_data = self.preprocessor(*self.train_data)[0]

    def test_task(self):
        vocabulary_size = self.preprocessor.tokenizer.vocabulary_size()
        self.run_task_test(
            cls=BwETAFCausalLM,
            init_kwargs=self.init_kwargs,
            train_data=self.train_data,
            expected_output_shape=(2, 8, vocabulary_size),
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=BwETAFCausalLM,
            init_kwargs=self.init_kwargs,
            input_data=self.input_data,
        )


def random_ids(vocabulary_size, batch_size=1, length=LENGTH, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(1, vocabulary_size, (batch_size, length))


def check_parity(manager, **port_changes):
    token_ids = random_ids(manager.data["vocab_size"])
    mask = np.ones_like(token_ids)
    lm = parity.port(manager, **port_changes)
    logits = lm({"token_ids": token_ids, "padding_mask": mask})
    assert parity.relative_l2(logits, manager(token_ids, mask)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        name
        if name == "heads per layer"
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGURATIONS
    ],
)
def test_parity(name):
    check_parity(original.manager(**{**SMALL, **CONFIGURATIONS[name]}))


@pytest.mark.slow
def test_parity_of_the_card():
    manager = original.manager()
    check_parity(manager)
    # The compiled forward pass of `predict` agrees, too.
    token_ids = random_ids(16384)
    mask = np.ones_like(token_ids)
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    logits = parity.port(manager).predict(inputs, verbose=0)
    assert parity.relative_l2(logits, manager(token_ids, mask)) < 1e-5


@pytest.mark.slow
def test_parity_with_padding():
    manager = original.manager(**SMALL)
    token_ids = random_ids(512, batch_size=3)
    lengths = np.array([[LENGTH], [700], [1]])
    mask = (np.arange(LENGTH) < lengths).astype("int32")
    expected = np.asarray(manager(token_ids, mask))
    logits = parity.port(manager)(
        {"token_ids": token_ids, "padding_mask": mask}
    )
    real = mask.astype("bool")
    assert parity.relative_l2(logits[real], expected[real]) < 1e-5


def test_parity_with_padding_on_the_left():
    """Positions count from the start of the row, padding included."""
    manager = original.manager(**SMALL)
    token_ids = random_ids(512)
    mask = (np.arange(LENGTH)[None] >= 100).astype("int32")
    expected = np.asarray(manager(token_ids, mask))
    logits = parity.port(manager)(
        {"token_ids": token_ids, "padding_mask": mask}
    )
    assert parity.relative_l2(logits[:, 100:], expected[:, 100:]) < 1e-5


def test_parity_with_packed_documents():
    """Against the original's training path, which reads the end tokens."""
    manager = original.manager(**SMALL, dropout_rate=0.0)
    token_ids = random_ids(512, batch_size=2)
    token_ids[0, [0, 5, 6, 300, 1023]] = 0
    token_ids[1, 511] = 0
    expected = manager.model_struct.apply(
        manager.params,
        token_ids,
        np.ones_like(token_ids),
        training=True,
        rngs={"dropout": manager.key},
    )
    logits = parity.port(manager)(
        {
            "token_ids": token_ids,
            "padding_mask": parity.document_numbers(token_ids),
        }
    )
    assert parity.relative_l2(logits, expected) < 1e-5


@pytest.mark.slow
def test_bfloat16_is_no_less_exact_than_the_original():
    manager = original.manager("bfloat16")
    token_ids = random_ids(16384)
    mask = np.ones_like(token_ids)
    exact = parity.float64_logits(manager, token_ids[0], "bfloat16")[None]
    lm = parity.port(manager, "bfloat16")
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    for name, ours, theirs in (
        ("eager", lm(inputs), manager(token_ids, mask)),
        (
            "compiled",
            lm.predict(inputs, verbose=0),
            manager.jax_call(token_ids, mask),
        ),
    ):
        our_distance = parity.relative_l2(ours, exact)
        their_distance = parity.relative_l2(theirs, exact)
        print(f"{name}: {our_distance:.4f}, the original {their_distance:.4f}")
        assert our_distance <= their_distance


@pytest.mark.slow
def test_rope_dtype_float32_is_exact_in_bfloat16():
    """Rounding only the angles moves late logits; exact angles don't."""
    manager = original.manager(**SMALL)
    token_ids = random_ids(512)
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    float32 = parity.port(manager)(inputs)
    rounded = parity.port(manager, "bfloat16")(inputs)
    exact = parity.port(manager, "bfloat16", rope_dtype="float32")(inputs)
    assert parity.relative_l2(exact, float32) < 0.05
    assert parity.relative_l2(rounded, float32) > 0.1


def test_compiled_settings_survive_saving(tmp_path):
    lm = BwETAFCausalLM(BwETAFBackbone(**TINY))
    lm.compile(
        optimizer=keras.optimizers.SGD(0.5),
        sampler=BwETAFSampler(temperature=0.3, top_k=7),
    )
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.sampler.get_config() == lm.sampler.get_config()
    assert float(again.optimizer.learning_rate) == 0.5


@pytest.mark.slow
def test_keras_hub_loads_what_we_save(tmp_path):
    """`keras_hub.models.CausalLM.from_preset` finds our classes."""
    tokenizer = train_tokenizer(TEXTS * 6, 300)
    config = {**OTHER, "vocabulary_size": tokenizer.vocabulary_size()}
    del config["dtype"], config["name"]
    preprocessor = BwETAFCausalLMPreprocessor(tokenizer, sequence_length=8)
    lm = BwETAFCausalLM(BwETAFBackbone(**config), preprocessor)
    lm.save_to_preset(tmp_path)
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    assert type(again) is BwETAFCausalLM
    for name, value in config.items():
        assert getattr(again.backbone, name) == value, name
    inputs = preprocessor(TEXTS)[0]
    assert (np.asarray(again(inputs)) == np.asarray(lm(inputs))).all()
    arguments = dict(max_new_tokens=10, temperature=0)
    assert again.generate(TEXTS, **arguments) == lm.generate(TEXTS, **arguments)


def greedy_by_full_passes(lm, inputs):
    """The slow way: a whole forward pass for each new token of one row."""
    token_ids = np.array(inputs["token_ids"])
    mask = np.array(inputs["padding_mask"])
    for i in range(mask.sum(), mask.shape[1]):
        logits = lm({"token_ids": token_ids, "padding_mask": mask})
        token_ids[0, i] = np.argmax(logits[0, i - 1])
        mask[0, i] = 1
    return token_ids


def test_model_without_an_optimizer_can_be_saved(tmp_path):
    lm = BwETAFCausalLM(BwETAFBackbone(**TINY))
    lm.compile(optimizer=None, loss=None, weighted_metrics=None)
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer is None


# Keras names every layer that has no weights to quantize.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_lora_and_quantization():
    """Both change the layers; generation follows, compiled or not before."""
    config = {**TINY, "initializer_range": 0.5}
    lm = BwETAFCausalLM(BwETAFBackbone(**config))
    inputs = {
        "token_ids": np.array([[1, 2, 3, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]]),
    }
    arguments = dict(stop_token_ids=None, temperature=0)
    before = lm.generate(inputs, **arguments)["token_ids"]

    lm.backbone.enable_lora(2)
    assert {v.path.rsplit("/", 2)[1] for v in lm.trainable_weights} == {
        "query",
        "value",
    }
    rng = np.random.default_rng(0)
    for variable in lm.trainable_weights:
        variable.assign(rng.standard_normal(variable.shape))
    after = lm.generate(inputs, **arguments)["token_ids"]
    assert (after != before).any()
    np.testing.assert_array_equal(after, greedy_by_full_passes(lm, inputs))

    lm = BwETAFCausalLM(BwETAFBackbone(**config))
    logits = np.asarray(lm(inputs))
    lm.generate(inputs, **arguments)
    tokenizer = train_tokenizer(TEXTS * 6, 300)
    lm.preprocessor = BwETAFCausalLMPreprocessor(tokenizer)
    lm.quantize("int8")
    lm.preprocessor = None
    assert lm.backbone.transformer_layers[0].attention.query.kernel.dtype == (
        "int8"
    )
    quantized = np.asarray(lm(inputs))
    assert 0 < parity.relative_l2(quantized, logits) < 0.05
    made = lm.generate(inputs, **arguments)["token_ids"]
    np.testing.assert_array_equal(made, greedy_by_full_passes(lm, inputs))


QUANTIZATIONS = {
    "int8, weights": keras.quantizers.Int8QuantizationConfig(
        activation_quantizer=None
    ),
    "int8, 7 bits": keras.quantizers.Int8QuantizationConfig(
        activation_quantizer=keras.quantizers.AbsMaxQuantizer(
            value_range=(-63, 63)
        )
    ),
    "int4": keras.quantizers.Int4QuantizationConfig(),
    "int4, rows": keras.quantizers.Int4QuantizationConfig(
        activation_quantizer=keras.quantizers.AbsMaxQuantizer(), block_size=-1
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
@pytest.mark.filterwarnings("ignore:The model has no preprocessor")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "int4" else name
        for name in QUANTIZATIONS
    ],
)
def test_quantized_models_come_back(name, tmp_path):
    """With the same quantizers of the layers' inputs, or none."""
    config = {**TINY, "num_layers": 1, "initializer_range": 0.5}
    backbone = BwETAFBackbone(**config)
    inputs = {
        "token_ids": np.arange(1, 9)[None],
        "padding_mask": np.ones((1, 8), "int32"),
    }
    backbone.quantize(config=QUANTIZATIONS[name])
    hidden_states = backbone(inputs)
    logits = backbone.token_embedding(hidden_states, reverse=True)
    backbone.save_to_preset(tmp_path)
    for again in (
        from_preset(tmp_path).backbone,
        BwETAFBackbone.from_config(backbone.get_config()),
    ):
        again.set_weights(backbone.get_weights())
        np.testing.assert_array_equal(again(inputs), hidden_states)
        np.testing.assert_array_equal(
            again.token_embedding(hidden_states, reverse=True), logits
        )


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
@pytest.mark.filterwarnings("ignore:Invalid quantization mode")
@pytest.mark.parametrize("kind", ["GPTQ", "AWQ"])
def test_quantization_that_needs_other_kernels(kind):
    backbone = BwETAFBackbone(**TINY)
    config = getattr(keras.quantizers, f"{kind}Config")(
        dataset=["a"], tokenizer=list
    )
    before = backbone.get_config(), backbone.get_weights()
    with pytest.raises(ValueError, match=f"Use 'int8'.*mode='{kind.lower()}'"):
        backbone.quantize(config=config)
    assert backbone.get_config() == before[0]
    for weight, value in zip(backbone.weights, before[1], strict=True):
        np.testing.assert_array_equal(weight, value)


# Keras passes it to JAX.
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter")
@pytest.mark.slow
def test_saved_model_for_rows_of_any_length(tmp_path):
    import tensorflow as tf

    lm = BwETAFCausalLM(BwETAFBackbone(**{**TINY, "initializer_range": 0.5}))
    lm.export(tmp_path, verbose=False)
    exported = tf.saved_model.load(str(tmp_path))
    for length in (5, 150):
        inputs = {
            "token_ids": np.arange(2 * length, dtype="int32") % 7 + 1,
            "padding_mask": np.repeat(np.array([1, 2], "int32"), length),
        }
        inputs = {name: x.reshape(2, length) for name, x in inputs.items()}
        received = exported.serve(inputs)
        assert parity.relative_l2(received, lm(inputs)) < 1e-5
