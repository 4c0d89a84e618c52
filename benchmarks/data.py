"""Packing in MB/s, next to the original, and loading in tokens/s.

    python -m benchmarks.data [--megabytes 16] [--rounds 3] [--workers 2]

The text has words as frequent as in a natural language. Both packers take
turns, with the same tokenizer, documents and number of processes. The
original keeps the tokens in memory; ours writes them to a folder.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

import keras_bwetaf
from keras_bwetaf.data import load_packed, pack

NUM_WORDS = 50_000
DOCUMENT_BYTES = 3500
SEQUENCE_LENGTH, BATCH_SIZE, NUM_BATCHES = 2048, 8, 500


def make_documents(megabytes):
    """Texts of made-up words, the n-th of which has a frequency of 1 / n."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1 / np.arange(1, len(letters) + 1)
    lengths = rng.integers(2, 11, NUM_WORDS)
    words = np.array(
        [
            "".join(rng.choice(letters, length, p=weights / weights.sum()))
            for length in lengths
        ]
    )
    weights = 1 / np.arange(1, NUM_WORDS + 1)
    documents, size = [], 0
    while size < megabytes * 1e6:
        chosen = rng.choice(
            words, DOCUMENT_BYTES // 6, p=weights / sum(weights)
        )
        documents.append(" ".join(chosen).capitalize() + ".")
        size += len(documents[-1])
    return documents


def original(documents, tokenizer, num_workers):
    with (
        mock.patch("tiktoken.get_encoding"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        from BwETAF.tokenizer import main
    import tokenizers

    theirs = main.tok(tokenizers.Tokenizer.from_buffer(tokenizer.content), "")
    theirs.tokenizer.eos_token = tokenizer.end_token

    def run():
        with warnings.catch_warnings():  # It forks a process with threads.
            warnings.simplefilter("ignore")
            return len(theirs.tokenize_max_util(documents, num_workers))

    return run


def ours(documents, tokenizer, num_workers, folder):
    names = map(str, itertools.count())

    def run():
        report = pack(
            documents,
            folder / next(names),
            tokenizer,
            num_workers=num_workers,
            progress=False,
        )
        return sum(report.tokens.values())

    return run


def tokens_per_second(folder):
    """How fast the loader is alone, all checks and shuffling included."""
    data = load_packed(
        folder, sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE
    )
    batches = iter(data)
    next(batches)
    start = time.perf_counter()
    for _ in range(NUM_BATCHES):
        next(batches)
    seconds = time.perf_counter() - start
    return NUM_BATCHES * BATCH_SIZE * SEQUENCE_LENGTH / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    console = Console()
    documents = make_documents(arguments.megabytes)
    size = sum(map(len, documents))
    tokenizer = keras_bwetaf.train_tokenizer(documents[:500], 16384)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = {
            "keras_bwetaf": ours(
                documents, tokenizer, arguments.workers, folder
            ),
            "BwETAF 0.6": original(documents, tokenizer, arguments.workers),
        }
        seconds = {name: [] for name in runs}
        for round_ in range(arguments.rounds):
            console.print(f"round {round_ + 1} of {arguments.rounds}")
            counts = set()
            for name, run in runs.items():
                start = time.perf_counter()
                counts.add(run())
                seconds[name].append(time.perf_counter() - start)
            if len(counts) != 1:
                raise ValueError(f"The token counts differ: {counts}")
        loaded = statistics.median(
            tokens_per_second(folder / "0") for _ in range(arguments.rounds)
        )

    table = Table(
        title=f"{len(documents):,} documents, {size / 1e6:.0f} MB, "
        f"{arguments.workers} processes, median of {arguments.rounds}"
    )
    for column in ("packing", "MB/s", "seconds"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{size / 1e6 / median:.2f}", f"{median:.2f}")
    console.print(table)
    ratio = statistics.median(seconds["BwETAF 0.6"]) / statistics.median(
        seconds["keras_bwetaf"]
    )
    console.print(f"keras_bwetaf packs {ratio:.2f} times as fast.")
    console.print(
        f"It loads {loaded:,.0f} tokens/s, in batches of {BATCH_SIZE} x "
        f"{SEQUENCE_LENGTH}, shuffled."
    )


if __name__ == "__main__":
    main()
