"""What a stranger's folder and names may do, and where may be written."""

import errno
import os
import shutil
from pathlib import Path

import pytest

import converters
from converters import CheckpointError, convert, inspect, mapped
from converters.errors import printable
from converters.files import local_path, new_file
from tests.converters.folders import FORMATS, assert_same_folders

# A document, a file of weights and one in a folder of its own, by format.
FILES = {
    "flax": ["understanding_good_stuff.json", "good_stuff.pkl", "stats.json"],
    "safetensors": ["config.json", "model.safetensors", "tokenizer.json"],
    "keras": ["task.json", "model.weights.h5", "assets/tokenizer"],
    "torch": ["generation_config.json", "optimizer.safetensors", "stats.json"],
}
EVERY = [(layout, name) for layout in FORMATS for name in FILES[layout]]


@pytest.mark.parametrize(
    "target",
    [
        *("gs://bucket/model", "s3://b/m", "hf://me/model", "HF://me/model"),
        *("https://huggingface.co/me/model", "file:///tmp/model", "memory://m"),
        *("gs:/bucket/model", Path("gs://bucket/model"), "abfs+x.y-z://c/d"),
    ],
)
def test_addresses_are_no_targets(tiny, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError) as error:
            convert(tiny["flax"], target, to="torch", overwrite=overwrite)
        assert f"Received: target={os.fspath(target)!r}" in str(error.value)
        assert "`target` must be a path of this machine" in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "path", ["a", "a:b", "./gs:/b", "/gs:/b", "C:/b", "C:\\b", "a/gs://b", "gs"]
)
def test_paths_are_targets(path):
    assert local_path("target", path) == Path(path)
    assert local_path("target", Path(path).absolute()) == Path(path).absolute()


def test_full_disk_says_where(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space.*model.safetensors'") as error:
        with new_file(path):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match="No space.*: 'elsewhere'"):
        with new_file(path):
            raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("layout, name", EVERY)
def test_links_out_of_a_folder(copy, tmp_path, layout, name):
    folder, own = copy(layout), tmp_path / "own"
    shutil.move(folder / name, own)  # the same content, so that it fits
    for target in (own, Path("..") / "own", Path("/dev/zero")):
        if name.startswith("assets"):
            target = own
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target, target_is_directory=own.is_dir())
        for read in (
            lambda: convert(folder, tmp_path / "new", to="flax"),
            lambda: inspect(folder),
        ):
            with pytest.raises(CheckpointError, match="is a link to .*, out"):
                read()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout, name", EVERY)
def test_links_that_stay_inside(copy, tiny, tmp_path, layout, name):
    folder = copy(layout)
    shutil.move(folder / name, folder / "other")
    (folder / name).symlink_to(folder / "other")
    report = convert(folder, tmp_path / "new", to="flax")
    assert report["left_behind"] == ["other"]
    assert_same_folders(tmp_path / "new", tiny["flax"])


def test_folders_that_are_links(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tiny["keras"])
    convert(tmp_path / "link", tmp_path / "new", to="flax")
    assert_same_folders(tmp_path / "new", tiny["flax"])


def test_links_of_the_hubs_cache(hub, hub_client, copy, tmp_path):
    hub.add("owner/tiny", copy("keras"))
    convert("hf://owner/tiny", tmp_path / "new", to="keras")
    (snapshot,) = hub_client.glob("hub/models--owner--tiny/snapshots/*")
    assert (snapshot / "config.json").is_symlink()
    convert(snapshot, tmp_path / "again", to="keras")
    # A stranger may have made something that looks like the cache.
    blob = Path(os.path.realpath(snapshot / "stats.json"))
    blob.rename(tmp_path / "own")
    blob.symlink_to(tmp_path / "own")
    with pytest.raises(CheckpointError, match="stats.json is a link to .*own"):
        convert(snapshot, tmp_path / "stolen", to="keras")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("layout, name", EVERY)
def test_no_files_in_place_of_files(copy, tmp_path, layout, name, make):
    folder = copy(layout)
    name = "assets/tokenizer/tokenizer.json" if "assets" in name else name
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} must be a file"):
        convert(folder, tmp_path / "new", to="flax")


@pytest.mark.parametrize("layout", FORMATS)
def test_files_that_are_cut_short_while_they_are_read(copy, tmp_path, layout):
    folder = copy(layout)
    (path,) = (
        each
        for pattern in ("good_stuff.pkl", "model.safetensors", "model.weights*")
        for each in folder.glob(pattern)
    )
    size = path.stat().st_size

    def cut(done, total):
        os.truncate(path, size // 10)

    to = "torch" if layout == "flax" else "flax"
    with pytest.raises(CheckpointError, match=f"{path.name}: .* cut short"):
        convert(folder, tmp_path / "new", to=to, progress=cut)
    assert os.listdir(tmp_path) == ["copy"]


def test_files_that_grow_stay_readable(copy):
    path = copy("safetensors") / "model.safetensors"
    buffer = mapped.map_file(path)
    with open(path, "ab") as file:
        file.write(b"more")
    buffer.check_size()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model.weight", "model.weight"),
        ("w[red] :smile: \u00e9 \u4e2d \U0001f600",) * 2,
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\r\n\tb\x00\x7f\x9b", "a\\r\\n\\tb\\x00\\x7f\\x9b"),
        ("\u202egnp\udcff", "\\u202egnp\\udcff"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected
    message = str(CheckpointError(text))
    assert message == expected.replace("\\n", "\n")


def test_errors_carry_no_escape_codes(copy):
    folder = copy("safetensors")
    shutil.copytree(folder, odd := folder.with_name("a\x1b[2Jb"))
    (odd / "config.json").write_text("[]")
    with pytest.raises(CheckpointError) as error:
        converters.read_checkpoint(odd)
    assert r"a\x1b[2Jb/config.json" in str(error.value)
