"""What smaller weights cost and save: loss, bytes on disk, tokens per second.

    python -m benchmarks.quantization [--preset tiny] [--rounds 5]
        [--data FILES]

The model in float32, bfloat16, int8 and int4. The loss, in nats per token, is
that of `perplexity`, of the data or of 200 stories by the grammar of
`examples/tiny` that `tiny` has not seen. Speed is that of 200 tokens after a
short prompt, greedy, batch 1; the models take turns.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import keras_bwetaf
from examples.tiny.grammar import tell

DTYPES = ("float32", "bfloat16", "int8", "int4")


def model(preset, dtype):
    is_float = dtype in ("float32", "bfloat16")
    lm = keras_bwetaf.from_preset(
        preset, dtype=dtype if is_float else "float32"
    )
    if not is_float:
        lm.quantize(dtype)
    return lm


def size(lm):
    """Bytes of the weights' file."""
    with tempfile.TemporaryDirectory() as folder:
        lm.save_to_preset(folder)
        return sum(
            path.stat().st_size for path in Path(folder).glob("*.weights.h5")
        )


def generate(lm):
    """Tokens per second."""
    start = time.perf_counter()
    lm.generate(
        "Once upon a time, there",
        max_new_tokens=200,
        temperature=0,
        stop_token_ids=None,
    )
    return 200 / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="as read_documents takes it")
    arguments = parser.parse_args()
    stories = random.Random("test")  # The split that `tiny` has not seen.
    texts = [tell(stories) for _ in range(200)]
    if arguments.data:
        texts = list(keras_bwetaf.data.read_documents(arguments.data))
    models = {dtype: model(arguments.preset, dtype) for dtype in DTYPES}
    speeds = {dtype: [] for dtype in DTYPES}
    for lm in models.values():
        generate(lm)
    for _ in range(arguments.rounds):
        for dtype, lm in models.items():
            speeds[dtype].append(generate(lm))
    table = Table("weights", "loss", "MB", "of float32", "tokens/s", "times")
    first = None
    for dtype, lm in models.items():
        loss = keras_bwetaf.evaluation.perplexity(lm, texts).loss
        row = size(lm) / 1e6, statistics.median(speeds[dtype])
        first = first or row
        table.add_row(
            dtype,
            f"{loss:.4f}",
            f"{row[0]:.1f}",
            f"{row[0] / first[0]:.2f}",
            f"{row[1]:.0f}",
            f"{row[1] / first[1]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
