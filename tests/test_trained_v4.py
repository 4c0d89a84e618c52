"""Version 4 on real text: a model that the original trained and saved."""

import json
import re

import numpy as np
import pytest

import keras_bwetaf
from tests import originals, trained
from tests.parity import relative_l2

FOLDER = trained.KJV.with_name("bwetafv4-kjv-1.7m")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason="the trained checkpoint is not at hand"
    ),
]


def logits_of(rows, dtype="float32", batch_size=16, **changes):
    lm = keras_bwetaf.from_preset(FOLDER, dtype=dtype, **changes)
    results = []
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size]
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        results.append(np.asarray(lm(inputs), "float32"))
    return np.concatenate(results)


def loss_of(logits, rows):
    logits = logits[:, :-1].astype("float64")
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, rows[:, 1:, None], axis=-1).mean()


@pytest.fixture(scope="module")
def rows():
    return np.load(FOLDER / "val.npy")[:64].astype("int32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_of_whole_sequences(rows, dtype):
    """Beside the original, 16 rows a call."""
    theirs = np.concatenate(
        [
            originals.run(
                "v4", "logits", FOLDER, rows[i : i + 16], dtype=dtype
            )[0]
            for i in range(0, 64, 16)
        ]
    )
    ours = logits_of(rows, dtype, expert_dispatch="original_batch")
    received, expected = loss_of(ours, rows), loss_of(theirs, rows)
    print(f"{dtype}: ours {received:.4f}, theirs {expected:.4f}")
    assert abs(received - expected) < 1e-3


def test_loss_of_the_generators_rule(rows):
    """Of the first rows, which the original computes token by token."""
    rows = rows[:2, :64]
    theirs = originals.run("v4", "decode", FOLDER, rows)
    ours = logits_of(rows, expert_dispatch="original_token")
    assert relative_l2(ours, theirs) < 1e-5
    assert abs(loss_of(ours, rows) - loss_of(theirs, rows)) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_dispatch_is_as_good_as_what_was_trained(rows, dtype):
    """And better than the rule by which the original generates."""
    exact, token, batch = (
        loss_of(logits_of(rows, dtype, expert_dispatch=rule), rows)
        for rule in ("exact", "original_token", "original_batch")
    )
    print(f"{dtype}: {exact:.4f}, {token:.4f}, {batch:.4f}")
    assert abs(exact - batch) < 0.01 < token - exact


def test_greedy_continuations():
    """Those of the checkpoint's page, token for token."""
    table = re.findall(
        r"^\| ([\d ]+) \| ([\d ]+) \| [\d.]+ \|",
        (FOLDER / "README.md").read_text(),
        flags=re.M,
    )
    assert len(table) == 5
    lm = keras_bwetaf.from_preset(
        FOLDER,
        dtype="float32",
        expert_dispatch="original_token",
        preprocessor=None,
    )
    prompts, expected = (
        [list(map(int, row[i].split())) for row in table] for i in range(2)
    )
    width = max(map(len, prompts))
    ids = np.zeros((5, width), "int32")
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
    made = lm.generate(
        {"token_ids": ids, "padding_mask": mask},
        max_new_tokens=32,
        stop_token_ids=None,
        temperature=0,
    )["token_ids"]
    for row, prompt, continuation in zip(made, prompts, expected, strict=True):
        start = len(prompt)
        assert row[start : start + 32].tolist() == continuation


def test_optimizer_state(tmp_path):
    """Of the original's own optimizer, to every format and back."""
    import shutil

    from converters import convert
    from tests.converters.folders import FORMATS

    source = tmp_path / "source"
    source.mkdir()
    for name in ("good_stuff.pkl", "understanding_good_stuff.json"):
        shutil.copy(FOLDER / name, source / name)
    shutil.copytree(FOLDER / "tokenizer", source / "tokenizer")
    optimizer = FOLDER.with_name(f"{FOLDER.name}-optimizer")
    shutil.copy(optimizer / "make_stuff_better.pkl", source)
    folder = source
    for to in (*FORMATS[1:], "flax"):
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
    for name in ("good_stuff.pkl", "make_stuff_better.pkl"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert json.loads(
        (folder / "understanding_good_stuff.json").read_text()
    ) == json.loads((source / "understanding_good_stuff.json").read_text())
