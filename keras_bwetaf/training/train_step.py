"""The steps of `fit` and `evaluate` with head and loss in one.

Keras's own train step holds the logits of the whole batch, and weighs the
means of batches by rows. These compute the same from hidden states, chunk by
chunk, and weigh by tokens. The rest of the trainer is Keras's.
"""

import jax
import jax.numpy as jnp
import keras

from keras_bwetaf.training.loss import (
    cross_entropy,
    head_cross_entropy,
    targets_and_weights,
)


def check_optimizer(model):
    """Checks that the optimizer is one for what is trainable now.

    Args:
        model: `BwETAFCausalLM`, compiled.

    Raises:
        ValueError: If weights were frozen, unfrozen, added or removed since
            its optimizer was built.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if optimizer is None or not optimizer.built:
        return
    built_for = optimizer._trainable_variables
    if [*map(id, built_for)] != [*map(id, model.trainable_variables)]:
        raise ValueError(
            "Weights were frozen, unfrozen, added or removed after the "
            "optimizer had been built. Compile the model with a new "
            f"optimizer. Received: an optimizer for {len(built_for)} "
            "variables, a model in which "
            f"{len(model.trainable_variables)} are trainable"
        )


def train_step(model, state, data):
    """One step of the optimizer.

    With `model.gradient_accumulation_steps`, the rows of the batch are worked
    on in as many parts, one after the other. Their gradients add up to that
    of the mean over all tokens, however these are spread over the parts.

    Args:
        model: `BwETAFCausalLM`, compiled with its own loss.
        state: Tuple of lists of arrays: trainable, non-trainable, optimizer's
            and metrics' variables.
        data: dict as the model's inputs, or tuple of such a dict, labels and
            sample weights. See `targets_and_weights`.

    Returns:
        Tuple of logs, a dict of name to float, and the new state.
    """
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    batch = _token_batch(data)
    num_tokens = jnp.sum(batch["weights"])

    def loss_fn(trainable, non_trainable, batch):
        sums, non_trainable = _sums(
            model, trainable, non_trainable, batch, training=True
        )
        loss = sums["loss"] / _at_least_one(num_tokens)
        mapping = zip(
            model.optimizer.variables, optimizer_variables, strict=True
        )
        with keras.StatelessScope(state_mapping=list(mapping)):
            loss = model.optimizer.scale_loss(loss)
        return loss, (sums, non_trainable)

    gradients, (sums, non_trainable) = _accumulate(
        jax.grad(loss_fn, has_aux=True),
        trainable,
        non_trainable,
        batch,
        model.gradient_accumulation_steps,
    )
    trainable, optimizer_variables = model.optimizer.stateless_apply(
        optimizer_variables, gradients, trainable
    )
    logs, metrics_variables = _update_metrics(model, metrics_variables, sums)
    return logs, (
        trainable,
        non_trainable,
        optimizer_variables,
        metrics_variables,
    )


def test_step(model, state, data):
    """The metrics of one batch.

    Args:
        model: `BwETAFCausalLM`, compiled with its own loss.
        state: Tuple of lists of arrays: trainable, non-trainable and metrics'
            variables.
        data: As for `train_step`.

    Returns:
        Tuple of logs, a dict of name to float, and the new state.
    """
    trainable, non_trainable, metrics_variables = state
    sums, non_trainable = _sums(
        model, trainable, non_trainable, _token_batch(data), training=False
    )
    logs, metrics_variables = _update_metrics(model, metrics_variables, sums)
    return logs, (trainable, non_trainable, metrics_variables)


def _token_batch(data):
    """A dict of arrays `(batch, length)`: inputs, targets, weights."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    targets, weights = targets_and_weights(x, y, sample_weight)
    return {
        "token_ids": x["token_ids"],
        "padding_mask": x["padding_mask"],
        "targets": targets,
        "weights": weights,
    }


def _sums(model, trainable, non_trainable, batch, training):
    """Sums over the tokens of a batch, each times its weight.

    Returns:
        Tuple of a dict of float scalars, `"loss"`, `"correct"` and
        `"weight"`, and the new non-trainable variables.
    """
    mapping = [
        *zip(model.trainable_variables, trainable, strict=True),
        *zip(model.non_trainable_variables, non_trainable, strict=True),
    ]
    inputs = {name: batch[name] for name in ("token_ids", "padding_mask")}
    targets, weights = batch["targets"], batch["weights"]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        hidden_states = model.backbone(inputs, training=training)
        embedding = model.backbone.token_embedding
        if embedding.quantization_mode is None:
            table = keras.ops.convert_to_tensor(embedding.embeddings)
            loss, _, is_correct = head_cross_entropy(
                hidden_states, table, targets, weights
            )
        else:  # There is no table of floats.
            loss, _, is_correct = cross_entropy(
                model.head(hidden_states), targets, weights
            )
    non_trainable = [
        scope.get_current_value(variable)
        for variable in model.non_trainable_variables
    ]
    sums = {
        "loss": loss,
        "correct": jnp.sum(is_correct * weights),
        "weight": jnp.sum(weights),
    }
    return sums, non_trainable


def _accumulate(gradient_fn, trainable, non_trainable, batch, num_parts):
    """Adds up the gradients of the parts of a batch.

    Args:
        gradient_fn: function of trainable and non-trainable variables and a
            batch. Returns gradients and, as one more output, a dict of sums
            and the new non-trainable variables.
        trainable: list of arrays.
        non_trainable: list of arrays.
        batch: dict of arrays `(batch, length)`.
        num_parts: int.

    Returns:
        As `gradient_fn`. The gradients of several parts are in float32.
    """
    if num_parts == 1:
        return gradient_fn(trainable, non_trainable, batch)

    def step(carry, part):
        sums, non_trainable = carry
        new, (new_sums, non_trainable) = gradient_fn(
            trainable, non_trainable, part
        )
        sums = jax.tree.map(jnp.add, sums, (new, new_sums))
        return (sums, non_trainable), None

    zeros = (
        [jnp.zeros(value.shape, "float32") for value in trainable],
        {name: jnp.zeros(()) for name in ("loss", "correct", "weight")},
    )
    ((gradients, sums), non_trainable), _ = jax.lax.scan(
        step, (zeros, non_trainable), _parts(batch, num_parts)
    )
    return gradients, (sums, non_trainable)


def _parts(batch, num_parts):
    """`(batch, length)` to `(num_parts, batch / num_parts, length)`.

    Part `i` has the rows `i`, `i + num_parts`, ..., so that every part has
    rows of each device's. Rows of zeros are added where some are missing:
    padding, which weighs nothing.
    """

    def split(x):
        x = jnp.pad(x, ((0, -x.shape[0] % num_parts), (0, 0)))
        return jnp.swapaxes(x.reshape(-1, num_parts, x.shape[1]), 0, 1)

    return jax.tree.map(split, batch)


def _update_metrics(model, metrics_variables, sums):
    """Adds the sums of a batch to the metrics.

    Returns:
        Tuple of logs, a dict of name to float, and the metrics' variables.
    """
    num_tokens = sums["weight"]
    loss = sums["loss"] / _at_least_one(num_tokens)
    accuracy = sums["correct"] / _at_least_one(num_tokens)
    mapping = zip(model.metrics_variables, metrics_variables, strict=True)
    with keras.StatelessScope(state_mapping=list(mapping)) as scope:
        model._loss_tracker.update_state(loss, sample_weight=num_tokens)
        model.token_metrics.update(loss, accuracy, num_tokens)
        logs = model.get_metrics_result()
    return logs, [
        scope.get_current_value(variable)
        for variable in model.metrics_variables
    ]


def _at_least_one(num_tokens):
    """A batch without tokens has a mean of 0, and not 0 / 0."""
    return jnp.where(num_tokens > 0, num_tokens, 1.0)
