"""Where gradients vanish, what weights look like, which rows are hard."""

import functools
import math

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_bwetaf.checks import positive_int
from keras_bwetaf.step.loss import nonzero
from keras_bwetaf.step.train_step import token_batch, token_losses

VANISHING = 1e-6
EXPLODING = 1e2
QUANTITIES = ("norm", "mean", "std", "max_abs", "vanishing", "exploding")


class TensorStatistics(list):
    """Statistics of tensors: a list of dicts that prints as a table.

    The first dict is of all tensors together, named `"all"`. Each has
    `"name"`; `"size"`, the number of elements; their `"norm"`, `"mean"`,
    `"std"` and `"max_abs"`; and the shares of elements, from 0 to 1, whose
    absolute value is below and above two thresholds, `"vanishing"` and
    `"exploding"`. NaN counts as exploding.

    Args:
        title: str. What the tensors are.
        records: list of dicts.
    """

    def __init__(self, title, records):
        super().__init__(records)
        self.title = title

    def __str__(self):
        rows = [list(self[0])]
        for record in self:
            rows.append([_text(value) for value in record.values()])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title]
        for name, *numbers in rows:
            cells = [name.ljust(widths[0])]
            cells += map(str.rjust, numbers, widths[1:])
            lines.append("  ".join(cells))
        return "\n".join(lines)


def gradient_statistics(lm, batch, vanishing=VANISHING, exploding=EXPLODING):
    """Statistics of the gradient of a batch's loss, for every weight.

    It is the gradient that `fit` computes, before it is clipped. Nothing of
    the model changes, and it need not be compiled.

    Args:
        lm: `BwETAFCausalLM`.
        batch: A batch as `fit` takes them: a dict of `"token_ids"` and
            `"padding_mask"`, int arrays `(batch, length)`, or a tuple of it,
            labels and sample weights; with a preprocessor, also a list of
            str.
        vanishing: float. Absolute values below it count as vanishing.
        exploding: float. Absolute values above it count as exploding.

    Returns:
        `TensorStatistics` of the trainable variables.

    Raises:
        ValueError: If the thresholds are not in order.

    Example:

    ```python
    statistics = gradient_statistics(lm, next(iter(train)))
    print(statistics)
    plot_statistics(statistics, "gradients.png")
    ```
    """
    _check_thresholds(vanishing, exploding)
    samples = keras.utils.unpack_x_y_sample_weight(batch)
    batch = token_batch(lm.preprocess_samples(*samples))

    @jax.jit
    def measure(trainable, non_trainable, batch):
        def loss_fn(trainable):
            (loss, _, _), penalty, _ = token_losses(
                lm, trainable, non_trainable, batch, training=True
            )
            return loss / nonzero(jnp.sum(batch["weights"])) + penalty

        gradients = jax.grad(loss_fn)(trainable)
        return _measure(gradients, vanishing, exploding)

    values = measure(*_values(lm), batch)
    return _tabulate("Gradients", lm.trainable_variables, values)


def parameter_statistics(lm, vanishing=VANISHING, exploding=EXPLODING):
    """Statistics of every weight.

    Args:
        lm: `BwETAFCausalLM`.
        vanishing: float. Absolute values below it count as vanishing.
        exploding: float. Absolute values above it count as exploding.

    Returns:
        `TensorStatistics`.

    Raises:
        ValueError: If the thresholds are not in order.

    Example:

    ```python
    print(parameter_statistics(lm))
    ```
    """
    _check_thresholds(vanishing, exploding)
    measure = jax.jit(
        functools.partial(_measure, vanishing=vanishing, exploding=exploding)
    )
    weights = [
        weight
        for weight in lm.weights
        if keras.backend.is_float_dtype(weight.dtype)
    ]
    values = measure([weight.value for weight in weights])
    return _tabulate("Weights", weights, values)


def rank_rows(lm, dataset, batch_size=8):
    """Orders rows from easy to hard, by the mean loss of their tokens.

    For a curriculum, or to find what is broken in a data set: see what comes
    last. There is no dropout. Rows without a token to predict are left out.

    Args:
        lm: `BwETAFCausalLM`.
        dataset: Token ids, an int array `(rows, length)` without padding;
            or a dict of `"token_ids"` and `"padding_mask"`, such arrays; or
            an iterable of batches of such dicts that ends, such as
            `load_packed(..., shuffle=False, repeat=False)`.
        batch_size: int. Rows that are worked on at once, of an array or dict.

    Returns:
        Tuple of
        - int array of the numbers of rows, the easiest first;
        - float32 array of the loss of every row of the data set, in the data
          set's order, NaN where it is left out.

    Raises:
        ValueError: If `batch_size` is not positive, or there are no rows.

    Example:

    ```python
    indices, losses = rank_rows(lm, token_ids)
    lm.fit({name: x[indices] for name, x in rows.items()}, shuffle=False)
    ```
    """
    batch_size = positive_int("batch_size", batch_size)
    if hasattr(dataset, "shape"):
        dataset = {
            "token_ids": dataset,
            "padding_mask": np.ones(dataset.shape, "int32"),
        }
    num_rows = None
    if isinstance(dataset, dict):
        num_rows = len(dataset["token_ids"])
        dataset = _batches(dataset, batch_size)

    @jax.jit
    def row_losses(trainable, non_trainable, x):
        batch = token_batch(x)
        (_, losses, _), _, _ = token_losses(
            lm, trainable, non_trainable, batch, training=False
        )
        weights = batch["weights"]
        return jnp.sum(losses * weights, axis=1) / jnp.sum(weights, axis=1)

    values = _values(lm)
    losses = [np.asarray(row_losses(*values, x)) for x in dataset]
    if not losses:
        raise ValueError("Expected at least one row. Received: none")
    losses = np.concatenate(losses)[:num_rows]
    indices = np.argsort(losses, kind="stable")  # NaN comes last.
    return indices[: np.isfinite(losses).sum()], losses


def _values(lm):
    """The values of trainable and of other variables, as lists."""
    return (
        [variable.value for variable in lm.trainable_variables],
        [variable.value for variable in lm.non_trainable_variables],
    )


def _measure(tensors, vanishing, exploding):
    """Norm, mean, std, max_abs, vanishing, exploding of each tensor.

    Returns:
        float32 array `(tensors, 6)`.
    """

    def measure(x):
        x = x.astype("float32")
        size = jnp.abs(x)
        return jnp.stack(
            [
                jnp.sqrt(jnp.sum(jnp.square(x))),
                jnp.mean(x),
                jnp.std(x),
                jnp.max(size),
                jnp.mean(size < vanishing),
                jnp.mean(~(size <= exploding)),  # NaN explodes.
            ]
        )

    return jnp.stack([measure(x) for x in tensors])


def _tabulate(title, variables, values):
    """Returns `TensorStatistics`.

    Args:
        title: str.
        variables: list of `keras.Variable`.
        values: array, as `_measure` returns it.
    """
    values = np.asarray(values, "float64")
    sizes = np.array([math.prod(variable.shape) for variable in variables])
    shares = sizes / sizes.sum()
    norm, mean, std, max_abs, vanishing, exploding = values.T
    mean_of_all = shares @ mean
    variance_of_all = shares @ (std**2 + (mean - mean_of_all) ** 2)
    everything = [
        np.sqrt(np.sum(norm**2)),
        mean_of_all,
        np.sqrt(variance_of_all),
        max_abs.max(),
        shares @ vanishing,
        shares @ exploding,
    ]
    names = ["all", *(variable.path for variable in variables)]
    rows = zip(names, [sizes.sum(), *sizes], [everything, *values], strict=True)
    return TensorStatistics(
        title,
        [
            {"name": name, "size": int(size)}
            | dict(zip(QUANTITIES, map(float, row), strict=True))
            for name, size, row in rows
        ],
    )


def _batches(rows, batch_size):
    """Yields batches of the same size; the last one is filled up with padding.

    Args:
        rows: dict of arrays `(rows, length)`.
        batch_size: int.
    """
    for start in range(0, len(rows["token_ids"]), batch_size):
        batch = {k: x[start : start + batch_size] for k, x in rows.items()}
        missing = batch_size - len(batch["token_ids"])
        yield {k: np.pad(x, ((0, missing), (0, 0))) for k, x in batch.items()}


def _check_thresholds(vanishing, exploding):
    if not 0 < vanishing < exploding:
        raise ValueError(
            "`vanishing` must be greater than 0 and less than `exploding`. "
            f"Received: vanishing={vanishing}, exploding={exploding}"
        )


def _text(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)
