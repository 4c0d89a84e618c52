"""Weights of a checkpoint -> the variables of a live backbone."""

import jax
import numpy as np

import converters
from keras_bwetaf.layers.sharding import mesh


def _shapes(architecture, config):
    """Shapes by path of the variables that a configuration leads to."""
    canonical = architecture.config_from_keras(config)
    return {each.keras: each.shape for each in architecture.tensors(canonical)}


def check_changes(architecture, config, changes):
    """Refuses changes to a configuration that its weights do not fit.

    Args:
        architecture: `converters.architecture.Architecture`.
        config: dict.
        changes: dict.

    Raises:
        ValueError: If a shape changes.
    """
    _check_fit(
        _shapes(architecture, config),
        _shapes(architecture, {**config, **changes}),
    )


def _check_fit(found, wanted):
    """Compares the shapes of a checkpoint and of a model."""
    problems = [
        f"{path}: {found.get(path, 'nothing')} in the checkpoint, "
        f"{wanted.get(path, 'nothing')} in the model"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]
    if problems:
        raise ValueError(
            "The configuration does not fit the weights. Change nothing that "
            "changes a shape, or start from random weights: "
            "load_weights=False, or from_scratch of `train`. Tensors that "
            f"differ: {len(problems)}.\n" + "\n".join(problems)
        )


def assign(backbone, folder):
    """Moves weights from a folder into variables, one by one.

    Each goes straight to its devices, which get their own parts only.
    """
    variables = {variable.path: variable for variable in backbone.weights}
    checkpoint = converters.read_checkpoint(folder, optimizer=False)
    _check_fit(
        {row.keras: row.shape for row in checkpoint.rows},
        {path: tuple(each.shape) for path, each in variables.items()},
    )
    places = {path: each.value.sharding for path, each in variables.items()}
    for variable in variables.values():
        variable.value.delete()  # zeros, whose memory the weights can have
    for row in checkpoint.rows:
        variable = variables[row.keras]
        with checkpoint.tensor(row.name) as view:

            def read(part, view=view, dtype=variable.dtype):
                # A copy, because JAX goes on using an array where it lies,
                # and the file may change.
                return np.array(view[part], dtype, order="C")

            if mesh() is not None:
                value = jax.make_array_from_callback(
                    view.shape, places[row.keras], read
                )
            else:
                value = jax.device_put(read(...))
            # Finished, so that copies don't pile up.
            variable.assign(value.block_until_ready())
