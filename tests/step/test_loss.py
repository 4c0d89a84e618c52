"""Head and cross-entropy in one, next to the plain formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keras_bwetaf.step.loss import (
    cross_entropy,
    head_cross_entropy,
    targets_and_weights,
)
from tests.parity import relative_l2

pytestmark = pytest.mark.fast

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 21, 8, 50


def draw(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, LENGTH, WIDTH))
    table = rng.standard_normal((VOCABULARY, WIDTH))
    targets = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
    weights = rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) > 0.3)
    targets[weights == 0] = -1
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(table, dtype),
        jnp.asarray(targets, "int32"),
        jnp.asarray(weights, "float32"),
    )


def plain(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table).astype("float32")
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(targets, 0)
    )
    return jnp.sum(losses * weights) / jnp.sum(weights)


def fused(hidden, table, targets, weights, num_chunks=8):
    total, _, _ = head_cross_entropy(
        hidden, table, targets, weights, num_chunks
    )
    return total / jnp.sum(weights)


@pytest.mark.parametrize("num_chunks", [1, 2, 8, 21, 100])
def test_gradients_are_those_of_the_plain_loss(num_chunks):
    """21 positions in 8 chunks leave the last one short."""
    arguments = draw()
    expected = jax.value_and_grad(plain, argnums=(0, 1, 3))(*arguments)
    received = jax.jit(
        jax.value_and_grad(fused, argnums=(0, 1, 3)), static_argnums=4
    )(*arguments, num_chunks)
    assert relative_l2(received[0], expected[0]) < 1e-6
    for ours, theirs in zip(received[1], expected[1], strict=True):
        assert relative_l2(ours, theirs) < 1e-6


def test_gradients_through_a_tied_table():
    """The table is the embedding that made the hidden states, too."""
    _, table, targets, weights = draw()
    inputs = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH))

    def tied(loss):
        return jax.grad(
            lambda table: loss(jnp.sin(table[inputs]), table, targets, weights)
        )(table)

    assert relative_l2(tied(fused), tied(plain)) < 1e-6


def test_every_token():
    hidden, table, targets, weights = draw()
    logits = np.asarray(hidden) @ np.asarray(table).T
    targets = targets.at[:, ::2].set(logits[:, ::2].argmax(-1))
    total, losses, is_correct = head_cross_entropy(
        hidden, table, targets, weights
    )
    others = cross_entropy(jnp.asarray(logits), targets, weights)
    expected = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(targets, 0)
    )
    best = logits.argmax(-1) == np.maximum(targets, 0)
    assert best.any() and not best.all()
    for received in ((total, losses, is_correct), others):
        assert relative_l2(received[0], (expected * weights).sum()) < 1e-6
        assert relative_l2(received[1], expected) < 1e-6
        np.testing.assert_array_equal(received[2], best)


def test_logits_are_summed_and_normalized_in_float32():
    """In bfloat16, the loss is as exact as its inputs."""
    arguments = draw("bfloat16")
    wide = [jnp.asarray(x, "float32") for x in arguments[:2]]
    exact, gradients = jax.value_and_grad(plain, argnums=(0, 1))(
        *wide, *arguments[2:]
    )
    received, ours = jax.value_and_grad(fused, argnums=(0, 1))(*arguments)
    assert received.dtype == "float32"
    assert abs(received - exact) < 1e-6 * exact
    for gradient, expected in zip(ours, gradients, strict=True):
        assert gradient.dtype == "bfloat16"
        assert relative_l2(gradient, expected) < 1e-2


def test_targets_of_a_packed_row():
    """Two documents, the second one's first token included, and padding."""
    x = {
        "token_ids": np.array([[5, 0, 7, 8, 0, 9, 9], [0, 4, 5, 6, 7, 8, 9]]),
        "padding_mask": np.array(
            [[1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 1]]
        ),
    }
    targets, weights = targets_and_weights(x)
    np.testing.assert_array_equal(targets[0, :4], [0, 7, 8, 0])
    np.testing.assert_array_equal(weights[0], [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(targets[1], [4, 5, 6, 7, 8, 9, -1])
    np.testing.assert_array_equal(weights[1], [0, 1, 1, 1, 1, 1, 0])


def test_labels_and_weights():
    x = {
        "token_ids": np.ones((2, 4), "int32"),
        "padding_mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    y = np.array([[2, -1, 4, 5], [2, 3, -100, 5]])
    targets, weights = targets_and_weights(x, y, np.array([0.5, 2.0]))
    np.testing.assert_array_equal(targets, y)
    np.testing.assert_array_equal(weights, [[0.5, 0, 0.5, 0], [2, 2, 0, 2]])
    _, weights = targets_and_weights(x, y, np.full((2, 4), 3.0))
    np.testing.assert_array_equal(weights, [[3, 0, 3, 0], [3, 3, 0, 3]])


def test_wrong_inputs_are_refused():
    ids = np.ones((2, 4), "int32")
    x = {"token_ids": ids, "padding_mask": ids}
    with pytest.raises(ValueError, match="dict with 'token_ids'"):
        targets_and_weights(ids)
    with pytest.raises(ValueError, match=r"Received: x=\['token_ids'\]"):
        targets_and_weights({"token_ids": ids})
    with pytest.raises(ValueError, match="Received: y of shape"):
        targets_and_weights(x, ids[:, 1:])
    with pytest.raises(ValueError, match="Received: sample_weight of shape"):
        targets_and_weights(x, ids, np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least 1. Received: 0"):
        head_cross_entropy(*draw(), num_chunks=0)
