"""Tensors that lie in a memory-mapped file."""

import contextlib
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.files import check_is_content
from converters.transforms import view, view_shape

# Of a pass over a tensor, however large it is.
BLOCK_BYTES = 16 * 2**20
DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class MappedFile(mmap.mmap):
    """A file in memory, which knows its name."""

    path = None

    def check_size(self):
        """Looks whether the file is as long as it was.

        Reading beyond a file's end would end the process.

        Raises:
            CheckpointError: if it is shorter.
        """
        if self.size() < len(self):
            raise CheckpointError(
                f"{self.path}: the file was cut short while it was read. "
                f"Expected: {len(self)} bytes. Received: {self.size()}. Fetch "
                "or export it again."
            )


@dataclass(frozen=True, repr=False)
class MappedTensor:
    """A tensor that stays in its file until it is asked for.

    Args:
        buffer: `MappedFile`, the whole file.
        dtype: numpy dtype.
        shape: tuple of int.
        segments: tuple of (offset, number of bytes), one for each piece of
            the tensor, in order.
    """

    buffer: MappedFile
    dtype: np.dtype
    shape: tuple
    segments: tuple

    @property
    def nbytes(self):
        return sum(length for _, length in self.segments)

    def array(self):
        """Returns the values: a read-only view, or a copy of the pieces."""
        self.buffer.check_size()
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


@dataclass(frozen=True)
class View:
    """A tensor in another layout and, when written, of another dtype.

    What writes a tensor needs its `dtype`, its `shape` and `open()` only.

    Args:
        mapped: `MappedTensor`, or what has a shape, a dtype, an `array()`
            and a `release()`, too.
        transforms: tuple of transforms, see `converters.transforms`.
        dtype: numpy dtype to write it in. Defaults to the tensor's own.
    """

    mapped: MappedTensor
    transforms: tuple = ()
    dtype: np.dtype = None

    def __post_init__(self):
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.mapped.dtype)

    @property
    def shape(self):
        return view_shape(self.transforms, self.mapped.shape)

    @property
    def nbytes(self):
        return byte_count(self.shape, self.dtype)

    def array(self):
        """Returns the values in their own dtype; may be a view of the file."""
        return view(self.transforms, self.mapped.array())

    @contextlib.contextmanager
    def open(self):
        """Yields what `array` returns; gives the memory back at the end."""
        try:
            yield self.array()
        finally:
            self.mapped.release()


@dataclass(frozen=True)
class Held:
    """An array in memory in the place of a `MappedTensor`.

    Args:
        values: numpy array.
    """

    values: np.ndarray

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def shape(self):
        return self.values.shape

    def array(self):
        return self.values

    def release(self):
        pass


def map_file(path):
    """Maps a file into memory for reading.

    Args:
        path: str or path.

    Returns:
        `MappedFile`. It closes when the last tensor that uses it goes.

    Raises:
        CheckpointError: if the file is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the file is missing. Expected: the model's weights. "
            "Fetch or export it again."
        )
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path}: the file is empty. Fetch or export it again."
        )
    with open(path, "rb") as file:
        buffer = MappedFile(file.fileno(), 0, access=mmap.ACCESS_READ)
    buffer.path = path
    check_is_content(path, buffer[:64])
    return buffer


def byte_count(shape, dtype):
    """Bytes of a tensor, or None where no machine could hold it."""
    if math.prod(max(size, 1) for size in shape) > 2**48 or len(shape) > 32:
        return None
    return math.prod(shape) * dtype.itemsize


def blocks(array, dtype=None):
    """The values of an array in row-major order, some megabytes at a time.

    Args:
        array: numpy array of any shape and layout.
        dtype: numpy dtype to convert them to. Defaults to the array's own.

    Yields:
        numpy arrays `(length,)`, contiguous.
    """
    dtype = array.dtype if dtype is None else dtype
    rows = array.reshape(1) if array.ndim == 0 else array
    width = max(1, math.prod(rows.shape[1:]) * rows.itemsize)
    step = max(1, BLOCK_BYTES // width)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        with np.errstate(over="ignore", invalid="ignore"):
            block = np.ascontiguousarray(block, dtype)
        yield block.ravel()


def non_finite(array, dtype=None):
    """How many values of an array are NaN or infinite.

    Looks at the exponent's bits, which is faster than `numpy.isfinite` where
    a dtype is not NumPy's own.

    Args:
        array: numpy array of floats.
        dtype: numpy dtype to convert them to first. Defaults to their own.
    """
    count = 0
    for block in blocks(array, dtype):
        info = ml_dtypes.finfo(block.dtype)
        bits = block.view(f"uint{info.bits}")
        exponent = bits.dtype.type((2**info.nexp - 1) << info.nmant)
        count += np.count_nonzero((bits & exponent) == exponent)
    return int(count)


def different(left, right):
    """How many values of two arrays differ in a bit.

    Args:
        left, right: numpy arrays of one shape and dtype.
    """
    return sum(
        np.count_nonzero(
            (as_bytes(one) != as_bytes(two))
            .reshape(-1, left.itemsize)
            .any(axis=-1)
        )
        for one, two in zip(blocks(left), blocks(right), strict=True)
    )


def as_bytes(block):
    """A contiguous array of one axis as uint8."""
    return block.view(np.uint8)


def write_tensor(file, tensor):
    """Writes a tensor's values in row-major order, in its dtype.

    Args:
        file: binary file.
        tensor: `View`.
    """
    with tensor.open() as array:
        write_values(file, array, tensor.dtype)


def write_values(file, array, dtype):
    """Writes an array's values in row-major order.

    Args:
        file: binary file.
        array: numpy array.
        dtype: numpy dtype to convert them to.
    """
    for block in blocks(array, dtype):
        file.write(as_bytes(block))
