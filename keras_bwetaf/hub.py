"""A repository of the Hugging Face Hub -> a local folder, once."""

import dataclasses
import errno
import shutil
from pathlib import Path
from urllib.parse import quote

import h5py
import huggingface_hub
import tokenizers
from filelock import FileLock
from huggingface_hub import constants

import converters
from converters.files import new_file
from converters.formats import FORMATS, find_format
from converters.hub import (
    cached_snapshot,
    clear_errors,
    download,
    likeliest,
    matching,
    resolve,
)
from keras_bwetaf.panics import clear_panics

# Loads slowly: a repository of it is converted to safetensors, once.
CONVERTED = "flax"
# What a cache answers that is read-only or full.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
}


def _assets(repo):
    """Where the converted models of a repository live, a folder a commit.

    The path is that of `huggingface_hub.cached_assets_path`, which would
    create the folder: a look-up must leave no trace, and a conversion ends
    with the folder's creation.
    """
    assets = Path(constants.HF_ASSETS_CACHE).expanduser()
    return assets / "keras-bwetaf" / repo.replace("/", "--")


def _pin(repo, revision):
    """The file that holds the commit of a revision that was loaded."""
    return _assets(repo) / "refs" / quote(revision, safe="")


def cached(repo, revision):
    """The folder that a revision was loaded from before; no network.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.

    Returns:
        Path of a folder, or None.
    """
    pin = _pin(repo, revision)
    if not pin.is_file():
        return None
    commit = pin.read_text()
    converted = _assets(repo) / commit
    if converted.is_dir():
        return converted
    snapshot = cached_snapshot(repo, commit)
    return snapshot if snapshot and _is_ready(snapshot) else None


def _is_ready(snapshot):
    """Whether a folder of the Hub's cache loads as it is."""
    names = {
        path.relative_to(snapshot).as_posix()
        for path in snapshot.rglob("*")
        if path.is_file()
    }
    return any(
        names.issuperset(layout.needed(names))
        for layout in FORMATS.values()
        if layout.name != CONVERTED
    )


def fetch(repo, revision, weights, check):
    """Downloads a revision; with weights, checks, converts and pins it.

    A cache that cannot be written does as well, if it holds all that is
    needed.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.
        weights: bool. `False` leaves the weights out.
        check: callable. Takes the folder before the weights are there, and
            raises a ValueError if it is not a model, or not the one that is
            wanted.

    Returns:
        Path of a folder.
    """
    pin = _pin(repo, revision)
    known = pin.read_text() if pin.is_file() else revision
    commit, files = resolve(
        repo, known, lambda names: not _missing(names, weights)
    )
    missing = _missing(files, weights)
    if missing and not _does_without(repo, known, commit, files, missing):
        raise FileNotFoundError(
            f"The repository {repo} does not hold a whole model. Missing: "
            f"{', '.join(missing)}. Its owner has to add them, or pass a "
            "folder that holds the model."
        )

    def fetched():
        return _download(repo, known, commit, files, weights, check)

    with clear_errors(repo, known):
        if not weights:
            return fetched()
        try:
            with _lock(repo):
                # Another process may have been faster.
                folder = cached(repo, commit) or _keep(repo, commit, fetched())
                for name in (commit, revision):
                    pin = _pin(repo, name)
                    pin.parent.mkdir(parents=True, exist_ok=True)
                    with new_file(pin) as file:
                        file.write(commit.encode())
                return folder
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
        return fetched()


def _missing(names, weights):
    """What a repository lacks of a whole model in the likeliest format."""
    needed = likeliest(names).needed(names, weights)
    return [name for name in needed if name not in names]


def _does_without(repo, revision, commit, files, missing):
    """Whether all that is missing is a tokenizer that is known."""
    layout = likeliest(files)
    if missing != [layout.tokenizer]:
        return False
    cached_before = _snapshot(repo, commit).exists()
    with clear_errors(repo, revision):
        folder = download(repo, revision, commit, files, [layout.config])
    try:
        is_known = layout.has_known_tokenizer(folder)
    except ValueError:  # It is no configuration.
        is_known = False
    if not (is_known or cached_before):
        _forget(repo, commit)
    return is_known


def _download(repo, revision, commit, files, with_weights, check):
    """Downloads and checks files.

    The optimizer's state, larger than the weights, is not among them. What
    turns out to be no model is removed, unless the user had it before.
    """
    cached_before = _snapshot(repo, commit).exists()
    layout = likeliest(files)
    weights = matching(files, layout.weights) if with_weights else []
    small = set(matching(files, [*layout.settings, *layout.heads]))
    small -= set(matching(files, layout.weights))
    try:
        # Weights come last: first it must be the model that is wanted.
        for batch in filter(None, (sorted(small), weights)):
            folder = download(repo, revision, commit, files, batch)
            check(folder)
            _check_content(folder, batch)
        if weights:
            check_weights(folder)
        return folder
    except ValueError:
        if not cached_before:
            _forget(repo, commit)
        raise


def check_weights(folder):
    """Reads and checks a model folder, but the values of its weights.

    Raises:
        ValueError: if a file is damaged or missing, or they do not fit.
    """
    find_format(folder).check_weights(folder)


def _keep(repo, commit, folder):
    """Converts a folder of the original's format, in which loading is slow."""
    if converters.detect_format(folder) != CONVERTED:
        return folder
    target = _assets(repo) / commit
    for leftover in target.parent.glob(".*.tmp"):
        shutil.rmtree(leftover)  # of a process that was killed
    converters.convert(folder, target, to="safetensors", optimizer=False)
    return target


def _check_content(folder, names):
    """Opens the files that are loaded as they are."""
    tokenizer = find_format(folder).tokenizer
    for name in names:
        try:
            if name == tokenizer:
                content = (folder / name).read_bytes()
                with clear_panics():
                    tokenizers.Tokenizer.from_buffer(content)
            elif name.endswith(".h5"):
                h5py.File(folder / name).close()
        except (OSError, ValueError) as error:
            kind = "tokenizer" if name == tokenizer else "HDF5"
            raise ValueError(
                f"{name}: expected a {kind} file. Received: {error}. The "
                "repository's owner has to upload it again, or pass another "
                "revision."
            ) from error


def _forget(repo, commit):
    """Removes a revision from the Hub's cache."""
    cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    own = frozenset(each for each in cache.repos if each.repo_id == repo)
    cache = dataclasses.replace(cache, repos=own)
    cache.delete_revisions(commit).execute()


def _hub_folder(repo):
    """Where the Hub's cache keeps a repository."""
    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")


def _snapshot(repo, commit):
    """Where the Hub's cache keeps a revision of it."""
    return _hub_folder(repo) / "snapshots" / commit


def _lock(repo):
    """One process at a time downloads and converts a repository."""
    hub_folder = _hub_folder(repo)
    folder = hub_folder.parent / ".locks" / hub_folder.name
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "keras-bwetaf.lock")
