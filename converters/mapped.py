"""Tensors that lie in a memory-mapped file."""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError

DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, repr=False)
class MappedTensor:
    """A tensor that stays in its file until it is asked for.

    Args:
        buffer: mmap.mmap of the whole file.
        dtype: numpy dtype.
        shape: tuple of int.
        segments: tuple of (offset, number of bytes), one for each piece of
            the tensor, in order.
    """

    buffer: mmap.mmap
    dtype: np.dtype
    shape: tuple
    segments: tuple

    @property
    def nbytes(self):
        return sum(length for _, length in self.segments)

    def array(self):
        """Returns the values: a read-only view, or a copy of the pieces."""
        if len(self.segments) == 1:
            offset = self.segments[0][0]
            return np.ndarray(self.shape, self.dtype, self.buffer, offset)
        pieces = [
            np.frombuffer(
                self.buffer, self.dtype, length // self.dtype.itemsize, offset
            )
            for offset, length in self.segments
        ]
        return np.concatenate(pieces).reshape(self.shape)

    def release(self):
        """Gives the tensor's memory back; views read the file again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        for offset, length in self.segments:
            start = -(-offset // page) * page
            end = (offset + length) // page * page
            if start < end:
                self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)


def map_file(path):
    """Maps a file into memory for reading.

    Args:
        path: str or path.

    Returns:
        mmap.mmap. It closes when the last tensor that uses it goes.

    Raises:
        CheckpointError: if the file is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the file is missing. Expected: the model's weights."
        )
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path}: the file is empty. Fetch or export it again."
        )
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def byte_count(shape, dtype):
    """Bytes of a tensor, or None where no machine could hold it."""
    if math.prod(max(size, 1) for size in shape) > 2**48 or len(shape) > 32:
        return None
    return math.prod(shape) * dtype.itemsize


def raw_bytes(array):
    """The array's values in row-major order, as something to write."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
