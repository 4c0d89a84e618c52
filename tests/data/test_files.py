"""Which files of a folder or glob are read, and what damaged ones say."""

import bz2
import glob
import gzip
import itertools
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from keras_bwetaf.data import files, read_documents

pytestmark = pytest.mark.fast

COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(folder, *names):
    """Files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Path(name).name)


def test_a_folder_that_jupyter_a_mac_and_git_have_touched(tmp_path):
    write(tmp_path, "a.txt", "sub/B.TXT", "c.md", "d.csv", "e", "f.parquet.gz")
    write(tmp_path, "._a.txt", ".git/x.txt", "sub/.ipynb_checkpoints/a.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    documents = read_documents(tmp_path)
    assert list(documents) == ["a.txt", "c.md", "B.TXT"]
    skipped = {
        reason: sorted(os.path.relpath(name, tmp_path) for name in names)
        for reason, names in documents.skipped.items()
    }
    assert skipped == {
        "hidden": ["._a.txt", ".git", "sub/.ipynb_checkpoints"],
        "of another format": ["d.csv", "e", "f.parquet.gz"],
        "no file": ["gone.txt"],
    }


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path):
    write(tmp_path, ".data/a.txt")
    assert list(read_documents(tmp_path / ".data")) == ["a.txt"]


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path, "corpus/a.txt", "corpus/sub/b.txt", "disk/c.txt")
    corpus = tmp_path / "corpus"
    for name, target in {
        "disk": tmp_path / "disk",
        "again": tmp_path / "disk",
        "latest": "sub",
        "sub/circle": "..",
        "above": tmp_path,
        "linked.txt": tmp_path / "disk" / "c.txt",
    }.items():
        (corpus / name).symlink_to(target)
    (tmp_path / "disk" / "back").symlink_to(corpus)
    documents = read_documents(corpus)
    assert list(documents) == ["a.txt", "c.txt", "c.txt", "b.txt"]
    (reason,) = documents.skipped
    assert reason.startswith("links to folders that")
    skipped = [os.path.relpath(n, corpus) for n in documents.skipped[reason]]
    assert sorted(skipped) == [
        "above", "again/back", "disk", "latest", "sub/circle"
    ]  # fmt: skip
    assert list(read_documents(f"{corpus}/**/c.txt")) == ["c.txt"]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def refuse(path):
        if "closed" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        read_documents(tmp_path)


NAMES = [
    "a.txt", "b.jsonl", "[a].txt", "{a}.txt", ".hidden.txt", "d/a.txt",
    "d/e/a.txt", "d/.h/a.txt", "d/e/f/ab.txt", ".h/a.txt", "D/a.TXT",
]  # fmt: skip
PARTS = [
    "*",
    "**",
    "*.txt",
    "?.txt",
    "[ab]*",
    "[!a]*",
    "{a,b}",
    ".*",
    "d",
    "d*",
]


def test_globs_on_the_hub_are_those_of_this_machine(tmp_path, monkeypatch):
    write(tmp_path, *NAMES)
    monkeypatch.chdir(tmp_path)
    taken = set()
    for count in (1, 2, 3):
        for pattern in itertools.product(PARTS, repeat=count):
            found = glob.glob("/".join(pattern), recursive=True)
            expected = {path for path in found if os.path.isfile(path)}
            matched = {n for n in NAMES if files.matches(n.split("/"), pattern)}
            assert matched == expected, pattern
            local, _ = files.find("/".join(pattern))
            if not os.path.isdir("/".join(pattern)):
                assert set(local) == expected, pattern
            taken |= matched
    assert taken == set(NAMES)


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    texts = pyarrow.table({"text": ["parquet"]})
    with open(name + b".parquet", "wb") as file:
        parquet.write_table(texts, file)
    with open(name + b".txt", "w") as file:
        file.write("text")
    documents = read_documents(tmp_path)
    assert list(documents) == ["parquet", "text"]
    for each, _ in documents.files:
        assert each.encode() and "caf\\xe9." in each
    (path,) = glob.glob(f"{tmp_path}/*.txt")
    assert read_documents(path).description["source"].encode()
    with open(name + b".txt", "wb") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"caf\\xe9.txt: expected UTF-8") as e:
        list(read_documents(path))
    assert str(e.value).encode()


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files(tmp_path, suffix):
    compress = COMPRESSED[suffix]
    lines = b'{"text": "one"}\n\n{"text": "two"}\n'
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines))
    (tmp_path / f"b.txt{suffix.upper()}").write_bytes(compress(b"three"))
    documents = read_documents(tmp_path)
    assert list(documents) == ["one", "two", "three"]
    assert list(documents.starting_at(1)) == ["two", "three"]
    assert list(documents.starting_at(2)) == ["three"]


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_damaged_compressed_files(tmp_path, suffix, name):
    lines = b"".join(b'{"text": "%d"}\n' % random.getrandbits(64)
                     for _ in range(9000))  # fmt: skip
    data = COMPRESSED[suffix](lines)
    path = tmp_path / f"{name}{suffix}"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    flipped[-6] ^= 0xFF  # gzip's checksum
    for content in (data[: len(data) // 2], b"no such format", flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            list(read_documents(path))
        assert f"{path.name}" in str(error.value)
        assert "expected " in str(error.value)
    path.write_bytes(data[:-9])
    after = ", after line \\d+" if name == "a.jsonl" else ""
    expected = f"{after}: expected a whole file.*Fetch or write"
    with pytest.raises(ValueError, match=expected):
        list(read_documents(path))


def test_the_mark_of_windows_is_no_text(tmp_path):
    for name, text in {
        "a.txt": "one",
        "b.jsonl": '{"text": "two"}\n{"text": "three"}',
        "c.jsonl": '\n{"text": "\ufefffour"}',  # It is within a document.
    }.items():
        (tmp_path / name).write_text(text, "utf-8-sig")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffive"))
    documents = read_documents(tmp_path)
    expected = ["one", "two", "three", "\ufefffour", "five"]
    assert list(documents) == expected
    assert list(documents.starting_at(2)) == expected[2:]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_utf16_is_named(tmp_path, encoding, errors):
    for name in ("a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_text('\ufeff{"text": "a"}', encoding)
        with pytest.raises(ValueError, match=f"{name}.*UTF-16.*iconv"):
            list(read_documents(path, errors=errors))


@pytest.mark.parametrize(
    "line",
    [
        '{"text": ' + "9" * 5000 + "}",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": "cut',
    ],
)
def test_lines_that_json_refuses(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected a JSON"):
        list(read_documents(tmp_path))


def test_damaged_parquet_names_the_file(tmp_path):
    texts = [f"Story {n} of a dog and a cat. " * 3 for n in range(300)]
    path, rng = tmp_path / "a.parquet", random.Random(0)
    parquet.write_table(
        pyarrow.table({"id": range(300), "text": texts}),
        path,
        row_group_size=100,
        write_page_checksum=True,
    )
    good, messages = path.read_bytes(), []
    for number in range(120):
        data = bytearray(good)
        if number % 3 == 0:
            del data[rng.randrange(4, len(data)) :]
        else:
            place = rng.randrange(4, len(data) - 8)
            data[place : place + 1 + number % 3 * 50] = bytes(
                [rng.randrange(256)]
            )
        path.write_bytes(data)
        try:
            assert list(read_documents(path)) == texts
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all("a.parquet" in message for message in messages)
    assert any("a.parquet, row group 1: " in message for message in messages)
