"""The index of a folder of packed tokens, `index.json`."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from converters.errors import CheckpointError
from converters.files import new_file, read_json
from keras_bwetaf.data.worker import SPLITS

FILE_NAME = "index.json"
VERSION = 1
DTYPES = ("uint16", "uint32")
SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.bin")


def shard_name(split, number):
    """The file of a shard."""
    return f"{split}-{number:05d}.bin"


def tokenizer_digest(tokenizer):
    """The SHA-256 of a tokenizer file, however its JSON is laid out.

    Args:
        tokenizer: `BwETAFTokenizer`.

    Returns:
        str of hexadecimal digits.
    """
    content = json.dumps(json.loads(tokenizer.content), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_index(folder):
    """Reads an index and checks its structure.

    Args:
        folder: path.

    Returns:
        dict.

    Raises:
        ValueError: If it is missing or is no index of this version.
    """
    path = Path(folder) / FILE_NAME
    try:
        index = read_json(path)
    except CheckpointError as error:
        if not path.is_file():
            raise
        raise ValueError(
            f"{error} Or pack the source again, with overwrite=True."
        ) from error
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected version {VERSION} of packed tokens. Received: "
            f"version={index.get('version')!r}. Pack the source again."
        )
    if not _is_sound(index):
        raise ValueError(
            f"{path}: expected an index as `pack` writes it. Received: one "
            "in which entries are missing or of another type. Pack the "
            "source again, with overwrite=True."
        )
    return index


def _is_sound(index):
    try:
        return (
            isinstance(index["complete"], bool)
            and isinstance(index["source"], dict)
            and isinstance(index["tokenizer_sha256"], str)
            and index["dtype"] in DTYPES
            and 0 <= index["end_token_id"] < index["vocabulary_size"]
            and index["vocabulary_size"] - 1 <= np.iinfo(index["dtype"]).max
            and all(
                shard["documents"] >= 0
                and shard["empty_documents"] >= 0
                and shard["bytes"] >= 0
                and all(
                    SHARD.fullmatch(part["file"])
                    and split in SPLITS
                    and isinstance(part["sha256"], str)
                    and part["tokens"] > 0
                    and part["documents"] > 0
                    for split, part in shard["splits"].items()
                )
                for shard in index["shards"]
            )
        )
    except (KeyError, TypeError, AttributeError):
        return False


def write_index(folder, index):
    """Replaces an index at once."""
    with new_file(Path(folder) / FILE_NAME) as file:
        file.write(json.dumps(index, indent=2).encode() + b"\n")


def damage(path, part, dtype, *, verify):
    """What is wrong with the file of a shard.

    Args:
        path: path.
        part: dict. Its entry in the index.
        dtype: str.
        verify: bool. Whether to read it and compare its digest.

    Returns:
        str, or None if nothing is.
    """
    path = Path(path)
    if not path.is_file():
        return "the file is missing"
    expected = part["tokens"] * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        return f"expected {expected} bytes. Received: {path.stat().st_size}"
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != part["sha256"]:
            return f"expected SHA-256 {part['sha256']}. Received: {digest}"
    return None
