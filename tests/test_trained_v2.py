"""Version 2 on real input: models that the original trained and saved.

They are only at hand where the repository is developed; elsewhere, the same is
checked on a model that the original trains here for a few steps.
"""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import keras_bwetaf
from tests import originals

SHARED = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"
NAMES = ["bwetafv2-kjv-1.5m", "bwetafv2-kjv-gpt2"]
NUM_NEW = 32


def checkpoint(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the trained checkpoint is not at {folder}")
    return folder


def load(folder, dtype="float32"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # One of them has no tokenizer.
        return keras_bwetaf.from_preset(folder, dtype=dtype)


def losses(lm, rows):
    lm.preprocessor = None
    inputs = {
        "token_ids": rows.astype("int32"),
        "padding_mask": np.ones_like(rows, "int32"),
    }
    return lm.evaluate(inputs, batch_size=8, verbose=0, return_dict=True)[
        "loss"
    ]


def greedy(lm, prompts, num_new):
    """New tokens after each of some prompts, in one batch."""
    lm.preprocessor = None
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    token_ids = np.zeros(mask.shape, "int32")
    token_ids[mask] = np.concatenate(prompts)
    made = lm.generate(
        {"token_ids": token_ids, "padding_mask": mask.astype("int32")},
        max_new_tokens=num_new,
        stop_token_ids=None,
        temperature=0,
    )["token_ids"]
    return [
        row[length : length + num_new].tolist()
        for row, length in zip(made, lengths, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_validation_loss(name, dtype):
    folder = checkpoint(name)
    rows = np.load(folder / "val.npy")[:64]
    expected = originals.run("v2", "losses", folder, rows, dtype).mean()
    received = losses(load(folder, dtype), rows)
    print(f"{name}, {dtype}: ours {received:.5f}, theirs {expected:.5f}")
    assert abs(received - expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuations(name, dtype):
    """Those that the original made, token for token."""
    folder = checkpoint(name)
    table = re.findall(
        r"^\| ([\d ]+) \| ([\d ]+) \| [\d.]+ \| yes \|$",
        (folder / "README.md").read_text(),
        re.MULTILINE,
    )
    assert len(table) == 5
    prompts, expected = (
        [[*map(int, text.split())] for text in column]
        for column in zip(*table, strict=True)
    )
    assert greedy(load(folder, dtype), prompts, NUM_NEW) == expected


@pytest.mark.slow
def test_text():
    """Through GPT-2's tokenizer: what the original's own interface gave."""
    lm = load(checkpoint("bwetafv2-kjv-gpt2"))
    for prompt, text in {
        "In the beginning": ", and the LORD" * 4,
        "The LORD is my shepherd;": " and the LORD, and the LORD, and the "
        "LORD, and the LORD,",
        "Blessed are the": " LORD" + ", and the LORD" * 3 + ", and the",
        "And God said unto Moses,": "\n and\n,\n,\n,\n,,,,,,,",
    }.items():
        made = lm.generate(prompt, max_new_tokens=16, temperature=0)
        assert made == prompt + text


@pytest.fixture(scope="module")
def made_here(tmp_path_factory):
    """A model that the original trained for a few steps, and its rows."""
    folder = tmp_path_factory.mktemp("made")
    originals.run("v2", "save", folder / "start", seed=3)
    rng = np.random.default_rng(0)
    rows = (rng.integers(0, 61, (80, 1)) + np.arange(32)) % 61
    first, *_, last = originals.run(
        "v2",
        "train",
        *(folder / "start", folder / "trained"),
        rows[:64].reshape(8, 8, 32),
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    assert last < 0.8 * first
    return folder / "trained", rows[64:]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_of_a_model_made_here(made_here, dtype):
    folder, rows = made_here
    expected = originals.run("v2", "losses", folder, rows, dtype).mean()
    assert abs(losses(load(folder, dtype), rows) - expected) < 1e-3


@pytest.mark.slow
def test_greedy_continuations_of_a_model_made_here(made_here):
    """Each token is the likeliest by the original's logits of one pass."""
    folder, rows = made_here
    prompts = [row[: 4 + i].tolist() for i, row in enumerate(rows[:6])]
    made = greedy(load(folder), prompts, 16)
    for prompt, new in zip(prompts, made, strict=True):
        ids = np.array([prompt + new])
        likeliest = originals.run("v2", "logits", folder, ids).argmax(-1)[0]
        assert new == likeliest[len(prompt) - 1 : -1].tolist()
