"""Folders that cannot be written, not even by root."""

import contextlib
import errno
import functools
import os
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {
    f"os.{name}"
    for name in ("link", "mkdir", "remove", "rename", "rmdir", "symlink")
}
_folders = []


@functools.cache
def _watch():
    """Python calls the hook before it opens or changes a file, for ever."""
    sys.addaudithook(_refuse)


def _refuse(event, arguments):
    if not _folders:
        return
    if event == "open" and not arguments[2] & WRITING:
        return
    if event != "open" and event not in CHANGES:
        return
    for each in arguments:
        if isinstance(each, (str, os.PathLike)):
            path = os.path.abspath(each)
            if any(path.startswith(folder + os.sep) for folder in _folders):
                raise OSError(errno.EROFS, "Read-only file system", path)


@contextlib.contextmanager
def read_only(folder):
    """Makes a folder read-only for this process.

    Args:
        folder: path.
    """
    _watch()
    _folders.append(os.path.abspath(folder))
    try:
        yield
    finally:
        _folders.pop()
