"""`fit` with head and loss in one: parity, isolation, memory, metrics."""

import math
import re

import grain
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    train_tokenizer,
)
from keras_bwetaf.layers import TransformerBlock
from keras_bwetaf.step.loss import targets_and_weights
from keras_bwetaf.training import AdamW, recipe
from tests import original
from tests.exchange.test_optimizer_state import ADAM, schedule
from tests.parity import document_numbers, port, relative_l2

TINY = dict(
    num_heads=4,
    attention_dim=32,
    vocab_size=64,
    num_blocks=2,
    ff_dim=48,
    gqa_repeats=2,
    max_len=64,
    dropout_rate=0.0,
)


def rows(num_rows, length=32, vocabulary_size=64, seed=0):
    """Packed rows of counting numbers, which a model can learn."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, vocabulary_size, (num_rows, 1))
    token_ids = (start + np.arange(length)) % vocabulary_size
    noise = rng.integers(0, vocabulary_size, token_ids.shape)
    token_ids = np.where(rng.random(token_ids.shape) < 0.1, noise, token_ids)
    return token_ids.astype("int32")


def packed(token_ids):
    return {
        "token_ids": token_ids,
        "padding_mask": document_numbers(token_ids).astype("int32"),
    }


def uneven(num_rows=8, **arguments):
    """Rows with padding: 3 to all tokens of each."""
    x = packed(rows(num_rows, **arguments))
    length = x["token_ids"].shape[1]
    lengths = np.linspace(3, length, num_rows).astype("int32")[:, None]
    x["padding_mask"] *= np.arange(length) < lengths
    return x


def make_lm(
    optimizer=None,
    dtype="float32",
    dropout=0.0,
    vocabulary_size=64,
    **compile_arguments,
):
    keras.utils.set_random_seed(0)
    backbone = BwETAFBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        max_sequence_length=64,
        initializer_range=0.1,
        dropout=dropout,
        dtype=dtype,
    )
    lm = BwETAFCausalLM(backbone)
    lm.compile(optimizer or keras.optimizers.SGD(1e5), **compile_arguments)
    return lm


def step(lm, x, *labels):
    """The gradients of a step, scaled, and its logs. Weights stay as they are.

    Plain descent at so high a rate that a change is not lost in the weight.
    """
    before = lm.get_weights()
    logs = lm.train_on_batch(x, *labels, return_dict=True)
    after = lm.get_weights()
    lm.set_weights(before)
    return [b - a for a, b in zip(before, after, strict=True)], logs


def without_rounding(lm):
    """The same model, with an embedding that is not rounded to bfloat16.

    Its gradient is rounded with it, which makes a difference in the last
    place of a sum into one of 1/256, here and there.
    """
    block = lm.backbone.transformer_layers[0]
    block.input_precision = block.attention_norm.precision = None
    return lm


def assert_close(received, expected, tolerance=1e-6):
    for ours, theirs in zip(received, expected, strict=True):
        if theirs.dtype.kind == "f" and theirs.any():
            assert relative_l2(ours, theirs) < tolerance


# === The original ===


def manager(dtype, seed):
    """The original's own initial weights in float32, random ones otherwise.

    Both round the embedding to bfloat16, so once in a while a difference in
    the last place becomes one of 1/256. A model with weights as small as at
    the beginning of a training does not blow it up.
    """
    model = original.manager(dtype, seed, **TINY)
    if dtype == "float32":
        shape = (2, 8)
        model.params = model.model_struct.clone(param_init_rage=0.01).init(
            model.key, jnp.ones(shape), jnp.ones(shape)
        )
    return model


def their_losses(dtype, seed, num_steps):
    """The original's loss function, run as it is written, under optax."""
    model = manager(dtype, seed)
    model.training_setup(
        optax.adamw, {**schedule(200), **ADAM, "opt_dtype": jnp.dtype(dtype)}
    )
    clip = optax.clip_by_global_norm(7.0)
    update = jax.jit(model.optimizer.optimizer.update)
    params, state = model.params, model.optimizer.state
    losses = []
    for batch in np.split(rows(2 * num_steps), num_steps):
        batch = jnp.asarray(batch)
        with jax.disable_jit():
            loss, gradients = model.grad_fn(
                params,
                model.model_struct,
                (batch, jnp.ones_like(batch), batch),
                model.key,
            )
        gradients, _ = clip.update(gradients, clip.init(params))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return np.array(losses)


def our_losses(dtype, seed, num_steps):
    """As many epochs as steps, so that the history has each loss."""
    lm = port(manager(dtype, seed), dtype)
    lm.compile(recipe("97m", 200, moments_dtype=dtype))
    history = lm.fit(
        packed(rows(2 * num_steps)),
        batch_size=2,
        epochs=num_steps,
        steps_per_epoch=1,
        shuffle=False,
        verbose=0,
    )
    return np.array(history.history["loss"])


@pytest.mark.slow
def test_follows_the_original():
    expected = their_losses("float32", 0, 20)
    received = our_losses("float32", 0, 20)
    differences = np.abs(received / expected - 1)
    print(
        f"loss {expected[0]:.4f} to {expected[-1]:.4f}, differs by at most "
        f"{differences.max():.1e}"
    )
    assert len(received) == 20
    assert expected[-1] < 0.998 * expected[0]
    assert differences.max() < 1e-5


@pytest.mark.slow
def test_follows_the_original_in_bfloat16():
    expected, other = (their_losses("bfloat16", seed, 6) for seed in (0, 1))
    received = our_losses("bfloat16", 0, 6)
    noise = np.abs(other - expected).mean()
    difference = np.abs(received - expected).mean()
    print(f"differs by {difference:.4f}, two seeds by {noise:.4f}")
    assert difference < noise


@pytest.mark.slow
def test_mixed_precision_keeps_float32_weights():
    losses = {}
    for dtype in ("float32", "mixed_bfloat16"):
        lm = make_lm(recipe("97m", 200, moments_dtype=None), dtype)
        before = lm.get_weights()
        x = packed(rows(4))
        history = lm.fit(x, batch_size=4, epochs=4, verbose=0)
        losses[dtype] = np.array(history.history["loss"])
    for variable in lm.trainable_variables + lm.optimizer.variables[2:]:
        assert variable.dtype == "float32"
    for old, weight in zip(before, lm.trainable_variables, strict=True):
        # Most of such steps bfloat16 would round away, or to a few values.
        steps = np.array(weight) - old
        assert len(np.unique(steps)) > 0.5 * steps.size
    differences = np.abs(losses["mixed_bfloat16"] / losses["float32"] - 1)
    print(f"differs by at most {differences.max():.1e}")
    assert 0 < differences.max() < 2e-3


# === Documents in one row ===


def two_documents(change=None):
    """Document 1 is tokens 0 to 9 of each row, document 2 the rest."""
    token_ids = np.maximum(rows(2, seed=3), 1)
    token_ids[:, 9] = 0
    if change is not None:
        token_ids[:, change] = 1 + (token_ids[:, change] + 7) % 63
    return {
        "token_ids": token_ids,
        "padding_mask": np.where(np.arange(32) < 10, 1, 2)
        * np.ones((2, 1), int),
    }


def second_only(x):
    """Labels and weights of the predictions made in document 2."""
    y = np.roll(x["token_ids"], -1, axis=1)
    weights = np.zeros(y.shape, "float32")
    weights[:, 10:-1] = 1
    return x, y, weights


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_a_document_does_not_see_another(remat):
    lm = make_lm(remat=remat)
    start = lm.get_weights()
    x, other = two_documents(), two_documents(change=slice(0, 9))
    logits = lm.predict(x, verbose=0)
    others = lm.predict(other, verbose=0)
    np.testing.assert_array_equal(logits[:, 10:], others[:, 10:])
    assert (logits[:, :9] != others[:, :9]).any()

    change, logs = step(lm, *second_only(x))
    lm.set_weights(start)
    changed, other_logs = step(lm, *second_only(other))
    assert logs["loss"] == other_logs["loss"]
    for one, two in zip(change, changed, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.any()

    # What it does see makes a difference, and so would a plain mask.
    lm.set_weights(start)
    lm.reset_metrics()
    within = two_documents(change=slice(12, 13))
    assert (step(lm, *second_only(within))[0][1] != change[1]).any()
    for inputs in (x, other):
        inputs["padding_mask"] = np.ones((2, 32), "int32")
    changes = []
    for inputs in (x, other):
        lm.set_weights(start)
        changes.append(step(lm, *second_only(inputs))[0])
    assert (changes[0][1] != changes[1][1]).any()


# === Accumulation, rematerialisation ===


@pytest.mark.parametrize("parts", [3, 8])
def test_accumulation_weighs_by_tokens(parts):
    """8 rows in 3 parts leave one of these short."""
    x = uneven()
    whole = without_rounding(make_lm())
    expected, expected_logs = step(whole, x)
    lm = without_rounding(make_lm(gradient_accumulation_steps=parts))
    received, logs = step(lm, x)
    assert_close(received, expected)
    for name, value in expected_logs.items():
        assert abs(logs[name] / value - 1) < 1e-6, name

    # The mean of the rows' means is something else.
    means = [
        step(whole, {name: array[i : i + 1] for name, array in x.items()})[0]
        for i in range(8)
    ]
    mean = sum(change[0] for change in means) / 8
    assert relative_l2(mean, expected[0]) > 0.01


def test_accumulation_draws_new_dropout_in_every_part():
    x = {name: np.repeat(x[:1], 2, axis=0) for name, x in uneven(2).items()}
    x["padding_mask"][:] = 1
    once, _ = step(make_lm(dropout=0.5), {name: x[:1] for name, x in x.items()})
    twice, _ = step(make_lm(dropout=0.5, gradient_accumulation_steps=2), x)
    assert relative_l2(twice[0], once[0]) > 0.01


@pytest.mark.parametrize(
    ("remat", "dtype", "tolerance"),
    [
        ("attention", "float32", 1e-6),
        ("block", "float32", 1e-6),
        pytest.param("full", "float32", 1e-6, marks=pytest.mark.slow),
        (("block", "attention"), "float32", 1e-6),
        # It rounds at other places.
        pytest.param("full", "mixed_bfloat16", 3e-2, marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_gradient(remat, dtype, tolerance):
    x = uneven()
    plain = without_rounding(make_lm(dropout=0.2, dtype=dtype))
    lm = without_rounding(make_lm(dropout=0.2, dtype=dtype, remat=remat))
    changes = []
    for _ in range(2):
        expected, _ = step(plain, x)
        received, _ = step(lm, x)
        assert_close(received, expected, tolerance)
        changes.append(received[0])
    # The second step has new random numbers.
    assert relative_l2(*changes) > 0.01
    state = [v for v in lm.non_trainable_variables if "seed" in v.path]
    assert state and all(int(v.value[1]) > 0 for v in state)


def compiled_step(lm, x):
    lm.optimizer.build(lm.trainable_variables)
    state = [
        [variable.value for variable in variables]
        for variables in (
            lm.trainable_variables,
            lm.non_trainable_variables,
            lm.optimizer.variables,
            lm.metrics_variables,
        )
    ]
    return jax.jit(lm.train_step).lower(tuple(state), x).compile()


@pytest.mark.slow
def test_remat_recomputes():
    """A step counts more operations the less is kept."""
    x = packed(rows(2, length=64))
    flops = [
        compiled_step(make_lm(remat=remat), x).cost_analysis()["flops"]
        for remat in (
            "none",
            "attention",
            ["block", "attention"],
            "block",
            ["full", "block"],
            "full",
        )
    ]
    assert flops == sorted(set(flops))


def test_loss_scaling_is_undone():
    x = uneven()
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e5), initial_scale=1024.0
    )
    expected, _ = step(without_rounding(make_lm()), x)
    received, logs = step(without_rounding(make_lm(optimizer)), x)
    assert_close(received, expected)
    assert 3 < logs["loss"] < 6


# === Memory ===


def arrays(compiled):
    """Dtype and shape of what is in memory: fused loops keep nothing."""
    found, is_fused = [], False
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            is_fused = "fused" in line.split("(")[0]
        elif not is_fused and " = " in line:
            results = line.split(" = ")[1].split("(%")[0]
            for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", results):
                shape = tuple(map(int, dims.split(",")))
                found.append((dtype, shape))
    return found


PRIME = 509  # A vocabulary that no other dimension is a multiple of.


def large_arrays(lm, x):
    """Arrays with a dimension for each token of the vocabulary, but tables."""
    return {
        (dtype, shape)
        for dtype, shape in arrays(compiled_step(lm, x))
        if any(dim % PRIME == 0 for dim in shape)
        and math.prod(shape) > PRIME * lm.backbone.hidden_dim
    }


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_no_array_of_all_logits_and_no_one_hot(dtype):
    batch, length = 8, 64
    x = packed(rows(batch, length))
    all_logits = batch * length * PRIME
    one_chunk = all_logits // 8

    def largest(kinds, found):
        return max(math.prod(shape) for kind, shape in found if kind in kinds)

    lm = make_lm(dtype=dtype, vocabulary_size=PRIME)
    found = large_arrays(lm, x)
    assert largest({"f32", "bf16"}, found) <= one_chunk
    # A one-hot array would be one more of bools, ints or floats.
    assert not {kind for kind, _ in found} - {"f32", "bf16"}

    # The plain path is seen to have both.
    lm = make_lm(dtype=dtype, vocabulary_size=PRIME, metrics=["accuracy"])
    y = np.roll(x["token_ids"], -1, axis=1)
    found = large_arrays(lm, (x, y))
    assert largest({"f32"}, found) >= all_logits


# === Metrics and data ===


def by_hand(lm, x):
    """Loss, accuracy and perplexity of all tokens together."""
    logits = np.asarray(lm.predict(x, verbose=0), "float64")[:, :-1]
    targets = x["token_ids"][:, 1:]
    is_real = x["padding_mask"][:, 1:] > 0
    normalizer = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], 2)[..., 0]
    loss = (normalizer - picked)[is_real].mean()
    accuracy = (logits.argmax(-1) == targets)[is_real].mean()
    return {"loss": loss, "accuracy": accuracy, "perplexity": math.exp(loss)}


def test_metrics_weigh_by_tokens():
    """Batches of 3 rows have 21 to 81 tokens, the last one 2 rows."""
    x = uneven()
    lm = make_lm(keras.optimizers.SGD(0.0))
    expected = by_hand(lm, x)
    assert expected["accuracy"] > 0
    trained = lm.fit(x, batch_size=3, verbose=0, validation_data=x).history
    evaluated = lm.evaluate(x, batch_size=3, verbose=0, return_dict=True)
    assert set(evaluated) == set(expected)
    for name, value in expected.items():
        assert abs(trained[name][0] / value - 1) < 1e-6
        assert abs(trained[f"val_{name}"][0] / value - 1) < 1e-6
        assert abs(evaluated[name] / value - 1) < 1e-6


def test_a_batch_of_padding_changes_nothing():
    x = {name: np.zeros((2, 8), "int32") for name in packed(rows(1))}
    lm = make_lm()
    change, logs = step(lm, x)
    assert logs == {"loss": 0, "accuracy": 0, "perplexity": 1}
    assert not any(value.any() for value in change)


def test_grain_data_of_packed_rows():
    x = packed(rows(8))
    batches = [
        {name: array[i : i + 2] for name, array in x.items()}
        for i in range(0, 8, 2)
    ]
    lm, other = (make_lm(keras.optimizers.SGD(0.1)) for _ in range(2))
    history = lm.fit(grain.MapDataset.source(batches), verbose=0).history
    expected = other.fit(x, batch_size=2, shuffle=False, verbose=0).history
    assert history == expected
    assert set(history) == {"loss", "accuracy", "perplexity"}
    assert history["loss"][0] > 0


def test_packed_rows_beside_a_preprocessor():
    """Strings go through it, token ids do not."""
    texts = ["the light of the day", "the night and the stars"] * 6
    tokenizer = train_tokenizer(texts, 300)
    lm = make_lm(
        keras.optimizers.SGD(0.1), vocabulary_size=tokenizer.vocabulary_size()
    )
    lm.preprocessor = BwETAFCausalLMPreprocessor(tokenizer, sequence_length=12)
    x, y, weights = lm.preprocessor(texts)
    from_text = lm.evaluate(texts, verbose=0, return_dict=True)
    from_ids = lm.evaluate(
        {name: np.asarray(array) for name, array in x.items()},
        np.asarray(y),
        sample_weight=np.asarray(weights),
        verbose=0,
        return_dict=True,
    )
    assert from_text == from_ids
    history = lm.fit(texts, batch_size=4, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.slow
def test_own_loss_and_metrics_see_logits():
    """And compiling anew goes back."""
    x = uneven()
    y, weights = next_token(x)
    expected, _ = step(without_rounding(make_lm()), x, y, weights)

    lm = make_lm(weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()])
    received, logs = step(without_rounding(lm), x, y, weights)
    assert_close(received, expected)
    assert set(logs) == {"loss", "sparse_categorical_accuracy"}

    def half(y, logits):
        losses = keras.losses.sparse_categorical_crossentropy(
            y, logits, from_logits=True
        )
        return losses / 2

    lm = make_lm(loss=half, weighted_metrics=None)
    _, logs = step(lm, x, y)
    assert set(logs) == {"loss"}
    lm.compile(keras.optimizers.SGD(0.1))
    assert set(step(lm, x)[1]) == {"loss", "accuracy", "perplexity"}
    lm.compile(keras.optimizers.SGD(0.1), weighted_metrics=None)
    assert set(step(lm, x)[1]) == {"loss"}


def next_token(x):
    """Labels and weights that stand for none."""
    weights = (np.roll(x["padding_mask"], -1, axis=1) > 0).astype("float32")
    weights[:, -1] = 0
    return np.roll(x["token_ids"], -1, axis=1), weights


def regularized(**arguments):
    """A model of which two weights have a regularizer."""
    lm = without_rounding(make_lm(**arguments))
    for block in lm.backbone.transformer_layers:
        block.attention.query.kernel.regularizer = keras.regularizers.L2(0.1)
    return lm


OF_KERAS = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, reduction="mean_with_sample_weight"
)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_regularizers_count_as_in_keras(parts):
    """Once in a step, whatever its parts; perplexity is that of the tokens."""
    x = uneven()
    labels = next_token(x)
    theirs = regularized(loss=OF_KERAS, weighted_metrics=None)
    expected, expected_logs = step(theirs, x, *labels)
    lm = regularized(gradient_accumulation_steps=parts)
    received, logs = step(lm, x)
    assert_close(received, expected, 1e-5)
    penalty = float(sum(lm.losses))
    assert penalty > 0.1
    assert logs["loss"] == pytest.approx(expected_logs["loss"], rel=1e-5)
    assert math.log(logs["perplexity"]) == pytest.approx(
        logs["loss"] - penalty, rel=1e-5
    )
    evaluated = lm.evaluate(x, batch_size=4, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(expected_logs["loss"], rel=1e-5)


def test_a_training_loop_of_ones_own():
    """As in Keras's guide for JAX: `stateless_compute_loss` has a gradient."""
    x = uneven()
    lm = without_rounding(make_lm())
    expected, logs = step(lm, x)

    @jax.jit
    @jax.value_and_grad
    def loss_of(trainable):
        logits, non_trainable = lm.stateless_call(
            trainable, lm.non_trainable_variables, x, training=True
        )
        return lm.stateless_compute_loss(
            trainable, non_trainable, lm.metrics_variables, x=x, y_pred=logits
        )[0]

    loss, gradients = loss_of([v.value for v in lm.trainable_variables])
    assert float(loss) == pytest.approx(logs["loss"], rel=1e-6)
    assert_close([-1e5 * np.asarray(g) for g in gradients], expected, 1e-5)


def test_the_loss_of_logits():
    """Of the default loss, and of one that was compiled."""
    x = uneven()
    labels, weights = next_token(x)
    logits = np.random.default_rng(0).normal(size=(*labels.shape, 64))
    expected = float(OF_KERAS(labels, logits, weights))
    lm = make_lm()
    ignored = np.where(weights > 0, labels, -100)
    for given in ((labels, weights), (None, None), (ignored, None)):
        received = float(lm.compute_loss(x, given[0], logits, given[1]))
        assert received == pytest.approx(expected, rel=1e-6)
    lm.compile(loss=OF_KERAS)
    received = float(lm.compute_loss(x, labels, logits, weights))
    assert received == pytest.approx(expected, rel=1e-6)


def test_own_metrics_count_what_the_loss_counts():
    """Not padding, and not labels that are ignored."""
    x = uneven()
    lm = make_lm(
        keras.optimizers.SGD(0.0),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
    )
    expected = make_lm().evaluate(x, verbose=0, return_dict=True)
    labels, weights = next_token(x)
    for data in ((None, None), (np.where(weights > 0, labels, -100), None)):
        received = lm.test_on_batch(x, *data, return_dict=True)
        for name, value in received.items():
            assert value == pytest.approx(expected[name], rel=1e-5)
    again = type(lm).from_config(lm.get_config())
    again.compile_from_config(lm.get_compile_config())
    assert again.has_default_loss and not again.fuses_head_and_loss


def test_lora():
    x = uneven()
    lm = make_lm()
    lm.backbone.enable_lora(2)
    lm.compile(keras.optimizers.SGD(1.0))
    frozen = [v for v in lm.weights if "lora" not in v.path]
    before = [v.numpy() for v in frozen]
    history = lm.fit(x, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for variable, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)


@pytest.mark.parametrize(
    ("metric", "is_better"),
    [("loss", np.less), ("perplexity", np.less), ("accuracy", np.greater)],
)
def test_callbacks_know_directions(metric, is_better, tmp_path):
    x = uneven()
    lm = make_lm(keras.optimizers.SGD(0.1))
    monitor = f"val_{metric}"
    callbacks = [
        keras.callbacks.EarlyStopping(monitor),
        keras.callbacks.ReduceLROnPlateau(monitor),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5",
            monitor=monitor,
            save_best_only=True,
            save_weights_only=True,
        ),
    ]
    logs = lm.fit(x, validation_data=x, verbose=0, callbacks=callbacks).history
    assert monitor in logs
    for callback in callbacks:
        assert callback.monitor_op(1.0, 2.0) == is_better(1.0, 2.0)


def test_compiling_anew_begins_new_metrics():
    x = uneven()
    lm = make_lm(keras.optimizers.SGD(0.0))
    for _ in range(2):
        lm.evaluate(x, verbose=0)
        assert [each.name for each in lm.metrics] == ["loss", "token_metrics"]
        assert len(lm.metrics_variables) == 6
        lm.compile(keras.optimizers.SGD(0.0))


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        keras.callbacks.ReduceLROnPlateau("loss"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_recipe_sets_its_own_learning_rate(callback, is_wrapped):
    optimizer = recipe("small", 10)
    if is_wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    lm = make_lm(optimizer)
    with pytest.raises(ValueError, match="Leave out the callback and change"):
        lm.fit(uneven(), verbose=0, callbacks=[[callback]])
    lm.compile(AdamW(learning_rate=1e-3))
    lm.fit(uneven(), verbose=0, callbacks=[callback])


@pytest.mark.parametrize("has_own_loss", [False, True])
def test_clone_model(has_own_loss):
    """A plain model of the same form, with weights of its own."""
    x = uneven()
    arguments = dict(metrics=["accuracy"]) if has_own_loss else {}
    lm = make_lm(keras.optimizers.Adam(0.01), **arguments)
    clone = keras.models.clone_model(lm)
    assert not {*map(id, lm.weights)} & {*map(id, clone.weights)}
    assert clone.count_params() == lm.count_params()
    clone.set_weights(lm.get_weights())
    np.testing.assert_array_equal(
        clone.predict(x, verbose=0), lm.predict(x, verbose=0)
    )
    assert clone.optimizer is not lm.optimizer
    assert clone.optimizer.get_config() == lm.optimizer.get_config()
    y = np.roll(x["token_ids"], -1, axis=1)
    losses = clone.fit(x, y, epochs=3, verbose=0).history
    assert losses["loss"][-1] < losses["loss"][0]
    assert "accuracy" in losses


def test_a_clone_counts_tokens_as_the_model_does():
    x = uneven()
    y, weights = targets_and_weights(x, None, None)
    lm = make_lm(keras.optimizers.SGD(0.0))
    clone = keras.models.clone_model(lm)
    clone.set_weights(lm.get_weights())
    expected = lm.evaluate(x, verbose=0, return_dict=True)
    received = clone.evaluate(
        x,
        np.asarray(y),
        sample_weight=np.asarray(weights),
        verbose=0,
        return_dict=True,
    )
    for name, value in received.items():
        assert abs(value / expected[name] - 1) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantize_is_silent(mode, capfd):
    """Warnings are errors here."""
    lm = make_lm(dropout=0.1)
    capfd.readouterr()
    lm.quantize(mode)
    make_lm(dropout=0.1).backbone.quantize(mode)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="filters"):
        lm.quantize(mode, filters=3)


def test_a_quantized_head_has_no_table():
    """Its logits are those of the layer."""
    x = uneven()
    lm = make_lm()
    expected = lm.evaluate(x, verbose=0, return_dict=True)
    lm.backbone.token_embedding.quantize("int8")
    lm.compile(keras.optimizers.SGD(0.1))
    received = lm.evaluate(x, verbose=0, return_dict=True)
    assert 0 < abs(received["loss"] / expected["loss"] - 1) < 0.01


def test_settings_survive_saving(tmp_path):
    remat = ["block", "attention"]
    lm = make_lm(recipe("97m", 10), remat=remat, gradient_accumulation_steps=2)
    lm.fit(uneven(), verbose=0)
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.remat == remat
    assert [b.remat for b in again.backbone.transformer_layers] == remat
    assert again.gradient_accumulation_steps == 2
    for _ in range(2):
        expected, logs = step(lm, uneven())
        received, again_logs = step(again, uneven())
        for ours, theirs in zip(received, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert set(logs) == set(again_logs) == {"loss", "accuracy", "perplexity"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(remat="some"), "Received: remat='some'"),
        (dict(remat=["block", "some"]), "Received: remat='some'"),
        (dict(remat=["block"]), "each of the 2 blocks. Received"),
        (dict(remat=None), "each of the 2 blocks. Received: remat=None"),
        (dict(gradient_accumulation_steps=0), "a positive int"),
        (
            dict(gradient_accumulation_steps=2, loss="mse"),
            "needs the default loss",
        ),
        (
            dict(optimizer=keras.optimizers.SGD(gradient_accumulation_steps=2)),
            "whatever number of tokens",
        ),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_lm(**arguments)


def test_the_block_checks_its_remat():
    block = make_lm().backbone.transformer_layers[0]
    assert isinstance(block, TransformerBlock) and block.remat == "none"
    with pytest.raises(ValueError, match="must be one of"):
        block.remat = None
