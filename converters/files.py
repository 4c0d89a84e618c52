"""Files: bounded JSON in, and out only whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path

from converters.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


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
    return path.read_bytes()


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

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path):
    """Builds a folder that appears under its name only when it is complete.

    Args:
        path: str or path. Must not exist.

    Yields:
        Path of a temporary sibling folder to fill. It is removed if the
        block raises.

    Raises:
        CheckpointError: if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(
            f"{path}: the target exists already. Expected: a new folder. "
            "Remove it or choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_files(folder, files):
    """Writes small files.

    Args:
        folder: path.
        files: dict of relative path to bytes, or to a dict. Dicts are written
            as the original writes its JSON: two spaces, no newline at the
            end.
    """
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content, indent=2).encode()
        with new_file(path) as file:
            file.write(content)


def _sibling(path):
    # tempfile would create it private; a plain name honours the umask.
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
