"""Cross-entropy of the next token, without ever holding all the logits."""

import functools

import jax
import jax.numpy as jnp

IGNORED = -1  # A target that is not learned, as every negative one.
NUM_CHUNKS = 8


def targets_and_weights(x, y=None, sample_weight=None):
    """What each position is to predict, and how much that counts.

    Without labels, a position predicts the next token of its row, be it the
    first of another document. Predictions of padding, or made at padding, do
    not count.

    Args:
        x: dict of `"token_ids"` and `"padding_mask"`, int arrays
            `(batch, length)`. The mask is 0 for padding.
        y: int array `(batch, length)`, or `None`. The tokens to predict;
            negative ones, such as -1 and -100, are ignored.
        sample_weight: float array `(batch, length)` or `(batch,)`, or `None`.
            How much the prediction made at each position counts.

    Returns:
        Tuple of targets, int32 `(batch, length)`, and their weights, float32
        of the same shape, 0 where there is nothing to predict.

    Raises:
        ValueError: If there is no such input, or shapes differ.
    """
    if not isinstance(x, dict) or not {"token_ids", "padding_mask"} <= set(x):
        received = sorted(x) if isinstance(x, dict) else type(x).__name__
        raise ValueError(
            "Expected a dict with 'token_ids' and 'padding_mask', or a model "
            f"with a preprocessor that makes one. Received: x={received}"
        )
    token_ids = jnp.asarray(x["token_ids"], "int32")
    is_real = jnp.asarray(x["padding_mask"]) > 0
    if y is None:
        targets = _next(token_ids, IGNORED)
        is_real &= _next(is_real, False)
    else:
        targets = jnp.asarray(y, "int32")
        _check_shape("y", targets, token_ids)
    weights = (is_real & (targets >= 0)).astype("float32")
    if sample_weight is not None:
        sample_weight = jnp.asarray(sample_weight, "float32")
        if sample_weight.ndim == 1:
            sample_weight = sample_weight[:, None] * jnp.ones_like(weights)
        _check_shape("sample_weight", sample_weight, token_ids)
        weights *= sample_weight
    return targets, weights


def mean_loss(logits, x, y=None, sample_weight=None):
    """The mean cross-entropy of logits over the tokens that count.

    Args:
        logits: float array `(batch, length, vocabulary_size)`.
        x, y, sample_weight: See `targets_and_weights`.

    Returns:
        float32 scalar, 0 if no token counts.

    Raises:
        ValueError: As `targets_and_weights` does.
    """
    targets, weights = targets_and_weights(x, y, sample_weight)
    total, _, _ = cross_entropy(logits, targets, weights)
    return total / nonzero(jnp.sum(weights))


def nonzero(num_tokens):
    """A divisor: a batch without tokens has a mean of 0, and not 0 / 0."""
    return jnp.where(num_tokens > 0, num_tokens, 1.0)


def _next(x, last):
    """Each row moved to the left by one."""
    return jnp.full_like(x, last).at[:, :-1].set(x[:, 1:])


def _check_shape(name, received, token_ids):
    if received.shape != token_ids.shape:
        raise ValueError(
            f"`{name}` must have the shape of `token_ids`, "
            f"{token_ids.shape}. Received: {name} of shape {received.shape}"
        )


def cross_entropy(logits, targets, weights):
    """Cross-entropy of logits that are there already.

    Args:
        logits: float array `(batch, length, vocabulary_size)`.
        targets: int array `(batch, length)`.
        weights: float array `(batch, length)`.

    Returns:
        As `head_cross_entropy` does.
    """
    losses, is_correct, _ = _token_losses(logits.astype("float32"), targets)
    return jnp.sum(losses * weights), jax.lax.stop_gradient(losses), is_correct


def head_cross_entropy(
    hidden_states, embeddings, targets, weights, num_chunks=NUM_CHUNKS
):
    """The tied head and the cross-entropy of its logits, in one.

    The positions of all rows are worked on in chunks, so that at no time more
    than one chunk's logits exist. Each chunk's gradient is computed along
    with its loss, so nothing is computed twice; without differentiation, none
    is. Products are computed in the dtype of `hidden_states` and summed in
    float32, and so is the logarithm of the softmax.

    Args:
        hidden_states: float array `(batch, length, hidden_dim)`.
        embeddings: float array `(vocabulary_size, hidden_dim)`.
        targets: int array `(batch, length)`. Where a weight is 0, any number.
        weights: float array `(batch, length)`.
        num_chunks: int. In how many parts a row is worked on.

    Returns:
        Tuple of
        - float32 scalar, the sum of the losses times their weights. This is
          what has a gradient, by `hidden_states`, `embeddings`, `weights`.
        - float32 array `(batch, length)`, the loss of every position.
        - bool array `(batch, length)`, whether the target is the token with
          the highest logit.

    Raises:
        ValueError: If `num_chunks` is not positive.

    Example:

    ```python
    targets, weights = targets_and_weights(x)
    total, _, _ = head_cross_entropy(hidden, embeddings, targets, weights)
    loss = total / weights.sum()
    ```
    """
    if num_chunks < 1:
        raise ValueError(
            f"`num_chunks` must be at least 1. Received: {num_chunks}"
        )
    total, losses, is_correct = _head_cross_entropy(
        hidden_states, embeddings, targets, weights, num_chunks
    )
    return total, jax.lax.stop_gradient(losses), is_correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_cross_entropy(
    hidden_states, embeddings, targets, weights, num_chunks
):
    table = embeddings.astype(hidden_states.dtype)

    def step(carry, chunk):
        hidden_states, targets = chunk
        losses, is_correct, _ = _token_losses(
            _logits(hidden_states, table), targets
        )
        return carry, (losses, is_correct)

    _, outputs = jax.lax.scan(
        step, None, _split((hidden_states, targets), num_chunks)
    )
    losses, is_correct = _join(outputs, targets.shape[1])
    return jnp.sum(losses * weights), losses, is_correct


def _with_gradient(hidden_states, embeddings, targets, weights, num_chunks):
    """The outputs, and the gradients of the first of them."""
    # b = batch, t = positions of a chunk, v = vocabulary, d = hidden
    table = embeddings.astype(hidden_states.dtype)

    def step(table_gradient, chunk):
        hidden_states, targets, weights = chunk
        logits = _logits(hidden_states, table)  # (b, t, v)
        losses, is_correct, log_normalizer = _token_losses(logits, targets)
        probabilities = jnp.exp(logits - log_normalizer[..., None])
        # A comparison inside one fused loop; a one-hot array is never made.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        gradient = jnp.where(is_target, probabilities - 1, probabilities)
        gradient *= weights[..., None]
        gradient = gradient.astype(hidden_states.dtype)  # (b, t, v)
        hidden_gradient = jnp.einsum("btv,vd->btd", gradient, table)
        # (v, d), summed over all chunks
        table_gradient += jnp.einsum(
            "btv,btd->vd",
            gradient,
            hidden_states,
            preferred_element_type="float32",
        )
        return table_gradient, (losses, is_correct, hidden_gradient)

    table_gradient, outputs = jax.lax.scan(
        step,
        jnp.zeros(embeddings.shape, "float32"),
        _split((hidden_states, targets, weights), num_chunks),
    )
    losses, is_correct, hidden_gradient = _join(outputs, targets.shape[1])
    outputs = jnp.sum(losses * weights), losses, is_correct
    table_gradient = table_gradient.astype(embeddings.dtype)
    return outputs, (hidden_gradient, table_gradient, losses)


def _times_cotangent(num_chunks, gradients, cotangents):
    hidden_gradient, table_gradient, weight_gradient = (
        (gradient * cotangents[0]).astype(gradient.dtype)
        for gradient in gradients
    )
    return hidden_gradient, table_gradient, None, weight_gradient


_head_cross_entropy.defvjp(_with_gradient, _times_cotangent)


def _logits(hidden_states, table):
    """Float32 logits, `(batch, length, vocabulary_size)`."""
    return jnp.einsum(
        "btd,vd->btv", hidden_states, table, preferred_element_type="float32"
    )


def _token_losses(logits, targets):
    """Losses, whether targets have the highest logit, and normalizers.

    Args:
        logits: float32 array `(batch, length, vocabulary_size)`.
        targets: int array `(batch, length)`. Negative ones read some logit.

    Returns:
        Tuple of three arrays `(batch, length)`.
    """
    highest = jnp.max(logits, axis=-1)  # (batch, length)
    sums = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    log_normalizer = highest + jnp.log(sums)
    target_logits = jnp.take_along_axis(
        logits, jnp.maximum(targets, 0)[..., None], axis=-1
    )[..., 0]
    return (
        log_normalizer - target_logits,
        target_logits >= highest,
        log_normalizer,
    )


def _split(arrays, num_chunks):
    """`(batch, length, ...)` to `(chunks, batch, length of one, ...)`.

    Rows stay together, so that what is sharded by row stays where it is. The
    last chunk is filled up with zeros, which weigh nothing.
    """
    length = arrays[0].shape[1]
    chunk_length = -(-length // num_chunks)
    num_chunks = -(-length // chunk_length)

    def split(x):
        missing = num_chunks * chunk_length - length
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], num_chunks, chunk_length, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    return tuple(split(x) for x in arrays)


def _join(arrays, length):
    """The way back from `_split`."""

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return tuple(join(x) for x in arrays)
