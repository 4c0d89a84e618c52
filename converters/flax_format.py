"""Flax's msgpack files, read without trust and written byte for byte.

A file is a tree of dictionaries with text keys. An array is an extension
(type 1, or 3 for a scalar) that holds another msgpack value: (shape, dtype
name, bytes). An array above 2**30 bytes is a dictionary of flat pieces.
"""

import struct

import msgpack

from converters.errors import CheckpointError
from converters.files import new_file
from converters.mapped import (
    DTYPES,
    MappedTensor,
    byte_count,
    map_file,
    write_values,
)

CHUNKED = "__msgpack_chunked_array__"
MAX_CHUNK_BYTES = 2**30
MAX_DEPTH = 32
MAX_ITEMS = 200_000
MAX_TEXT_BYTES = 1024
ARRAY_TYPE, SCALAR_TYPE = 1, 3

# First byte -> what follows, and the width of its length (or value).
WIDTHS = {
    **{0xC4 + power: ("bytes", 2**power) for power in range(3)},
    **{0xC7 + power: ("extension", 2**power) for power in range(3)},
    **{0xCC + power: ("integer", 2**power) for power in range(4)},
    **{0xD9 + power: ("text", 2**power) for power in range(3)},
    **{0xDC + power: ("array", 2**power * 2) for power in range(2)},
    **{0xDE + power: ("map", 2**power * 2) for power in range(2)},
}
# First byte -> what follows, and its length (or value).
VALUES = {
    0xC2: ("boolean", False),
    0xC3: ("boolean", True),
    **{0xD4 + power: ("extension", 2**power) for power in range(5)},
    **{value: ("integer", value) for value in range(0x80)},
    **{0x80 + size: ("map", size) for size in range(16)},
    **{0x90 + size: ("array", size) for size in range(16)},
    **{0xA0 + size: ("text", size) for size in range(32)},
}


def read_flax(path):
    """Indexes a file, reading no tensor.

    Nothing is allocated from a length that the file does not back.

    Args:
        path: str or path.

    Returns:
        Nested dict of str to `MappedTensor`, in file order.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything
            but dictionaries and arrays of plain numbers.
    """
    return _Reader(map_file(path), path).read()


def flatten(tree, parents=()):
    """The leaves of a tree.

    Args:
        tree: nested dict of str.
        parents: tuple of str. Path of the tree in a larger one.

    Returns:
        dict of path (tuple of str) to leaf, in the tree's order. An empty
        dictionary has no leaves.
    """
    leaves = {}
    for key, value in tree.items():
        path = (*parents, key)
        if isinstance(value, dict):
            leaves |= flatten(value, path)
        else:
            leaves[path] = value
    return leaves


def nest(leaves):
    """The inverse of `flatten`, with keys sorted, as JAX sorts them.

    Args:
        leaves: dict of path (tuple of str) to leaf.

    Returns:
        Nested dict of str.
    """
    tree = {}
    for path in sorted(leaves):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaves[path]
    return tree


class _Reader:
    def __init__(self, buffer, path):
        self.buffer = buffer
        self.path = path
        self.position = 0
        self.end = len(buffer)
        self.items = 0

    def read(self):
        tree = self.value(depth=0)
        if self.position != self.end:
            self.fail(f"{self.end - self.position} trailing bytes follow")
        if not isinstance(tree, dict):
            self.fail("the file must hold a dictionary")
        for path, leaf in flatten(tree).items():
            if not isinstance(leaf, MappedTensor):
                self.fail(
                    f"{'/'.join(path)} must be an array, but is the plain "
                    f"value {leaf}"
                )
        return tree

    def value(self, depth):
        kind, size = self.header()
        if kind == "map":
            return self.map(size, depth)
        if kind == "extension":
            return self.extension(size)
        if kind in ("integer", "boolean"):
            return size
        self.fail(f"expected a dictionary or an array, found {kind}")

    def map(self, size, depth):
        self.items += size
        if depth >= MAX_DEPTH:
            self.fail(f"dictionaries are nested deeper than {MAX_DEPTH}")
        if 2 * size > self.end - self.position or self.items > MAX_ITEMS:
            self.fail(
                f"a dictionary of {size} items is more than the file can hold "
                f"or than the {MAX_ITEMS} that are allowed in all"
            )
        result = {}
        for _ in range(size):
            key = self.text(kinds=("text",))
            if key in result:
                self.fail(f"the key {key!r} occurs twice")
            result[key] = self.value(depth + 1)
        return self.join(result) if CHUNKED in result else result

    def join(self, pieces):
        """Makes one tensor of a dictionary of flat pieces."""
        shape = self.sequence(pieces.get("shape"))
        chunks = self.sequence(pieces.get("chunks"))
        if (
            not chunks
            or not all(type(size) is int for size in shape)
            or not all(isinstance(chunk, MappedTensor) for chunk in chunks)
            or any(len(chunk.shape) != 1 for chunk in chunks)
            or any(chunk.dtype != chunks[0].dtype for chunk in chunks)
            or sum(chunk.nbytes for chunk in chunks)
            != byte_count(shape, chunks[0].dtype)
        ):
            self.fail("the pieces of a chunked array do not fit together")
        segments = tuple(piece for chunk in chunks for piece in chunk.segments)
        return MappedTensor(self.buffer, chunks[0].dtype, shape, segments)

    def sequence(self, items):
        """The tuple that flax writes as {"0": first, "1": second, ...}."""
        if not isinstance(items, dict) or any(
            str(index) not in items for index in range(len(items))
        ):
            self.fail("a chunked array needs a numbered shape and chunks")
        return tuple(items[str(index)] for index in range(len(items)))

    def extension(self, length):
        type_number = self.integer_of(1)
        self.require(length)
        end = self.position + length
        if type_number not in (ARRAY_TYPE, SCALAR_TYPE):
            self.fail(
                f"extension type {type_number} is not supported, expected "
                f"{ARRAY_TYPE} (array) or {SCALAR_TYPE} (scalar)"
            )
        if self.header() != ("array", 3):
            self.fail("an array must be (shape, dtype, bytes)")
        kind, dimensions = self.header()
        if kind != "array" or dimensions > 32:
            self.fail("a shape must be a list of at most 32 sizes")
        shape = tuple(self.size() for _ in range(dimensions))
        name = self.text()
        if name not in DTYPES:
            self.fail(
                f"dtype {name!r:.80} is refused, expected one of "
                f"{', '.join(DTYPES)}"
            )
        dtype = DTYPES[name]
        kind, nbytes = self.header()
        if kind not in ("bytes", "text"):
            self.fail(f"an array's values must be bytes, found {kind}")
        self.require(nbytes)
        if nbytes != byte_count(shape, dtype):
            self.fail(
                f"an array of shape {shape} in {name} has {nbytes} bytes, "
                f"expected {byte_count(shape, dtype)}"
            )
        segments = ((self.position, nbytes),)
        self.position += nbytes
        if self.position != end:
            self.fail(f"an array ends here, but its extension at byte {end}")
        return MappedTensor(self.buffer, dtype, shape, segments)

    def size(self):
        kind, value = self.header()
        if kind != "integer":
            self.fail(f"a shape must consist of integers, found {kind}")
        return value

    def text(self, kinds=("text", "bytes")):
        kind, length = self.header()
        if kind not in kinds or length > MAX_TEXT_BYTES:
            self.fail(
                f"expected a text of at most {MAX_TEXT_BYTES} bytes, found "
                f"{kind}"
            )
        self.require(length)
        start = self.position
        self.position += length
        try:
            return self.buffer[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a text is not UTF-8")

    def header(self):
        """Returns what comes next and its length, count or value."""
        first = self.integer_of(1)
        if first in VALUES:
            return VALUES[first]
        if first in WIDTHS:
            kind, width = WIDTHS[first]
            return kind, self.integer_of(width)
        self.fail(f"msgpack type 0x{first:02x} has no place in a checkpoint")

    def integer_of(self, width):
        self.require(width)
        self.position += width
        start = self.position - width
        return int.from_bytes(self.buffer[start : self.position], "big")

    def require(self, count):
        if count > self.end - self.position:
            self.fail(
                f"the file is truncated: {count} bytes are announced, "
                f"{self.end - self.position} are left"
            )

    def fail(self, message):
        raise CheckpointError(
            f"{self.path}: not a Flax checkpoint that can be read: {message} "
            f"(at byte {self.position} of {self.end}). Fetch or export the "
            "file again."
        )


def write_flax(path, tree):
    """Writes the bytes that `flax.serialization.to_bytes` would.

    Args:
        path: str or path. The file; it appears when it is complete.
        tree: nested dict of str. Its leaves have an `open()`, as `View` has;
            each array is written in its own dtype.
    """
    with new_file(path) as file:
        _write_node(file, tree)


def _write_node(file, node):
    if not isinstance(node, dict):
        with node.open() as array:
            _write_array(file, array)
        return
    file.write(msgpack.Packer().pack_map_header(len(node)))
    for key, child in node.items():
        file.write(msgpack.packb(key))
        _write_node(file, child)


def _write_array(file, array):
    if array.nbytes <= MAX_CHUNK_BYTES:
        _write_extension(file, array.shape, array)
        return
    flat = array.reshape(-1)
    step = max(1, MAX_CHUNK_BYTES // array.itemsize)
    chunks = [flat[at : at + step] for at in range(0, flat.size, step)]
    shape = {str(index): size for index, size in enumerate(array.shape)}
    packer = msgpack.Packer()
    file.write(packer.pack_map_header(3))
    for item in (CHUNKED, True, "shape", shape, "chunks"):
        file.write(packer.pack(item))
    file.write(packer.pack_map_header(len(chunks)))
    for index, chunk in enumerate(chunks):
        file.write(msgpack.packb(str(index)))
        _write_extension(file, chunk.shape, chunk)


def _write_extension(file, shape, array):
    inner = (
        msgpack.Packer().pack_array_header(3)
        + msgpack.packb(shape)
        + msgpack.packb(array.dtype.name)
        + _length(array.nbytes, 0xC4)
    )
    length = len(inner) + array.nbytes
    fixed = {2**power: 0xD4 + power for power in range(5)}
    start = bytes([fixed[length]]) if length in fixed else _length(length, 0xC7)
    file.write(start + bytes([ARRAY_TYPE]) + inner)
    write_values(file, array, array.dtype)


def _length(value, first):
    """A length in the narrowest of msgpack's three widths."""
    if value < 2**8:
        return struct.pack(">BB", first, value)
    if value < 2**16:
        return struct.pack(">BH", first + 1, value)
    return struct.pack(">BI", first + 2, value)
