"""The steps of `fit` and `evaluate` with head and loss in one.

Keras's own train step holds the logits of the whole batch, and weighs the
means of batches by rows. These compute the same from hidden states, chunk by
chunk, and weigh by tokens. The rest of the trainer is Keras's.
"""

import jax
import jax.numpy as jnp
import keras

from keras_bwetaf.layers.sharding import gathered_over_batch_axis
from keras_bwetaf.step.loss import (
    cross_entropy,
    head_cross_entropy,
    nonzero,
    targets_and_weights,
)

# The key of a step's own values among the logs of `train_step`, and what they
# are. Metrics are means since the beginning of the epoch.
STEP_VALUES = "step_values"
STEP_VALUE_NAMES = (
    "loss",  # Mean over the tokens of the step, without `model.losses`.
    "gradient_norm",  # Of all gradients together, before they are clipped.
    "learning_rate",
    "num_tokens",  # That count in the loss.
    "sequence_length",
)


def train_step(model, state, data, reports_values=False):
    """One step of the optimizer.

    With `model.gradient_accumulation_steps`, the rows of the batch are worked
    on in as many parts, one after the other. Their gradients add up to that
    of the mean over all tokens, however these are spread over the parts.
    What is in `model.losses`, such as a regularizer's, is added to the mean.

    Args:
        model: `BwETAFCausalLM`, compiled with its own loss.
        state: Tuple of lists of arrays: trainable, non-trainable, optimizer's
            and metrics' variables.
        data: dict as the model's inputs, or tuple of such a dict, labels and
            sample weights. See `targets_and_weights`.
        reports_values: bool. Whether the logs have the step's own values.

    Returns:
        Tuple of logs, a dict of name to float, and the new state. With
        `reports_values`, there is also `"step_values"` among the logs, a
        float32 array of what `STEP_VALUE_NAMES` says.
    """
    trainable, non_trainable, optimizer_variables, metrics_variables = state
    batch = token_batch(data)
    num_tokens = jnp.sum(batch["weights"])

    def loss_fn(trainable, non_trainable, batch):
        sums, non_trainable = _sums(
            model, trainable, non_trainable, batch, training=True
        )
        # The penalty of the batch is the mean of those of its parts.
        sums["penalty"] /= model.gradient_accumulation_steps
        loss = sums["loss"] / nonzero(num_tokens) + sums["penalty"]
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
    logs, metrics_variables = _update_metrics(model, metrics_variables, sums)
    if reports_values:
        logs[STEP_VALUES] = _step_values(
            model, optimizer_variables, batch, sums, gradients
        )
    trainable, optimizer_variables = model.optimizer.stateless_apply(
        optimizer_variables, gradients, trainable
    )
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
        model, trainable, non_trainable, token_batch(data), training=False
    )
    logs, metrics_variables = _update_metrics(model, metrics_variables, sums)
    return logs, (trainable, non_trainable, metrics_variables)


def without_step_values(train_function, tell):
    """Takes a step's own values out of the logs of a train function.

    Logs are for Keras and its callbacks, which take them for metrics.

    Args:
        train_function: function of the state and an iterator of batches,
            whose logs have the values.
        tell: function. Called with the values of each step.

    Returns:
        Such a function.
    """

    def function(state, iterator):
        logs, state = train_function(state, iterator)
        tell(logs.pop(STEP_VALUES))
        return logs, state

    return function


def token_batch(data):
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
        Tuple of a dict of float scalars, `"loss"`, `"correct"`, `"weight"`
        and the `"penalty"`, which is no sum over tokens, and the new
        non-trainable variables.
    """
    (loss, _, is_correct), penalty, non_trainable = token_losses(
        model, trainable, non_trainable, batch, training
    )
    weights = batch["weights"]
    sums = {
        "loss": loss,
        "correct": jnp.sum(is_correct * weights),
        "weight": jnp.sum(weights),
        "penalty": penalty,
    }
    return sums, non_trainable


def token_losses(model, trainable, non_trainable, batch, training):
    """The loss of every token of a batch, and of all of them.

    Args:
        model: `BwETAFCausalLM`.
        trainable: list of arrays, the values of its trainable variables.
        non_trainable: list of arrays.
        batch: dict, as `token_batch` returns it.
        training: bool. Whether there is dropout.

    Returns:
        Tuple of what `head_cross_entropy` returns; the penalty, a float
        scalar, the sum of `model.losses`; and the new non-trainable
        variables.
    """
    variables = model.trainable_variables + model.non_trainable_variables
    values = gathered_over_batch_axis(variables, [*trainable, *non_trainable])
    mapping = list(zip(variables, values, strict=True))
    inputs = {name: batch[name] for name in ("token_ids", "padding_mask")}
    targets, weights = batch["targets"], batch["weights"]
    with keras.StatelessScope(
        state_mapping=mapping, collect_losses=True
    ) as scope:
        hidden_states = model.backbone(inputs, training=training)
        losses = head_losses(model, hidden_states, targets, weights)
        penalty = sum(map(jnp.sum, model.losses), jnp.zeros(()))
    whole = values[len(trainable) :]
    changed = map(scope.get_current_value, model.non_trainable_variables)
    non_trainable = [
        before if after is each else after
        for before, each, after in zip(
            non_trainable, whole, changed, strict=True
        )
    ]
    return losses, penalty, non_trainable


def head_losses(model, hidden_states, targets, weights):
    """The losses of the tokens that hidden states are to predict.

    Args:
        model: `BwETAFCausalLM`.
        hidden_states: float array `(batch, length, hidden_dim)`.
        targets: int array `(batch, length)`.
        weights: float array `(batch, length)`.

    Returns:
        As `head_cross_entropy` does.
    """
    embedding = model.backbone.token_embedding
    if embedding.quantization_mode is None:
        table = keras.ops.convert_to_tensor(embedding.embeddings)
        return head_cross_entropy(hidden_states, table, targets, weights)
    # There is no table of floats.
    logits = model.backbone.head(hidden_states)
    return cross_entropy(logits, targets, weights)


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
        dict.fromkeys(("loss", "correct", "weight", "penalty"), jnp.zeros(())),
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
    loss = sums["loss"] / nonzero(num_tokens)
    accuracy = sums["correct"] / nonzero(num_tokens)
    mapping = zip(model.metrics_variables, metrics_variables, strict=True)
    with keras.StatelessScope(state_mapping=list(mapping)) as scope:
        model._loss_tracker.update_state(
            loss + sums["penalty"], sample_weight=num_tokens
        )
        model.token_metrics.update(loss, accuracy, num_tokens)
        logs = model.get_metrics_result()
    return logs, [
        scope.get_current_value(variable)
        for variable in model.metrics_variables
    ]


def _step_values(model, optimizer_variables, batch, sums, gradients):
    """What `STEP_VALUE_NAMES` says, float32, of one step.

    Args:
        model: `BwETAFCausalLM`.
        optimizer_variables: list of arrays, before the step.
        batch: dict, as `token_batch` returns it.
        sums: dict, as `_sums` returns it, of the whole batch.
        gradients: list of arrays, of the loss as the optimizer scales it.
    """
    mapping = zip(model.optimizer.variables, optimizer_variables, strict=True)
    with keras.StatelessScope(state_mapping=list(mapping)):
        learning_rate = keras.ops.cast(model.optimizer.learning_rate, "float32")
        scale = model.optimizer.scale_loss(jnp.ones(()))
    squares = [jnp.sum(jnp.square(g.astype("float32"))) for g in gradients]
    values = {
        "loss": sums["loss"] / nonzero(sums["weight"]),
        "gradient_norm": jnp.sqrt(sum(squares)) / scale,
        "learning_rate": learning_rate,
        "num_tokens": jnp.sum(batch["weights"] > 0),
        "sequence_length": batch["token_ids"].shape[1],
    }
    return jnp.stack(
        [jnp.asarray(values[name], "float32") for name in STEP_VALUE_NAMES]
    )
