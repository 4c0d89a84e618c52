"""The reader takes plain arrays in one piece and refuses everything else."""

import io

import h5py
import ml_dtypes
import numpy as np
import pytest

from converters import CheckpointError, hdf5_format
from converters.hdf5_format import read_hdf5, write_hdf5
from converters.mapped import DTYPES, Held, View
from tests.converters.folders import (
    Unreadable,
    any_bits,
    assert_same_tensors,
)

NUMBERS = np.arange(6, dtype="float32").reshape(2, 3)


def write_all(path, arrays):
    write_hdf5(path, {name: View(Held(each)) for name, each in arrays.items()})


def read_all(path):
    return {name: each.array() for name, each in read_hdf5(path).items()}


def random_arrays():
    rng = np.random.default_rng(0)
    arrays = {
        f"group {dtype}/{len(shape)}": rng.integers(0, 2, shape).astype(
            getattr(ml_dtypes, dtype, dtype)
        )
        for dtype in DTYPES
        for shape in [(), (3,), (5, 7), (1, 2, 3)]
    }
    draw = any_bits("float16", "float32", "float64", "bfloat16")
    return arrays | {f"any/bits/{number}": draw(9, 11) for number in range(4)}


def test_library_reads_what_we_write(tmp_path):
    arrays = random_arrays()
    write_all(tmp_path / "file", arrays)
    found = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            array = np.asarray(item[()])
            # The time of writing would differ from one time to the next.
            assert h5py.h5g.get_objinfo(item.id).mtime == 0
            if item.attrs.get("dtype") == "bfloat16":
                array = array.view(ml_dtypes.bfloat16)
            found[name] = array

    with h5py.File(tmp_path / "file") as file:
        file.visititems(add)
    assert_same_tensors(found, arrays)


def test_we_read_what_the_library_writes(tmp_path):
    arrays = random_arrays()
    with h5py.File(tmp_path / "file", "w") as file:
        for name, array in arrays.items():
            if array.dtype == ml_dtypes.bfloat16:
                file[name] = array.view("V2")
                file[name].attrs["dtype"] = "bfloat16"
            else:
                file[name] = array
    assert_same_tensors(read_all(tmp_path / "file"), arrays)


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
def test_every_version_of_the_file_format(tmp_path, libver):
    arrays = {f"{number}/x": np.full((2, 3), number) for number in range(99)}
    with h5py.File(tmp_path / "file", "w", libver=libver) as file:
        for name, array in arrays.items():
            file[name] = array
    assert_same_tensors(read_all(tmp_path / "file"), arrays)


def test_round_trip(tmp_path):
    arrays = random_arrays()
    write_all(tmp_path / "file", arrays)
    assert_same_tensors(read_all(tmp_path / "file"), arrays)
    write_all(tmp_path / "again", arrays)
    data = (tmp_path / "file").read_bytes()
    assert (tmp_path / "again").read_bytes() == data


def test_many_arrays_and_long_names(tmp_path):
    arrays = {
        f"{'g' * 300}_{number}/vars/{number % 3}": np.full(5, number)
        for number in range(2000)
    }
    write_all(tmp_path / "file", arrays)
    assert_same_tensors(read_all(tmp_path / "file"), arrays)


def test_arrays_are_views_that_survive_release(tmp_path):
    values = np.arange(100_000, dtype="float32")
    write_all(tmp_path / "file", {"a": values})
    tensor = read_hdf5(tmp_path / "file")["a"]
    array = tensor.array()
    assert array.base is not None and not array.flags.writeable
    tensor.release()
    np.testing.assert_array_equal(array, values)


def test_failed_write_leaves_what_was_there(tmp_path):
    write_all(tmp_path / "file", {"a": np.ones(3)})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(KeyError):
        write_hdf5(tmp_path / "file", {"a": View(Unreadable(np.ones(3)))})
    assert (tmp_path / "file").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# === Refused ===


def test_numbers_stored_in_another_way(tmp_path):
    """NumPy's dtype says float32, and the library would convert them."""
    stored = h5py.h5t.IEEE_F32LE.copy()
    stored.set_fields(31, 23, 8, 0, 22)
    stored.set_precision(32)
    with h5py.File(tmp_path / "file", "w") as file:
        space = h5py.h5s.create_simple((2, 3))
        created = h5py.h5d.create(file.id, b"a", stored, space)
        assert created.dtype == "float32"
        created.write(h5py.h5s.ALL, h5py.h5s.ALL, NUMBERS)
    with pytest.raises(CheckpointError, match="a has dtype"):
        read_hdf5(tmp_path / "file")


def external(file):
    layout = [("elsewhere.bin", 0, 24)]
    file.create_dataset("bad", (2, 3), "float32", external=layout)


def virtual(file):
    layout = h5py.VirtualLayout((2, 3), "float32")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (2, 3))
    file.create_virtual_dataset("bad", layout)


def compact(file):
    kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind.set_layout(h5py.h5d.COMPACT)
    file.create_dataset("bad", data=NUMBERS, dcpl=kind)


def never_written(file):
    file.create_dataset("bad", (2, 3), "float32")


def opaque(file):
    file["bad"] = np.zeros((2, 3), "V2")


def named_type(file):
    file["bad"] = np.dtype("float32")


def put(name, value):
    def build(file):
        file[name] = value

    return build


def create(**options):
    return lambda file: file.create_dataset("bad", **options)


@pytest.mark.parametrize(
    "build, message",
    [
        (put("bad", h5py.SoftLink("/good")), "bad is a link to elsewhere"),
        (put("bad", h5py.SoftLink("/nothing")), "bad is a link to elsewhere"),
        (put("bad", h5py.ExternalLink("/etc/passwd", "/")), "bad is a link to"),
        (create(data=NUMBERS, chunks=(1, 3)), "bad is compressed, in pieces"),
        (create(data=NUMBERS, compression="gzip"), "bad is compressed"),
        (create(data=NUMBERS, maxshape=(None, 3)), "bad is compressed"),
        (create(data=NUMBERS, scaleoffset=2), "bad is compressed"),
        (create(data=NUMBERS, fletcher32=True), "bad is compressed"),
        (external, "bad is compressed, in pieces or in another file"),
        (virtual, "bad is compressed, in pieces or in another file"),
        (compact, "bad is compressed, in pieces"),
        (never_written, "bad has shape .2, 3., which the file does not back"),
        (create(data=NUMBERS.astype(">f4")), "bad has dtype >f4, expected one"),
        (create(data=NUMBERS.astype(">i2")), "bad has dtype >i2, expected one"),
        (create(data=NUMBERS.astype("complex64")), "bad has dtype <c8"),
        (create(data=np.array([b"ab", b"c"])), "bad has dtype .S2"),
        (create(data="text"), "bad has dtype .O"),
        (create(data=["text", "more"]), "bad has dtype .O"),
        (create(data=np.zeros(2, "f4,i4")), "bad has dtype .V8"),
        (create(data=h5py.Empty("f4")), "bad is a Dataset, expected an array"),
        (create(shape=(2,), dtype=h5py.ref_dtype), "bad has dtype .O"),
        (
            create(shape=(2,), dtype=h5py.vlen_dtype("float32")),
            "bad has dtype .O",
        ),
        (opaque, "bad has dtype .V2, expected one of"),
        (named_type, "bad is a Datatype, expected an array"),
    ],
)
def test_what_is_no_plain_array_is_refused(tmp_path, build, message):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file["good"] = NUMBERS
        build(file)
    with pytest.raises(CheckpointError, match=message) as error:
        read_hdf5(path)
    assert str(path) in str(error.value)
    assert "good" not in str(error.value)


def test_all_problems_are_listed(tmp_path):
    with h5py.File(tmp_path / "file", "w") as file:
        file["a/link"] = h5py.SoftLink("/b")
        file["a/text"] = "text"
        file.create_dataset("z", data=NUMBERS, chunks=True)
    with pytest.raises(CheckpointError, match="3 problems") as error:
        read_hdf5(tmp_path / "file")
    for place in ("- a/link is", "- a/text has", "- z is"):
        assert place in str(error.value)


def test_groups_that_hold_each_other(tmp_path):
    with h5py.File(tmp_path / "file", "w") as file:
        group = file.create_group("a/b/c")
        group["again"] = file["a"]
    with pytest.raises(CheckpointError, match="at most 32 levels of groups"):
        read_hdf5(tmp_path / "file")


def test_too_many_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_format, "MAX_ITEMS", 4)
    with h5py.File(tmp_path / "file", "w") as file:
        file["a/b"] = file["a/c"] = NUMBERS
    assert len(read_hdf5(tmp_path / "file")) == 2
    with h5py.File(tmp_path / "file", "r+") as file:
        file["d"] = file["e"] = NUMBERS
    with pytest.raises(CheckpointError, match="4 entries. Received: more"):
        read_hdf5(tmp_path / "file")


def test_two_groups_with_many_links_to_one(tmp_path, monkeypatch):
    """Each level doubles what a reader without a limit would visit."""
    monkeypatch.setattr(hdf5_format, "MAX_ITEMS", 2000)
    with h5py.File(tmp_path / "file", "w") as file:
        inner = file.create_group("0")
        for level in range(1, 30):
            outer = file.create_group(str(level))
            outer["a"] = outer["b"] = inner
            inner = outer
    with pytest.raises(CheckpointError, match="2000 entries. Received: more"):
        read_hdf5(tmp_path / "file")


def test_truncated_files(tmp_path):
    path = tmp_path / "file"
    write_all(path, {"a/b": NUMBERS, "c": np.ones(3000, "float32")})
    data = path.read_bytes()
    for length in range(1, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="HDF5|does not back"):
            read_hdf5(path)


def test_missing_empty_and_other_files(tmp_path):
    path = tmp_path / "model.weights.h5"
    with pytest.raises(CheckpointError, match="h5: the file is missing"):
        read_hdf5(path)
    path.touch()
    with pytest.raises(CheckpointError, match="h5: the file is empty"):
        read_hdf5(path)
    buffer = io.BytesIO()
    np.savez(buffer, a=NUMBERS)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="h5: not an HDF5 file"):
        read_hdf5(path)


def test_offset_that_points_elsewhere(tmp_path):
    """What lies beyond the file's end is refused before it is read."""
    path = tmp_path / "file"
    write_all(path, {"a": NUMBERS})
    (tensor,) = read_hdf5(path).values()
    ((offset, _),) = tensor.segments
    data = path.read_bytes()
    address = offset.to_bytes(8, "little")
    assert data.count(address) >= 1
    for value in (len(data) - 23, 2**63, 2**40):
        path.write_bytes(data.replace(address, value.to_bytes(8, "little")))
        with pytest.raises(CheckpointError):
            read_hdf5(path)
