"""`convert`: a model folder of one format -> a folder of another."""

from pathlib import Path

from converters import kept
from converters.checkpoint import FLOATS, STEP
from converters.errors import CheckpointError, refuse
from converters.files import local_path, new_folder
from converters.formats import (
    FORMATS,
    WRITE,
    detect_format,
    other_files,
    read_checkpoint,
)
from converters.hub import local_folder
from converters.mapped import DTYPES, non_finite

SAFETENSORS = ("safetensors", "torch")


def convert(
    source,
    target,
    *,
    to,
    dtype=None,
    max_shard_size=None,
    duplicate_head=False,
    optimizer=True,
    overwrite=False,
    progress=None,
):
    """Converts a model folder; no bit of a tensor changes unless asked for.

    The target appears when it is complete, and not at all on failure. What
    its format has no place for goes into `conversion_extras.json` there, and
    comes back on the way home. Tensors pass one at a time.

    Args:
        source: str or path. A folder of any format, or `"hf://owner/repo"`,
            with `"@revision"` at the end if need be.
        target: str or path. The folder to write.
        to: str. Its format: `"flax"`, `"safetensors"`, `"keras"`, `"torch"`.
        dtype: str, optional. Dtype of the written weights, such as
            `"bfloat16"`; the optimizer's state keeps its own. Defaults to
            each tensor's own.
        max_shard_size: int, optional. Bytes of tensors in one file of
            safetensors. Defaults to one file for all.
        duplicate_head: bool. Writes the head of a safetensors or PyTorch
            folder as a tensor of its own, which some tools want, although it
            is the embedding.
        optimizer: bool. Whether to convert the optimizer's state, if any.
        overwrite: bool. Whether a model folder may be replaced.
        progress: callable, optional. Takes the bytes done and the bytes in
            all, after each tensor.

    Returns:
        dict of `"source"`, `"from"`, `"target"`, `"to"`, the numbers of
        `"tensors"` and `"bytes"`, `"optimizer"` (bool), `"non_finite"`, a
        dict of tensor to the number of its values that are NaN or infinite,
        and `"left_behind"`, files of the source that are not its format's.

    Raises:
        CheckpointError: if the source is incomplete, damaged or cannot be
            expressed in the target's format, or the target exists.
        OSError: if files cannot be read or written, such as on a full disk.

    Example:

    ```python
    converters.convert("bwetaf-flax", "bwetaf-torch", to="torch")
    ```
    """
    folder = local_folder(source)
    options = dict(
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        duplicate_head=duplicate_head,
    )
    _check_options(**options)
    if local_path("target", target).resolve() in folder.resolve().parents:
        raise CheckpointError(
            f"{target}: the target holds the source. Choose another name."
        )
    layout = detect_format(folder)
    left_behind = other_files(folder, layout)
    report = write_checkpoint(
        read_checkpoint(folder, optimizer),
        target,
        **options,
        overwrite=overwrite,
        progress=progress,
    )
    return {
        "source": str(source),
        "from": layout,
        **report,
        "left_behind": left_behind,
    }


def write_checkpoint(
    checkpoint,
    target,
    *,
    to,
    dtype=None,
    max_shard_size=None,
    duplicate_head=False,
    overwrite=False,
    progress=None,
):
    """Writes a checkpoint, from `read_checkpoint` or of a live model.

    Args:
        checkpoint: `Checkpoint`.
        target: str or path. For it and the other arguments, see `convert`.

    Returns:
        dict, the part of what `convert` returns that is about the target.

    Raises:
        CheckpointError: As `convert`.
    """
    target = local_path("target", target)
    _check_options(to, dtype, max_shard_size, duplicate_head)
    if overwrite:
        _check_target(target)
    if dtype is not None:
        checkpoint = checkpoint.cast(DTYPES[dtype])
    tensors = checkpoint.tensors | (checkpoint.optimizer or {})
    total = sum(tensor.nbytes for tensor in tensors.values())
    done, infinite = 0, {}

    def read(name):
        array = tensors[name].array()
        if name != STEP and (count := non_finite(array, tensors[name].dtype)):
            _check_overflow(name, tensors[name], count)
            infinite[name] = count
        return array

    def finish(name):
        nonlocal done
        tensors[name].release()
        done += tensors[name].nbytes
        if progress:
            progress(done, total)

    options = {}
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    if duplicate_head:
        options["duplicate_head"] = True
    with new_folder(target, replace=overwrite) as folder:
        WRITE[to](folder, checkpoint, read, finish, **options)
        _check_written(folder, checkpoint.source)
        if overwrite:
            _check_target(target)  # Nothing may have come in the meantime.
    return {
        "target": str(target),
        "to": str(to),
        "tensors": len(tensors),
        "bytes": total,
        "optimizer": checkpoint.optimizer is not None,
        "non_finite": infinite,
    }


def _check_written(folder, source):
    """What a side file brings along may leave a folder that nobody reads."""
    try:
        read_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source}: what would be written cannot be read. If there is a "
            f"{kept.FILE_NAME}, remove it to go on without it. {error}"
        ) from error


def _check_options(to, dtype, max_shard_size, duplicate_head):
    problems = []
    if to not in FORMATS:
        problems.append(
            f"`to` must be one of {', '.join(FORMATS)}. Received: {to!r}"
        )
    if dtype is not None and dtype not in FLOATS:
        problems.append(
            f"`dtype` must be one of {', '.join(FLOATS)}. Received: {dtype!r}"
        )
    if max_shard_size is not None and (
        type(max_shard_size) is not int or max_shard_size <= 0
    ):
        problems.append(
            "`max_shard_size` must be a positive number of bytes. Received: "
            f"{max_shard_size!r}"
        )
    if (max_shard_size is not None or duplicate_head) and (
        to not in SAFETENSORS
    ):
        problems.append(
            "`max_shard_size` and `duplicate_head` are for "
            f"{' and '.join(SAFETENSORS)} only. Received: to={to!r}"
        )
    refuse("cannot convert", problems)


def _check_target(target):
    """Nothing is replaced but a model folder with nothing else in it."""
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise CheckpointError(
            f"{target}: the target is the working directory. Expected: "
            "another folder. Change to its parent first."
        )
    others = other_files(target) if target.is_dir() else []
    if others:
        raise CheckpointError(
            f"{target}: the target holds what is not part of a model and "
            "would be lost. Move it away, or choose another name. Received: "
            f"{', '.join(others[:10])}{', ...' if len(others) > 10 else ''}"
        )
    if not target.is_dir() or any(target.iterdir()):
        detect_format(target)  # raises if it is no model


def _check_overflow(name, tensor, count):
    """A cast must not make a number infinite."""
    lost = count - non_finite(tensor.array())
    if lost:
        raise CheckpointError(
            f"{tensor.dtype.name} cannot hold {lost} values of {name}, which "
            "would become infinite. Choose another dtype, such as bfloat16."
        )
