"""HDF5 files, of which the library only reads the index.

Tensors lie in one piece each, so their values are read from the memory map
and never pass through the library: what a file claims to hold compressed,
elsewhere, or as anything but plain numbers is refused.
"""

import io
import os

import h5py
import numpy as np

from converters.errors import CheckpointError, refuse
from converters.files import new_file
from converters.mapped import (
    DTYPES,
    MappedTensor,
    byte_count,
    map_file,
    write_tensor,
)

PAGE = 4096
MAX_DEPTH = 32
MAX_ITEMS = 200_000
# HDF5 has no bfloat16: Keras stores two opaque bytes and says what they are.
BFLOAT16 = DTYPES["bfloat16"]


def read_hdf5(path):
    """Indexes a file, reading no tensor.

    Args:
        path: str or path.

    Returns:
        dict of path (parts joined by "/") to `MappedTensor`.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything
            but groups and arrays of plain numbers that lie in one piece; the
            message lists every problem.
    """
    buffer = map_file(path)
    tensors, problems, items = {}, [], 0
    try:
        with h5py.File(path, "r") as file:
            groups = [("", file, 0)]
            while groups:
                parent, group, depth = groups.pop()
                items += len(group)
                if depth > MAX_DEPTH or items > MAX_ITEMS:
                    raise CheckpointError(
                        f"{path}: expected at most {MAX_DEPTH} levels of "
                        f"groups and {MAX_ITEMS} entries. Received: more."
                    )
                for name in sorted(group, reverse=True):
                    place = f"{parent}/{name}".lstrip("/")
                    if type(group.get(name, getlink=True)) is not h5py.HardLink:
                        problems.append(f"{place} is a link to elsewhere")
                        continue
                    item = group[name]
                    if isinstance(item, h5py.Group):
                        groups.append((place, item, depth + 1))
                        continue
                    problem, tensor = _tensor(item, buffer)
                    if problem:
                        problems.append(f"{place} {problem}")
                    else:
                        tensors[place] = tensor
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: not an HDF5 file that can be read: {error}. Fetch or "
            "export it again."
        ) from error
    refuse(path, problems)
    _check_overlap(path, tensors)
    return tensors


def _check_overlap(path, tensors):
    """A small file must not become a large model by naming bytes twice."""
    position = 0
    for place, tensor in sorted(
        tensors.items(), key=lambda item: item[1].segments
    ):
        ((offset, size),) = tensor.segments
        if offset < position and size:
            refuse(path, [f"{place} overlaps another array"])
        position = max(position, offset + size)


def _tensor(item, buffer):
    """Returns (problem or None, tensor or None) for an item of a group."""
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        return f"is a {type(item).__name__}, expected an array", None
    kind = item.id.get_create_plist()
    layout = kind.get_layout()
    if layout != h5py.h5d.CONTIGUOUS or kind.get_external_count():
        return (
            "is compressed, in pieces or in another file. Save it again with "
            "Keras",
            None,
        )
    dtype = item.dtype
    if dtype == np.dtype("V2") and item.attrs.get("dtype") == "bfloat16":
        dtype = BFLOAT16
    # NumPy's dtype is only the one that holds the values, once converted.
    stored = h5py.h5t.py_create(item.dtype, logical=True)
    if DTYPES.get(dtype.name) != dtype or not stored.equal(item.id.get_type()):
        return (
            f"has dtype {dtype.str}, expected one of {', '.join(DTYPES)}",
            None,
        )
    size, offset = byte_count(item.shape, dtype), item.id.get_offset()
    if size == 0:
        offset = 0
    if size is None or offset is None or offset + size > len(buffer):
        return f"has shape {item.shape}, which the file does not back", None
    return None, MappedTensor(buffer, dtype, item.shape, ((offset, size),))


def write_hdf5(path, tensors):
    """Writes a file tensor by tensor, as Keras would.

    The library lays the file out in memory and never touches the disk: where
    a disk is full, it prints, and then crashes the process.

    Args:
        path: str or path. The file; it appears when it is complete.
        tensors: dict of path in the file to `View`.
    """
    kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind.set_layout(h5py.h5d.CONTIGUOUS)
    kind.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    kind.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind.set_obj_track_times(False)
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    index, offsets = _Index(), {}
    with h5py.File(index, "w") as file:
        for place, tensor in tensors.items():
            is_bfloat16, shape = tensor.dtype == BFLOAT16, tensor.shape
            stored = np.dtype("V2") if is_bfloat16 else tensor.dtype
            # Not file.create_dataset, which allocates scalars late.
            created = h5py.h5d.create(
                file.id,
                place.encode(),
                h5py.h5t.py_create(stored, logical=True),
                h5py.h5s.create_simple(shape)
                if shape
                else h5py.h5s.create(h5py.h5s.SCALAR),
                dcpl=kind,
                lcpl=link,
            )
            if is_bfloat16:
                h5py.Dataset(created).attrs["dtype"] = "bfloat16"
            offsets[place] = created.get_offset()
    with new_file(path) as file:
        file.truncate(index.size)
        for number, page in index.pages.items():
            file.seek(number * PAGE)
            file.write(page[: index.size - number * PAGE])
        for place, offset in offsets.items():
            if offset is not None:  # A tensor without values lies nowhere.
                file.seek(offset)
            write_tensor(file, tensors[place])


class _Index(io.RawIOBase):
    """A file in memory that holds what was written to it, and else zeros."""

    def __init__(self):
        self.pages = {}
        self.position = 0
        self.size = 0

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_CUR: self.position, os.SEEK_END: self.size}
        self.position = start.get(whence, 0) + offset
        return self.position

    def truncate(self, size):
        self.size = size

    def write(self, data):
        data = bytes(data)
        for page, at, done, count in self._spans(len(data)):
            new = self.pages.setdefault(page, bytearray(PAGE))
            new[at : at + count] = data[done : done + count]
        self.position += len(data)
        self.size = max(self.size, self.position)
        return len(data)

    def readinto(self, buffer):
        count = max(0, min(len(buffer), self.size - self.position))
        for page, at, done, length in self._spans(count):
            old = self.pages.get(page, bytes(PAGE))
            buffer[done : done + length] = old[at : at + length]
        self.position += count
        return count

    def _spans(self, count):
        """The parts of pages from the position on."""
        done = 0
        while done < count:
            page, at = divmod(self.position + done, PAGE)
            length = min(count - done, PAGE - at)
            yield page, at, done, length
            done += length
