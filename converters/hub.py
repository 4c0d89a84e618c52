"""`hf://owner/repo` -> a local folder, with errors that say what to do."""

import contextlib
import errno
import fnmatch
import hashlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from converters import flax_folder, kept
from converters.errors import CheckpointError
from converters.formats import FILES

PREFIX = "hf://"
SOURCE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(\S+))?")
# What a full disk, or a folder that is not the user's, answers.
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def local_folder(source):
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
    if not isinstance(source, str) or not source.startswith(PREFIX):
        return Path(source)
    match = SOURCE.fullmatch(source)
    if not match:
        raise CheckpointError(
            "A repository is written hf://owner/repo or "
            f"hf://owner/repo@revision. Received: {source!r}"
        )
    repo, revision = match[1], match[2] or constants.DEFAULT_REVISION
    with clear_errors(repo, revision):
        try:
            return _download(repo, revision)
        except errors.HTTPError:
            # What was downloaded before does as well.
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return Path(
                    huggingface_hub.snapshot_download(
                        repo, revision=revision, local_files_only=True
                    )
                )
            raise


def _download(repo, revision):
    info = huggingface_hub.HfApi().model_info(
        repo, revision=revision, files_metadata=True
    )
    files = {file.rfilename: file for file in info.siblings}
    if flax_folder.CONFIG in files:
        known = FILES["flax"]
    elif any(name.endswith(".h5") for name in files):
        known = FILES["keras"]
    else:
        known = FILES["safetensors"]
    names = [
        name
        for name in files
        if any(
            fnmatch.fnmatchcase(name, pattern)
            for pattern in (*known, kept.FILE_NAME)
        )
    ]
    folder = Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=names
        )
    )
    if folder.name != info.sha:
        raise ConnectionError(
            f"{repo}: {revision} changed during the download. Try again."
        )
    for name in names:
        check_digest(folder / name, files[name])
    return folder


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
def clear_errors(repo, revision, kind="model"):
    """Says what went wrong on the way from the Hub, and what to do.

    Args:
        repo: str, `"owner/name"`.
        revision: str.
        kind: str. What the repository holds.
    """
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
            f"{where} is not in the cache, and HF_HUB_OFFLINE forbids to "
            "download it. Unset HF_HUB_OFFLINE, or pass a folder that holds "
            f"the {kind}."
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
