"""Files of data sets on the Hugging Face Hub, or in its cache."""

import collections
import contextlib
import functools
import hashlib
import json
import warnings
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants

from converters.files import new_file, read_json
from converters.hub import (
    ask,
    cached_snapshot,
    check_digest,
    clear_errors,
    parse_data_set,
)
from keras_bwetaf.data import files

REPO_TYPE = "dataset"


def read_hub(source, description, column, errors):
    """Documents of files of a repository; files come when they are needed.

    Args:
        source: str, `"hf://datasets/owner/name/path"`.
        description: dict. What the user asked for.
        column: str.
        errors: str.

    Returns:
        `Documents`.
    """
    repo, revision, pattern = parse_data_set(source)
    commit, blob_ids, siblings = _resolve(repo, revision)
    names, skipped = _find(sorted(blob_ids), pattern)
    if not names:
        raise FileNotFoundError(
            f"{source}: no file of the repository matches. It holds, for "
            f"example, {sorted(blob_ids)[:5]}."
        )

    def download(name):
        with clear_errors(f"{repo}/{name}", revision, REPO_TYPE):
            path = huggingface_hub.hf_hub_download(
                repo, name, repo_type=REPO_TYPE, revision=commit
            )
            check_digest(Path(path), siblings.get(name))
        return path

    return files.read_files(
        [
            files.File(name, blob_ids[name], functools.partial(download, name))
            for name in names
        ],
        {**description, "commit": commit},
        skipped,
        column,
        errors,
    )


def _find(names, pattern):
    """As `files.find`, among the names of a repository's files."""
    skipped = collections.defaultdict(list)
    if pattern in names:
        return [pattern], skipped
    folder = pattern.rstrip("/") + "/"
    below = [name for name in names if name.startswith(folder)]
    if not below:
        parts = PurePosixPath(pattern).parts
        return [n for n in names if files.matches(n.split("/"), parts)], {}
    shown = []
    for name in below:
        is_hidden = "/." in name.removeprefix(folder[:-1])
        (skipped[files.HIDDEN] if is_hidden else shown).append(name)
    return files.choose(shown, skipped), skipped


def _resolve(repo, revision):
    """What a revision is; where the Hub gives no answer, from the cache.

    Returns:
        The commit; dict of the files' names to the IDs of their blobs; dict
        of the names to what else the Hub says of them, if it was asked.
    """
    try:
        info = ask(repo, revision, REPO_TYPE)
    except ConnectionError:
        known = _listed(repo, revision) or _cached(repo, revision)
        if known is None:
            raise
        return *known, {}
    siblings = {file.rfilename: file for file in info.siblings}
    blob_ids = {name: file.blob_id for name, file in siblings.items()}
    with contextlib.suppress(OSError):  # A cache that only is to be read.
        for name in (info.sha, revision):
            _keep_list(repo, name, info.sha, blob_ids)
    return info.sha, blob_ids, siblings


def _list_of(repo, revision):
    """The file with the list of a revision's files, which the cache lacks."""
    folder = f"datasets--{repo.replace('/', '--')}"
    assets = Path(constants.HF_ASSETS_CACHE, "keras-bwetaf").expanduser()
    return assets / folder / f"{quote(revision, safe='')}.json"


def _keep_list(repo, revision, commit, blob_ids):
    path = _list_of(repo, revision)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(json.dumps({"commit": commit, "files": blob_ids}).encode())


def _listed(repo, revision):
    path = _list_of(repo, revision)
    if not path.is_file():
        return None
    known = read_json(path)
    return known["commit"], known["files"]


def _cached(repo, revision):
    """What another program put into the Hub's cache does as well."""
    snapshot = cached_snapshot(repo, revision, repo_type=REPO_TYPE)
    if snapshot is None:
        return None
    blob_ids = {
        path.relative_to(snapshot).as_posix(): _blob_id(path)
        for path in snapshot.rglob("*")
        if path.is_file()
    }
    warnings.warn(
        f"{repo}: the Hub can't be reached, and the cache has no list of the "
        "repository's files, so those that it has are taken for all. "
        f"Received: {len(blob_ids)} files",
        stacklevel=5,
    )
    return snapshot.name, blob_ids


def _blob_id(path):
    """The ID of a file's blob in Git; of a large file, that of its pointer."""
    name = path.resolve().name
    if len(name) != 64:  # It is no SHA-256.
        return name
    pointer = (
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{name}\nsize {path.stat().st_size}\n"
    ).encode()
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
