import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from converters import CheckpointError
from converters.mapped import Held, View
from converters.safetensors_format import (
    CODES,
    read_safetensors,
    read_safetensors_folder,
    write_safetensors,
)
from tests.converters.folders import Unreadable


def random_arrays():
    rng = np.random.default_rng(0)
    return {
        f"{dtype}.{len(shape)}": rng.integers(0, 2, shape).astype(
            getattr(ml_dtypes, dtype, dtype)
        )
        for dtype in CODES
        for shape in [(3,), (5, 7), (1, 2, 3)]
    }


def write_all(path, arrays):
    tensors = {name: View(Held(each)) for name, each in arrays.items()}
    write_safetensors(path, tensors)


def assert_same_arrays(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].array().tobytes() == array.tobytes(), name


def write_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)


def test_library_reads_what_we_write(tmp_path):
    arrays = random_arrays()
    write_all(tmp_path / "file", arrays)
    loaded = safetensors.numpy.load_file(tmp_path / "file")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype, name
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_library_writes(tmp_path):
    arrays = random_arrays()
    safetensors.numpy.save_file(
        arrays, tmp_path / "file", metadata={"format": "pt"}
    )
    assert_same_arrays(read_safetensors(tmp_path / "file"), arrays)


def test_round_trip_metadata_and_alignment(tmp_path):
    arrays = {**random_arrays(), "scalar": np.float32(2.5).reshape(())}
    write_all(tmp_path / "file", arrays)
    found = read_safetensors(tmp_path / "file")
    assert_same_arrays(found, arrays)
    assert all(each.array().flags.aligned for each in found.values())
    with safetensors.safe_open(tmp_path / "file", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_arrays_are_views_that_survive_release(tmp_path):
    values = np.arange(100_000, dtype="float32")
    write_all(tmp_path / "file", {"a": values})
    tensor = read_safetensors(tmp_path / "file")["a"]
    array = tensor.array()
    assert array.base is not None and not array.flags.writeable
    tensor.release()
    np.testing.assert_array_equal(array, values)


def test_failed_write_leaves_what_was_there(tmp_path):
    write_all(tmp_path / "file", {"a": np.ones(3)})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(KeyError):
        write_safetensors(
            tmp_path / "file", {"a": View(Unreadable(np.ones(3)))}
        )
    assert (tmp_path / "file").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{nonsense", b"", "expected JSON"),
        (b"\xff\xff", b"", "expected JSON"),
        (b"[" * 100_000, b"", "expected JSON"),
        (b"[1]", b"", "expected a JSON object. Received: list"),
        (b'{"a": {}, "a": {}}', b"", "a key occurs twice"),
        ({"a": ENTRY}, b"1234", "ends at byte .* truncated"),
        ({"a": ENTRY}, b"123456789", "truncated or has trailing bytes"),
        (
            {"a": {**ENTRY, "data_offsets": [1, 9]}},
            b"123456789",
            "overlap or leave a hole",
        ),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", "overlap or leave a hole"),
        ({"a": 3}, b"", "'a' must be described by an object"),
        ({"a": {**ENTRY, "dtype": "F9"}}, b"12345678", "has dtype 'F9'"),
        ({"a": {**ENTRY, "dtype": [1]}}, b"12345678", "has dtype .1."),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678", "8 bytes. Expected 12"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"12345678", "non-negative integers"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"12345678", "non-negative integer"),
        ({"a": {**ENTRY, "shape": [True]}}, b"1234", "non-negative integers"),
        ({"a": {**ENTRY, "data_offsets": [8]}}, b"12345678", "two data_offse"),
        (
            {"a": {**ENTRY, "shape": [2**40, 2**40]}},
            b"12345678",
            "8 bytes. Expected None",
        ),
    ],
)
def test_damaged_header_is_refused(tmp_path, header, data, message):
    path = tmp_path / "model.safetensors"
    write_header(path, header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_all_problems_of_a_header_are_listed(tmp_path):
    path = tmp_path / "file"
    write_header(path, {"a": 3, "b": {**ENTRY, "dtype": "F9"}})
    with pytest.raises(CheckpointError, match="2 problems") as error:
        read_safetensors(path)
    assert "'a'" in str(error.value) and "'b'" in str(error.value)


def test_header_length_is_checked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="8 bytes of header length"):
        read_safetensors(path)
    write_header(path, {}, length=2**63)
    with pytest.raises(CheckpointError, match="header is corrupt or truncat"):
        read_safetensors(path)


@pytest.fixture
def shards(tmp_path):
    arrays = {name: np.full(3, i) for i, name in enumerate("abc")}
    write_all(tmp_path / "1.safetensors", {"a": arrays["a"]})
    write_all(tmp_path / "2.safetensors", {"b": arrays["b"], "c": arrays["c"]})

    def index(**places):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": places}))
        return tmp_path

    return arrays, index


def test_shards_are_read(shards):
    arrays, index = shards
    folder = index(a="1.safetensors", b="2.safetensors", c="2.safetensors")
    assert_same_arrays(read_safetensors_folder(folder), arrays)


def test_index_must_agree_with_shards(shards):
    _, index = shards
    folder = index(a="1.safetensors", b="2.safetensors", d="2.safetensors")
    with pytest.raises(CheckpointError, match="2 problems") as error:
        read_safetensors_folder(folder)
    assert "'d' is not in 2.safetensors" in str(error.value)
    assert "'c' is in 2.safetensors, but" in str(error.value)


@pytest.mark.parametrize(
    "place",
    ["../1.safetensors", "/1.safetensors", "1.bin", 3, "a\\1.safetensors"],
)
def test_index_cannot_leave_the_folder(shards, place):
    _, index = shards
    with pytest.raises(CheckpointError, match="of the same folder"):
        read_safetensors_folder(index(a=place))


def test_missing_shard_or_file(shards, tmp_path):
    _, index = shards
    with pytest.raises(CheckpointError, match="3.safetensors.*is missing"):
        read_safetensors_folder(index(a="3.safetensors"))
    with pytest.raises(CheckpointError, match="model.safetensors: the file is"):
        read_safetensors_folder(tmp_path / "elsewhere")


def test_flax_reads_bfloat16(tmp_path):
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    write_all(tmp_path / "file", {"a": array})
    loaded = safetensors.flax.load_file(tmp_path / "file")["a"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(loaded), array)
