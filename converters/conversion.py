"""`convert`: a model folder of one format -> a folder of another."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters import kept
from converters.checkpoint import FLOATS, STEP, Checkpoint, Float
from converters.errors import CheckpointError, refuse
from converters.files import local_path, new_folder
from converters.formats import (
    FORMATS,
    FormatName,
    find_format,
    other_files,
)
from converters.hub import local_folder
from converters.mapped import DTYPES, View, non_finite

Progress = Callable[[int, int], Any]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: FormatName,
    dtype: Float | None = None,
    max_shard_size: int | None = None,
    duplicate_head: bool = False,
    optimizer: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
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
    layout = find_format(folder)
    left_behind = other_files(folder, layout)
    report = write_checkpoint(
        layout.read(folder, optimizer),
        target,
        **options,
        overwrite=overwrite,
        progress=progress,
    )
    return {
        "source": str(source),
        "from": layout.name,
        **report,
        "left_behind": left_behind,
    }


def write_checkpoint(
    checkpoint: Checkpoint,
    target: str | os.PathLike,
    *,
    to: FormatName,
    dtype: Float | None = None,
    max_shard_size: int | None = None,
    duplicate_head: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
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
    watch = _Watch(checkpoint, progress)
    watched = watch.each(checkpoint)
    options = {}
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    if duplicate_head:
        options["duplicate_head"] = True
    with new_folder(target, replace=overwrite) as folder:
        FORMATS[to].write(folder, watched, **options)
        _check_written(folder, FORMATS[to], checkpoint.source)
        if overwrite:
            _check_target(target)  # Nothing may have come in the meantime.
    return {
        "target": str(target),
        "to": str(to),
        "tensors": len(watch.sizes),
        "bytes": watch.total,
        "optimizer": checkpoint.optimizer is not None,
        "non_finite": watch.non_finite,
    }


class _Watch:
    """Looks at each tensor of a checkpoint when it is read.

    It does not keep the checkpoint: mapped files close with the last tensor,
    and not when Python finds a circle of objects.

    Args:
        checkpoint: `Checkpoint`.
        progress: callable or None. See `convert`.

    Attributes:
        sizes: dict of name to bytes, of every tensor.
        total: int. Bytes in all.
        non_finite: dict of name to the number of values that are NaN or
            infinite, of the tensors read so far.
    """

    def __init__(self, checkpoint, progress):
        tensors = checkpoint.tensors | (checkpoint.optimizer or {})
        self.sizes = {name: each.nbytes for name, each in tensors.items()}
        self.total = sum(self.sizes.values())
        self.non_finite = {}
        self._done = set()
        self._progress = progress

    def each(self, checkpoint):
        """The checkpoint with tensors that tell of their reading."""
        weights, state = (
            tensors
            and {
                name: _Watched(
                    each.mapped, each.transforms, each.dtype, name, self
                )
                for name, each in tensors.items()
            }
            for tensors in (checkpoint.tensors, checkpoint.optimizer)
        )
        return replace(checkpoint, tensors=weights, optimizer=state)

    def look(self, name, tensor, array):
        """Counts values that are NaN or infinite; refuses an overflow."""
        if name != STEP and (count := non_finite(array, tensor.dtype)):
            _check_overflow(name, tensor, count)
            self.non_finite[name] = count

    def finish(self, name):
        """Tells the progress. A tensor may be written twice."""
        if name not in self._done:
            self._done.add(name)
            if self._progress:
                done = sum(self.sizes[each] for each in self._done)
                self._progress(done, self.total)


@dataclass(frozen=True)
class _Watched(View):
    """A `View` that tells a `_Watch` of its reading."""

    name: str = None
    watch: _Watch = None

    @contextlib.contextmanager
    def open(self):
        with super().open() as array:
            self.watch.look(self.name, self, array)
            yield array
        self.watch.finish(self.name)


def _check_written(folder, layout, source):
    """Reads the new folder, which the side file may have spoilt."""
    try:
        if not layout.recognizes(folder):
            raise CheckpointError(f"Expected {layout.sign}.")
        layout.read(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source}: what would be written cannot be read. If there is a "
            f"{kept.FILE_NAME}, remove it to go on without it. {error}"
        ) from error


def _check_options(to, dtype, max_shard_size, duplicate_head):
    problems = []
    if to not in tuple(FORMATS):  # A list, say, is no key.
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
    if max_shard_size is not None or duplicate_head:
        able = [each.name for each in FORMATS.values() if each.options]
        if to not in able:
            problems.append(
                "`max_shard_size` and `duplicate_head` are for "
                f"{' and '.join(able)} only. Received: to={to!r}"
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
        find_format(target)  # raises if it is no model


def _check_overflow(name, tensor, count):
    """A cast must not make a number infinite."""
    lost = count - non_finite(tensor.array())
    if lost:
        raise CheckpointError(
            f"{tensor.dtype.name} cannot hold {lost} values of {name}, which "
            "would become infinite. Choose another dtype, such as bfloat16."
        )
