"""The examples run, with smaller settings, and do what they say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import converters
import keras_bwetaf
from tests.generation.conftest import small_lm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def load_example():
    def load(name):
        spec = importlib.util.spec_from_file_location(
            name, EXAMPLES / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.slow
def test_finetune_lora(load_example, tmp_path, capsys):
    small_lm().save_to_preset(tmp_path / "base")
    load_example("finetune_lora").main(
        ["--preset", str(tmp_path / "base"), "--steps", "2"]
        + ["--output", str(tmp_path / "output"), "--learning-rate", "0.1"]
    )
    printed = capsys.readouterr().out
    before, after, again = (
        printed.split(f"\n{title}\n")[1]
        .split("\n\n")[0]
        .strip()
        .splitlines()[:4]
        for title in ("Before:", "After:", "Loaded again:")
    )
    assert len(before) == 4
    assert before != after == again
    lm = keras_bwetaf.from_preset(tmp_path / "base")
    lm.backbone.load_lora_weights(tmp_path / "output" / "lora.safetensors")
    lm.backbone.merge_lora()
    merged = keras_bwetaf.from_preset(tmp_path / "output" / "merged")
    for one, two in zip(lm.weights, merged.weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_continue_from_flax(load_example, trained_checkpoint, tmp_path, capsys):
    target = tmp_path / "target"
    load_example("continue_from_flax").main(
        [str(trained_checkpoint), str(target), "--steps", "2"]
        + ["--sequence-length", "32", "--batch-size", "2"]
    )
    printed = capsys.readouterr().out
    assert "Going on at step 700" in printed and "step 702" in printed
    assert converters.detect_format(target) == "flax"
    before, after = map(
        converters.read_checkpoint, (trained_checkpoint, target)
    )
    assert after.optimizer["step"].array() == 702
    assert after.tokenizer == before.tokenizer
    for row in before.rows:
        one, two = (
            each[row.name].array().astype("float32") for each in (before, after)
        )
        assert 0 < np.abs(one - two).max() < 0.01


@pytest.mark.slow
def test_tpu_97m(tmp_path):
    """On eight devices, which are CPUs here."""
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as lines:
        for number in range(100):
            text = f"Once upon a time, there were {number} foxes. " * 20
            print(json.dumps({"text": text}), file=lines)
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = (
        [sys.executable, EXAMPLES / "tpu_97m.py", "--preset", "tiny"]
        + ["--run", tmp_path / "run", "--first", corpus, "--then", corpus]
        + ["--validation-fraction", "0.5", "--first-rows", "8", "--steps", "2"]
        + ["--steps-per-epoch", "1", "--batch-size", "8"]
    )
    printed = subprocess.run(
        [*map(str, command), "-f", "kernel.json"],  # As notebooks pass it.
        env=environment,
        text=True,
        capture_output=True,
    )
    assert printed.returncode == 0, printed.stderr
    assert "step 2/2" in printed.stdout
    lm = keras_bwetaf.from_preset(tmp_path / "run" / "model")
    assert (
        lm.count_params() == keras_bwetaf.list_presets()["tiny"]["parameters"]
    )
