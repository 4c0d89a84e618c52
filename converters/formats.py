"""The formats by name, and which of them a folder is in."""

import fnmatch
import os
from functools import partial
from pathlib import Path, PurePosixPath

from converters import flax_folder, hugging_face_folder, kept, keras_folder
from converters.checkpoint import token_ids
from converters.errors import CheckpointError, refuse
from converters.files import read_json

READ = {
    "flax": flax_folder.read,
    "safetensors": hugging_face_folder.read,
    "keras": keras_folder.read,
    "torch": hugging_face_folder.read,
}
WRITE = {
    "flax": flax_folder.write,
    "safetensors": hugging_face_folder.write,
    "keras": keras_folder.write,
    "torch": partial(hugging_face_folder.write, code=True),
}
FILES = {
    "flax": flax_folder.FILES,
    "safetensors": hugging_face_folder.FILES,
    "keras": keras_folder.FILES,
    "torch": hugging_face_folder.FILES,
}
FORMATS = tuple(READ)
KNOWN = {kept.FILE_NAME, *(name for names in FILES.values() for name in names)}


def detect_format(folder):
    """Tells the format of a model folder.

    Args:
        folder: str or path.

    Returns:
        `"flax"` (the original's), `"safetensors"` (canonical), `"keras"` (a
        KerasHub preset) or `"torch"` (canonical, with PyTorch code).

    Raises:
        CheckpointError: if it is none of them, or a file of it is none, or a
            link to elsewhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder. Received: "
            f"{'a file' if folder.exists() else 'nothing there'}."
        )
    _check_files(folder)
    if (folder / flax_folder.CONFIG).is_file():
        return "flax"
    found = sorted(path.name for path in folder.iterdir())
    received = f"the files {', '.join(found) or '(none)'}"
    if "config.json" in found:
        config = read_json(folder / "config.json")
        if "registered_name" in config:
            return "keras"
        if config.get("model_type") == "bwetaf":
            return "torch" if "auto_map" in config else "safetensors"
        received += (
            f", and config.json with model_type={config.get('model_type')!r}"
        )
    raise CheckpointError(
        f"{folder}: not a model folder. Expected {flax_folder.CONFIG} (Flax), "
        "or config.json with model_type 'bwetaf' (safetensors, PyTorch) or "
        f"with registered_name (Keras). Received: {received}."
    )


def _check_files(folder):
    """A stranger's folder must not reach for the user's own files.

    The folder itself may be a link. In the Hub's cache, files are links to
    blobs.
    """
    root = Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    problems = []
    for pattern in sorted(KNOWN):
        for path in folder.glob(pattern):
            name = path.relative_to(folder)
            target = Path(os.path.realpath(path))
            if not any(map(target.is_relative_to, allowed)):
                problems.append(
                    f"{name} is a link to {target}, out of the folder. Put "
                    "the file itself there"
                )
            elif not path.is_file():
                problems.append(
                    f"{name} must be a file. Received: a folder, or what is "
                    "no file at all"
                )
    refuse(folder, problems)


def read_checkpoint(folder, optimizer=True):
    """Reads and checks a model folder of any format; reads no tensor yet.

    Args:
        folder: str or path.
        optimizer: bool. Whether to read the optimizer's state, if any.

    Returns:
        `Checkpoint`.

    Raises:
        CheckpointError: if it is no model folder, or a file is missing,
            damaged or does not fit the others.
    """
    checkpoint = READ[detect_format(folder)](folder, optimizer)
    if checkpoint.tokenizer is not None:
        ids, _ = token_ids(checkpoint.tokenizer, folder)
        largest = max(
            (each for each in ids.values() if type(each) is int), default=0
        )
        size = checkpoint.config["vocab_size"]
        if largest >= size:
            raise CheckpointError(
                f"{folder}: the tokenizer has ids up to {largest}, but the "
                f"model's vocabulary has {size}. Use the tokenizer that "
                "belongs to the model."
            )
    return checkpoint


def other_files(folder, layout=None):
    """The files of a model folder that are not part of it.

    Args:
        folder: str or path.
        layout: str, optional. The format whose files are part of it.
            Defaults to any.

    Returns:
        list of str, relative paths in order. A folder that holds none of the
        formats' files is listed, and not what is in it.
    """
    folder = Path(folder)
    known = KNOWN
    if layout is not None:
        known = {kept.FILE_NAME, *FILES[layout]}
    parents = {
        parent.as_posix()
        for name in known
        for parent in PurePosixPath(name).parents
    }
    others, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and name in parents:
                folders.append(path)
            elif path.is_dir() or not any(
                fnmatch.fnmatchcase(name, each) for each in known
            ):
                others.append(name)
    return sorted(others)
