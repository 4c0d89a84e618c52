"""The target appears whole or not at all, and nothing else is touched."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import converters
from converters import CheckpointError, convert, detect_format, files
from tests.converters.folders import (
    FORMATS,
    assert_same_folders,
    contents,
    write_original,
)

ROOT = Path(converters.__path__[0]).parent


def other_model(folder):
    """A model folder that differs from the small one."""
    return write_original(folder, attention_dim=16)


class Fails(Exception):
    pass


def fail(*_, **__):
    raise Fails


@pytest.mark.parametrize("to", FORMATS)
def test_existing_target_is_kept(tiny, tmp_path, to):
    target = other_model(tmp_path / "target")
    before = contents(target)
    with pytest.raises(CheckpointError, match="target: the target exists alr"):
        convert(tiny["source"], target, to=to)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("to", FORMATS)
def test_overwriting(tiny, tmp_path, to):
    target = other_model(tmp_path / "target")
    convert(tiny["source"], target, to=to, overwrite=True)
    assert_same_folders(target, tiny[to])
    assert os.listdir(tmp_path) == ["target"]


def test_overwriting_nothing_and_an_empty_folder(tiny, tmp_path):
    for _ in range(2):
        convert(tiny["source"], tmp_path / "new", to="flax", overwrite=True)
        assert_same_folders(tmp_path / "new", tiny["source"])
        shutil.rmtree(tmp_path / "new")
        (tmp_path / "new").mkdir()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_target_can_be_the_source(copy, tiny, tmp_path, layout, to):
    folder = copy(layout)
    report = convert(folder, folder, to=to, overwrite=True)
    assert (report["from"], report["to"]) == (layout, to)
    assert report["left_behind"] == []
    assert_same_folders(folder, tiny[to])
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize(
    "name",
    [".git/HEAD", "README.md", "assets/photo.png", "a/model.safetensors"],
)
def test_foreign_files_are_not_overwritten(tiny, copy, tmp_path, name):
    target = copy("keras", "target")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("precious")
    before = contents(target)
    received = name if name.startswith("assets") else name.split("/")[0]
    with pytest.raises(
        CheckpointError, match=f"would be lost.* Received: {received}$"
    ):
        convert(tiny["flax"], target, to="torch", overwrite=True)
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["target"]


def test_foreign_target_is_not_overwritten(tiny, copy, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(
        CheckpointError, match="expected a folder. Received: a f"
    ):
        convert(tiny["flax"], tmp_path / "file", to="torch", overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "models").mkdir()
    source = copy("flax", "models/source")
    with pytest.raises(CheckpointError, match="the target holds the source"):
        convert(source, tmp_path / "models", to="torch", overwrite=True)
    assert_same_folders(source, tiny["flax"])


def test_many_foreign_files_are_named_in_part(tiny, tmp_path):
    (tmp_path / "target").mkdir()
    for number in range(12):
        (tmp_path / "target" / f"{number:02}.txt").touch()
    with pytest.raises(CheckpointError, match=r"00.txt, .*09.txt, \.\.\.$"):
        convert(tiny["flax"], tmp_path / "target", to="torch", overwrite=True)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"my": "settings"}'),
        ("config.json", '{"model_type": "llama"}'),
        ("stats.json/thesis.txt", "precious"),
    ],
)
def test_what_is_no_model_is_not_overwritten(tiny, tmp_path, name, text):
    path = tmp_path / "target" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(CheckpointError, match="not a model folder|would be l"):
        convert(tiny["flax"], tmp_path / "target", to="flax", overwrite=True)
    assert path.read_text() == text


def test_working_directory_is_not_replaced(copy, tiny, monkeypatch):
    monkeypatch.chdir(copy("flax"))
    with pytest.raises(CheckpointError, match="target is the working direct"):
        convert(tiny["flax"], ".", to="keras", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_in_the_meantime_is_kept(tiny, tmp_path, overwrite):
    precious = tmp_path / "target" / "thesis.txt"

    def arrive(done, total):
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("precious")

    with pytest.raises(CheckpointError, match="exists already|would be lost"):
        convert(
            tiny["flax"],
            tmp_path / "target",
            to="keras",
            overwrite=overwrite,
            progress=arrive,
        )
    assert precious.read_text() == "precious"
    assert os.listdir(tmp_path) == ["target"]


def test_target_may_be_a_link(tiny, tmp_path):
    other_model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    convert(tiny["flax"], tmp_path / "link", to="torch", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_same_folders(tmp_path / "real", tiny["torch"])
    shutil.rmtree(tmp_path / "real")
    convert(tiny["flax"], tmp_path / "link", to="torch")
    assert_same_folders(tmp_path / "real", tiny["torch"])
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_parents_of_the_target_are_made(tiny, tmp_path):
    convert(tiny["flax"], tmp_path / "a" / "b" / "c", to="keras")
    assert detect_format(tmp_path / "a" / "b" / "c") == "keras"


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["json", "weights", "rename"])
def test_failure_leaves_nothing(
    tiny, tmp_path, monkeypatch, step, overwrite, to
):
    if overwrite:
        other_model(tmp_path / "target")
    before, rename, renamed = contents(tmp_path), os.rename, []

    def fail_to_move_in(old, new):
        renamed.append(new)
        if len(renamed) == 1 + overwrite:
            raise Fails
        rename(old, new)

    if step == "json":
        monkeypatch.setattr(files.json, "dumps", fail)
    if step == "rename":
        monkeypatch.setattr(files.os, "rename", fail_to_move_in)
    with pytest.raises(Fails):
        convert(
            tiny["source"],
            tmp_path / "target",
            to=to,
            overwrite=overwrite,
            progress=fail if step == "weights" else None,
        )
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["target"][: int(overwrite)]


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


FULL_DISK = """
import errno, resource, sys
import converters

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for to in sys.argv[3:]:
    try:
        converters.convert(sys.argv[1], sys.argv[2], to=to, overwrite=True)
    except OSError as error:
        print(to, errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tiny, tmp_path, existing):
    """Files that cannot grow any more, for writes fail in the same place."""
    target = tmp_path / "target"
    if existing:
        other_model(target)
    before = contents(tmp_path)
    result = run(FULL_DISK, tiny["source"], target, *FORMATS)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"{to} EFBIG" for to in FORMATS]
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["target"][: int(existing)]


KILLED = """
import os, signal, sys
import converters

def kill(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

source, target, to = sys.argv[1:]
converters.convert(source, target, to=to, overwrite=True, progress=kill)
"""


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("existing", ["nothing", "another", "source"])
def test_killed_while_it_writes(tiny, copy, tmp_path, existing, to):
    source = copy("safetensors", "source")
    target = source if existing == "source" else tmp_path / "target"
    if existing == "another":
        other_model(target)
        before = contents(target)
    result = run(KILLED, source, target, to)
    assert result.returncode == -signal.SIGKILL
    assert_same_folders(source, tiny["safetensors"])
    assert target.exists() == (existing != "nothing")
    if existing == "another":
        assert contents(target) == before
    convert(source, target, to=to, overwrite=True)
    assert_same_folders(target, tiny[to])
