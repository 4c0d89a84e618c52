"""`inspect`: what lies in a model folder or a file of weights."""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import FLOATS
from converters.errors import CheckpointError
from converters.flax_format import flatten, read_flax
from converters.formats import find_format
from converters.hdf5_format import read_hdf5
from converters.hub import local_folder
from converters.mapped import View, as_bytes, blocks
from converters.safetensors_format import read_safetensors


def _read_flax(path):
    leaves = flatten(read_flax(path))
    return {"/".join(place): tensor for place, tensor in leaves.items()}


READERS = {
    ".safetensors": read_safetensors,
    ".h5": read_hdf5,
    ".pkl": _read_flax,
    ".msgpack": _read_flax,
}


def inspect(
    path: str | os.PathLike,
    *,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Lists the tensors of a model folder, or of one file, as they are there.

    A folder is listed even where it is not a whole model, or contradicts
    itself, or its code for PyTorch is of another version; `"problem"` says
    so.

    Args:
        path: str or path. A model folder of any format, `"hf://owner/repo"`,
            or a file: `.safetensors`, `.h5`, or Flax's `.pkl` or `.msgpack`.
        progress: callable, optional. Takes the bytes done and the bytes in
            all, after each tensor.

    Returns:
        dict of `"path"`, `"format"`, `"problem"` (str or None),
        `"parameters"`, `"bytes"`, and `"tensors"`: a list of dicts of
        `"file"`, `"name"`, `"dtype"`, `"shape"`, `"bytes"`, `"sha256"` (of
        the values in row-major order), and of how many values are `"nan"` and
        `"inf"`.

    Raises:
        CheckpointError: if it is neither, or a file of weights is missing or
            damaged.

    Example:

    ```python
    converters.inspect("model.safetensors")["tensors"][0]["sha256"]
    ```
    """
    place = local_folder(path)
    if place.is_dir():
        layout, problem, weights, others = _look(place)
    else:
        layout, problem, weights, others = place.suffix, None, [place], []
        if layout not in READERS:
            raise CheckpointError(
                f"{place}: expected a model folder, or a file that ends in "
                f"{', '.join(READERS)}. Received: "
                f"{'another file' if place.exists() else 'nothing there'}."
            )
    found = [
        (file, name, View(tensor))
        for file in weights + others
        for name, tensor in READERS[file.suffix](file).items()
    ]
    total, done, rows = sum(tensor.nbytes for *_, tensor in found), 0, []
    for file, name, tensor in found:
        rows.append({"file": file.name, "name": name} | _facts(tensor))
        done += tensor.nbytes
        if progress:
            progress(done, total)
    return {
        "path": str(path),
        "format": layout,
        "problem": problem,
        "parameters": sum(
            math.prod(tensor.shape)
            for file, _, tensor in found
            if file in weights
        ),
        "bytes": total,
        "tensors": rows,
    }


def _look(folder: Path):
    """A folder's format, what is wrong with it, and its files of tensors.

    Returns:
        str; str or None; two lists of paths: the weights, and the optimizer's
        state, which is no parameter.
    """
    layout = find_format(folder)
    try:
        layout.read(folder)
    except CheckpointError as error:
        problem = str(error)
    else:
        problem = layout.code_problem(folder)
    weights = _matching(folder, layout.weights)
    return layout.name, problem, weights, _matching(folder, layout.optimizer)


def _matching(folder, patterns):
    return sorted(path for each in patterns for path in folder.glob(each))


def _facts(tensor):
    digest, nan, inf = hashlib.sha256(), 0, 0
    with tensor.open() as array:
        for block in blocks(array):
            digest.update(as_bytes(block))
            if tensor.dtype.name in FLOATS:
                nan += np.count_nonzero(np.isnan(block))
                inf += np.count_nonzero(np.isinf(block))
    return {
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "sha256": digest.hexdigest(),
        "nan": int(nan),
        "inf": int(inf),
    }
