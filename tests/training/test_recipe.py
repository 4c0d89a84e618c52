"""The optimizer of the recipe, next to optax's and the original's."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from keras_bwetaf.training import (
    AdamW,
    WarmupDecay,
    load_optimizer_state,
    optimizer_state,
    recipe,
)
from tests import original
from tests.exchange.test_optimizer_state import (
    ADAM,
    assert_same,
    random_state,
    schedule,
    small_lm,
    train_step,
)
from tests.parity import relative_l2

SHAPES = {"kernel": (6, 4), "bias": (4,), "scale": (4,)}


def their_schedule(total_steps, **changes):
    return original.BwETAF.independent.create_lr_schedule(
        **{**schedule(total_steps), **changes}
    )


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("total_steps", [1, 49, 50, 700, 12345])
def test_schedule_is_the_originals(total_steps, decay):
    """With 49 steps, there is no warm-up."""
    ours = recipe("97m", total_steps, decay=decay)._learning_rate
    theirs = their_schedule(total_steps, training_decay=decay)
    for step in {
        0,
        1,
        13,
        14,
        15,
        246,
        247,
        total_steps // 2,
        total_steps - 1,
        total_steps,
        total_steps + 9,
    }:
        expected = theirs(jnp.asarray(step))
        assert relative_l2(ours(step), expected) < 1e-6, step


def their_steps(transform, weights, gradients, dtype="float32"):
    params = {k: jnp.asarray(v, dtype) for k, v in weights.items()}
    state = transform.init(params)
    for gradient in gradients:
        gradient = {k: jnp.asarray(v, dtype) for k, v in gradient.items()}
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def our_steps(optimizer, weights, gradients, dtype="float32"):
    variables = {
        name: keras.Variable(value, name=name, dtype=dtype)
        for name, value in weights.items()
    }
    optimizer.build(list(variables.values()))
    for gradient in gradients:
        optimizer.apply([jnp.asarray(gradient[k], dtype) for k in variables])
    return {name: variable.value for name, variable in variables.items()}


def draw(scale=1.0, num_steps=10):
    rng = np.random.default_rng(0)

    def normal(scale):
        return {
            name: scale * rng.standard_normal(shape)
            for name, shape in SHAPES.items()
        }

    return normal(1.0), [normal(scale) for _ in range(num_steps)]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e3])
def test_ten_steps_are_optax(scale):
    """Small gradients show the epsilon, large ones the clipping."""
    weights, gradients = draw(scale)
    optimizer = recipe("97m", 300, moments_dtype=None)
    transform = optax.chain(
        optax.clip_by_global_norm(7.0),
        optax.adamw(their_schedule(300), **ADAM),
    )
    expected = their_steps(transform, weights, gradients)
    received = our_steps(optimizer, weights, gradients)
    for name, value in expected.items():
        moved = value - weights[name]
        assert relative_l2(received[name] - weights[name], moved) < 1e-4
        assert relative_l2(received[name], value) < 1e-6
    keras_own = keras.optimizers.AdamW(
        optimizer._learning_rate,
        beta_1=0.95,
        beta_2=0.98,
        epsilon=1.5e-8,
        weight_decay=0.1,
        global_clipnorm=7.0,
    )
    other = our_steps(keras_own, weights, gradients)
    differs = relative_l2(other["kernel"], expected["kernel"]) > 1e-6
    assert differs == (scale == 1e-8)


def test_vectors_can_be_left_out_of_weight_decay():
    weights, gradients = draw()
    optimizer = recipe("97m", 300, moments_dtype=None, decay_vectors=False)
    mask = {name: len(shape) > 1 for name, shape in SHAPES.items()}
    transform = optax.chain(
        optax.clip_by_global_norm(7.0),
        optax.adamw(their_schedule(300), **ADAM, mask=mask),
    )
    expected = their_steps(transform, weights, gradients)
    received = our_steps(optimizer, weights, gradients)
    for name, value in expected.items():
        assert relative_l2(received[name], value) < 1e-6


def test_bfloat16_is_rounded_once():
    """Late steps are counted, and weights decay, as they would not in Keras."""
    weights, gradients = draw(num_steps=1)
    weights = {
        k: np.asarray(jnp.asarray(v, "bfloat16"), "float32")
        for k, v in weights.items()
    }

    def step(dtype):
        optimizer = recipe("97m", 1000, moments_dtype=None)
        variables = [
            keras.Variable(v, name=k, dtype=dtype) for k, v in weights.items()
        ]
        optimizer.build(variables)
        optimizer._iterations.assign(500)
        for velocity in optimizer._velocities:
            velocity.assign(velocity + 1.0)
        optimizer.apply(
            [jnp.asarray(g, "bfloat16") for g in gradients[0].values()]
        )
        return [np.asarray(v.value, "float32") for v in variables]

    for narrow, wide in zip(step("bfloat16"), step("float32"), strict=True):
        rounded = np.asarray(jnp.asarray(wide, "bfloat16"), "float32")
        np.testing.assert_array_equal(narrow, rounded)


def test_moments_have_their_own_dtype():
    lm = small_lm(recipe("97m", 100))
    state = random_state(lm)
    load_optimizer_state(lm, state)
    received = optimizer_state(lm)
    assert {v.dtype.name for k, v in received.items() if k != "step"} == {
        "bfloat16"
    }
    expected = {
        name: value if name == "step" else value.astype("bfloat16")
        for name, value in state.items()
    }
    assert_same(dict(received), expected)
    assert all(v.dtype == "float32" for v in lm.trainable_variables)
    before = lm.get_weights()
    train_step(lm, np.ones((2, 8), "int32"))
    assert optimizer_state(lm)["step"] == 4
    assert not np.array_equal(before[0], lm.get_weights()[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_settings_survive_a_config(scaled):
    optimizer = recipe(
        "97m", 700, decay="linear", decay_vectors=False, weight_decay=0.2
    )
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    if scaled:
        optimizer, again = optimizer.inner_optimizer, again.inner_optimizer
    assert type(again) is AdamW
    assert again.get_config() == optimizer.get_config()
    assert again.moments_dtype == "bfloat16"
    assert again._learning_rate.get_config() == (
        optimizer._learning_rate.get_config()
    )
    for step in (0, 7, 14, 300, 700):
        assert again._learning_rate(step) == optimizer._learning_rate(step)


def test_a_schedule_counts_the_optimizers_steps():
    """Also where Keras gathers the gradients of several batches."""
    weights, gradients = draw()
    expected = their_steps(
        optax.chain(
            optax.clip_by_global_norm(7.0),
            optax.adamw(their_schedule(100), **ADAM),
        ),
        weights,
        gradients[:5],
    )
    twice = [gradient for gradient in gradients[:5] for _ in range(2)]
    received = our_steps(
        recipe("97m", 100, moments_dtype=None, gradient_accumulation_steps=2),
        weights,
        twice,
    )
    for name, value in expected.items():
        assert relative_l2(received[name], value) < 1e-6


def test_small():
    rate = recipe("small", 100)._learning_rate
    rates = [float(rate(step)) for step in (0, 5, 10, 100)]
    np.testing.assert_allclose(rates, [0, 1.5e-3, 3e-3, 1e-4], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe("98m", 10), r"recipes for \['97m', .* name='98m'"),
        (lambda: recipe("97m", 10, beta_1=None), "`beta_1` must be a number"),
        (
            lambda: recipe("97m", 10, peak_learning_rate="3e-4"),
            "a number. Received: peak_learning_rate='3e-4' of type str",
        ),
        (lambda: recipe("97m", 0), "greater than `warmup_steps`"),
        (lambda: recipe("97m", 10, warmup=1), "share of the steps"),
        (lambda: recipe("97m", 10, decay="step"), "Received: decay='step'"),
        (lambda: recipe("97m", 10, moments_dtype="int32"), "a float dtype"),
        (lambda: AdamW(amsgrad=True), "`amsgrad` is not supported"),
        (
            lambda: WarmupDecay(
                initial_learning_rate=0.1,
                peak_learning_rate=0.1,
                final_learning_rate=0.1,
                warmup_steps=-1,
                total_steps=1,
            ),
            "warmup_steps=-1",
        ),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_compiles():
    """Nothing but arrays under `jit`."""
    optimizer = recipe("97m", 100)
    variable = keras.Variable(np.ones((2, 3), "float32"))
    optimizer.build([variable])
    trained, _ = jax.jit(optimizer.stateless_apply)(
        [v.value for v in optimizer.variables],
        [jnp.ones((2, 3))],
        [variable.value],
    )
    assert (np.asarray(trained[0]) < 1).all()


def test_a_constant_learning_rate_is_refused():
    with pytest.raises(ValueError, match="Pass `peak_learning_rate`, its"):
        recipe("small", 10, learning_rate=1e-3)
