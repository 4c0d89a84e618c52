"""From logits to the next token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from keras_bwetaf.checks import checked_number, checked_seed

# Whatever generator JAX's settings name: the others draw other numbers for a
# row in a batch than for the same row alone.
GENERATOR = "threefry2x32"
SMALLEST = float(np.finfo("float32").tiny)
LARGEST = float(np.finfo("float32").max)
BELOW_ONE = 1 - float(np.finfo("float32").eps)
# The square root of a vocabulary of 16,384.
DRAWN_BLOCK = 128


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFSampler(keras_hub.samplers.Sampler):
    """Samples with temperature and any of the usual filters together.

    In this order: tokens that occurred before are made less likely by
    `repetition_penalty`, logits are divided by `temperature`, then `top_k`,
    `top_p` and `min_p` each drop unlikely tokens. The defaults are those of
    the model's card. All of it can be changed in a call to `generate`
    without compiling anything anew.

    Randomness depends on the seed and on the position of the token alone, so
    a prompt continues in the same way alone, in a batch, padded or streamed.

    Args:
        temperature: float. 0 always takes the likeliest token.
        top_k: int. Keep this many likeliest tokens. 0 keeps all.
        top_p: float. Keep the likeliest tokens whose probabilities sum to
            `top_p`, the one that crosses it included. 1 keeps all.
        min_p: float. Keep tokens at least this probable, relative to the
            likeliest. 0 keeps all.
        repetition_penalty: float. Positive logits of tokens in the prompt or
            generated before are divided by it, negative ones multiplied. 1
            changes nothing.
        seed: int or `None`. `None` draws a new one for every prompt of every
            call, from NumPy's global state (`keras.utils.set_random_seed`).

    Raises:
        ValueError: If a value is out of range.

    Example:

    ```python
    lm.compile(sampler=BwETAFSampler(temperature=0.7, top_k=50))
    lm.generate("In the beginning", max_new_tokens=32)
    lm.generate("In the beginning", max_new_tokens=32, temperature=0)
    ```

    Reference:
     - [Holtzman et al., 2019](https://arxiv.org/abs/1904.09751) (top-p)
     - [Nguyen et al., 2024](https://arxiv.org/abs/2407.01082) (min-p)
     - [Keskar et al., 2019](https://arxiv.org/abs/1909.05858) (penalty)
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.92,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ):
        temperature = checked_number(
            "temperature", temperature, lambda x: x >= 0, "at least 0"
        )
        super().__init__(temperature=temperature)
        self.top_k = checked_number(
            "top_k",
            top_k,
            lambda x: x >= 0 and x.is_integer(),
            "an int, at least 0",
        )
        self.top_p = checked_number(
            "top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1"
        )
        self.min_p = checked_number(
            "min_p", min_p, lambda x: 0 <= x <= 1, "between 0 and 1"
        )
        self.repetition_penalty = checked_number(
            "repetition_penalty",
            repetition_penalty,
            lambda x: SMALLEST <= x <= LARGEST,
            "above 0, and a float32",
        )
        self.seed = None if seed is None else checked_seed(seed)

    def get_config(self):
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }


def from_keras_hub(sampler):
    """The `BwETAFSampler` that does what a KerasHub sampler does.

    Args:
        sampler: `keras_hub.samplers.Sampler`.

    Returns:
        `BwETAFSampler`, or `sampler` itself if it is a class of the user's,
        whose `get_next_token` is then called.

    Raises:
        ValueError: If the sampler needs more than the next token's
            probabilities.
    """
    samplers = keras_hub.samplers
    kind = type(sampler)
    if kind is samplers.GreedySampler:
        return BwETAFSampler(temperature=0)
    everything = {"top_k": 0, "top_p": 1.0}
    if kind is samplers.RandomSampler:
        filters = everything
    elif kind is samplers.TopKSampler:
        filters = {**everything, "top_k": sampler.k}
    elif kind is samplers.TopPSampler:
        filters = {"top_k": sampler.k or 0, "top_p": sampler.p}
    elif isinstance(
        sampler,
        (
            samplers.BeamSampler,
            samplers.ContrastiveSampler,
            samplers.SpeculativeSampler,
        ),
    ) or not isinstance(sampler, samplers.Sampler):
        raise ValueError(
            "`sampler` must choose one token from its probabilities: a "
            "`keras_bwetaf.BwETAFSampler`, one of 'greedy', 'random', "
            "'top_k' and 'top_p', or a subclass of "
            "`keras_hub.samplers.Sampler` that implements "
            f"`get_next_token`. Received: sampler={sampler}"
        )
    else:
        return sampler
    return BwETAFSampler(
        temperature=sampler.temperature, seed=sampler.seed, **filters
    )


class SamplingSettings(NamedTuple):
    """What `next_token` needs, as arrays, so that no value is compiled in."""

    temperature: np.ndarray  # float32 ()
    top_k: np.ndarray  # int32 ()
    top_p: np.ndarray  # float32 ()
    min_p: np.ndarray  # float32 ()
    repetition_penalty: np.ndarray  # float32 ()
    seeds: np.ndarray  # uint32 (batch,)

    @classmethod
    def of(cls, sampler, seeds):
        return cls(
            temperature=np.float32(min(sampler.temperature, LARGEST)),
            # More than any vocabulary has is all of it.
            top_k=np.int32(min(sampler.top_k, np.iinfo("int32").max)),
            top_p=np.float32(sampler.top_p),
            min_p=np.float32(sampler.min_p),
            repetition_penalty=np.float32(sampler.repetition_penalty),
            seeds=np.asarray(seeds, "uint32"),
        )


def next_token(logits, seen, positions, settings):
    """Chooses the next token of every row.

    Args:
        logits: float array `(batch, vocabulary)`.
        seen: bool array `(batch, vocabulary)`. Tokens that occurred before.
        positions: int array `(batch,)`. Where in its row the token will be.
        settings: `SamplingSettings`.

    Returns:
        int32 array `(batch,)`.
    """
    logits = logits.astype("float32")
    penalty = settings.repetition_penalty
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalized, logits)

    def greedy():
        return jnp.argmax(logits, axis=-1)

    def sample():
        below_best = logits - jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(below_best / settings.temperature)
        kept = filter_weights(weights, settings)
        return draw(kept, uniform(settings.seeds, positions))

    token = jax.lax.cond(settings.temperature > 0, sample, greedy)
    return token.astype("int32")


def uniform(seeds, positions):
    """A random number for each row.

    Args:
        seeds: uint32 array `(batch,)`.
        positions: int array `(batch,)`.

    Returns:
        float32 array `(batch,)`, from 0 to 1, without 1.
    """

    def of_row(seed, position):
        key = jax.random.key(seed, impl=GENERATOR)
        return jax.random.uniform(jax.random.fold_in(key, position))

    with jax.threefry_partitionable(True):
        return jax.vmap(of_row)(seeds, positions)


def draw(weights, shares):
    """Draws a token of each row, with a probability in proportion to weights.

    The token is the one at which the sum of the weights up to it exceeds a
    share of the whole sum. Sums over the vocabulary cost most, so the block
    of the token is found by the sums of blocks, and then the token in it.

    Args:
        weights: float32 array `(batch, vocabulary)`.
        shares: float32 array `(batch,)`, from 0 to 1.

    Returns:
        int32 array `(batch,)`.
    """
    batch_size, vocabulary_size = weights.shape
    padding = -vocabulary_size % DRAWN_BLOCK
    blocks = jnp.pad(weights, ((0, 0), (0, padding)))
    blocks = jnp.reshape(blocks, (batch_size, -1, DRAWN_BLOCK))
    rows = jnp.arange(batch_size)

    def find(weights, wanted):
        """The first index at which sums exceed `wanted`, and what is left."""
        sums = jnp.cumsum(weights, axis=-1)  # (batch, n)
        # Rounding must not lead beyond the last weight.
        wanted = jnp.minimum(wanted, sums[:, -1] * BELOW_ONE)
        index = jnp.argmax(sums > wanted[:, None], axis=-1)
        before = jnp.where(index > 0, sums[rows, index - 1], 0)
        return index, wanted - before

    sums = jnp.sum(blocks, axis=-1)  # (batch, n)
    block, rest = find(sums, shares * jnp.sum(sums, axis=-1))
    index, _ = find(blocks[rows, block], rest)
    return (block * DRAWN_BLOCK + index).astype("int32")


def filter_weights(weights, settings):
    """Sets the weights of unlikely tokens to zero.

    Args:
        weights: float32 array `(batch, vocabulary)`, proportional to the
            probabilities, with a maximum of 1 in each row.
        settings: `SamplingSettings`.

    Returns:
        float32 array `(batch, vocabulary)`.
    """

    def keep_top_k(weights):
        return _keep_largest(
            weights, lambda kept: jnp.sum(kept > 0, -1) >= settings.top_k
        )

    def keep_top_p(weights):
        wanted = settings.top_p * jnp.sum(weights, axis=-1)
        return _keep_largest(
            weights, lambda kept: jnp.sum(kept, axis=-1) > wanted
        )

    weights = jax.lax.cond(
        settings.top_k > 0, keep_top_k, lambda weights: weights, weights
    )
    weights = jax.lax.cond(
        settings.top_p < 1, keep_top_p, lambda weights: weights, weights
    )
    return jnp.where(weights >= settings.min_p, weights, 0)


def _keep_largest(weights, is_enough):
    """Keeps the fewest largest weights of each row that are enough.

    Sorting the vocabulary costs several times what sampling does, so the
    smallest weight to keep is found by bisection. The bits of positive
    floats are in the order of their values: 30 halvings are exact.
    """

    def keep(threshold):
        threshold = jax.lax.bitcast_convert_type(threshold, "float32")
        return jnp.where(weights >= threshold[:, None], weights, 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = is_enough(keep(middle))
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bits_above_one = np.float32(1).view("int32") + 1
    low = jnp.zeros(weights.shape[:1], "int32")
    low, _ = jax.lax.fori_loop(
        0, 30, halve, (low, jnp.full_like(low, bits_above_one))
    )
    return keep(low)
