"""Several devices compute what one does, and each has only its part."""

import contextlib
import functools
import re
from types import SimpleNamespace

import jax
import keras
import numpy as np
import pytest

import converters
from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    from_preset,
    train_tokenizer,
)
from keras_bwetaf.distribution import (
    Sharding,
    data_parallel,
    describe,
    fully_sharded,
    model_parallel,
)
from keras_bwetaf.exchange.export import as_checkpoint
from keras_bwetaf.generation.generation import Generation
from keras_bwetaf.generation.request import make_request
from keras_bwetaf.layers import attention_kernel
from keras_bwetaf.training import TrainingCheckpoint
from tests.models.test_fit import compiled_step
from tests.models.test_lora import ALL as ALL_LAYERS
from tests.parity import document_numbers, relative_l2
from tests.training import resumable

STRATEGIES = {
    "one device": None,
    "data 8": data_parallel,
    "fully sharded 8": fully_sharded,
    "model 2": functools.partial(model_parallel, 2),
    "model 4": functools.partial(model_parallel, 4),
    "model 8": functools.partial(model_parallel, 8),
    "model 2, fully sharded": functools.partial(
        model_parallel, 2, fully_sharded=True
    ),
}
SLOW = (
    "data 8",
    "fully sharded 8",
    "model 4",
    "model 8",
    "model 2, fully sharded",
)
SPLIT = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in STRATEGIES
    if name != "one device"
]
# The card's, an order of magnitude smaller.
CARD = dict(
    vocabulary_size=320,
    num_layers=2,
    num_query_heads=8,
    num_key_value_heads=4,
    hidden_dim=32,
    intermediate_dim=96,
    max_sequence_length=256,
)
# Little of it divides over devices.
ODD = dict(
    vocabulary_size=61,
    num_layers=2,
    num_query_heads=[12, 3],
    num_key_value_heads=[4, 3],
    hidden_dim=60,
    intermediate_dim=45,
    max_sequence_length=256,
)
SMALL = {**CARD, "num_layers": 1}
LENGTH = 160  # Two chunks of queries.
TEXTS = [
    "In the beginning was the light, and the light was good.",
    "The night sky is full of stars; who can count them?",
    "naïve café — 光 🌟 \n a tab\tand a line",
] * 6
PROMPTS = ["The night sky is full", "In the", "a tab and the stars; light"]

# Keras warns of every layer without weights to quantize.
no_quantize_warning = pytest.mark.filterwarnings(
    "ignore:Layer .* does not have a `quantize` method:UserWarning"
)


@pytest.fixture(autouse=True)
def no_distribution_is_left():
    yield
    is_left = keras.distribution.distribution() is not None
    keras.distribution.set_distribution(None)
    assert not is_left


@functools.cache
def tokenizer():
    return train_tokenizer(TEXTS, CARD["vocabulary_size"])


def make_preprocessor():
    return BwETAFCausalLMPreprocessor(tokenizer(), sequence_length=LENGTH)


def scope(name):
    strategy = STRATEGIES[name]
    return strategy().scope() if strategy else contextlib.nullcontext()


def make_backbone(config=CARD, **changes):
    """With random weights, norms and biases included.

    The embedding is not rounded to bfloat16: a difference in the last place
    would become one of 1/256, here and there.
    """
    keras.utils.set_random_seed(0)
    backbone = BwETAFBackbone(**{**config, **changes})
    randomize(backbone.weights)
    block = backbone.transformer_layers[0]
    block.input_precision = block.attention_norm.precision = None
    return backbone


def randomize(variables, seed=0):
    rng = np.random.default_rng(seed)
    for variable in variables:
        values = rng.standard_normal(variable.shape)
        if variable.name == "scale":
            values = 1 + 0.2 * values
        elif variable.name == "bias":
            values = 0.1 * values
        else:
            values = values / np.sqrt(variable.shape[1])
        variable.assign(values)


def make_lm(config=CARD, dropout=0.0, **compile_arguments):
    backbone = make_backbone(config, dropout=dropout)
    is_card = config["vocabulary_size"] == CARD["vocabulary_size"]
    lm = BwETAFCausalLM(backbone, make_preprocessor() if is_card else None)
    lm.compile(keras.optimizers.AdamW(1e-3), **compile_arguments)
    return lm


def batch(vocabulary_size, num_rows=8):
    """Packed rows of several documents, and padding at the end of most."""
    rng = np.random.default_rng(1)
    shape = (num_rows, LENGTH)
    token_ids = rng.integers(1, vocabulary_size, shape).astype("int32")
    token_ids[:, [30, 90, 133]] = 0
    lengths = np.linspace(20, LENGTH, num_rows).astype("int32")[:, None]
    documents = document_numbers(token_ids) * (np.arange(LENGTH) < lengths)
    return {"token_ids": token_ids, "padding_mask": documents.astype("int32")}


def other_first_document(x):
    token_ids = x["token_ids"].copy()
    token_ids[:, :30] = token_ids[::-1, :30]
    return {**x, "token_ids": token_ids}


def assert_documents_are_isolated(logits, changed):
    documents = batch(CARD["vocabulary_size"])["padding_mask"]
    later, first = documents > 1, documents == 1
    np.testing.assert_array_equal(logits[later], changed[later])
    assert (logits[first] != changed[first]).any()


def train(lm, x, num_steps=5):
    """Losses of steps, and the gradients of the first, by path.

    After one step, AdamW's first moments are a tenth of them.
    """
    gradients = {}

    def keep(epoch, logs):
        if epoch == 0:
            for variable, moment in zip(
                lm.trainable_variables, lm.optimizer._momentums, strict=True
            ):
                gradients[variable.path] = 10 * np.asarray(moment.value)

    history = lm.fit(
        x,
        batch_size=8,
        epochs=num_steps,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=keep)],
    )
    return np.array(history.history["loss"]), gradients


def assert_same_gradients(received, expected, tolerance=1e-5):
    """By the norm of each tensor."""
    assert received.keys() == expected.keys()
    differences = {
        path: relative_l2(received[path], each)
        for path, each in expected.items()
    }
    worst = max(differences, key=differences.get)
    print(f"gradients differ by {differences[worst]:.1e}, {worst}")
    assert differences[worst] < tolerance, worst


def assert_same_losses(received, expected):
    difference = np.abs(received / expected - 1).max()
    print(f"losses differ by {difference:.1e}")
    assert len(received) == len(expected)
    assert difference < 1e-5


# === Batches that shrink ===


def shrinking_batch(name):
    """32 rows of which 24 end first; the tokens, and the sizes of batches."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 300, 5 + i).tolist() for i in range(32)]
    limits = [12 if i % 4 == 1 else 3 for i in range(32)]
    with scope(name):
        lm = make_lm()
        request = make_request(
            lm,
            prompts,
            max_length=None,
            max_new_tokens=12,
            stop_token_ids=None,
            truncation=None,
            seed=1,
            sampling={"temperature": 0.8},
        )._replace(limits=limits)
        decoder, sizes = lm.make_generate_function(), []
        decode = decoder.decode

        def recorded(state, *arguments):
            sizes.append(len(state.done))
            return decode(state, *arguments)

        decoder.decode = recorded
        rows = [[] for _ in prompts]
        for fresh in Generation(decoder, request).run(64):
            for row, tokens in zip(rows, fresh, strict=True):
                row.extend(tokens)
    return rows, sizes


@pytest.fixture(scope="module")
def shrinking_on_one_device():
    return shrinking_batch("one device")


@pytest.mark.parametrize("name", SPLIT)
def test_rows_of_a_smaller_batch_keep_their_cache(
    name, shrinking_on_one_device
):
    rows, sizes = shrinking_batch(name)
    assert sizes == [32, 8]
    assert (rows, sizes) == shrinking_on_one_device


# === The card's configuration, under every strategy ===


def everything(name):
    """What a user does with a model, in this order, and what comes out."""
    results = SimpleNamespace(name=name)
    x = batch(CARD["vocabulary_size"])
    with scope(name):
        lm = make_lm(dropout=0.1)
        results.logits = lm.predict(x, batch_size=8, verbose=0)
        results.changed = lm.predict(
            other_first_document(x), batch_size=8, verbose=0
        )
        results.greedy = lm.generate(PROMPTS, max_new_tokens=8, temperature=0)
        results.sampled = lm.generate(
            PROMPTS, max_new_tokens=8, temperature=2.0, seed=[3, 4, 5]
        )
        results.streamed = "".join(
            lm.stream(PROMPTS[0], max_new_tokens=8, seed=3, temperature=2.0)
        )
        results.cache = prefilled_cache(lm)
        results.losses, results.gradients = train(lm, x)
    results.lm = lm
    return results


def prefilled_cache(lm):
    """Of four rows, or one for each group of devices."""
    decoder, kept = lm.make_generate_function(), []
    prefill = decoder.prefill

    def recorded(*arguments):
        kept.append(prefill(*arguments))
        return kept[-1]

    decoder.prefill = recorded
    lm.generate(PROMPTS, max_new_tokens=1, temperature=0)
    del decoder.prefill
    return kept[0].cache


@pytest.fixture(scope="module")
def expected():
    return everything("one device")


@pytest.fixture(scope="module", params=SPLIT)
def received(request):
    return everything(request.param)


def test_logits(received, expected):
    is_real = batch(CARD["vocabulary_size"])["padding_mask"] > 0
    difference = relative_l2(received.logits[is_real], expected.logits[is_real])
    print(f"logits differ by {difference:.1e}")
    assert difference < 1e-5


def test_documents_are_isolated(received):
    assert_documents_are_isolated(received.logits, received.changed)


def test_gradients(received, expected):
    """With dropout: it falls on the same tokens."""
    assert_same_gradients(received.gradients, expected.gradients)


def test_losses(received, expected):
    assert expected.losses[-1] < expected.losses[0]
    assert_same_losses(received.losses, expected.losses)


def test_greedy_generation(received, expected):
    assert len(set(expected.greedy)) == len(PROMPTS)
    assert received.greedy == expected.greedy


def test_sampled_generation(received, expected):
    assert expected.sampled != expected.greedy
    assert received.sampled == expected.sampled


def test_stream(received, expected):
    assert expected.sampled[0] == PROMPTS[0] + expected.streamed
    assert received.streamed == expected.streamed


# Rows and heads of a device's cache.
CACHES = {
    "data 8": (1, 4),
    "fully sharded 8": (1, 4),
    "model 2": (1, 2),
    "model 4": (2, 1),
    "model 8": (4, 4),  # There are four heads.
    "model 2, fully sharded": (1, 2),
}


def test_a_device_has_the_cache_of_its_rows_and_heads(received):
    rows, heads = CACHES[received.name]
    for keys, values in received.cache:
        num_slots = values.shape[1]
        shapes = {x.data.shape for x in keys.addressable_shards}
        assert shapes == {(rows * heads, 4, num_slots)}
        shapes = {x.data.shape for x in values.addressable_shards}
        assert shapes == {(rows * heads, num_slots, 4)}


def test_optimizer_state_is_split_as_the_weights(received):
    optimizer, weights = received.lm.optimizer, received.lm.trainable_variables
    for moments in (optimizer._momentums, optimizer._velocities):
        for moment, weight in zip(moments, weights, strict=True):
            assert moment.value.sharding == weight.value.sharding


def test_weights_are_split_as_laid_out(received):
    strategy = STRATEGIES[received.name]()
    for variable in received.lm.variables:
        layout = strategy.get_variable_layout(variable).backend_layout
        assert variable.value.sharding.is_equivalent_to(
            layout, len(variable.shape)
        )


def test_describe(received, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lm = received.lm
    describe(lm)
    text = capsys.readouterr().out
    variables = lm.variables + lm.optimizer.variables
    device = jax.devices()[0]
    num_bytes = sum(
        shard.data.nbytes
        for variable in variables
        for shard in variable.value.addressable_shards
        if shard.device == device
    )
    total = re.search(r"all +([\d,]+)", text)[1]
    assert int(total.replace(",", "")) == num_bytes
    lines = re.findall(r"^ *(\S+/\S+|\w+) .*?([\d,]+) *$", text, re.M)
    sizes = [int(size.replace(",", "")) for _, size in lines]
    assert sum(sizes) == 2 * num_bytes  # The last is the sum of the others.
    assert len({path for path, _ in lines}) == len(lines)
    if received.name == "fully sharded 8":
        everything = sum(variable.value.nbytes for variable in variables)
        assert num_bytes < 1.05 * everything / 8
        assert re.search(r"token_embedding/embeddings .* -, batch ", text)


# === Where little divides, with what else a step may do ===


@pytest.fixture(scope="module")
def expected_odd():
    x = batch(ODD["vocabulary_size"])
    lm = make_lm(ODD)
    return lm.predict(x, batch_size=8, verbose=0), *train(lm, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fully sharded 8", {}),
        ("model 2", {"remat": "attention"}),
        ("model 4", {"gradient_accumulation_steps": 2}),
        (
            "model 2, fully sharded",
            {"remat": "full", "gradient_accumulation_steps": 2},
        ),
    ],
)
def test_odd_sizes(name, options, expected_odd):
    x = batch(ODD["vocabulary_size"])
    logits, losses, gradients = expected_odd
    with scope(name):
        lm = make_lm(ODD, **options)
        with pytest.warns(UserWarning, match="are replicated") as warnings:
            received = lm.predict(x, batch_size=8, verbose=0)
            received_losses, received_gradients = train(lm, x)
    (text,) = (
        str(each.message)
        for each in warnings
        if "are replicated" in str(each.message)
    )
    assert text.count("token_embedding/embeddings: ") == 1
    assert text.count("transformer_layer_*/feedforward/gate/kernel: ") == 1
    is_real = x["padding_mask"] > 0
    assert relative_l2(received[is_real], logits[is_real]) < 1e-5
    assert_same_gradients(received_gradients, gradients)
    assert_same_losses(received_losses, losses)


# === Layouts ===

# Axes under fully sharded, model 2, and model 2 fully sharded: b is the
# batch's, m the model's.
ATTENTION = {
    "kernel": "b- -- b-",
    "lora_kernel_a": "b- -- b-",
    "lora_kernel_b": "-b -- -b",
}
FIRST = {
    "kernel": "-b m- mb",
    "bias": "b m m",
    "lora_kernel_a": "b- m- m-",
    "lora_kernel_b": "-b -- -b",
}
LAYOUTS = {
    "token_embedding": {
        "embeddings": "-b m- mb",
        "lora_embeddings_a": "b- m- m-",
        "lora_embeddings_b": "-b -- -b",
    },
    "transformer_layer_0/self_attention/query": ATTENTION,
    "transformer_layer_0/self_attention/key": ATTENTION,
    "transformer_layer_0/self_attention/value": ATTENTION,
    "transformer_layer_0/self_attention/attention_output": {
        **ATTENTION,
        "bias": "b - b",
    },
    "transformer_layer_0/feedforward/gate": FIRST,
    "transformer_layer_0/feedforward/intermediate": FIRST,
    "transformer_layer_0/feedforward/output": {
        "kernel": "b- -m bm",
        "bias": "b - b",
        "lora_kernel_a": "b- -- b-",
        "lora_kernel_b": "-b -m -m",
    },
    "transformer_layer_0/attention_norm": {"scale": "b - b"},
    "transformer_layer_0/feedforward_norm": {"scale": "b - b"},
    "transformer_layer_0/seed_generator": {
        "seed_generator_state": "- - -",
    },
}


def backbones():
    """One with LoRA everywhere, and quantized ones."""
    config = {**CARD, "num_layers": 1, "dropout": 0.1}
    lora = make_backbone(config)
    lora.enable_lora(8, ALL_LAYERS)
    yield "lora", lora
    for mode in ("int8", "int4"):
        lm = BwETAFCausalLM(make_backbone(config))
        lm.preprocessor = make_preprocessor()
        lm.quantize(mode)
        yield mode, lm.backbone


@pytest.mark.slow
@no_quantize_warning
def test_layouts():
    expected = {
        f"{layer}/{name}": axes.split()
        for layer, weights in LAYOUTS.items()
        for name, axes in weights.items()
    }
    columns = ["fully sharded 8", "model 2", "model 2, fully sharded"]
    strategies = [STRATEGIES[name]() for name in columns]
    seen = set()
    for mode, backbone in backbones():
        for variable in backbone.variables:
            received = [
                "".join(
                    axis[0] if axis else "-"
                    for axis in strategy.get_variable_layout(variable).axes
                )
                for strategy in strategies
            ]
            layout = data_parallel().get_variable_layout(variable)
            assert not any(layout.axes)
            is_scale = re.search("_scale$|_zero$|g_idx$", variable.path)
            if is_scale:
                assert mode in ("int8", "int4")
                axes = ["-" * len(variable.shape)] * 3
            else:
                path = re.sub(r"_generator_\d+/", "_generator/", variable.path)
                axes = expected[path]
                seen.add(path)
            assert received == axes, (mode, variable.path)
    assert seen == expected.keys()


@no_quantize_warning
@pytest.mark.slow
def test_every_variable_matches_one_pattern():
    layout_map = fully_sharded()._layout_map
    for _, backbone in backbones():
        lm = BwETAFCausalLM(backbone)
        for variable in lm.variables:
            matched = [
                pattern
                for pattern in layout_map
                if re.fullmatch(pattern, variable.path)
            ]
            assert len(matched) == 1, (variable.path, matched)


@pytest.mark.parametrize("model", [0, -2, 3, 2.0, "2"])
def test_bad_groups(model):
    message = f"positive int that divides .*model={model!r}, 8 devices"
    with pytest.raises(ValueError, match=message):
        model_parallel(model)


def test_groups_of_given_devices():
    with pytest.raises(ValueError, match="model=4, 6 devices"):
        model_parallel(4, devices=jax.devices()[:6])
    mesh = model_parallel(3, devices=jax.devices()[:6]).device_mesh
    assert tuple(mesh.shape) == (2, 3)


def test_unknown_axis():
    mesh = keras.distribution.DeviceMesh((4, 2), ["batch", "model"])
    for arguments in (
        {"model_parallel_dim_name": "heads"},
        {"data_parallel_dim_name": "heads"},
    ):
        message = r"The mesh has the axes \['batch', 'model'\].*'heads'"
        with pytest.raises(ValueError, match=message):
            BwETAFBackbone.get_layout_map(mesh, **arguments)
        with pytest.raises(ValueError, match=message):
            Sharding(mesh, **arguments)


# === Attention's work ===


def hidden_states_program(name, config=CARD):
    """The compiled program of a forward pass, as text."""
    with scope(name):
        backbone = make_backbone(config)
        x = batch(config["vocabulary_size"])
        layout = keras.distribution.distribution().get_data_layout((8, LENGTH))

        @jax.jit
        def forward(trainable, non_trainable, x):
            return backbone.stateless_call(trainable, non_trainable, x)[0]

        return (
            forward.lower(
                [v.value for v in backbone.trainable_variables],
                [v.value for v in backbone.non_trainable_variables],
                jax.device_put(x, layout.backend_layout),
            )
            .compile()
            .as_text()
        )


def test_heads_do_not_cross_devices():
    """Of two rows, a device has half of the heads of both kinds."""
    text = hidden_states_program("model 2")
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    # After the embedding, and after both halves of a block.
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == 1 + 2 * 2
    products = re.findall(r"= f32(\S+?)\{\S* (?:dot|custom-call)\(", text)
    assert set(products) == {
        "[320,16]",  # Queries, 32 dimensions of two rows, on two devices.
        "[320,8]",  # Keys and values.
        "[320,48]",  # The feed-forward network's inside.
        "[320,32]",  # Sums over the devices of a group.
        # Two rows, two of four key/value heads, query heads and queries.
        "[2,2,256,128]",
        "[2,2,256,4]",
        "[2,2,64,160]",
        "[2,2,64,4]",
    }


def test_only_weights_cross_devices_if_fully_sharded():
    """A step puts weights together; a device's rows stay its own."""
    with scope("fully sharded 8"):
        lm = make_lm(SMALL)
        x = batch(SMALL["vocabulary_size"])
        layout = keras.distribution.distribution().get_data_layout((8, LENGTH))
        x = jax.device_put(x, layout.backend_layout)
        text = compiled_step(lm, x).as_text()
    weights = {",".join(map(str, v.shape)) for v in lm.trainable_variables}
    gathered = re.findall(r"= f32\[(\S+)\]\S* all-gather(?:-start)?\(", text)
    assert gathered and set(gathered) <= weights
    assert "all-to-all" not in text
    assert "collective-permute" not in text


# === Kernels ===


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
@pytest.mark.parametrize("name", ["data 8", "model 2"])
def test_kernels(name, kernel, expected):
    x = batch(CARD["vocabulary_size"])
    is_real = x["padding_mask"] > 0
    with scope(name), attention_kernel(kernel):
        lm = make_lm()
        logits = lm.predict(x, batch_size=8, verbose=0)
        changed = lm.predict(other_first_document(x), batch_size=8, verbose=0)
    assert relative_l2(logits[is_real], expected.logits[is_real]) < 1e-5
    assert_documents_are_isolated(logits, changed)


# === Batches whose rows do not divide ===


def metrics_of_ten(name):
    """Of four groups' batches, the last has two rows."""
    x = batch(CARD["vocabulary_size"], num_rows=10)
    texts = (TEXTS + PROMPTS)[-10:]
    labels = np.roll(x["token_ids"], -1, axis=1)
    weights = np.linspace(0, 1, 10, dtype="float32")
    with scope(name):
        lm = make_lm(SMALL)
        evaluate = functools.partial(
            lm.evaluate, batch_size=4, verbose=0, return_dict=True
        )
        metrics = [
            evaluate(x),
            evaluate(texts),
            evaluate(np.array(texts)),
            evaluate(x, labels, sample_weight=weights),
        ]
        logits = lm.predict(x, batch_size=4, verbose=0)
        history = lm.fit(
            x,
            batch_size=4,
            epochs=2,
            shuffle=False,
            validation_data=(x, labels),
            verbose=0,
        )
    metrics.append({key: values[-1] for key, values in history.history.items()})
    return metrics, logits


@pytest.mark.slow
def test_the_last_batch_is_filled_up():
    expected, expected_logits = metrics_of_ten("one device")
    received, logits = metrics_of_ten("model 2, fully sharded")
    assert expected[1] == expected[2]
    for ours, theirs in zip(received, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    is_real = batch(CARD["vocabulary_size"], num_rows=10)["padding_mask"] > 0
    assert relative_l2(logits[is_real], expected_logits[is_real]) < 1e-5


def test_rows_that_do_not_divide():
    x = batch(CARD["vocabulary_size"])
    with scope("model 2"):
        lm = make_lm(SMALL)
        with pytest.raises(
            ValueError, match=r"a multiple of 4.*of shape \(6, 160\)"
        ):
            lm.evaluate(x, batch_size=6, verbose=0)


# === LoRA and quantized weights ===


def make_lora_lm():
    lm = make_lm(SMALL)
    lm.backbone.enable_lora(4, ALL_LAYERS)
    randomize(lm.trainable_variables)
    lm.compile(keras.optimizers.AdamW(1e-3))
    return lm


@pytest.fixture(scope="module")
def expected_lora():
    return train(make_lora_lm(), batch(CARD["vocabulary_size"]), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 8", "model 2, fully sharded"])
def test_lora(name, expected_lora):
    losses, gradients = expected_lora
    assert len(gradients) == 2 * len(ALL_LAYERS)
    with scope(name):
        received = train(make_lora_lm(), batch(CARD["vocabulary_size"]), 2)
    assert_same_losses(received[0], losses)
    assert_same_gradients(received[1], gradients)


@pytest.mark.slow
@no_quantize_warning
def test_quantized():
    x = batch(CARD["vocabulary_size"])
    logits = []
    for name in ("one device", "model 2"):
        with scope(name):
            lm = make_lm(SMALL)
            lm.quantize("int8")
            logits.append(lm.predict(x, batch_size=8, verbose=0))
    is_real = x["padding_mask"] > 0
    assert relative_l2(logits[1][is_real], logits[0][is_real]) < 1e-5


# === Files ===


def save_everything(name, folder):
    keras.backend.clear_session(free_memory=False)  # Names start from 1.
    with scope(name):
        lm = make_lm(SMALL)
        lm.save_to_preset(folder / "keras")
        lm.export_to_transformers(folder / "torch")
        make_lora_lm().backbone.save_lora_weights(folder / "lora.safetensors")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"  # It has the time.
    }


def test_files_are_the_same(tmp_path):
    expected = save_everything("one device", tmp_path / "one")
    received = save_everything("model 2, fully sharded", tmp_path / "several")
    assert received.keys() == expected.keys()
    assert {
        "lora.safetensors",
        "keras/model.weights.h5",
        "torch/model.safetensors",
    } <= expected.keys()
    differ = [path for path in expected if received[path] != expected[path]]
    assert not differ


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and folders of it by format."""
    lm = make_lm({**SMALL, "rope_dtype": None})
    folders = {}
    for to in ("flax", "safetensors", "keras"):
        folders[to] = tmp_path_factory.mktemp("saved") / to
        converters.write_checkpoint(as_checkpoint(lm), folders[to], to=to)
    return lm, folders


@pytest.mark.parametrize("to", ["flax", "safetensors", "keras"])
def test_loading(saved, to, monkeypatch):
    """Each device's part is read, and nothing else."""
    lm, folders = saved
    make, parts = jax.make_array_from_callback, []

    def recorded(shape, sharding, read):
        def part(index):
            value = read(index)
            parts.append((shape, value.shape, sharding.shard_shape(shape)))
            return value

        return make(shape, sharding, part)

    monkeypatch.setattr(jax, "make_array_from_callback", recorded)
    with scope("model 2, fully sharded"):
        loaded = from_preset(folders[to])
        strategy = keras.distribution.distribution()
    for ours, theirs in zip(
        loaded.backbone.weights, lm.backbone.weights, strict=True
    ):
        assert ours.path == theirs.path
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        layout = strategy.get_variable_layout(ours).backend_layout
        assert ours.value.sharding.is_equivalent_to(layout, len(ours.shape))
    if to != "keras":  # KerasHub reads each weight as a whole.
        assert {shape for shape, *_ in parts} == {
            tuple(each.shape) for each in lm.backbone.weights
        }
        assert all(received == wanted for _, received, wanted in parts)
        assert any(received != shape for shape, received, _ in parts)


# === Checkpoints ===


@pytest.mark.slow
def test_a_training_moves_to_other_devices(tmp_path):
    """Bit for bit, and goes on as if it had stayed on one device."""
    resumable.write_rows(tmp_path / "rows.npy")
    devices = jax.devices()

    def fit(epochs, folder=None):
        lm = resumable.make_lm()
        if folder:
            lm.optimizer.build(lm.trainable_variables)
        callbacks, moved = [], {}
        if folder:
            callbacks.append(TrainingCheckpoint(folder, save_every=2))
            if folder.exists():
                callbacks[0].restore(lm, include_optimizer=True)
                moved = resumable.state(lm)
        history = lm.fit(
            resumable.read_rows(tmp_path / "rows.npy", batch_size=8, seed=3),
            epochs=epochs,
            steps_per_epoch=2,
            callbacks=callbacks,
            verbose=0,
        )
        return history.history["loss"], moved, resumable.state(lm)

    stages = [
        fully_sharded(),
        model_parallel(2, devices=devices[:4]),
        data_parallel(devices[:2]),
        None,
        fully_sharded(),
    ]
    expected, _, _ = fit(len(stages))
    before = {}
    for epochs, strategy in enumerate(stages, start=1):
        with strategy.scope() if strategy else contextlib.nullcontext():
            losses, moved, after = fit(epochs, tmp_path / "checkpoints")
        assert moved.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(moved[name], value)
        before = after
    assert_same_losses(np.array(losses), np.array(expected))
