"""The known formats, and which of them a folder is in.

A new one is a module with a subclass of `Format`, an entry here, and its name
in `FormatName`.
"""

import fnmatch
import os
from pathlib import Path, PurePosixPath
from typing import Literal

from converters import kept
from converters.checkpoint import Checkpoint
from converters.errors import CheckpointError, refuse
from converters.files import read_json
from converters.flax_folder import FLAX
from converters.format import Format
from converters.hugging_face_folder import SAFETENSORS, TORCH
from converters.keras_folder import KERAS

FORMATS = {each.name: each for each in (FLAX, SAFETENSORS, KERAS, TORCH)}
FormatName = Literal["flax", "safetensors", "keras", "torch"]
KNOWN = {
    kept.FILE_NAME,
    *(name for each in FORMATS.values() for name in each.files),
}


def detect_format(folder: str | os.PathLike) -> FormatName:
    """Tells the format of a model folder.

    Args:
        folder: str or path.

    Returns:
        `"flax"` (the original's), `"safetensors"` (canonical), `"keras"` (a
        KerasHub preset) or `"torch"` (canonical, with PyTorch code).

    Raises:
        CheckpointError: if the folder is in none of these formats, or one of
            its files is a folder, or a link that leads out of it.
    """
    return find_format(folder).name


def find_format(folder: str | os.PathLike) -> Format:
    """As `detect_format`, but returns the `Format`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder. Received: "
            f"{'a file' if folder.exists() else 'nothing there'}."
        )
    _check_files(folder)
    for each in FORMATS.values():
        if each.recognizes(folder):
            return each
    found = sorted(path.name for path in folder.iterdir())
    received = f"the files {', '.join(found) or '(none)'}"
    if "config.json" in found:
        model_type = read_json(folder / "config.json").get("model_type")
        received += f", and config.json with model_type={model_type!r}"
    signs = dict.fromkeys(each.sign for each in FORMATS.values())
    raise CheckpointError(
        f"{folder}: not a model folder. Expected {', or '.join(signs)}. "
        f"Received: {received}."
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


def read_checkpoint(
    folder: str | os.PathLike, optimizer: bool = True
) -> Checkpoint:
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
    return find_format(folder).read(folder, optimizer)


def other_files(folder, layout=None):
    """The files of a model folder that are not part of it.

    Args:
        folder: str or path.
        layout: `Format`, optional. The one whose files are part of it.
            Defaults to any.

    Returns:
        list of str, relative paths in order. A folder that holds none of the
        formats' files is listed, and not what is in it.
    """
    folder = Path(folder)
    known = KNOWN
    if layout is not None:
        known = {kept.FILE_NAME, *layout.files}
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
