"""`hf://owner/repo` -> a local folder, with errors that say what to do.

All that is written `hf://` is parsed, asked for, downloaded and checked here.
"""

import contextlib
import errno
import fnmatch
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants, errors

from converters import kept
from converters.errors import CheckpointError
from converters.files import ADDRESS
from converters.format import Format
from converters.formats import FORMATS, KNOWN

SCHEME = "hf://"
NAME = r"[\w.-]+/[\w.-]+"
REPOSITORY = re.compile(rf"{SCHEME}({NAME})(?:@(\S+))?", re.IGNORECASE)
DATA_SET = re.compile(
    rf"{SCHEME}datasets/({NAME})(?:@([^/\s]+))?/(.+)", re.IGNORECASE
)
PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)({NAME})"
    r"(?:/(?:tree|blob)/([^/\s]+))?.*",
    re.IGNORECASE,
)
# What a full disk, or a folder that is not the user's, answers.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def parse_source(name, source):
    """Tells a repository of the Hub from a path.

    Args:
        name: str. The argument's, for messages.
        source: str or path.

    Returns:
        `(repository, revision)`, the revision None where the address has
        none; or None for a path.

    Raises:
        CheckpointError: if it is another address, or looks like a repository.
    """
    text = os.fspath(source)
    if match := REPOSITORY.fullmatch(text):
        return match.groups()
    if page := PAGE.fullmatch(text):
        expected = SCHEME + "@".join(filter(None, page.groups()))
    elif re.fullmatch(NAME, text) and not os.path.exists(text):
        expected = f"an existing folder, or hf://{text}"
    elif ADDRESS.match(text):
        expected = (
            "a folder of this machine, to which other files have to be "
            "downloaded first, or a repository of the Hub. This is written "
            "hf://owner/repo or hf://owner/repo@revision, where the revision "
            "is a branch, tag or commit of hf://owner/repo"
        )
    else:
        return None
    raise CheckpointError(f"Expected {expected}. Received: {name}={text!r}")


class DataSet(NamedTuple):
    """Files of a repository of a data set.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.
        pattern: str. A path in the repository, or a glob.
    """

    repo: str
    revision: str
    pattern: str


def is_address(source: str) -> bool:
    """Whether a source is written as one of the Hub."""
    return source[: len(SCHEME)].lower() == SCHEME


def parse_data_set(source: str) -> DataSet:
    """Reads the address of files of a data set.

    Args:
        source: str, `"hf://datasets/owner/name/path"`, where `@revision` may
            follow the name. A slash of the revision is written `%2F`.

    Returns:
        `DataSet`.

    Raises:
        ValueError: if it is another address.
    """
    match = DATA_SET.fullmatch(source)
    if not match:
        raise ValueError(
            "A data set of the Hub is written hf://datasets/owner/name/path "
            "or hf://datasets/owner/name@revision/path, where the path may "
            f"be a glob. Received: {source!r}"
        )
    repo, revision, pattern = match.groups()
    revision = unquote(revision or constants.DEFAULT_REVISION)
    return DataSet(repo, revision, pattern)


def local_folder(source: str | os.PathLike) -> Path:
    """The folder of a source, downloaded into the Hub's cache if need be.

    Args:
        source: str or path. A folder, or `"hf://owner/repo"`, with
            `"@revision"` at the end if need be.

    Returns:
        A `Path`.

    Raises:
        CheckpointError: if the source is not written like that, or a
            download is damaged.
        FileNotFoundError: if the repository or revision does not exist.
        PermissionError: if it needs a login.
        ConnectionError: if it is not in the cache and cannot be reached.
        OSError: if the cache cannot be written.
    """
    repository = parse_source("source", source)
    if repository is None:
        return Path(source)
    repo, revision = repository
    revision = revision or constants.DEFAULT_REVISION
    code = {name for each in FORMATS.values() for name in each.code}
    needed = KNOWN - code  # Other programs may leave it out.
    commit, files = resolve(
        repo,
        revision,
        lambda _: cached_snapshot(repo, revision, needed) is not None,
    )
    names = matching(files, [*likeliest(files).files, kept.FILE_NAME])
    with clear_errors(repo, revision):
        return download(repo, revision, commit, files, names)


def likeliest(names) -> Format:
    """The format of which a repository holds most of the needed files.

    Args:
        names: collection of str. The files of the repository.

    Returns:
        `Format`.
    """
    return max(
        FORMATS.values(),
        key=lambda each: len({*each.needed(names)}.intersection(names)),
    )


def resolve(repo, revision, suffices):
    """The commit of a revision, and its files.

    Where the Hub gives no answer, what was downloaded before does as well.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.
        suffices: callable. Takes the names of the files in the cache, and
            tells whether they are all that is needed.

    Returns:
        Two values: str, and dict of name to what the Hub says of a file, or
        to None for one in the cache.

    Raises:
        As `local_folder`.
    """
    try:
        info = ask(repo, revision)
    except OSError:
        snapshot = cached_snapshot(repo, revision)
        files = {
            path.relative_to(snapshot).as_posix(): None
            for path in (snapshot.rglob("*") if snapshot else ())
            if path.is_file()
        }
        if not files or not suffices(files):
            raise
        return snapshot.name, files
    return info.sha, {file.rfilename: file for file in info.siblings}


def ask(repo, revision, repo_type="model"):
    """What the Hub says of a revision and its files.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.
        repo_type: str. `"model"` or `"dataset"`.

    Returns:
        An object with `sha`, the commit, and `siblings`, the files.

    Raises:
        As `local_folder`.
    """
    with clear_errors(repo, revision, repo_type):
        return huggingface_hub.HfApi().repo_info(
            repo, revision=revision, repo_type=repo_type, files_metadata=True
        )


def cached_snapshot(repo, revision, patterns=(), repo_type="model"):
    """The folder of a revision in the Hub's cache; no network.

    Args:
        repo, revision, repo_type: See `ask`.
        patterns: collection of str. Files that have to be there, as far as
            it is known that the repository has them.

    Returns:
        Path of a folder, or None.
    """
    with contextlib.suppress(errors.LocalEntryNotFoundError):
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        )


def download(repo, revision, commit, files, names):
    """Downloads and checks files, as far as they are not in the cache.

    Args:
        repo: str, `"owner/name"`.
        revision: str. Branch, tag or commit.
        commit, files: What `resolve` returned.
        names: list of str, out of `files`.

    Returns:
        Path of the folder in the Hub's cache.

    Raises:
        ValueError: if a download is corrupt.
        ConnectionError: if the revision is another commit by now.
        OSError: what `clear_errors` makes clear.
    """
    folder = Path(
        huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=names,
            # Where the Hub gave no answer, it is not asked again.
            local_files_only=not any(files.values()),
        )
    )
    if folder.name != commit:
        raise ConnectionError(
            f"{repo}: {revision} changed during the download. Try again."
        )
    for name in names:
        check_digest(folder / name, files[name])
    return folder


def matching(names, patterns):
    """Those of some names that match a pattern."""
    return [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, each) for each in patterns)
    ]


def check_digest(path, file):
    """Compares a file with what the Hub says of it, if it was asked.

    A file that differs is removed: the next attempt downloads it again.
    """
    if file is None:
        return
    with path.open("rb") as content:
        if file.lfs is not None:
            expected = file.lfs.sha256
            received = hashlib.file_digest(content, "sha256").hexdigest()
        else:
            expected = file.blob_id
            data = content.read()
            header = b"blob %d\0" % len(data)
            received = hashlib.sha1(header + data).hexdigest()
    if received != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{file.rfilename}: the download is corrupt and was removed. "
            f"Expected: digest {expected}. Received: {received}. Try again."
        )


@contextlib.contextmanager
def clear_errors(repo, revision, repo_type="model"):
    """Says what went wrong on the way from the Hub, and what to do.

    Args:
        repo: str, `"owner/name"`; the name of a file may follow.
        revision: str.
        repo_type: str. See `ask`.
    """
    kind = {"dataset": "data set"}.get(repo_type, repo_type)
    try:
        yield
    except (errors.HTTPError, OSError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            error = error.__cause__ or error
        raise _explain(error, repo, revision, kind) from error


def _explain(error, repo, revision, kind):
    where = f"{repo} (revision {revision}, {constants.ENDPOINT})"
    response = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{where} is gated. Accept its terms on its page, then {LOGIN}, "
            "as somebody who has access."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{where} does not exist, or is private. Check its name; if it is "
            f"private, {LOGIN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{where}: the repository has no such revision. Pass a branch, a "
            "tag or a commit that it has."
        )
    if response is not None and response.status_code in (401, 403):
        return PermissionError(
            f"{where} refuses access with status {response.status_code}. "
            f"To use another account or token, {LOGIN}."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{where} is not in the cache, or not all of it, and "
            "HF_HUB_OFFLINE forbids to download it. Unset HF_HUB_OFFLINE, or "
            f"pass a folder that holds the {kind}."
        )
    if response is not None:
        return ConnectionError(
            f"{where} answers with status {response.status_code}. Try again "
            "later."
        )
    if isinstance(error, errors.HTTPError):
        return ConnectionError(
            f"{where} cannot be reached: {error}. Check the network, or pass "
            f"a folder that holds the {kind}. Once downloaded, a {kind} loads "
            "without the network."
        )
    if error.errno in DISK_ERRORS:
        return OSError(
            error.errno,
            f"{error.strerror}. Cannot write the cache. Free space, or set "
            "HF_HOME to a folder that can be written",
            error.filename,
        )
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return ConnectionError(
        f"{where}: the download is incomplete. {reason}. Try again."
    )
