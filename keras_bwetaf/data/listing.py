"""The list of a source's files: its digest, and what has changed."""

import contextlib
import gzip
import hashlib
import json
import zlib
from pathlib import Path

from converters.files import new_file

# Beside the index, which names no files: there may be any number.
FILE_NAME = "files.jsonl.gz"
MAX_NAMES = 3


def _content(files):
    return "".join(json.dumps(file) + "\n" for file in files).encode()


def summary(files):
    """What an index has of the files.

    Args:
        files: iterable of pairs of a name and a size or digest.

    Returns:
        dict with their number and a digest.
    """
    files = list(files)
    digest = hashlib.sha256(_content(files)).hexdigest()
    return {"num_files": len(files), "files_sha256": digest}


def write(folder, files):
    """Writes the list into a folder of packed tokens."""
    with new_file(Path(folder) / FILE_NAME) as file:
        file.write(gzip.compress(_content(files), mtime=0))


def _read(folder, source):
    """The files of a source as an index has it, or None."""
    if "files" in source:  # An earlier version listed them in the index.
        return list(source["files"].items())
    with contextlib.suppress(OSError, EOFError, ValueError, zlib.error):
        with gzip.open(Path(folder) / FILE_NAME) as file:
            files = list(map(json.loads, file))
        if summary(files).items() <= source.items():
            return files
    return None


def changes(folder, source, files):
    """Says how files differ from those that were packed.

    Args:
        folder: path. Of packed tokens.
        source: dict. What its index says of the source.
        files: list of pairs of a name and a size or digest.

    Returns:
        str of a few sentences, with a space at the end; empty if it is not
        known, or if the files are the same.
    """
    packed = _read(folder, source)
    if packed is None or list(map(list, files)) == list(map(list, packed)):
        return ""
    before, after = dict(packed), dict(files)
    names = {
        "New": [name for name in after if name not in before],
        "Missing": [name for name in before if name not in after],
        "Changed": [
            name
            for name in after
            if name in before and before[name] != after[name]
        ],
    }
    sentences = [
        f"{kind}: {shortened(names[kind])}. " for kind in names if names[kind]
    ]
    return "".join(sentences) or "The files are in another order. "


def shortened(names):
    """Names, or the first of them and how many others there are."""
    shown = ", ".join(
        repr(name if len(name) <= 60 else f"...{name[-57:]}")
        for name in names[:MAX_NAMES]
    )
    others = len(names) - MAX_NAMES
    return shown + (f" and {others:,} more" if others > 0 else "")
