"""The canonical folder: a Hugging Face style one, and the ways to it."""

from pathlib import Path

import numpy as np

from converters import bwetaf_v3, bwetaf_v3_config, companions
from converters.errors import CheckpointError, refuse
from converters.files import new_folder, read_json, write_files
from converters.flax_format import read_flax, write_flax
from converters.safetensors_format import (
    FILE_NAME,
    read_safetensors_folder,
    write_safetensors,
)
from converters.transforms import view

FLAX_CONFIG = companions.FLAX_CONFIG
FLAX_WEIGHTS = "good_stuff.pkl"
FLOATS = ("float16", "bfloat16", "float32", "float64")


def detect_format(folder):
    """Tells the format of a model folder.

    Args:
        folder: str or path.

    Returns:
        "flax" (the original's), "safetensors" (canonical) or "keras" (a
        KerasHub preset).

    Raises:
        CheckpointError: if it is none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    if (folder / FLAX_CONFIG).is_file():
        return "flax"
    found = sorted(path.name for path in folder.iterdir())
    received = f"the files {', '.join(found) or '(none)'}"
    if "config.json" in found:
        config = read_json(folder / "config.json")
        if "registered_name" in config:
            return "keras"
        if config.get("model_type") == "bwetaf":
            return "safetensors"
        received += (
            f", and config.json with model_type={config.get('model_type')!r}"
        )
    raise CheckpointError(
        f"{folder}: not a model folder. Expected {FLAX_CONFIG} (Flax), or "
        "config.json with model_type 'bwetaf' (safetensors) or with "
        f"registered_name (Keras). Received: {received}."
    )


def read_config(folder):
    """Reads and checks the configuration of a canonical folder.

    Args:
        folder: str or path.

    Returns:
        dict.

    Raises:
        CheckpointError: if it is missing or wrong.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.get("model_type") != "bwetaf":
        raise CheckpointError(
            f"{path}: expected model_type 'bwetaf'. Received: "
            f"{config.get('model_type')!r:.80}"
        )
    bwetaf_v3_config.check_config(config, source=path)
    return config


def keras_tensors(folder):
    """Gives the weights of a canonical folder by path of Keras variable.

    Names, shapes and dtypes are checked before the first tensor is given.

    Args:
        folder: str or path.

    Returns:
        Iterator of (path of the Keras variable, numpy array). An array is a
        view of the file: copy it, or finish with it, before the next one.

    Raises:
        CheckpointError: that lists every tensor that is missing, left over,
            misshapen or not of floats.
    """
    expected = bwetaf_v3.tensors(read_config(folder))
    found = read_safetensors_folder(folder)
    shapes = {tensor.name: tensor.shape for tensor in expected}
    refuse(folder, _coverage_problems(shapes, found))

    def by_path():
        for tensor in expected:
            mapped = found[tensor.name]
            yield tensor.keras, mapped.array()
            mapped.release()

    return by_path()


def flax_to_safetensors(source, target, *, progress=None):
    """Converts a folder of the original to a canonical folder.

    The target appears when it is complete, and not at all on failure. The
    optimizer's state is not converted.

    Args:
        source: str or path. The Flax folder; a tokenizer and `stats.json`
            travel along if there.
        target: str or path. Must not exist.
        progress: callable, optional. Takes the bytes done and the bytes in
            all, after each tensor.

    Raises:
        CheckpointError: if the source is incomplete, damaged or not
            expressible, or the target exists.
    """
    source = Path(source)
    weights = source / FLAX_WEIGHTS
    flax_config = read_json(source / FLAX_CONFIG)
    files, eos_token_id = companions.from_flax(source, flax_config)
    config = bwetaf_v3_config.config_from_flax(
        flax_config, eos_token_id=eos_token_id, source=source / FLAX_CONFIG
    )
    tensors = {tensor.name: tensor for tensor in bwetaf_v3.tensors(config)}
    found = read_flax(weights)
    shapes = {tensor.flax: tensor.flax_shape for tensor in tensors.values()}
    refuse(weights, _coverage_problems(shapes, found))
    config["dtype"] = _common_dtype(found)
    files["config.json"] = config
    report = _reporter(progress, found)

    def read(name):
        tensor = tensors[name]
        return view(tensor.kind.from_flax, found[tensor.flax].array())

    def written(name, nbytes):
        found[tensors[name].flax].release()
        report(nbytes)

    specs = {
        name: (found[tensor.flax].dtype, tensor.shape)
        for name, tensor in tensors.items()
    }
    with new_folder(target) as folder:
        write_files(folder, files)
        write_safetensors(folder / FILE_NAME, specs, read, written)


def safetensors_to_flax(source, target, *, progress=None):
    """Converts a canonical folder to a folder that the original loads.

    The target appears when it is complete, and not at all on failure.

    Args:
        source: str or path. The canonical folder; a tokenizer and
            `stats.json` travel along if there.
        target: str or path. Must not exist.
        progress: callable, optional. Takes the bytes done and the bytes in
            all, after each tensor.

    Raises:
        CheckpointError: if the source is incomplete, damaged or not
            expressible, or the target exists.
    """
    source = Path(source)
    config = read_config(source)
    files = companions.to_flax(
        source,
        bwetaf_v3_config.config_to_flax(config, source=source / "config.json"),
    )
    found = read_safetensors_folder(source)
    parts = {}
    for tensor in bwetaf_v3.tensors(config):
        parts.setdefault(tensor.flax, []).append(tensor)
    shapes = {
        tensor.name: tensor.shape for each in parts.values() for tensor in each
    }
    refuse(source, _coverage_problems(shapes, found))
    refuse(
        source,
        [
            f"{' and '.join(tensor.name for tensor in each)} are one tensor in "
            "Flax and need one dtype. Received: "
            f"{' and '.join(found[tensor.name].dtype.name for tensor in each)}"
            for each in parts.values()
            if len({found[tensor.name].dtype for tensor in each}) > 1
        ],
    )
    report = _reporter(progress, found)

    def read(path):
        each = parts[path]
        result = np.empty(each[0].flax_shape, found[each[0].name].dtype)
        for tensor in each:
            mapped = found[tensor.name]
            view(tensor.kind.from_flax, result)[...] = mapped.array()
            mapped.release()
        return result

    with new_folder(target) as folder:
        write_files(folder, files)
        write_flax(
            folder / FLAX_WEIGHTS,
            parts,
            read,
            lambda path, nbytes: report(nbytes),
        )


def _coverage_problems(shapes, found):
    """Compares tensors with what they should be.

    Args:
        shapes: dict of expected name (str, or tuple of str) to shape.
        found: dict of name to `MappedTensor`.

    Returns:
        list of str, empty if the names are the same and each tensor has its
        shape and a floating-point dtype.
    """

    def text(name):
        return name if isinstance(name, str) else "/".join(name)

    problems = [
        f"missing tensor {text(name)}, expected with shape {shape}"
        for name, shape in shapes.items()
        if name not in found
    ]
    for name, tensor in found.items():
        if name not in shapes:
            problems.append(
                f"unexpected tensor {text(name)} of shape {tensor.shape}"
            )
            continue
        if tensor.shape != shapes[name]:
            problems.append(
                f"tensor {text(name)} has shape {tensor.shape}, but the "
                f"configuration gives {shapes[name]}"
            )
        if tensor.dtype.name not in FLOATS:
            problems.append(
                f"tensor {text(name)} has dtype {tensor.dtype.name}, expected "
                f"one of {', '.join(FLOATS)}"
            )
    return problems


def _common_dtype(found):
    """The dtype of all tensors; of a mixture, one that holds each exactly."""
    names = {tensor.dtype.name for tensor in found.values()}
    if len(names) == 1:
        return names.pop()
    return "float64" if "float64" in names else "float32"


def _reporter(progress, found):
    """Counts written bytes up to those of all tensors."""
    total = sum(tensor.nbytes for tensor in found.values())
    done = 0

    def report(nbytes):
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    return report
