"""The optimizer's state: parity with optax, round trips, refusals."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import optax
import pytest

import converters
import keras_bwetaf
from converters import bwetaf_v3
from keras_bwetaf.models import BwETAFBackbone, BwETAFCausalLM
from keras_bwetaf.training import load_optimizer_state, optimizer_state
from tests import original
from tests.parity import document_numbers, relative_l2, weights_by_path
from tests.test_trained_checkpoint import load_original

NUM_STEPS = 5
TOLERANCE = 1e-5
ADAM = dict(b1=0.95, b2=0.98, eps=1.5e-8, weight_decay=0.1)


def schedule(total_steps):
    """The card's, in the original's terms."""
    return dict(
        peaklr=1.5e-3,
        min_warmup_value=6e-4,
        min_value=1.8e-4,
        warmup_percent=0.02,
        total_steps=total_steps,
        training_decay="cosine",
    )


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The original's schedule, in Keras."""

    def __init__(self, total_steps):
        self.schedule = original.BwETAF.independent.create_lr_schedule(
            **schedule(total_steps)
        )

    def __call__(self, step):
        return self.schedule(jnp.asarray(step))


def adamw(total_steps, **arguments):
    return keras.optimizers.AdamW(
        Schedule(total_steps),
        beta_1=ADAM["b1"],
        beta_2=ADAM["b2"],
        epsilon=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
        **arguments,
    )


def loss(token_ids, logits):
    """Mean cross-entropy of the next token."""
    targets = jnp.asarray(token_ids, "int32")[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], targets
    ).mean()


def train_step(lm, token_ids):
    """One step; a copy of the weights after it, by path."""
    inputs = {
        "token_ids": token_ids,
        "padding_mask": document_numbers(token_ids),
    }
    lm.train_on_batch(inputs, token_ids)
    return {v.path: np.array(v.value) for v in lm.trainable_variables}


def canonical_state(optax_state, backbone):
    """The canonical form of the original's state.

    Args:
        optax_state: dict, as Flax restores it from a file.
        backbone: `BwETAFBackbone`.
    """
    adam = optax_state["0"]
    state = {"step": adam["count"]}
    config = converters.config_from_keras(backbone.get_config())
    for name, tree in (("exp_avg", adam["mu"]), ("exp_avg_sq", adam["nu"])):
        moments = weights_by_path(tree)
        for row in bwetaf_v3.tensors(config):
            state[f"{name}.{row.name}"] = moments[row.keras]
    return state


@pytest.fixture(scope="module")
def batches(validation_rows):
    """int32 (NUM_STEPS, 2, 128). In each row, a document ends."""
    rows = validation_rows[:, :128].astype("int32")
    rows = rows[(rows == 0).any(axis=1)][: 2 * NUM_STEPS - 1]
    rows = np.concatenate([rows, rows[:1]])  # Of "kjv", there are nine.
    return rows.reshape(NUM_STEPS, 2, 128)


@pytest.fixture(scope="module")
def theirs(trained_checkpoint, batches):
    """Weights before and after each step of the original, by its schedule.

    Operation by operation: compiled, it would lose its roundings to bfloat16.
    """

    model = load_original(trained_checkpoint, "float32")

    @functools.cache
    def run(total_steps):
        model.training_setup(
            optax.adamw,
            {**schedule(total_steps), **ADAM},
            state_path=str(trained_checkpoint),
        )
        state = jax.tree.map(
            lambda x: jnp.asarray(x, "float32" if x.ndim else "int32"),
            model.optimizer.state,
        )
        assert int(state[0].count) == 700  # It was loaded, not made anew.
        update = jax.jit(model.optimizer.optimizer.update)
        params = model.params
        weights = [weights_by_path(params)]
        for rows in batches:
            batch = (jnp.asarray(rows), np.ones_like(rows), jnp.asarray(rows))
            with jax.disable_jit():
                _, gradients = model.grad_fn(
                    params, model.model_struct, batch, model.key
                )
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            weights.append(weights_by_path(params))
        return weights

    return run


@pytest.fixture(scope="module")
def optax_state(trained_checkpoint):
    data = (trained_checkpoint / "make_stuff_better.pkl").read_bytes()
    return flax.serialization.msgpack_restore(data)


@pytest.fixture(scope="module")
def ours(trained_checkpoint):
    """The same model here, by its schedule, at its first weights."""

    @functools.cache
    def load(total_steps):
        lm = keras_bwetaf.from_preset(
            trained_checkpoint, dtype="float32", dropout=0.0
        )
        lm.preprocessor = None
        lm.compile(adamw(total_steps), loss=loss, weighted_metrics=None)
        return lm, lm.get_weights()

    def reset(total_steps):
        lm, weights = load(total_steps)
        lm.set_weights(weights)
        return lm

    return reset


@pytest.mark.slow
@pytest.mark.parametrize("total_steps", [700, 800])
def test_continues_as_optax(batches, theirs, ours, optax_state, total_steps):
    """At the end of the schedule, and where the learning rate changes."""
    lm = ours(total_steps)
    load_optimizer_state(lm, canonical_state(optax_state, lm.backbone))
    start, *expected = theirs(total_steps)
    for step in range(NUM_STEPS):
        received = train_step(lm, batches[step])
        assert set(received) == set(expected[step])
        moved = {
            path: relative_l2(weight, start[path])
            for path, weight in expected[step].items()
        }
        differences = {
            path: relative_l2(weight, expected[step][path])
            for path, weight in received.items()
        }
        worst = max(differences, key=differences.get)
        print(
            f"step {700 + step} of {total_steps}: differs by at most "
            f"{differences[worst]:.1e} ({worst}), moved by at least "
            f"{min(moved.values()):.1e}"
        )
        assert min(moved.values()) > TOLERANCE
        assert differences[worst] < TOLERANCE
    assert optimizer_state(lm)["step"] == 700 + NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["step", "exp_avg.", "exp_avg_sq.", ""])
def test_differs_without_the_state(batches, theirs, ours, optax_state, lost):
    """What the parity test would see if a part, or all, were not loaded."""
    lm = ours(700)
    state = canonical_state(optax_state, lm.backbone)
    for name in state:
        if name.startswith(lost):
            state[name] = np.zeros_like(state[name])
    load_optimizer_state(lm, state)
    received = train_step(lm, batches[0])
    expected = theirs(700)[1]
    for path, weight in received.items():
        assert relative_l2(weight, expected[path]) > TOLERANCE, path


def test_round_trip_of_the_trained_state(ours, optax_state):
    lm = ours(700)
    state = canonical_state(optax_state, lm.backbone)
    load_optimizer_state(lm, state)
    received = optimizer_state(lm)
    assert set(received) == set(state)
    assert received["step"].dtype == "int32" and received["step"] == 700
    for name in set(state) - {"step"}:
        assert state[name].dtype == ml_dtypes.bfloat16
        assert received[name].dtype == "float32"
        narrow = received[name].astype(ml_dtypes.bfloat16)
        assert narrow.astype("float32").tobytes() == received[name].tobytes()
        assert narrow.tobytes() == state[name].tobytes()


def small_lm(optimizer=None, dtype="float32", **config):
    backbone = BwETAFBackbone(
        **{
            "vocabulary_size": 32,
            "num_layers": 1,
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "hidden_dim": 8,
            "intermediate_dim": 12,
            "max_sequence_length": 16,
            "initializer_range": 0.1,
            **config,
        },
        dtype=dtype,
    )
    lm = BwETAFCausalLM(backbone)
    optimizer = optimizer or keras.optimizers.AdamW(1e-2)
    lm.compile(optimizer, loss=loss, weighted_metrics=None)
    return lm


def random_state(lm, dtype="float32"):
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(3, "int32")
        if name == "step"
        else rng.random(array.shape).astype(dtype)
        for name, array in optimizer_state(lm).items()
    }


def assert_same(received, expected):
    assert list(received) == list(expected)
    assert len(received) == len(expected)
    for name, array in expected.items():
        assert name in received
        assert received[name].dtype == array.dtype
        assert received[name].shape == array.shape
        assert received[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_round_trip(dtype):
    stored = "bfloat16" if dtype == "bfloat16" else "float32"
    lm = small_lm(dtype=dtype)
    state = random_state(lm, stored)
    load_optimizer_state(lm, state)
    assert_same(optimizer_state(lm), state)
    other = small_lm(dtype=dtype)
    load_optimizer_state(other, optimizer_state(lm))
    assert_same(optimizer_state(other), state)


def test_each_moment_is_its_weights():
    """Shapes repeat, so a moment could be swapped with another's."""
    lm = small_lm()
    state = random_state(lm)
    load_optimizer_state(lm, state)
    config = converters.config_from_keras(lm.backbone.get_config())
    names = {row.keras: row.name for row in bwetaf_v3.tensors(config)}
    variables = {variable.path: variable for variable in lm.optimizer.variables}
    prefix = lm.optimizer.name
    for path, name in names.items():
        for suffix, moment in (
            ("momentum", "exp_avg"),
            ("velocity", "exp_avg_sq"),
        ):
            variable = variables[f"{prefix}/{path.replace('/', '_')}_{suffix}"]
            np.testing.assert_array_equal(
                variable.value, state[f"{moment}.{name}"]
            )


def test_a_new_optimizer_gives_zeros():
    state = optimizer_state(small_lm())
    assert state["step"] == 0
    for array in state.values():
        assert not array.any()


def test_a_state_kept_as_a_dict_does_not_change():
    lm = small_lm()
    kept = dict(optimizer_state(lm))
    train_step(lm, np.ones((2, 8), "int32"))
    assert kept["step"] == 0
    assert not any(array.any() for array in kept.values())
    assert optimizer_state(lm)["step"] == 1


@pytest.mark.parametrize("kind", ["plain", "loss scale", "accumulation"])
def test_goes_on_as_if_it_had_not_stopped(kind):
    def make():
        arguments = {}
        if kind == "accumulation":
            arguments = {"gradient_accumulation_steps": 2}
        optimizer = keras.optimizers.AdamW(1e-2, **arguments)
        if kind == "loss scale":
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=1024.0
            )
        return small_lm(optimizer)

    rng = np.random.default_rng(0)
    batches = rng.integers(1, 32, (8, 2, 8), "int32")
    lm, other = make(), make()
    for rows in batches[:4]:
        train_step(lm, rows)
    # One more batch, the gradients of which loading must forget.
    train_step(other, batches[0])
    other.set_weights(lm.get_weights())
    load_optimizer_state(other, optimizer_state(lm))
    assert optimizer_state(other)["step"] == (
        2 if kind == "accumulation" else 4
    )
    before = [variable.numpy() for variable in lm.trainable_variables]
    for rows in batches[4:]:
        expected = train_step(lm, rows)
        received = train_step(other, rows)
        for path, weight in expected.items():
            np.testing.assert_array_equal(received[path], weight)
    for variable, start in zip(lm.trainable_variables, before, strict=True):
        assert not np.array_equal(variable.value, start)


def test_a_batch_between_two_steps_is_refused():
    lm = small_lm(keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=3))
    train_step(lm, np.ones((2, 8), "int32"))
    expected = "1 batches since the last step, gradient_accumulation_steps=3"
    with pytest.raises(ValueError, match=expected):
        optimizer_state(lm)


def refuses(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def test_other_models_are_refused():
    lm = small_lm()
    refuses(
        lambda: optimizer_state(lm.backbone),
        "Expected a BwETAFCausalLM",
        "of type BwETAFBackbone",
    )
    lm.compile(optimizer=None)
    refuses(lambda: optimizer_state(lm), "Compile it", "model.optimizer=None")


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        (keras.optimizers.SGD, ("Only the state of Adam", "of type SGD")),
        (keras.optimizers.Nadam, ("Only the state of Adam", "of type Nadam")),
        (
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.Lion()
            ),
            ("Only the state of Adam", "of type Lion"),
        ),
        (
            lambda: keras.optimizers.AdamW(amsgrad=True),
            ("no place in the state", "amsgrad=True"),
        ),
        (
            lambda: keras.optimizers.Adam(use_ema=True),
            ("no place in the state", "use_ema=True"),
        ),
    ],
)
def test_other_optimizers_are_refused(optimizer, parts):
    lm = small_lm(optimizer())
    refuses(lambda: optimizer_state(lm), *parts)
    refuses(lambda: load_optimizer_state(lm, {}), *parts)


def test_frozen_weights_are_refused():
    lm = small_lm()
    lm.backbone.token_embedding.trainable = False
    lm.backbone.transformer_layers[0].attention_norm.trainable = False
    refuses(
        lambda: optimizer_state(lm),
        "all of it must be trainable",
        "- token_embedding/embeddings is frozen",
        "- transformer_layer_0/attention_norm/scale is frozen",
    )
    assert not lm.optimizer.built


def test_lora_is_refused():
    lm = small_lm()
    lm.backbone.enable_lora(2)
    layer = "transformer_layer_0/self_attention/query"
    refuses(
        lambda: optimizer_state(lm),
        "without LoRA",
        f"- {layer}/kernel is frozen",
        f"- {layer}/lora_kernel_a is not in the checkpoint's format",
    )


def test_an_optimizer_of_other_variables_is_refused():
    optimizer = keras.optimizers.AdamW()
    optimizer.build([keras.Variable(np.zeros(3), name="stray")])
    lm = small_lm(optimizer)
    refuses(
        lambda: optimizer_state(lm),
        "built for other variables",
        "an optimizer for 1 variables, a model with 14",
    )


def test_every_problem_of_a_state_is_listed():
    """And nothing has been changed when it is refused."""
    lm = small_lm()
    before = dict(optimizer_state(lm))
    state = random_state(lm)
    scale = "model.layers.0.input_layernorm.weight"
    query = "model.layers.0.self_attn.q_proj.weight"
    del state[f"exp_avg.{scale}"]
    state["exp_avg.lm_head.weight"] = np.zeros(2, "float32")
    state[f"exp_avg.{query}"] = np.zeros((8, 4), "float32")
    state[f"exp_avg_sq.{query}"] = np.zeros((8, 8), "int64")
    state["step"] = np.zeros(1, "int32")
    with pytest.raises(ValueError) as caught:
        load_optimizer_state(lm, state)
    assert str(caught.value) == "\n".join(
        [
            "The optimizer's state: 5 problems:",
            f"- missing entry exp_avg.{scale}",
            "- step must be an int scalar. Received: shape (1,), dtype int32",
            f"- exp_avg.{query} must be floats of shape (8, 8), as the "
            "weight. Received: shape (8, 4), dtype float32",
            f"- exp_avg_sq.{query} must be floats of shape (8, 8), as the "
            "weight. Received: shape (8, 8), dtype int64",
            "- unexpected entry exp_avg.lm_head.weight. Received: shape (2,), "
            "dtype float32",
        ]
    )
    assert_same(optimizer_state(lm), before)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (np.asarray(-1), "step must be from 0 to 2147483647. Received: -1"),
        (np.asarray(2**31), "step must be from 0 to 2147483647. Received: 2"),
        (np.asarray(7.0), "step must be an int scalar. Received: shape ()"),
    ],
)
def test_steps_that_cannot_be_are_refused(step, message):
    lm = small_lm()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_optimizer_state(lm, {**random_state(lm), "step": step})
