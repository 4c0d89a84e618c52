"""Packed tokens -> batches: which rows, in which order, and the masks."""

import itertools
import json
import shutil
import sys
from collections import Counter

import grain
import numpy as np
import pytest

from keras_bwetaf.data import load_packed as load_packed_
from keras_bwetaf.data import pack
from keras_bwetaf.data.index import read_index
from tests.generation.conftest import small_lm
from tests.parity import document_numbers

pytestmark = pytest.mark.fast

LENGTH, BATCH = 32, 8


def load_packed(source, **arguments):
    arguments = {"sequence_length": LENGTH, "batch_size": BATCH, **arguments}
    return load_packed_(source, **arguments)


@pytest.fixture(scope="module")
def folder(documents, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack(
        documents,
        folder,
        tokenizer,
        num_workers=1,
        shard_size=1000,
        validation_fraction=0.2,
        progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def stream(folder):
    """The tokens of the training split, in the order of the documents."""
    index = read_index(folder)
    stream = np.concatenate(
        [
            np.fromfile(folder / shard["splits"]["train"]["file"], "uint16")
            for shard in index["shards"]
        ]
    )
    assert len(stream) % LENGTH and len(index["shards"]) > 3
    return stream


@pytest.fixture(scope="module")
def rows(stream):
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


def take(data, count=None):
    """The first batches, as one array of token ids."""
    batches = itertools.islice(data, count)
    return np.concatenate([batch["token_ids"] for batch in batches])


def as_set(rows):
    """Counts rows; `rows` must not be empty."""
    assert len(rows)
    return Counter(map(tuple, rows.tolist()))


def save_rows(path, value, count=100, dtype="uint16"):
    np.save(path, np.full((count, LENGTH), value, dtype))
    return path


def test_rows_in_order(folder, rows):
    data = load_packed(folder, shuffle=False, repeat=False)
    batches = list(data)
    assert isinstance(data, grain.IterDataset)
    received = np.concatenate([batch["token_ids"] for batch in batches])
    np.testing.assert_array_equal(received[: len(rows)], rows)
    for batch in batches:
        assert batch.keys() == {"token_ids", "padding_mask"}
        for array in batch.values():
            assert array.shape == (BATCH, LENGTH) and array.dtype == "int32"


def test_document_numbers(folder, rows):
    data = load_packed(folder, shuffle=False, repeat=False)
    mask = np.concatenate([batch["padding_mask"] for batch in data])
    np.testing.assert_array_equal(mask[: len(rows)], document_numbers(rows))
    assert mask.max() > 2
    empty = mask[len(rows) :]
    assert len(empty) == -len(rows) % BATCH > 0
    assert not empty.any()


def test_shuffled_rows_are_the_same_rows(folder, rows):
    shuffled = take(load_packed(folder, repeat=False))[: len(rows)]
    assert as_set(shuffled) == as_set(rows)
    assert (shuffled != rows).any(axis=1).mean() > 0.9


def test_the_order_is_a_function_of_the_seed(folder):
    first = take(load_packed(folder, seed=5), 30)
    np.testing.assert_array_equal(take(load_packed(folder, seed=5), 30), first)
    assert (take(load_packed(folder, seed=6), 30) != first).any()


def test_each_pass_has_other_rows_in_another_order(folder, stream, rows):
    """The rows of a pass follow each other in the stream, all around it."""
    count = -(-3 * len(rows) // BATCH)
    passes = np.split(take(load_packed(folder), count)[: 3 * len(rows)], 3)
    assert as_set(passes[0]) == as_set(rows)
    shifts = [0, int(0.618034 * LENGTH), int(0.236068 * LENGTH)]
    for received, shift in zip(passes, shifts, strict=True):
        moved = np.roll(stream, -shift)[: rows.size].reshape(rows.shape)
        assert as_set(received) == as_set(moved)
    for first, second in itertools.combinations(passes, 2):
        assert (first != second).any(axis=1).mean() > 0.9


def test_rows_in_order_are_the_same_in_each_pass(folder, rows):
    count = -(-2 * len(rows) // BATCH)
    data = load_packed(folder, shuffle=False)
    first, second = np.split(take(data, count)[: 2 * len(rows)], 2)
    np.testing.assert_array_equal(first, rows)
    np.testing.assert_array_equal(second, rows)


def test_batches_of_one_row(folder):
    one, whole = (
        take(load_packed(folder, batch_size=size), BATCH // size)
        for size in (1, BATCH)
    )
    np.testing.assert_array_equal(one, whole)


def test_validation_ends(folder):
    first = take(load_packed(folder, split="validation"))
    second = take(load_packed(folder, split="validation"))
    np.testing.assert_array_equal(first, second)
    index = read_index(folder)
    num_tokens = sum(
        shard["splits"]["validation"]["tokens"]
        for shard in index["shards"]
        if "validation" in shard["splits"]
    )
    assert len(first) == -(-(num_tokens // LENGTH) // BATCH) * BATCH


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_each_batch(folder, rows, num_processes, repeat):
    alone = load_packed(folder, repeat=repeat)
    together = [
        load_packed(
            folder,
            repeat=repeat,
            process_index=index,
            process_count=num_processes,
        )
        for index in range(num_processes)
    ]
    count = 40 if repeat else None
    batches = [list(itertools.islice(data, count)) for data in together]
    num_steps = len(list(itertools.islice(alone, count)))
    assert {len(each) for each in batches} == {num_steps}
    for step, expected in enumerate(itertools.islice(alone, count)):
        for name, array in expected.items():
            parts = [each[step][name] for each in batches]
            assert {len(part) for part in parts} == {BATCH // num_processes}
            np.testing.assert_array_equal(np.concatenate(parts), array)


def test_processes_are_disjoint_and_complete(folder, rows):
    assert set(as_set(rows).values()) == {1}  # No two rows are alike.
    parts = []
    for index in range(2):
        data = load_packed(
            folder, repeat=False, process_index=index, process_count=2
        )
        real = [b["token_ids"][b["padding_mask"][:, 0] > 0] for b in data]
        parts.append(as_set(np.concatenate(real)))
    assert not parts[0] & parts[1]
    assert parts[0] + parts[1] == as_set(rows)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_resume(folder, steps, repeat):
    """In the middle of the first pass, and of a later one."""
    data = load_packed(folder, repeat=repeat)
    num_steps = len(list(load_packed(folder, repeat=False)))
    steps += 2 * num_steps if repeat else 0
    iterator = iter(data)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, num_steps))
    assert len(expected) == (num_steps if repeat else num_steps - steps)

    resumed = iter(load_packed(folder, repeat=repeat))
    next(resumed)  # It may be anywhere before.
    resumed.set_state(state)
    received = list(itertools.islice(resumed, num_steps))
    assert len(received) == len(expected)
    for batch, other in zip(received, expected, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_mixture_weights(tmp_path):
    weights = {5: 0.7, 6: 0.2, 7: 0.1}
    mixture = {
        save_rows(tmp_path / f"{value}.npy", value): weight
        for value, weight in weights.items()
    }
    values = take(load_packed(mixture), 250)[:, 0]
    for value, weight in weights.items():
        shares = np.cumsum(values == value) - weight * np.arange(1, 2001)
        assert np.abs(shares).max() < 4  # At every point, not on average.


def test_a_finite_mixture_takes_no_row_twice(folder, rows, tmp_path):
    other = save_rows(tmp_path / "a.npy", 7, count=10)
    data = load_packed({folder: 3, other: 1}, repeat=False)
    received = take(data)
    assert (received[:, 0] == 7).all(axis=-1).sum() <= 10
    others = received[(received != 7).any(axis=1) & received.any(axis=1)]
    assert 24 <= len(others) <= 30
    assert as_set(others) <= as_set(rows)


def test_parts_are_shuffled_differently(tmp_path):
    for name in "ab":
        values = np.arange(100, dtype="uint16").repeat(LENGTH)
        np.save(tmp_path / f"{name}.npy", values.reshape(-1, LENGTH))
    mixture = {tmp_path / "a.npy": 1, tmp_path / "b.npy": 1}
    values = take(load_packed(mixture), 20)[:, 0].reshape(-1, 2)
    assert (values[:, 0] != values[:, 1]).mean() > 0.9


def test_stages(tmp_path):
    first = save_rows(tmp_path / "5.npy", 5)
    second = save_rows(tmp_path / "6.npy", 6)
    data = load_packed(
        [(first, 250), ({first: 1, second: 1}, 100), (second, None)]
    )
    values = take(data, 100)[:, 0]
    assert (values[:250] == 5).all()  # More than the file has.
    assert Counter(values[250:350].tolist()) == {5: 50, 6: 50}
    assert (values[350:] == 6).all() and len(values) == 800


def test_the_last_stage_can_end(tmp_path):
    first = save_rows(tmp_path / "5.npy", 5)
    second = save_rows(tmp_path / "6.npy", 6)
    batches = list(load_packed([(first, 30), (second, 20)]))
    tokens = np.concatenate([batch["token_ids"] for batch in batches])
    mask = np.concatenate([batch["padding_mask"] for batch in batches])
    assert tokens[:, 0].tolist() == [5] * 30 + [6] * 20 + [0] * 6
    assert mask[:, 0].tolist() == [1] * 50 + [0] * 6


def test_resume_in_a_later_stage(folder, tmp_path):
    other = save_rows(tmp_path / "5.npy", 5)
    stages = [(other, 20), ({folder: 2, other: 1}, None)]
    iterator = iter(load_packed(stages))
    for _ in range(9):
        next(iterator)
    state = iterator.get_state()
    expected = take(iterator, 9)
    resumed = iter(load_packed(stages))
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 9), expected)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 2 * LENGTH), (-1, 24)])
def test_row_files(tmp_path, dtype, shape):
    """Rows of another length are cut anew, as the original does."""
    tokens = np.arange(24 * LENGTH * 2).astype(dtype) % 300
    np.save(tmp_path / "rows.npy", tokens.reshape(shape))
    data = load_packed(tmp_path / "rows.npy", shuffle=False, repeat=False)
    received = take(data)[:48]
    np.testing.assert_array_equal(received, tokens.reshape(-1, LENGTH))


def test_end_token_of_row_files(tmp_path, tokenizer):
    tokens = np.arange(10 * LENGTH, dtype="uint16").reshape(-1, LENGTH) % 7
    np.save(tmp_path / "rows.npy", tokens)
    for each in (None, tokenizer):
        data = load_packed(
            tmp_path / "rows.npy", shuffle=False, repeat=False, tokenizer=each
        )
        mask = np.concatenate([batch["padding_mask"] for batch in data])
        np.testing.assert_array_equal(mask[:10], document_numbers(tokens))


def test_a_row_over_many_shards(tokenizer, tmp_path):
    pack(
        ["a", "b", "c"] * 50,
        tmp_path,
        tokenizer,
        shard_size=1,
        num_workers=1,
        progress=False,
    )
    assert len(read_index(tmp_path)["shards"]) == 150
    (row,) = take(
        load_packed(
            tmp_path,
            sequence_length=300,
            batch_size=1,
            shuffle=False,
            repeat=False,
        )
    )
    expected = [tokenizer.token_to_id(letter) for letter in "abc" * 50]
    np.testing.assert_array_equal(row[::2], expected)
    assert not row[1::2].any()


def test_keras_takes_the_data_set(tmp_path):
    """Empty rows too."""
    lm = small_lm()
    lm.preprocessor = None
    rows = np.arange(20 * LENGTH, dtype="uint16").reshape(-1, LENGTH) % 300
    np.save(tmp_path / "rows.npy", rows)
    data = load_packed(tmp_path / "rows.npy", shuffle=False, repeat=False)
    received = lm.predict(data, steps=3, verbose=0)
    assert received.shape[:2] == (24, LENGTH) and np.isfinite(received).all()
    inputs = {"token_ids": rows, "padding_mask": document_numbers(rows)}
    expected = lm.predict(inputs, batch_size=BATCH, verbose=0)
    np.testing.assert_array_equal(received[:16], expected[:16])


# Errors.


def test_other_tokenizers(folder, tokenizer, other_tokenizer, tmp_path):
    load_packed(folder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        load_packed(folder, tokenizer=other_tokenizer)
    other = tmp_path / "other"
    arguments = dict(num_workers=1, progress=False)
    pack(["some text " * 40], other, other_tokenizer, **arguments)
    with pytest.raises(ValueError, match="made with different tokenizers"):
        load_packed({folder: 1, other: 1})
    with pytest.raises(ValueError, match="made with different tokenizers"):
        load_packed([(folder, 10), (other, None)])


def test_tokens_beyond_the_vocabulary(folder, tokenizer, tmp_path):
    size = tokenizer.vocabulary_size()
    load_packed(folder, vocabulary_size=size)
    with pytest.raises(
        ValueError, match=f"at most {size - 1}. Received.*{size}"
    ):
        load_packed(folder, vocabulary_size=size - 1)
    rows = save_rows(tmp_path / "a.npy", 299)
    load_packed(rows, vocabulary_size=300)
    with pytest.raises(ValueError, match="from 0 to 298. Received: 299"):
        load_packed(rows, vocabulary_size=299)
    rows = save_rows(tmp_path / "b.npy", size)
    with pytest.raises(ValueError, match=f"Received: {size}"):
        load_packed(rows, tokenizer=tokenizer)
    rows = save_rows(tmp_path / "c.npy", -1, dtype="int32")
    with pytest.raises(ValueError, match="Received: -1"):
        load_packed(rows, vocabulary_size=300)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_damaged_shards(copy):
    path = copy / "train-00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected .* bytes.*pack. again"):
        load_packed(copy, verify=False)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="train-00001.bin: expected SHA-256"):
        load_packed(copy)
    load_packed(copy, verify=False)
    load_packed(copy, split="validation")
    path.unlink()
    with pytest.raises(ValueError, match="train-00001.bin: the file is miss"):
        load_packed(copy, verify=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"complete": False}, "packing was interrupted"),
        ({"version": 2}, "expected version 1"),
        ({"shards": None}, "an index as `pack` writes it"),
        ({"dtype": "float32"}, "an index as `pack` writes it"),
        ({"end_token_id": "0"}, "an index as `pack` writes it"),
        ({"vocabulary_size": 10**6}, "an index as `pack` writes it"),
        ({"shards": []}, "expected one of the splits"),
    ],
)
def test_damaged_index(copy, change, message):
    index = {**read_index(copy), **change}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_packed(copy)


def test_an_index_reads_no_other_folder(copy):
    index = read_index(copy)
    index["shards"][0]["splits"]["train"]["file"] = "../train-00000.bin"
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="an index as `pack` writes it"):
        load_packed(copy)


def test_what_is_not_there(folder, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder that `pack` wrote"):
        load_packed(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none.npy"):
        load_packed(tmp_path / "none.npy")
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="index.json: the file is missing"):
        load_packed(copy)
    with pytest.raises(ValueError, match=r"\['train', 'validation'\].*'test'"):
        load_packed(folder, split="test")


def test_damaged_row_files(tmp_path):
    path = save_rows(tmp_path / "a.npy", 5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="a.npy: expected a whole .npy file"):
        load_packed(path)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match="a.npy: expected a whole .npy file"):
        load_packed(path)
    for array in (np.ones(99), np.ones((2, 3, 4), "int32")):
        np.save(path, array)
        with pytest.raises(ValueError, match="integers of rank 1 or 2"):
            load_packed(path)


def test_too_few_tokens(folder, tmp_path):
    with pytest.raises(ValueError, match="tokens and sequence_length=100000"):
        load_packed(folder, sequence_length=100_000)
    rows = save_rows(tmp_path / "a.npy", 5, count=2)
    assert len(take(load_packed(rows, repeat=False))) == BATCH
    with pytest.raises(ValueError, match="64 tokens and sequence_length=65"):
        load_packed(rows, sequence_length=65)


@pytest.mark.parametrize(
    "name, value",
    [
        ("sequence_length", 0),
        ("batch_size", 2.0),
        ("seed", -1),
        ("process_count", 0),
        ("process_index", -1),
    ],
)
def test_numbers(folder, name, value):
    arguments = {"process_index": 0, "process_count": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be.*={value}"):
        load_packed(folder, **arguments)


def test_arguments(folder):
    with pytest.raises(ValueError, match="must be below `process_count`"):
        load_packed(folder, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch_size=8, process_count=3"):
        load_packed(folder, process_index=0, process_count=3)
    for weight in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="weights of a mixture"):
            load_packed({folder: weight})
    for source in ({}, []):
        with pytest.raises(ValueError, match="Expected at least one"):
            load_packed(source)
    with pytest.raises(ValueError, match=r"pairs \(source, rows\)"):
        load_packed([folder])
    with pytest.raises(ValueError, match="`source` must be a path"):
        load_packed([(5, None)])
    for stages in ([(folder, None), (folder, 5)], [(folder, 0)]):
        with pytest.raises(ValueError, match="rows of a stage"):
            load_packed(stages)


def test_grain_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"keras-bwetaf\[train\]"):
        load_packed(folder)
