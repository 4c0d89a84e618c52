"""safetensors: 8 bytes of length, a JSON header, the tensors."""

import json
import struct
from pathlib import Path, PurePosixPath

from converters.errors import CheckpointError, refuse
from converters.files import new_file, parse_json, read_json, write_files
from converters.mapped import (
    DTYPES,
    MappedTensor,
    byte_count,
    map_file,
    write_tensor,
)

MAX_HEADER_BYTES = 10_000_000
CODES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
DTYPE_OF_CODE = {code: DTYPES[name] for name, code in CODES.items()}


def read_safetensors(path):
    """Indexes one file, reading no tensor.

    Args:
        path: str or path.

    Returns:
        dict of tensor name to `MappedTensor`, in the order of the header.

    Raises:
        CheckpointError: if the file is missing or damaged; the message lists
            everything that is wrong with its header.
    """
    buffer = map_file(path)
    if len(buffer) < 8:
        raise CheckpointError(
            f"{path}: the file is truncated. Expected: 8 bytes of header "
            f"length. Received: {len(buffer)} bytes."
        )
    (length,) = struct.unpack_from("<Q", buffer)
    if length > min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise CheckpointError(
            f"{path}: the header is corrupt or truncated. Its length is given "
            f"as {length}; expected at most {len(buffer) - 8}, the rest of "
            f"the file, and {MAX_HEADER_BYTES}."
        )
    header = parse_json(buffer[8 : 8 + length], path)
    tensors, problems = {}, []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        problems.append(
            "__metadata__ must be an object of texts. Received: "
            f"{metadata!r:.80}"
        )
    for name, entry in header.items():
        problem, tensor = _tensor(entry, buffer, 8 + length)
        if problem:
            problems.append(f"tensor {name!r} {problem}")
        else:
            tensors[name] = tensor
    refuse(path, problems)
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda each: each.segments):
        ((offset, nbytes),) = tensor.segments
        if offset != position:
            raise CheckpointError(
                f"{path}: the header is corrupt: tensors overlap or leave a "
                f"hole. Expected one at byte {position}. Received: {offset}."
            )
        position += nbytes
    if position != len(buffer):
        raise CheckpointError(
            f"{path}: the file is truncated or has trailing bytes. Expected: "
            f"{position} bytes. Received: {len(buffer)}. Fetch it again."
        )
    return tensors


def _tensor(entry, buffer, start):
    """Returns (problem or None, tensor or None) for an entry of a header."""
    if not isinstance(entry, dict):
        return f"must be described by an object. Received: {entry!r:.80}", None
    dtype = DTYPE_OF_CODE.get(str(entry.get("dtype")))
    if dtype is None:
        return (
            f"has dtype {entry.get('dtype')!r:.80}. Expected one of "
            f"{', '.join(DTYPE_OF_CODE)}.",
            None,
        )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        return (
            "must have a shape and two data_offsets of non-negative integers. "
            f"Received: shape={shape!r:.80}, data_offsets={offsets!r:.80}",
            None,
        )
    begin, end = offsets
    expected = byte_count(shape, dtype)
    if expected is None or end - begin != expected:
        return (
            f"has {end - begin} bytes. Expected {expected} for shape "
            f"{tuple(shape)!s:.80} in {dtype.name}.",
            None,
        )
    if start + end > len(buffer):
        return (
            f"ends at byte {start + end}, but the file is truncated at "
            f"{len(buffer)}. Fetch it again.",
            None,
        )
    segments = ((start + begin, expected),)
    return None, MappedTensor(buffer, dtype, tuple(shape), segments)


def _sizes(value):
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )


def read_safetensors_folder(folder, stem="model"):
    """Indexes `model.safetensors`, or the shards that an index file names.

    Args:
        folder: str or path.
        stem: str. What the files' names start with.

    Returns:
        dict of tensor name to `MappedTensor`.

    Raises:
        CheckpointError: if a file is missing or damaged, or the index and
            the shards disagree.
    """
    folder = Path(folder)
    path = folder / f"{stem}.safetensors"
    index_path = folder / f"{stem}.safetensors.index.json"
    if not index_path.exists():
        return read_safetensors(path)
    if path.exists():
        raise CheckpointError(
            f"{folder}: expected {path.name}, or {index_path.name} with its "
            "shards. Received: both. Remove the one that is out of date."
        )
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str)
        and PurePosixPath(shard).name == shard
        and "\\" not in shard
        and "\0" not in shard
        and shard.endswith(".safetensors")
        for shard in weight_map.values()
    ):
        raise CheckpointError(
            f"{index_path}: weight_map must name a .safetensors file of the "
            f"same folder for each tensor. Received: {weight_map!r:.200}"
        )
    listed = {}
    for name, shard in weight_map.items():
        listed.setdefault(shard, set()).add(name)
    refuse(
        index_path,
        [
            f"the shard {shard} is missing. Fetch or export it again."
            for shard in sorted(listed)
            if not (folder / shard).is_file()
        ],
    )
    tensors, problems = {}, []
    for shard, names in sorted(listed.items()):
        found = read_safetensors(folder / shard)
        problems += [
            f"tensor {name!r} is not in {shard}, where the index puts it."
            for name in sorted(names - found.keys())
        ]
        problems += [
            f"tensor {name!r} is in {shard}, but the index does not say so."
            for name in sorted(found.keys() - names)
        ]
        tensors |= found
    refuse(index_path, problems)
    return tensors


def write_safetensors_folder(
    folder, tensors, *, stem="model", max_shard_size=None
):
    """Writes one file, or shards and an index file.

    Args:
        folder: path. It exists.
        tensors: dict of name to `View`.
        stem: str. What the files' names start with.
        max_shard_size: int, or None for one file. Bytes of tensors in a
            file; a larger tensor has one of its own.
    """
    sizes = {
        name: byte_count(each.shape, each.dtype)
        for name, each in tensors.items()
    }
    shards, used = [{}], 0
    for name, size in sizes.items():
        if max_shard_size and shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = tensors[name]
        used += size
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = {"total_size": sum(sizes.values())}
    index = {"metadata": total, "weight_map": weight_map}
    write_files(folder, {f"{stem}.safetensors.index.json": index})


def write_safetensors(path, tensors):
    """Writes a file tensor by tensor; it appears when it is complete.

    Args:
        path: str or path.
        tensors: dict of name to `View`.
    """
    # Widest dtype first, so that every tensor is aligned to its own size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = tensors[name]
        end = position + byte_count(tensor.shape, tensor.dtype)
        header[name] = {
            "dtype": CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            write_tensor(file, tensors[name])
