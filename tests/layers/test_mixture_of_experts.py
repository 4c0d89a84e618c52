"""Experts by grouped products, beside a plain computation of all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_bwetaf.layers import MixtureOfExperts
from keras_bwetaf.layers.grouped_product import grouped_product
from tests.parity import relative_l2

LENGTH = 40
WIDTH = 32


def layer(num_experts=8, num_chosen=2, **changes):
    """With random weights; biases, too."""
    result = MixtureOfExperts(
        num_experts=num_experts,
        num_experts_per_token=num_chosen,
        intermediate_dim=24,
        initializer_range=0.2,
        loss_weights=(0.3, 0.7),
        **changes,
    )
    result.build((2, LENGTH, WIDTH))
    rng = np.random.default_rng(0)
    for weight in result.weights:
        weight.assign(0.2 * rng.standard_normal(weight.shape))
    return result


def inputs(batch_size=2, length=LENGTH, width=WIDTH):
    rng = np.random.default_rng(1)
    shape = (batch_size, length, width)
    return jnp.asarray(rng.standard_normal(shape), "float32")


def by_all_experts(layer, weights, x):
    """Output and losses: every expert on every token, masked."""
    num_experts, chosen = layer.num_experts, layer.num_experts_per_token
    (gate, gate_bias, inner, inner_bias, output, output_bias), router = (
        weights[:6],
        weights[6:],
    )
    probabilities = jnp.ones((*x.shape[:-1], 1))
    is_chosen, penalty = probabilities, 0.0
    if router:
        logits = x @ router[0].T
        logits = logits - jnp.mean(logits, axis=-1, keepdims=True)
        logits = logits / (jnp.std(logits, axis=-1, keepdims=True) + 1e-3)
        probabilities = jax.nn.softmax(logits)
        threshold = jnp.sort(probabilities, axis=-1)[..., -chosen, None]
        is_chosen = jnp.where(probabilities >= threshold, 1.0, 0.0)
        share = jnp.mean(is_chosen, axis=(0, 1)) / chosen
        mean = jnp.mean(probabilities, axis=(0, 1))
        left = 1 - jnp.sum(probabilities * is_chosen, axis=-1)
        penalty = 0.3 * num_experts * jnp.sum(share * mean)
        penalty += 0.7 * jnp.mean(left**2)
    hidden = jax.nn.silu(
        jnp.einsum("bti,eio->beto", x, gate) + gate_bias[:, None]
    )
    hidden *= jnp.einsum("bti,eio->beto", x, inner) + inner_bias[:, None]
    outputs = jnp.zeros_like(x)
    for e in range(num_experts):
        weight = (probabilities * is_chosen)[..., e, None]
        outputs += weight * (hidden[:, e] @ output[e] + output_bias[e])
    return outputs, penalty


def by_layer(layer, weights, x):
    outputs, _, losses = layer.stateless_call(
        weights, [], x, training=True, return_losses=True
    )
    return outputs, sum(losses, jnp.zeros(()))


def values(layer):
    return [weight.value for weight in layer.trainable_variables]


@pytest.mark.fast
@pytest.mark.parametrize(
    "num_experts, chosen", [(8, 2), (6, 3), (4, 4), (1, 1)]
)
def test_gradients_are_those_of_all_experts(num_experts, chosen):
    """Of inputs and all weights, with both auxiliary losses."""
    mixture, x = layer(num_experts, chosen), inputs()
    target = inputs()[:, ::-1]

    def gradients(function):
        def loss(weights, x):
            outputs, penalty = function(mixture, weights, x)
            return jnp.sum(outputs * target) + 100 * penalty, outputs

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(values(mixture), x)

    expected, received = map(gradients, (by_all_experts, by_layer))
    assert len(jax.tree.leaves(received)) == len(mixture.weights) + 2
    for ours, theirs in zip(
        jax.tree.leaves(received), jax.tree.leaves(expected), strict=True
    ):
        assert relative_l2(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 300, 1, 0], [0, 0, 0, 0, 5], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
)
def test_grouped_product(sizes, monkeypatch):
    """Any groups, on CPU and as on other devices; rows of none give zeros."""
    rng = np.random.default_rng(0)
    num_rows = sum(sizes) + 4
    rows = rng.standard_normal((num_rows, 7)).astype("float32")
    kernels = rng.standard_normal((5, 7, 3)).astype("float32")
    factors = rng.standard_normal((num_rows, 3)).astype("float32")
    groups = np.repeat(np.arange(5), sizes)

    def loss(rows, kernels):
        return jnp.sum(
            grouped_product(rows, kernels, jnp.asarray(sizes)) * factors
        )

    def plain(rows, kernels):
        products = jnp.einsum("ri,rio->ro", rows[:-4], kernels[groups])
        return jnp.sum(products * factors[:-4])

    def on_others(*arguments, cpu, default):
        return default(*arguments)

    expected = jax.value_and_grad(plain, (0, 1))(rows, kernels)
    for function in (jax.lax.platform_dependent, on_others):
        monkeypatch.setattr(jax.lax, "platform_dependent", function)
        received = jax.value_and_grad(loss, (0, 1))(rows, kernels)
        for ours, theirs in zip(
            jax.tree.leaves(received), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def element_counts(text):
    """The sizes of all arrays of a program."""
    arrays = re.findall(r"\w\d+\[([\d,]+)\]|tensor<([\dx]+)x\w+>", text)
    return [
        int(np.prod([int(x) for x in re.split("[,x]", a or b)]))
        for a, b in arrays
    ]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("length", [512, 1])
def test_no_array_is_as_large_as_all_experts_of_all_tokens(platform, length):
    """Nor of the pairs of tokens and experts, of training and of decoding."""
    mixture = MixtureOfExperts(
        num_experts=8,
        num_experts_per_token=2,
        intermediate_dim=256,
        initializer_range=0.02,
    )
    mixture.build((2, length, 8))

    def loss(weights, x):
        return jnp.sum(by_layer(mixture, weights, x)[0])

    function = jax.grad(loss) if length > 1 else loss
    x = inputs(32 if length == 1 else 2, length, 8)
    lowered = jax.jit(function).trace(values(mixture), x)
    lowered = lowered.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    if platform == "cpu":
        text += lowered.compile().as_text()
    num_tokens = x.shape[0] * x.shape[1]
    largest = max(element_counts(text))
    assert num_tokens * 256 <= largest < num_tokens * 8 * 256


def test_equal_probabilities_have_gradients():
    """Where all logits are equal, the deviation is 0."""
    mixture = layer()
    mixture.router.assign(np.zeros(mixture.router.shape))
    gradients = jax.grad(lambda w: by_layer(mixture, w, inputs())[1])(
        values(mixture)
    )
    assert all(np.isfinite(each).all() for each in gradients)


def test_config():
    mixture = layer(dispatch="original_token", router_noise_steps=5)
    again = MixtureOfExperts.from_config(mixture.get_config())
    assert again.get_config() == mixture.get_config()
    with pytest.raises(ValueError, match="`dispatch` must be one of"):
        layer(dispatch="all")
