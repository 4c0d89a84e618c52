"""Files: bounded JSON in, and out only whole or not at all."""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from converters.errors import CheckpointError

# Parsed, JSON can take twenty times the memory.
MAX_JSON_BYTES = 50_000_000
MAX_JSON_DEPTH = 64
LFS_POINTER = b"version https://git-lfs"
# Of another machine, even where pathlib made one slash of two; a drive of
# Windows has one letter.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(name, path):
    """Where to write, if it is on this machine.

    Args:
        name: str. The argument's, for the message.
        path: str or path.

    Returns:
        A `Path`.

    Raises:
        CheckpointError: if it is an address, such as `"gs://bucket/name"`,
            of which pathlib would make folders.
    """
    if ADDRESS.match(os.fspath(path)):
        raise CheckpointError(
            f"`{name}` must be a path of this machine. Write to a folder, and "
            "copy it from there, such as with `hf upload` or `gcloud storage "
            f"cp`. Received: {name}={os.fspath(path)!r}"
        )
    return Path(path)


def read_bytes(path):
    """Reads a small file.

    Args:
        path: str or path.

    Returns:
        bytes.

    Raises:
        CheckpointError: if the file is missing or above `MAX_JSON_BYTES`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the file is missing. Copy it into the folder, or pass "
            "another folder."
        )
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON. "
            f"Received: {size} bytes."
        )
    data = path.read_bytes()
    check_is_content(path, data)
    return data


def check_is_content(path, start):
    """A repository that was cloned without Git LFS has pointers for files.

    Args:
        path: path of the file, for the message.
        start: bytes that the file starts with.

    Raises:
        CheckpointError: if they are those of a pointer.
    """
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: expected the file itself. Received: a Git LFS pointer "
            "to it. Run `git lfs pull` in the repository."
        )


def read_bytes_or_none(path):
    """`read_bytes`, or None where there is no such file."""
    return read_bytes(path) if Path(path).is_file() else None


def read_stats(path):
    """The bytes of the original's `stats.json`, or None where there is none.

    They travel unchanged. A loss of NaN is not JSON, but Python's own.

    Raises:
        CheckpointError: if it is no JSON at all.
    """
    data = read_bytes_or_none(path)
    try:
        json.loads((data or b"null").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON. Received: {error}. Remove the file to go "
            "on without it."
        ) from error
    return data


def read_json_or_none(path):
    """`read_json`, or None where there is no such file."""
    return read_json(path) if Path(path).is_file() else None


def parse_json(data, source):
    """Decodes a JSON object from a stranger.

    Args:
        data: bytes.
        source: str or path. Where they come from, for messages.

    Returns:
        dict.

    Raises:
        CheckpointError: if it is no JSON, no object, or repeats a key.
    """

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return result

    def finite(text):
        if math.isfinite(number := float(text)):
            return number
        raise ValueError(f"{text} is no JSON number")

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
        _check_depth(value)
        if b"\\ud" in data.lower():  # Half of a pair is no text.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: expected JSON. Received: {error}. Fetch or export the "
            "file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{source}: expected a JSON object. Received: "
            f"{type(value).__name__}."
        )
    return value


def _check_depth(value):
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [each for each in level if isinstance(each, (dict, list))]
        if not containers:
            return
        level = [
            item
            for each in containers
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    raise ValueError(f"more than {MAX_JSON_DEPTH} levels of nesting")


def read_json(path):
    """Reads a JSON object from a file; see `parse_json`."""
    return parse_json(read_bytes(path), path)


@contextlib.contextmanager
def new_file(path):
    """Opens a file that appears under its name only when it is complete.

    Args:
        path: str or path.

    Yields:
        A binary file to write to. It has another name in the same folder
        until the block ends, and is removed if the block raises.
    """
    path = Path(path)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # What the system says of writing, such as a full disk, has no name.
        if getattr(error, "errno", None) and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def new_folder(path, *, replace=False):
    """Builds a folder that appears under its name only when it is complete.

    Args:
        path: str or path.
        replace: bool. Whether the folder may take the place of another one,
            which is kept until the new one is complete.

    Yields:
        Path of a temporary sibling folder to fill. It is removed if the
        block raises.

    Raises:
        CheckpointError: if `path` exists and is not to be replaced.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise _exists(path)
    path = path.resolve()  # A link stays; what it points to is replaced.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        if replace and path.exists():
            _swap(temporary, path)
        elif path.exists():
            raise _exists(path)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exists(path):
    return CheckpointError(
        f"{path}: the target exists already. Expected: a new folder. Remove "
        "it, choose another name, or ask to overwrite it (--overwrite)."
    )


def _swap(new, path):
    """Puts a folder in the place of another, which is removed last."""
    old = _sibling(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"{path} is replaced, but what was there could not be removed "
            f"from {old}: {error}",
            stacklevel=2,
        )


def write_files(folder, files, *, indent=2):
    """Writes small files.

    Args:
        folder: path.
        files: dict of relative path to bytes, or to a dict, written as JSON;
            None is left out.
        indent: int. Spaces of a level of JSON.
    """
    for name, content in files.items():
        if content is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content, indent=indent).encode()
        with new_file(path) as file:
            file.write(content)


def _sibling(path):
    # tempfile would create it private; a plain name honours the umask.
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
