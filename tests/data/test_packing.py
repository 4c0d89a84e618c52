"""Documents -> token shards: the same bytes, whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers

from keras_bwetaf.data import listing, load_packed, packing, worker
from keras_bwetaf.data import pack as pack_
from keras_bwetaf.data.index import (
    read_index,
    tokenizer_digest,
    write_index,
)
from keras_bwetaf.models import BwETAFTokenizer
from tests.data.conftest import make_documents

ROOT = Path(__file__).resolve().parents[2]
SHARD_SIZE = 1000


def pack(source, folder, tokenizer, **arguments):
    arguments = {"num_workers": 1, "progress": False, **arguments}
    return pack_(source, folder, tokenizer, **arguments)


def contents(folder):
    """Every file by name, but the lock."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != packing.LOCK
    }


def stream(folder, split="train"):
    """All tokens of a split."""
    index = json.loads((folder / "index.json").read_text())
    shards = [
        np.fromfile(folder / shard["splits"][split]["file"], index["dtype"])
        for shard in index["shards"]
        if split in shard["splits"]
    ]
    return np.concatenate(shards)


@pytest.fixture(scope="module")
def whole(documents, tokenizer, tmp_path_factory):
    """A folder that was packed without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    pack(
        iter(documents),
        folder,
        tokenizer,
        shard_size=SHARD_SIZE,
        validation_fraction=0.2,
    )
    assert len(read_index(folder)["shards"]) >= 5
    return folder


def test_tokens(documents, tokenizer, tmp_path):
    report = pack(documents, tmp_path, tokenizer)
    expected = []
    for ids in tokenizer.tokenize(documents):
        expected += [*ids, tokenizer.end_token_id]
    np.testing.assert_array_equal(stream(tmp_path), expected)
    assert report.documents == len(documents)
    assert report.tokens == {"train": len(expected)}
    assert report.bytes == sum(len(text.encode()) for text in documents)
    assert report.tokens_per_byte == len(expected) / report.bytes
    assert report.seconds > 0
    assert report.megabytes_per_second == pytest.approx(
        report.bytes / 1e6 / report.seconds
    )


def test_index(documents, tokenizer, whole):
    index = read_index(whole)
    assert index["complete"] is True and index["version"] == 1
    assert index["dtype"] == "uint16"
    assert index["tokenizer_sha256"] == tokenizer_digest(tokenizer)
    assert index["vocabulary_size"] == tokenizer.vocabulary_size()
    assert index["end_token_id"] == 0
    assert index["source"] == {"source": "iterable", "documents": None}
    assert sum(s["documents"] for s in index["shards"]) == len(documents)
    for shard in index["shards"][:-1]:
        parts = shard["splits"].values()
        assert sum(part["tokens"] for part in parts) >= SHARD_SIZE
        assert sum(part["documents"] for part in parts) == shard["documents"]


def test_a_tokenizer_is_known_by_its_content(tokenizer, other_tokenizer):
    compact = json.dumps(json.loads(tokenizer.content)).encode()
    assert compact != tokenizer.content
    same = BwETAFTokenizer(tokenizers.Tokenizer.from_buffer(compact))
    assert tokenizer_digest(same) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(other_tokenizer) != tokenizer_digest(tokenizer)


def test_the_number_of_processes_changes_nothing(
    documents, tokenizer, whole, tmp_path
):
    pack(
        iter(documents),
        tmp_path,
        tokenizer,
        shard_size=SHARD_SIZE,
        validation_fraction=0.2,
        num_workers=3,
    )
    assert contents(tmp_path) == contents(whole)


def test_held_out_documents(documents, tokenizer, whole):
    end = tokenizer.end_token_id
    texts = {}
    for split in ("train", "validation"):
        rows = np.split(
            stream(whole, split), np.flatnonzero(stream(whole, split) == end)
        )
        texts[split] = {tuple(row[row != end]) for row in rows[:-1]}
    assert not texts["train"] & texts["validation"]
    assert len(texts["train"] | texts["validation"]) == len(documents)
    assert 0.1 < len(texts["validation"]) / len(documents) < 0.3


def test_copies_never_leak(documents, tokenizer, tmp_path):
    twice = documents + [f" {text.upper()}\n" for text in documents]
    pack(twice, tmp_path, tokenizer, validation_fraction=0.5)
    (shard,) = read_index(tmp_path)["shards"]
    assert shard["splits"]["validation"]["documents"] % 2 == 0
    expected = sum(worker.is_held_out(text, 0.5) for text in documents)
    assert shard["splits"]["validation"]["documents"] == 2 * expected > 0


KILLED = """
    import os, signal, sys
    from keras_bwetaf.data import pack
    from keras_bwetaf.models import BwETAFTokenizer
    from tests.data.conftest import make_documents

    def documents():
        for number, text in enumerate(make_documents(300)):
            if number == 280:
                os.kill(os.getpid(), signal.SIGKILL)
            yield text

    tokenizer = BwETAFTokenizer(sys.argv[2])
    pack(documents(), sys.argv[1], tokenizer, shard_size=1000,
         validation_fraction=0.2, num_workers=2, progress=False)
"""


def test_killed_and_called_again(documents, tokenizer, whole, tmp_path):
    tokenizer.save_assets(tmp_path)
    folder = tmp_path / "packed"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(KILLED),
            folder,
            tmp_path / "tokenizer.json",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        timeout=120,  # Until the workers have ended, too.
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert result.stderr == b""
    index = read_index(folder)
    done = len(index["shards"])
    assert not index["complete"] and 2 <= done < len(
        read_index(whole)["shards"]
    )
    # What a kill in the middle of a write leaves behind.
    (folder / f".train-{done:05d}.bin.0123456789abcdef.tmp").write_bytes(b"x")
    (folder / f"train-{done:05d}.bin").write_bytes(b"not in the index yet")
    kept = (folder / "train-00000.bin").stat().st_mtime_ns

    report = pack(
        iter(documents),
        folder,
        tokenizer,
        shard_size=SHARD_SIZE,
        validation_fraction=0.2,
    )
    assert contents(folder) == contents(whole)
    assert (folder / "train-00000.bin").stat().st_mtime_ns == kept
    assert report.documents == len(documents)


def test_a_failing_source_leaves_whole_shards_only(
    documents, tokenizer, whole, tmp_path
):
    def failing():
        yield from documents[:250]
        raise OSError("the network is gone")

    arguments = dict(shard_size=SHARD_SIZE, validation_fraction=0.2)
    with pytest.raises(OSError, match="the network is gone"):
        pack(failing(), tmp_path, tokenizer, **arguments)
    expected = contents(whole)
    files = contents(tmp_path)
    index = json.loads(files.pop("index.json"))
    assert index["complete"] is False and len(files) >= 2
    assert files.items() <= expected.items()
    pack(iter(documents), tmp_path, tokenizer, **arguments)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_shards_are_replaced(
    documents, tokenizer, whole, tmp_path, damage
):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "train-00002.bin"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    arguments = dict(shard_size=SHARD_SIZE, validation_fraction=0.2)
    pack(iter(documents), tmp_path, tokenizer, **arguments)
    assert contents(tmp_path) == contents(whole)


def test_a_complete_folder_is_left_alone(tokenizer, whole):
    before = contents(whole)
    report = pack(
        iter(()),
        whole,
        tokenizer,
        shard_size=SHARD_SIZE,
        validation_fraction=0.2,
    )
    assert contents(whole) == before
    assert report.documents == 300 and report.megabytes_per_second == 0


def test_no_more_tokens_than_asked_for(documents, tokenizer, whole, tmp_path):
    arguments = {"shard_size": SHARD_SIZE, "validation_fraction": 0.2}
    for limit, num_shards in ((1, 1), (2 * SHARD_SIZE - 1, 2)):
        folder, source = tmp_path / str(limit), iter(documents)
        report = pack(source, folder, tokenizer, max_tokens=limit, **arguments)
        assert next(source, None)  # Not all was read.
        assert sum(report.tokens.values()) >= limit
        shards = read_index(whole)["shards"][:num_shards]
        assert read_index(folder)["shards"] == shards
        again = pack(iter(()), folder, tokenizer, max_tokens=limit, **arguments)
        assert again.tokens == report.tokens
    with pytest.raises(ValueError, match="max_tokens=1. Received: max_tokens="):
        pack(iter(()), tmp_path / "1", tokenizer, **arguments)


def test_other_documents(tokenizer, tmp_path):
    for documents in (["once", "twice"], [b"once", b"twice"]):
        pack(documents, tmp_path, tokenizer)
    for others in (["once", "thrice"], ["onc", "etwice"]):
        with pytest.raises(ValueError, match="other settings: source="):
            pack(others, tmp_path, tokenizer)


def test_nothing_is_held_out(tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="nothing is held out.*1 documents"):
        pack(["once upon a time"], tmp_path, tokenizer, validation_fraction=0.1)


def test_other_settings(documents, tokenizer, other_tokenizer, tmp_path):
    pack(documents, tmp_path, tokenizer)
    for arguments, name in (
        ((documents[:9], tmp_path, tokenizer), "source"),
        ((documents, tmp_path, other_tokenizer), "tokenizer_sha256"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*overwrite=True"):
            pack(*arguments)
    with pytest.raises(ValueError, match="shard_size=.*Received"):
        pack(documents, tmp_path, tokenizer, shard_size=5)
    pack(documents[:9], tmp_path, other_tokenizer, overwrite=True)
    assert read_index(tmp_path)["source"]["documents"] == 9


def test_numbers_of_numpy(documents, tokenizer, tmp_path):
    """As Python's, also in the index."""
    pack(
        documents[:9],
        tmp_path,
        tokenizer,
        num_workers=np.int64(1),
        shard_size=np.int32(SHARD_SIZE),
        max_tokens=np.uint16(40),
        validation_fraction=np.float32(0.5),
    )
    index = read_index(tmp_path)
    assert (index["shard_size"], index["max_tokens"]) == (SHARD_SIZE, 40)
    batches = load_packed(
        [(tmp_path, np.int64(4)), (tmp_path, None)],
        sequence_length=np.int64(8),
        batch_size=np.int64(2),
        seed=np.uint32(3),
    )
    assert next(iter(batches))["token_ids"].shape == (2, 8)


def test_overwriting_leaves_nothing_behind(documents, tokenizer, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    pack(documents, many, tokenizer, shard_size=SHARD_SIZE)
    pack(documents[:9], few, tokenizer)
    pack(documents[:9], many, tokenizer, overwrite=True)
    assert contents(many) == contents(few)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_safe(documents, tokenizer, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="thesis.tex.*another folder"):
        pack(documents, tmp_path, tokenizer, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_two_calls_for_one_folder(documents, tokenizer, tmp_path):
    started, finish = threading.Event(), threading.Event()

    def slow():
        yield documents[0]
        started.set()
        finish.wait(60)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(pack, slow(), tmp_path, tokenizer)
        assert started.wait(60)
        try:
            with pytest.raises(RuntimeError, match="another process"):
                pack(documents, tmp_path, tokenizer)
        finally:
            finish.set()
        assert first.result().documents == 1


def test_more_than_65536_tokens(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    tokens = ["<|EOS|>", "<|UK|>", *alphabet, *map("".join, pairs)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    large = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, pairs, unk_token="<|UK|>")
    )
    large.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    large.decoder = tokenizers.decoders.ByteLevel()
    large.add_special_tokens(["<|EOS|>", "<|UK|>"])
    tokenizer = BwETAFTokenizer(large)
    text = "a\u00edb"  # The byte 0xad comes last in the alphabet.
    pack([text], tmp_path, tokenizer)
    assert read_index(tmp_path)["dtype"] == "uint32"
    expected = [*tokenizer.tokenize(text), 0]
    assert max(expected) > 65535
    np.testing.assert_array_equal(stream(tmp_path), expected)


def test_strange_documents(tokenizer, tmp_path):
    """Empty ones, NUL bytes, 20 MB with and without spaces."""
    words = " ".join(make_documents(100)) + "\n"
    texts = [
        "",
        "\0\0",
        words * (20_000_000 // len(words.encode())),
        "x" * 1_000_000,
        "",
    ]
    report = pack(texts, tmp_path, tokenizer, num_workers=2)
    assert report.documents == 3 and report.empty_documents == 2
    first, *_, last = np.split(
        stream(tmp_path), 1 + np.flatnonzero(stream(tmp_path) == 0)
    )
    assert first.tolist() == [*tokenizer.tokenize("\0\0"), 0]
    assert last.size == 0
    decoded = tokenizer.detokenize(stream(tmp_path)[-2_000:-1])
    assert set(decoded) == {"x"}


def test_an_empty_source(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at least one document"):
        pack([], tmp_path, tokenizer)
    with pytest.raises(ValueError, match="a token at least"):
        pack(["", ""], tmp_path / "empty", tokenizer)


def test_invalid_utf8_names_the_place(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected UTF-8"):
        pack(source, tmp_path / "packed", tokenizer)
    report = pack(source, tmp_path / "packed", tokenizer, errors="replace")
    assert report.documents == 2


def test_arguments(documents, tokenizer, tmp_path):
    for name, value in (
        ("num_workers", 0),
        ("max_tokens", 0),
        ("shard_size", 0.5),
        ("validation_fraction", 1),
        ("validation_fraction", -0.1),
    ):
        with pytest.raises(ValueError, match=f"`{name}`.*Received"):
            pack(documents, tmp_path, tokenizer, **{name: value})
    with pytest.raises(ValueError, match="must be a BwETAFTokenizer"):
        pack(documents, tmp_path, "tokenizer.json")


def test_a_worker_that_ends(documents, tokenizer, tmp_path):
    real = subprocess.Popen
    made = []

    def remember(*arguments, **keywords):
        made.append(real(*arguments, **keywords))
        return made[-1]

    def kill_workers():
        yield documents[0]
        yield documents[1]
        while not made:
            time.sleep(0.01)
        made[0].kill()
        yield from documents[2:]

    with (
        mock.patch.object(packing.subprocess, "Popen", remember),
        pytest.raises(RuntimeError, match="status -9.*`num_workers`"),
    ):
        pack(kill_workers(), tmp_path, tokenizer, num_workers=2, shard_size=1)
    assert 1 <= len(made) <= 2
    assert all(process.returncode is not None for process in made)


def test_no_word_of_forks(documents, tokenizer, tmp_path, capfd):
    tokenizer.tokenize(documents)  # The parent uses the library's threads.
    before = dict(os.environ)
    with mock.patch.object(
        packing.subprocess, "Popen", wraps=subprocess.Popen
    ) as started:
        pack(documents, tmp_path, tokenizer, num_workers=2)
    assert dict(os.environ) == before
    for call in started.call_args_list:
        assert call.kwargs["env"]["TOKENIZERS_PARALLELISM"] == "false"
    assert started.called
    assert capfd.readouterr() == ("", "")


def test_progress_and_report(documents, tokenizer, tmp_path, capsys):
    report = pack(documents, tmp_path, tokenizer, progress=True)
    output = capsys.readouterr().out
    assert str(report) in output and "300 documents" in output
    assert f"{report.tokens_per_byte:.4f} tokens per byte" in output


# Sources of files.


@pytest.fixture
def corpus(tmp_path):
    """A folder of as many texts as one may want to know nothing about."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3000):
        (folder / f"story-number-{number:05d}.txt").write_text("Once.")
    return folder


def test_the_index_does_not_grow_with_the_files(corpus, tokenizer, tmp_path):
    pack(corpus, tmp_path / "packed", tokenizer)
    assert (tmp_path / "packed" / "index.json").stat().st_size < 2000
    source = read_index(tmp_path / "packed")["source"]
    assert source["source"] == str(corpus) and source["num_files"] == 3000
    pack([*corpus.iterdir()], tmp_path / "listed", tokenizer)
    assert (tmp_path / "listed" / "index.json").stat().st_size < 2000


def test_what_has_changed_is_said_in_a_few_lines(corpus, tokenizer, tmp_path):
    folder = tmp_path / "packed"
    pack(corpus, folder, tokenizer)
    before = contents(folder)

    def message():
        with pytest.raises(
            ValueError, match="other settings: source="
        ) as error:
            pack(corpus, folder, tokenizer)
        assert len(str(error.value)) < 1500
        assert contents(folder) == before
        return str(error.value)

    (corpus / ("long" * 50 + ".txt")).write_text("more")
    assert re.search(r"New: '\.\.\.[long]{50,60}\.txt'\. Pass", message())
    (corpus / "story-number-00007.txt").unlink()
    for number in range(1000, 1600):
        (corpus / f"story-number-{number:05d}.txt").write_text("Longer.")
    text = message()
    assert "00007.txt'. " in text and "Missing: " in text
    assert re.search("Changed: .*01000.*01001.*01002.*and 597 more", text)
    assert "'num_files': 3000" not in text  # That is as it was.
    (folder / listing.FILE_NAME).write_bytes(b"damaged")
    before = contents(folder)
    assert "New:" not in message()


def test_the_order_of_paths_matters(corpus, tokenizer, tmp_path):
    paths = sorted(corpus.iterdir())[:2]
    pack(paths, tmp_path / "packed", tokenizer)
    pack(paths, tmp_path / "packed", tokenizer)
    with pytest.raises(ValueError, match="files are in another order"):
        pack(paths[::-1], tmp_path / "packed", tokenizer)


@pytest.mark.parametrize("is_list", [False, True])
def test_an_index_of_an_earlier_version(corpus, tokenizer, tmp_path, is_list):
    """It lists the files, and still is known to be of the same source."""
    paths, folder = sorted(corpus.iterdir()), tmp_path / "packed"
    source = paths if is_list else corpus
    pack(source, folder, tokenizer)
    (folder / listing.FILE_NAME).unlink()
    index = read_index(folder)
    index["source"] = {
        "source": [*map(str, paths)] if is_list else str(corpus),
        "column": "text",
        "files": {str(path): path.stat().st_size for path in paths},
    }
    write_index(folder, index)
    before = contents(folder)
    pack(source, folder, tokenizer)
    assert contents(folder) == before
    paths[5].write_text("Longer than before.")
    with pytest.raises(ValueError, match="Changed: .*00005.txt'") as error:
        pack(source, folder, tokenizer)
    assert len(str(error.value)) < 1500
    (folder / "index.json").write_bytes(b" " * 50_000_001)
    with pytest.raises(ValueError, match="at most 50000000.*overwrite=True"):
        pack(source, folder, tokenizer)


def test_names_that_are_not_utf8(tokenizer, tmp_path):
    corpus = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(corpus)
    with open(os.fsencode(corpus) + b"/\xe9t\xe9.txt", "w") as file:
        file.write("Once upon a time.")
    for source in (
        corpus,
        f"{corpus}/*.txt",
        [Path(corpus, "\udce9t\udce9.txt")],
    ):
        folder = tmp_path / "packed"
        pack(source, folder, tokenizer, overwrite=True)
        before = contents(folder)
        assert read_index(folder)["complete"]
        pack(source, folder, tokenizer)
        assert contents(folder) == before


def test_the_report_names_what_is_not_read(tokenizer, tmp_path, capsys):
    for name in (
        "a.txt",
        "[b].csv",
        ".git/x.txt",
        *(f"._{n}" for n in range(9)),
    ):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Once upon a time.")
    report = pack(
        tmp_path / "corpus", tmp_path / "packed", tokenizer, progress=True
    )
    assert report.documents == 1
    assert {reason: len(n) for reason, n in report.skipped.items()} == {
        "hidden": 10,
        "of another format": 1,
    }
    lines = str(report).splitlines()
    assert lines[3].startswith("Not read: 10 hidden: ")
    assert lines[3].endswith(" and 7 more")
    assert lines[4].endswith("/[b].csv'")
    assert lines[4] in capsys.readouterr().out
