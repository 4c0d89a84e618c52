"""Which files a path, folder or glob names, and their documents in a row."""

import collections
import fnmatch
import functools
import glob
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from keras_bwetaf.data import formats, listing
from keras_bwetaf.data.documents import Documents

HIDDEN = "hidden"
OTHER_FORMAT = "of another format"
LINKED = "links to folders that are read already"
NO_FILE = "no file"


class File(NamedTuple):
    """Attributes:

    name: str. For messages and the index.
    identity: int or str. The size, or a digest, by which a change is seen.
    locate: function without arguments that returns the path, called when
        the file is needed.
    """

    name: str
    identity: int | str
    locate: Callable


def printable(name):
    """A name of a file, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def matches(path, pattern):
    """Whether a glob takes a path, as `glob.glob(recursive=True)` does.

    Args:
        path: sequence of str. Names of folders, and of the file.
        pattern: sequence of str, the pattern's parts. `**` stands for any
            number of folders, and all other wildcards stay within a part.

    Returns:
        bool. No wildcard takes a name that begins with a dot.
    """
    if not path or not pattern:
        return not path and not pattern
    (name, *names), (part, *parts) = path, pattern
    is_shown = not name.startswith(".")
    if part == "**" and not parts:  # The file's own name is one of them.
        return is_shown and (not names or matches(names, pattern))
    if part == "**":
        return matches(path, parts) or (is_shown and matches(names, pattern))
    return (
        (is_shown or part.startswith("."))
        and fnmatch.fnmatchcase(name, part)
        and matches(names, parts)
    )


def choose(paths, skipped):
    """Leaves out files of a folder that are of another format.

    Args:
        paths: iterable of str.
        skipped: dict of lists, to which they are added.

    Returns:
        list of str.
    """
    chosen = []
    for path in paths:
        if formats.reader(path) is None:
            skipped[OTHER_FORMAT].append(path)
        else:
            chosen.append(path)
    return chosen


def find(source):
    """The files of a path, a folder or a glob.

    Args:
        source: str.

    Returns:
        Pair of a sorted list of paths and a dict of what is left out, by
        reason.
    """
    skipped = collections.defaultdict(list)
    if os.path.isfile(source):
        return [source], skipped
    if os.path.isdir(source):
        paths = choose(_walk(source, skipped), skipped)
    else:
        paths = _glob(source, skipped)
    return sorted(Path(path).as_posix() for path in paths), skipped


def _glob(source, skipped):
    parts = Path(source).parts
    if "**" not in parts:
        return [path for path in glob.glob(source) if os.path.isfile(path)]
    number = parts.index("**")
    tops = glob.glob(os.path.join(*parts[:number])) if number else ["."]
    rest = parts[number:]
    with_hidden = any(part.startswith(".") for part in rest)
    return [
        path
        for top in filter(os.path.isdir, tops)
        for path in _walk(top, skipped, with_hidden)
        if matches(Path(path).relative_to(top).parts, rest)
    ]


def _walk(top, skipped, with_hidden=False):
    """Finds the files below a folder, and in linked folders, in each once.

    Args:
        top: str.
        skipped: dict of lists, to which the names of all else are added.
        with_hidden: bool. Whether hidden files and folders are among them.

    Returns:
        list of str.
    """
    paths, seen, tops = [], set(), [top]
    for each in tops:  # Links are added, so that what is no link goes first.
        for folder, folders, names in os.walk(each, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:
                skipped[LINKED].append(folder)
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            if not with_hidden:
                folders[:] = _shown(folder, folders, skipped)
                names = _shown(folder, names, skipped)
            for path in (os.path.join(folder, name) for name in folders):
                if os.path.islink(path):
                    (skipped[LINKED] if _is_circle(path) else tops).append(path)
            for path in (os.path.join(folder, name) for name in names):
                (paths if os.path.isfile(path) else skipped[NO_FILE]).append(
                    path
                )
    return paths


def _raise(error):
    raise error


def _shown(folder, names, skipped):
    """The names that are not hidden."""
    hidden = {name for name in names if name.startswith(".")}
    skipped[HIDDEN] += [os.path.join(folder, name) for name in sorted(hidden)]
    return [name for name in names if name not in hidden]


def _is_circle(link):
    """Whether a link leads to a folder that it lies in."""
    place = Path(os.path.realpath(os.path.dirname(link)))
    return place.is_relative_to(os.path.realpath(link))


def read_local(paths, description, skipped, column, errors):
    """Documents of files on this machine.

    Args:
        paths: list of str.
        description: dict.
        skipped: dict. See `Documents`.
        column: str.
        errors: str.

    Returns:
        `Documents`.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Expected a file. Received: {path!r}")
    files = [
        File(
            printable(path),
            os.path.getsize(path),
            functools.partial(os.fspath, path),
        )
        for path in paths
    ]
    return read_files(files, description, skipped, column, errors)


def read_files(files, description, skipped, column, errors):
    """Documents of files, one file after the other.

    Args:
        files: list of `File`.
        description: dict. What the user asked for.
        skipped: dict. See `Documents`.
        column: str.
        errors: str.

    Returns:
        `Documents`.
    """
    for file in files:
        if formats.reader(file.name) is None:
            raise ValueError(
                f"{file.name}: expected a file in one of the formats "
                f"{sorted(formats.FORMATS)}. Received: one with the suffix "
                f"{PurePosixPath(file.name).suffix!r}"
            )

    def read(start):
        for file in files:
            count, rows = formats.reader(file.name)
            path = file.locate()
            num_rows = count(path, file.name) if start else None
            if num_rows is not None and start >= num_rows:
                start -= num_rows
                continue
            yield from rows(path, file.name, column, start, errors)
            start = 0

    listed = [(file.name, file.identity) for file in files]
    kinds = [formats.reader(file.name) for file in files]
    return Documents(
        lambda: {**description, "column": column, **listing.summary(listed)},
        read,
        errors,
        num_documents=1 if kinds == [formats.ONE_DOCUMENT] else None,
        files=listed,
        skipped={
            reason: [printable(name) for name in names]
            for reason, names in skipped.items()
            if names
        },
    )
