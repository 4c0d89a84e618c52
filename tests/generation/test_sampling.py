import inspect
import json

import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
import pytest

from keras_bwetaf import BwETAFSampler
from keras_bwetaf.generation.sampling import (
    SamplingSettings,
    draw,
    filter_weights,
    from_keras_hub,
    next_token,
)

pytestmark = pytest.mark.fast

VOCABULARY = 1000


def settings(seeds=(0,), **arguments):
    everything = dict(temperature=1.0, top_k=0, top_p=1.0)
    return SamplingSettings.of(
        BwETAFSampler(**{**everything, **arguments}), seeds
    )


def random_weights(batch_size=8, seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((batch_size, VOCABULARY))
    logits -= logits.max(axis=1, keepdims=True)
    return np.exp(logits).astype("float32")


def sorted_top_p(weights, top_p):
    """The original's filter: sort, sum up, keep ties of the last one kept."""
    kept = []
    for row in weights.astype("float64"):
        descending = np.sort(row)[::-1]
        is_over = np.cumsum(descending) > top_p * row.sum()
        threshold = descending[np.argmax(is_over)] if is_over.any() else 0
        kept.append(np.where(row >= threshold, row, 0))
    return np.array(kept)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.92, 0.999, 1.0])
def test_top_p_keeps_what_sorting_keeps(top_p):
    weights = random_weights()
    kept = filter_weights(weights, settings(top_p=top_p))
    np.testing.assert_array_equal(kept, sorted_top_p(weights, top_p))


@pytest.mark.parametrize("top_k", [1, 2, 50, 999, 1000, 2**31, 1e30])
def test_top_k_keeps_the_k_largest(top_k):
    weights = random_weights()
    kept = np.asarray(filter_weights(weights, settings(top_k=top_k)))
    assert ((kept > 0).sum(axis=1) == min(top_k, VOCABULARY)).all()
    for row, kept_row in zip(weights, kept, strict=True):
        assert row[kept_row > 0].min() >= np.sort(row)[-min(top_k, 1000)]


def test_filters_follow_one_another():
    """top_p counts among what top_k left, min_p is relative to the best."""
    weights = random_weights()
    kept = filter_weights(weights, settings(top_k=20, top_p=0.5, min_p=0.2))
    twenty = np.where(weights >= np.sort(weights)[:, [-20]], weights, 0)
    expected = sorted_top_p(twenty, 0.5)
    expected = np.where(expected >= 0.2, expected, 0)
    np.testing.assert_array_equal(kept, expected)


def test_equal_weights_are_all_kept():
    weights = np.ones((1, 8), "float32")
    assert (filter_weights(weights, settings(top_p=0.5)) == weights).all()


def test_samples_follow_the_probabilities():
    logits = np.log([[0.5, 0.25, 0.15, 0.07, 0.03]]).astype("float32")
    count = 20_000

    def frequencies(**arguments):
        tokens = next_token(
            jnp.tile(logits, (count, 1)),
            jnp.zeros((count, 5), "bool"),
            jnp.zeros(count, "int32"),
            settings(seeds=np.arange(count), **arguments),
        )
        return np.bincount(tokens, minlength=5) / count

    # Four standard deviations of a frequency are below 0.015.
    np.testing.assert_allclose(
        frequencies(), [0.5, 0.25, 0.15, 0.07, 0.03], atol=0.015
    )
    np.testing.assert_allclose(
        frequencies(top_p=0.74), [2 / 3, 1 / 3, 0, 0, 0], atol=0.015
    )
    squared = np.array([0.5, 0.25, 0.15, 0.07, 0.03]) ** 2
    np.testing.assert_allclose(
        frequencies(temperature=0.5), squared / squared.sum(), atol=0.015
    )


def test_a_tiny_temperature_is_greedy():
    logits = jnp.asarray(np.log(random_weights()))
    tokens = next_token(
        logits,
        logits > 1,
        jnp.zeros(8, "int32"),
        settings(seeds=np.arange(8), temperature=1e-37),
    )
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_repetition_penalty():
    logits = jnp.array([[2.0, 1.5, -1.0, -1.5]])
    seen = jnp.array([[True, False, False, True]])
    chosen = next_token(
        logits,
        seen,
        jnp.zeros(1, "int32"),
        settings(temperature=0, repetition_penalty=1.5),
    )
    assert chosen == 1  # 2 / 1.5 < 1.5
    only_seen = jnp.array([[-1.0, -1.4]])
    chosen = next_token(
        only_seen,
        jnp.array([[True, False]]),
        jnp.zeros(1, "int32"),
        settings(temperature=0, repetition_penalty=1.5),
    )
    assert chosen == 1  # -1 * 1.5 < -1.4


def test_randomness_depends_on_seed_and_position_alone():
    logits = jnp.zeros((4, VOCABULARY))
    seen = jnp.zeros((4, VOCABULARY), "bool")
    chosen = next_token(
        logits,
        seen,
        jnp.array([7, 7, 8, 7]),
        settings(seeds=[1, 1, 1, 2]),
    )
    assert chosen[0] == chosen[1]
    assert len(set(chosen.tolist())) == 3
    alone = next_token(
        logits[:1], seen[:1], jnp.array([7]), settings(seeds=[2])
    )
    assert alone[0] == chosen[3]


@pytest.mark.parametrize(
    "setting",
    [
        jax.default_prng_impl("rbg"),
        jax.default_prng_impl("unsafe_rbg"),
        jax.threefry_partitionable(False),
    ],
    ids=["rbg", "unsafe_rbg", "not partitionable"],
)
def test_settings_of_jax_change_no_choice(setting):
    arguments = (
        jnp.zeros((4, VOCABULARY)),
        jnp.zeros((4, VOCABULARY), "bool"),
        jnp.arange(4),
        settings(seeds=[1, 2, 3, 3]),
    )
    expected = next_token(*arguments)
    with setting:
        received = jax.jit(lambda *x: next_token(*x))(*arguments)
    np.testing.assert_array_equal(received, expected)


def test_no_value_is_compiled_in():
    function = jax.jit(next_token)
    weights = random_weights(1)
    for arguments in ({}, {"top_k": 3}, {"temperature": 0}, {"min_p": 0.1}):
        function(
            weights,
            weights > 2,
            np.zeros(1, "int32"),
            settings(**arguments),
        )
    assert function._cache_size() == 1


@pytest.mark.parametrize("kind", [np.float32, np.array, jnp.float32])
def test_numbers_of_numpy_and_jax(kind):
    values = dict(temperature=0.5, top_p=0.25, repetition_penalty=2.0)
    sampler = BwETAFSampler(
        **{name: kind(value) for name, value in values.items()},
        top_k=np.int64(3),
        seed=np.uint32(4),
    )
    values = {**values, "top_k": 3, "min_p": 0.0, "seed": 4}
    assert json.loads(json.dumps(sampler.get_config())) == values


@pytest.mark.parametrize("temperature", [1e39, 1e400, np.inf])
def test_the_highest_temperatures_make_all_tokens_alike(temperature):
    count = 1000
    tokens = next_token(
        jnp.tile(jnp.array([5.0, -5.0]), (count, 1)),
        jnp.zeros((count, 2), "bool"),
        jnp.zeros(count, "int32"),
        settings(seeds=np.arange(count), temperature=temperature),
    )
    assert 0.4 < np.mean(tokens) < 0.6


def test_config_holds_every_argument():
    values = dict(
        temperature=0.5,
        top_k=3,
        top_p=0.7,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=4,
    )
    assert set(values) == set(inspect.signature(BwETAFSampler).parameters)
    sampler = BwETAFSampler(**values)
    assert sampler.get_config() == values
    again = keras_hub.samplers.get(keras_hub.samplers.serialize(sampler))
    assert again.get_config() == values


@pytest.mark.parametrize(
    "sampler, expected",
    [
        ("greedy", {"temperature": 0}),
        (
            keras_hub.samplers.RandomSampler(temperature=0.5, seed=3),
            {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 3},
        ),
        (
            keras_hub.samplers.TopKSampler(k=7, temperature=0.5, seed=3),
            {"temperature": 0.5, "top_k": 7, "top_p": 1.0, "seed": 3},
        ),
        (
            keras_hub.samplers.TopPSampler(p=0.3, k=9, seed=3),
            {"temperature": 1.0, "top_k": 9, "top_p": 0.3, "seed": 3},
        ),
    ],
)
def test_keras_hub_samplers(sampler, expected):
    config = from_keras_hub(keras_hub.samplers.get(sampler)).get_config()
    assert expected.items() <= config.items()


@pytest.mark.parametrize("name", ["beam", "contrastive"])
def test_samplers_that_need_more_than_probabilities(name):
    with pytest.raises(ValueError, match="must choose one token from its"):
        from_keras_hub(keras_hub.samplers.get(name))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -1}, "`temperature` must be at least 0. Rec.*-1"),
        ({"top_k": -1}, "`top_k` must be an int, at least 0"),
        ({"temperature": True}, "`temperature` must be at least 0.*True"),
        ({"top_p": "0.9"}, "`top_p` must be above 0 and at most 1.*'0.9'"),
        ({"seed": -1}, r"`seed` must be an int from 0 to 2\*\*32 - 1.*=-1"),
        ({"seed": 2**32}, "`seed` must be an int from 0 to"),
        ({"seed": 1.0}, "`seed` must be an int from 0 to"),
        ({"seed": [1, 2]}, "`seed` must be an int from 0 to"),
        ({"top_k": 1.5}, "`top_k` must be an int"),
        ({"top_k": float("inf")}, "`top_k` must be an int"),
        ({"top_p": 0}, "`top_p` must be above 0 and at most 1"),
        ({"top_p": 1.1}, "`top_p` must be above 0"),
        ({"top_k": float("nan")}, "`top_k` must be an int"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0"),
        ({"min_p": jnp.float32(2)}, "`min_p` must be between 0 and 1"),
        ({"repetition_penalty": np.inf}, "must be above 0, and a float32.*inf"),
        ({"repetition_penalty": 1e39}, "must be above 0, and a float32"),
        ({"repetition_penalty": 1e-50}, "must be above 0, and a float32"),
        ({"min_p": 2}, "`min_p` must be between 0 and 1"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be above 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BwETAFSampler(**arguments)


def test_tokens_are_drawn_in_proportion_to_weights():
    """Shares of the whole sum, evenly spread, hit each token as often."""
    vocabulary_size, num_draws = 300, 4096
    weights = np.random.default_rng(0).exponential(size=vocabulary_size)
    weights[[0, 7, 127, 128, 250, 299]] = 0
    weights = np.float32(weights)
    shares = np.float32((np.arange(num_draws) + 0.5) / num_draws)
    tokens = draw(np.tile(weights, (num_draws, 1)), shares)
    counts = np.bincount(tokens, minlength=vocabulary_size)
    expected = num_draws * weights / weights.sum()
    assert len(counts) == vocabulary_size
    assert np.abs(counts - expected).max() <= 1
    assert (counts[weights == 0] == 0).all()


@pytest.mark.parametrize("share", [0, 0.5, 1 - 2**-24])
def test_a_token_without_weight_is_never_drawn(share):
    weights = np.zeros((300, 300), "float32")
    np.fill_diagonal(weights, np.geomspace(1e-30, 1, 300))
    tokens = draw(weights, np.full(300, share, "float32"))
    np.testing.assert_array_equal(tokens, np.arange(300))
