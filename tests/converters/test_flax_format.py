import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest

from converters import CheckpointError, flax_format
from converters.flax_format import flatten, nest, read_flax, write_flax
from converters.mapped import Held, View

pytestmark = pytest.mark.fast

DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "bool"),
    *("int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)


def arrays_of(tree):
    """The arrays of a tree by path."""
    return {path: np.asarray(array) for path, array in flatten(tree).items()}


def assert_same_arrays(found, expected):
    found = flatten(found)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].shape == array.shape, path
        assert found[path].array().tobytes() == array.tobytes(), path


def write_all(path, arrays):
    tensors = {name: View(Held(each)) for name, each in arrays.items()}
    write_flax(path, nest(tensors))


def random_tree():
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (3, 5), (2, 1, 7), (300,), (130, 257), (0, 3)]
    tree = {
        f"{dtype}_{len(shape)}_{sum(shape)}": rng.integers(0, 2, shape).astype(
            getattr(ml_dtypes, dtype, dtype)
        )
        for dtype in DTYPES
        for shape in shapes
    }
    # Longer keys and maps than msgpack's shortest forms hold.
    return {"b": {"k" * 40: tree, "empty": {}}, "a": {"ä": np.ones(2)}}


@pytest.mark.parametrize("name", ["good_stuff.pkl", "make_stuff_better.pkl"])
def test_index_equals_flax_on_trained_checkpoint(trained_checkpoint, name):
    path = trained_checkpoint / name
    expected = flax.serialization.msgpack_restore(path.read_bytes())
    assert_same_arrays(read_flax(path), arrays_of(expected))


def test_every_dtype_and_shape_is_read(tmp_path):
    tree = random_tree()
    (tmp_path / "file").write_bytes(flax.serialization.to_bytes(tree))
    assert_same_arrays(read_flax(tmp_path / "file"), arrays_of(tree))


def test_numpy_scalars_are_read(tmp_path):
    tree = {"a": np.float32(3.5), "b": np.int64(-2)}
    (tmp_path / "file").write_bytes(flax.serialization.to_bytes(tree))
    assert_same_arrays(read_flax(tmp_path / "file"), arrays_of(tree))


def test_written_bytes_are_flaxs(tmp_path):
    tree = random_tree()
    del tree["b"]["empty"]
    write_all(tmp_path / "file", arrays_of(tree))
    ordered = flax.serialization.msgpack_serialize(tree)
    assert (tmp_path / "file").read_bytes() == ordered


def test_chunked_arrays_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    monkeypatch.setattr(flax_format, "MAX_CHUNK_BYTES", 64)
    rng = np.random.default_rng(0)
    arrays = {
        ("a", "large"): rng.standard_normal((7, 9)).astype("bfloat16"),
        ("a", "limit"): rng.standard_normal((4, 4)).astype("float32"),
        ("b",): rng.standard_normal(50),
    }
    expected = flax.serialization.msgpack_serialize(
        {
            "a": {"large": arrays["a", "large"], "limit": arrays["a", "limit"]},
            "b": arrays["b",],
        }
    )
    assert expected.count(b"__msgpack_chunked_array__") == 2
    write_all(tmp_path / "file", arrays)
    assert (tmp_path / "file").read_bytes() == expected
    assert_same_arrays(read_flax(tmp_path / "file"), arrays)


def test_arrays_are_views_that_survive_release(tmp_path):
    values = np.arange(100_000, dtype="float32")
    write_all(tmp_path / "file", {("a",): values})
    (tensor,) = flatten(read_flax(tmp_path / "file")).values()
    array = tensor.array()
    assert array.base is not None and not array.flags.writeable
    tensor.release()
    np.testing.assert_array_equal(array, values)


def extension(values, type_number=1):
    return msgpack.ExtType(type_number, msgpack.packb(values))


ARRAY = extension(((2,), "float32", b"12345678"))


def nested(depth):
    return {"a": nested(depth - 1)} if depth else ARRAY


def chunked(shape, *chunks):
    return {
        "a": {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): size for i, size in enumerate(shape)},
            "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
        }
    }


@pytest.mark.parametrize(
    "data, message",
    [
        (msgpack.packb({"a": ARRAY})[:-3], "truncated: .* announced"),
        (msgpack.packb({"a": ARRAY}) + b"\0", "1 trailing bytes"),
        (msgpack.packb(3), "must hold a dictionary"),
        (b"\xdf\xff\xff\xff\xff", "4294967295 items is more than the file"),
        (b"\xde\x00\x64\xa1a\x80", "100 items is more than the file"),
        (b"\x81\xc6\xff\xff\xff\xff", "at most 1024 bytes, found bytes"),
        (b"\x81\xa1a\xc9\x7f\xff\xff\xff\x01", "2147483647 bytes are announc"),
        (b"\x82\xa1a\x80\xa1a\x80", "the key 'a' occurs twice"),
        (b"\x81\xa1\xff\x80", "not UTF-8"),
        (msgpack.packb({1: ARRAY}), "expected a text .* found integer"),
        (msgpack.packb({"a": 1}), "a must be an array, but is the plain val"),
        (msgpack.packb({"a": None}), "type 0xc0 has no place"),
        (msgpack.packb({"a": -1}), "type 0xff has no place"),
        (msgpack.packb({"a": "text"}), "found text"),
        (msgpack.packb({"a": [1]}), "found array"),
        (msgpack.packb(nested(33)), "nested deeper than 32"),
        (msgpack.packb({"a": extension((1, 2), 2)}), "type 2 is not supported"),
        (msgpack.packb({"a": extension((1, 2))}), "must be .shape, dtype, byt"),
        (
            msgpack.packb({"a": extension(((1,), "object", b"12345678"))}),
            "dtype 'object' is refused",
        ),
        (
            msgpack.packb({"a": extension(((1,), "V8", b"12345678"))}),
            "dtype 'V8' is refused",
        ),
        (
            msgpack.packb({"a": extension(((3,), "float32", b"12345678"))}),
            "shape .3,. in float32 has 8 bytes, expected 12",
        ),
        (
            msgpack.packb({"a": extension(((2**40, 2**40), "int8", b""))}),
            "has 0 bytes, expected None",
        ),
        (
            msgpack.packb({"a": extension(((-2,), "float32", b"12345678"))}),
            "type 0xfe has no place",
        ),
        (
            msgpack.packb({"a": extension(((True,), "int8", b"1"))}),
            "consist of integers, found boolean",
        ),
        (
            msgpack.packb({"a": extension(((1,) * 33, "int8", b"1"))}),
            "at most 32 sizes",
        ),
        (
            msgpack.packb({"a": extension((2, "float32", b"12345678"))}),
            "a shape must be a list",
        ),
        (
            msgpack.packb({"a": extension(((1,), "int8", 3))}),
            "values must be bytes, found integer",
        ),
        (
            msgpack.packb(
                {
                    "a": msgpack.ExtType(
                        1, msgpack.packb(((1,), "int8", b"1")) + b"\0\0"
                    )
                }
            ),
            "an array ends here, but its extension at byte",
        ),
        (msgpack.packb(chunked((5,), ARRAY, ARRAY)), "do not fit together"),
        (msgpack.packb(chunked((4,))), "do not fit together"),
        (msgpack.packb(chunked((True,), ARRAY)), "do not fit together"),
        (
            msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
            "needs a numbered shape",
        ),
    ],
)
def test_damaged_file_is_refused(tmp_path, data, message):
    path = tmp_path / "good_stuff.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_flax(path)
    assert str(path) in str(error.value)


def test_too_many_items_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flax_format, "MAX_ITEMS", 4)
    path = tmp_path / "file"
    path.write_bytes(msgpack.packb({"a": {"b": ARRAY, "c": ARRAY}}))
    assert len(flatten(read_flax(path))) == 2
    path.write_bytes(msgpack.packb({"a": {"b": ARRAY, "c": ARRAY}, "d": {}}))
    assert len(flatten(read_flax(path))) == 2
    path.write_bytes(
        msgpack.packb({"a": {"b": ARRAY}, "c": {"d": ARRAY}, "e": {}})
    )
    with pytest.raises(CheckpointError, match="4 that are allowed in all"):
        read_flax(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.pkl: the file is miss"):
        read_flax(tmp_path / "nothing.pkl")
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(CheckpointError, match="empty.pkl: the file is empty"):
        read_flax(tmp_path / "empty.pkl")


def test_every_truncation_is_refused(tmp_path):
    data = flax.serialization.to_bytes({"a": {"b": np.ones((2, 3), "float32")}})
    path = tmp_path / "file"
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated|more than the"):
            read_flax(path)


def test_every_flipped_bit_loads_or_raises_our_error(tmp_path):
    data = flax.serialization.to_bytes(
        {"a": {"b": np.ones((2, 3), "bfloat16")}}
    )
    path = tmp_path / "file"
    refused = 0
    for bit in range(8 * len(data)):
        mutated = bytearray(data)
        mutated[bit // 8] ^= 1 << bit % 8
        path.write_bytes(mutated)
        try:
            for tensor in flatten(read_flax(path)).values():
                tensor.array().tobytes()
        except CheckpointError:
            refused += 1
    assert refused > len(data)
