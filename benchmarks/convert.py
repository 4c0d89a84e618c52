"""Seconds and peak memory of conversions of a 97M checkpoint.

    python -m benchmarks.convert [--rounds 5] [--dtype bfloat16]

Between Flax and safetensors the peer is what people write by hand, with
`flax.serialization` and `safetensors.flax`: the same tensors in the same
layout. Each conversion runs in a process of its own, and they take turns.
Seconds are those of the conversion, and those of the whole process.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import converters
from benchmarks.memory import process_memory
from converters.architectures import tensors
from converters.formats import FORMATS
from converters.transforms import view

CARD = {
    "num_heads": 8,
    "attention_dim": 768,
    "vocab_size": 16384,
    "num_blocks": 12,
    "ff_dim": 2304,
    "dropout_rate": 0.05,
    "max_len": 2048,
    "gqa_repeats": 2,
    "emb_init_range": 0.02,
}
ROWS = tensors(converters.config_from_flax(CARD))
FLAX_WEIGHTS, SAFETENSORS = "good_stuff.pkl", "model.safetensors"


def ours(source, target, to):
    converters.convert(source, target, to=to)


def by_hand(source, target, to):
    import flax.serialization
    import safetensors.flax

    target.mkdir()
    if to == "safetensors":
        tree = flax.serialization.msgpack_restore(
            (source / FLAX_WEIGHTS).read_bytes()
        )
        arrays = {
            row.name: np.ascontiguousarray(
                view(row.kind.from_flax, parent(tree, row)[row.flax[-1]])
            )
            for row in ROWS
        }
        safetensors.flax.save_file(arrays, target / SAFETENSORS)
        return
    arrays, tree = safetensors.flax.load_file(source / SAFETENSORS), {}
    for row in ROWS:
        values = np.asarray(arrays[row.name])
        empty = np.empty(row.flax_shape, values.dtype)
        array = parent(tree, row).setdefault(row.flax[-1], empty)
        view(row.kind.from_flax, array)[...] = values
    (target / FLAX_WEIGHTS).write_bytes(flax.serialization.to_bytes(tree))


def parent(tree, row):
    """The dictionary of a Flax tree that a tensor is in."""
    for key in row.flax[:-1]:
        tree = tree.setdefault(key, {})
    return tree


HOW = {"converters": ours, "flax + safetensors.flax": by_hand}


def make_checkpoint(folder, dtype):
    """A folder of the original with random weights."""
    import flax.serialization

    rng, tree = np.random.default_rng(0), {}
    for row in ROWS:
        values = rng.standard_normal(row.flax_shape, "float32")
        parent(tree, row)[row.flax[-1]] = values.astype(dtype)
    folder.mkdir()
    (folder / FLAX_WEIGHTS).write_bytes(flax.serialization.to_bytes(tree))
    config = json.dumps(CARD)
    (folder / "understanding_good_stuff.json").write_text(config)


def measure(how, source, target, to):
    """Runs a conversion; returns its seconds, the process's, peak bytes."""
    command = [sys.executable, "-m", "benchmarks.convert", "--child"]
    command += [how, str(source), str(target), to]
    start = time.perf_counter()
    output = subprocess.check_output(command, text=True)
    seconds, peak = map(float, output.split())
    return seconds, time.perf_counter() - start, peak


def child(how, source, target, to):
    # The first call loads modules, which is the process's business.
    for module in ("flax.serialization", "safetensors.flax", "h5py"):
        if how != "converters" or module == "h5py":
            __import__(module)
    start = time.perf_counter()
    HOW[how](Path(source), Path(target), to)
    seconds = time.perf_counter() - start
    print(seconds, 2**20 * process_memory())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--child", nargs=4)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return

    runs = {
        (source, to, how): []
        for source, to in itertools.permutations(FORMATS, 2)
        for how in HOW
        if how == "converters" or {source, to} == {"flax", "safetensors"}
    }
    with tempfile.TemporaryDirectory() as temporary:
        folders = {each: Path(temporary, each) for each in FORMATS}
        make_checkpoint(folders["flax"], arguments.dtype)
        for to in list(FORMATS)[1:]:
            converters.convert(folders["flax"], folders[to], to=to)
        target = Path(temporary, "target")
        rounds = list(itertools.product(range(arguments.rounds), runs))
        for _, run in track(rounds, "Converting", transient=True):
            source, to, how = run
            runs[run].append(measure(how, folders[source], target, to))
            shutil.rmtree(target)

    table = Table(
        *("from", "to", "with", "seconds", "of the process", "peak MB"),
        "ratios of the three",
        title=f"97M, {arguments.dtype}, medians of {arguments.rounds}",
    )
    medians = {
        run: [statistics.median(each) for each in zip(*results, strict=True)]
        for run, results in runs.items()
    }
    for (source, to, how), figures in medians.items():
        peer = medians.get((source, to, "flax + safetensors.flax"))
        ratios = ""
        if peer and how == "converters":
            ratios = "  ".join(
                f"{mine / theirs:.2f}"
                for mine, theirs in zip(figures, peer, strict=True)
            )
        table.add_row(
            source,
            to,
            how,
            *(f"{seconds:.2f}" for seconds in figures[:2]),
            f"{figures[2] / 1e6:.0f}",
            ratios,
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
