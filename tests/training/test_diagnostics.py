"""Diagnostics next to direct computations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_bwetaf.training import (
    gradient_statistics,
    parameter_statistics,
    rank_rows,
)
from keras_bwetaf.training.diagnostics import QUANTITIES
from tests.models.test_fit import make_lm, packed, rows, uneven

THRESHOLDS = dict(vanishing=1e-4, exploding=0.01)


@functools.cache
def model(dropout=0.0):
    return make_lm(dropout=dropout)


def token_losses(logits, x):
    """Losses of all positions but the last, 0 where nothing is predicted."""
    losses = -jax.nn.log_softmax(logits[:, :-1])
    targets = x["token_ids"][:, 1:, None]
    losses = jnp.take_along_axis(losses, targets, axis=-1)[..., 0]
    is_real = (x["padding_mask"] > 0)[:, 1:] & (x["padding_mask"] > 0)[:, :-1]
    return losses * is_real, is_real


def check(statistics, tensors, vanishing, exploding):
    """Compares records with NumPy's, the one of all tensors first."""
    tensors = [np.asarray(x, "float64").reshape(-1) for x in tensors]
    tensors = [np.concatenate(tensors), *tensors]
    assert len(statistics) == len(tensors)
    for record, x in zip(statistics, tensors, strict=True):
        expected = {
            "norm": np.linalg.norm(x),
            "mean": x.mean(),
            "std": x.std(),
            "max_abs": abs(x).max(),
            "vanishing": (abs(x) < vanishing).mean(),
            "exploding": (abs(x) > exploding).mean(),
        }
        assert record["size"] == x.size
        for name in QUANTITIES:
            tolerance = 1e-4 * max(abs(expected[name]), expected["std"])
            assert abs(record[name] - expected[name]) <= tolerance, (
                record["name"],
                name,
            )


def test_gradients():
    lm, x = model(), uneven()
    trainable = [v.value for v in lm.trainable_variables]
    non_trainable = [v.value for v in lm.non_trainable_variables]

    @jax.jit
    @jax.grad
    def gradient(trainable):
        logits, _ = lm.stateless_call(trainable, non_trainable, x)
        losses, is_real = token_losses(logits, x)
        return losses.sum() / is_real.sum()

    before = lm.get_weights()
    statistics = gradient_statistics(lm, x, **THRESHOLDS)
    for ours, theirs in zip(before, lm.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    check(statistics, gradient(trainable), **THRESHOLDS)
    assert 0 < statistics[0]["vanishing"] < statistics[0]["exploding"] < 1
    paths = [v.path for v in lm.trainable_variables]
    assert [each["name"] for each in statistics] == ["all", *paths]


def test_parameters():
    lm = model()
    statistics = parameter_statistics(lm, **THRESHOLDS)
    check(statistics, lm.get_weights(), **THRESHOLDS)
    title, head, *table = str(statistics).splitlines()
    assert title == "Weights"
    assert head.split() == ["name", "size", *QUANTITIES]
    assert len(table) == len(lm.weights) + 1
    assert len({len(line) for line in [head, *table]}) == 1
    assert table[0].split()[:2] == ["all", str(lm.count_params())]


def test_what_is_no_number_explodes():
    lm = make_lm()
    bias = next(v for v in lm.weights if v.path.endswith("output/bias"))
    bias.assign([np.nan, np.inf] + [0.0] * 30)
    by_name = {each["name"]: each for each in parameter_statistics(lm)}
    assert by_name[bias.path]["exploding"] == 2 / 32
    assert np.isnan(by_name["all"]["norm"])


@pytest.mark.parametrize(
    "function", [gradient_statistics, parameter_statistics]
)
def test_thresholds_in_the_wrong_order(function):
    arguments = (model(), uneven())[: 2 - (function is parameter_statistics)]
    with pytest.raises(ValueError, match="vanishing=2, exploding=1"):
        function(*arguments, vanishing=2, exploding=1)


def direct_row_losses(lm, x):
    losses, is_real = jax.jit(lambda x: token_losses(lm(x), x))(x)
    with np.errstate(invalid="ignore"):
        return np.asarray(losses.sum(axis=1)) / np.asarray(is_real.sum(axis=1))


def test_ranks():
    """Rows are compared by the mean of their tokens; without one, left out."""
    lm, x = model(dropout=0.5), uneven(8)
    x["padding_mask"][4] = 0
    x["padding_mask"][6, 1:] = 0
    expected = direct_row_losses(lm, x)
    assert np.isnan(expected[[4, 6]]).all()
    indices, losses = rank_rows(lm, x, batch_size=3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert set(indices) == set(range(8)) - {4, 6}
    assert (np.diff(losses[indices]) >= 0).all()
    assert not (np.diff(indices) > 0).all()

    batches = [
        {name: array[start : start + 4] for name, array in x.items()}
        for start in (0, 4)
    ]
    others = rank_rows(lm, batches)
    np.testing.assert_array_equal(others[0], indices)
    np.testing.assert_allclose(others[1], losses, rtol=1e-5)


def test_ranks_of_plain_rows():
    """Token ids alone are rows of one document, without padding."""
    lm, token_ids = model(dropout=0.5), rows(4)
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    assert (packed(token_ids)["padding_mask"] > 1).any()
    indices, losses = rank_rows(lm, token_ids)
    np.testing.assert_allclose(losses, direct_row_losses(lm, x), rtol=1e-5)
    np.testing.assert_array_equal(indices, np.argsort(losses))


def test_nothing_to_rank():
    with pytest.raises(ValueError, match="at least one row. Received: none"):
        rank_rows(model(), [])
    with pytest.raises(ValueError, match="Received: batch_size=0"):
        rank_rows(model(), uneven(), batch_size=0)
