"""The benchmark that compiles for TPUs: its search, and a small program."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


@pytest.fixture(scope="module")
def largest_batch():
    with mock.patch.dict(os.environ):  # The module sets some for libtpu.
        from benchmarks.tpu_compile import largest_batch
    return largest_batch


@pytest.mark.parametrize("first", [1, 4, 28, 29, 64])
@pytest.mark.parametrize("bend", [0, 0.01, -0.01])
def test_few_compilations_find_the_largest_batch(largest_batch, first, bend):
    """Peaks bend a little, and what is far too large does not compile."""
    compiled = []

    def peak_of(rows):
        compiled.append(rows)
        peak = 0.5 + 0.49 * rows * (1 + bend * rows / 28)
        return peak if peak < 16 else math.inf

    peaks = {0: 0.5, first: peak_of(first)}
    found = largest_batch(peak_of, 14.4, peaks)
    assert peak_of(found) <= 14.4 < peak_of(found + 1)
    compiled = compiled[1:-2]
    assert len(compiled) == len(set(compiled)) <= (7 if first == 64 else 2)


def test_nothing_fits(largest_batch):
    assert largest_batch(lambda rows: 5 * rows, 4, {0: 1, 2: 10}) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
def test_a_small_program_for_one_chip():
    """One layer, for Colab's v5e-1."""
    code = (
        "from benchmarks import tpu_compile as t;"
        "t.CARD = {**t.CARD, 'num_layers': 1}; t.main()"
    )
    options = "--topology v5e:1x1 --programs train --batch 1 --no-estimate"
    printed = subprocess.run(
        [sys.executable, "-c", code, *options.split()],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert printed.returncode == 0, printed.stderr
    (row,) = re.findall(r"\| v5e:1x1 \| .*", printed.stdout)
    arguments, temporaries, peak = map(float, row.split(" | ")[3:6])
    assert 0 < arguments < peak < arguments + temporaries
