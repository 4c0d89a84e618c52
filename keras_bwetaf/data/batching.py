"""Rows -> the batches of each process, in an order that can be resumed."""

import numpy as np

from keras_bwetaf.checks import checked_int

# As many rows as nobody will read; Grain concatenates finite data sets only.
ENDLESS = 2**62
# A batch is read while the step before is computed; reading is fast.
READ_OPTIONS = {"num_threads": 1, "prefetch_buffer_size": 4}


def processes(process_index, process_count):
    """Fills in what JAX knows; asks it only if need be."""
    if process_index is None or process_count is None:
        import jax

        if process_count is None:
            process_count = jax.process_count()
        if process_index is None:
            process_index = jax.process_index()
    return process_index, process_count


def check_arguments(
    sequence_length, batch_size, seed, process_index, process_count
):
    """Checks what all loaders take.

    Returns:
        tuple of int, the arguments.

    Raises:
        ValueError: If an argument is out of range, or the processes cannot
            share a batch.
    """
    sequence_length = checked_int("sequence_length", sequence_length, 1)
    batch_size = checked_int("batch_size", batch_size, 1)
    seed = checked_int("seed", seed, 0)
    process_count = checked_int("process_count", process_count, 1)
    process_index = checked_int("process_index", process_index, 0)
    if process_index >= process_count:
        raise ValueError(
            "`process_index` must be below `process_count`. Received: "
            f"process_index={process_index}, process_count={process_count}"
        )
    if batch_size % process_count:
        raise ValueError(
            "`batch_size` counts the rows of all processes together, and "
            "must be a multiple of their number. Received: "
            f"batch_size={batch_size}, process_count={process_count}"
        )
    return sequence_length, batch_size, seed, process_index, process_count


def shuffle_and_repeat(rows, *, seed, repeat):
    """Puts rows in random order, another one in each pass.

    Args:
        rows: `grain.MapDataset`.
        seed: tuple of int, or None for rows in their order.
        repeat: bool. Whether the rows begin again at their end.

    Returns:
        A `grain.MapDataset`.
    """
    if seed is not None:
        numbers = np.random.SeedSequence(seed)
        rows = rows.shuffle(int(numbers.generate_state(1)[0]))
    return rows.repeat() if repeat else rows


def batches(
    rows, *, batch_size, process_index, process_count, empty_row, convert
):
    """One process's part of each batch.

    Args:
        rows: `grain.MapDataset` of arrays.
        batch_size: int. Rows in a batch, of all processes together.
        process_index: int.
        process_count: int.
        empty_row: array. The last batch of a finite data set is filled up
            with it.
        convert: function of a batch of rows. Makes of it what `fit` takes.

    Returns:
        A `grain.IterDataset`.
    """
    import grain

    num_empty = -len(rows) % batch_size
    if len(rows) > ENDLESS:  # Of more, Grain cannot count batches of one row.
        rows = rows[:ENDLESS]
    elif len(rows) < ENDLESS and num_empty:
        empty = grain.MapDataset.source([empty_row] * num_empty)
        rows = grain.MapDataset.concatenate([rows, empty])
    parts = rows.batch(batch_size // process_count)
    return (
        parts[process_index::process_count]
        .map(convert)
        .to_iter_dataset(grain.ReadOptions(**READ_OPTIONS))
    )
