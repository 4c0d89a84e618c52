"""Decoding, prompts, memory and start-up, next to the peers and the floors.

    python -m benchmarks.peers [--only decode prefill] [--rounds 3]
        [--peers KerasHub transformers] [--output docs/pictures/peers.json]

All models have the card's configuration (the Llamas have its sizes), random
weights and the same prompts. Each lives in a process of its own. They take
turns within each measure, so that a change in the machine's speed meets all,
and so do the floors. What is timed is a whole call that generates. A first
round warms up: it compiles, and does not count.

decode   new tokens a second, of shapes BATCHxPROMPT+NEW; "sampled" is top-p
         0.92 at temperature 0.8
prefill  seconds from a prompt to its first new token
ragged   200 prompts of 8 to 400 tokens, up to 128 new each: all in one call,
         and in calls of 32 in the order given
memory   peak of a new process that makes the model and generates once
start    seconds and memory of importing; of the command line

The floor of decoding is the time of reading the weights once a step, or of
multiplying with them if that takes longer; that of a prompt is its products.
Both are the fastest of NumPy, JAX and PyTorch with the same threads.

The peers' settings are in `models.py`. A package that is not installed is
named as missing: `pip install llama-cpp-python gguf` adds llama.cpp.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from benchmarks.peers.measures import KINDS, Measures, Shape, take_turns
from benchmarks.peers.models import OURS, PEERS
from benchmarks.peers.report import table


def about(config, missing, options):
    """What the figures are of."""
    packages = {
        OURS: "keras-bwetaf",
        "KerasHub": "keras-hub",
        "transformers": "transformers",
        "BwETAF": "BwETAF",
        "llama.cpp": "llama-cpp-python",
        "JAX": "jax",
        "PyTorch": "torch",
    }
    versions = {}
    for name, package in packages.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(package)
    return {
        "config": config,
        "dtype": options.dtype,
        "threads": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "versions": versions,
        "missing": missing,
    }


def save(path, results):
    """Writes the results; measures of an earlier run that are not new stay."""
    if path.exists():
        before = json.loads(path.read_text())
        for name in ("config", "dtype", "threads"):
            if before[name] != results[name]:
                raise ValueError(
                    f"{path} has results for {name}={before[name]}, and these "
                    f"are for {results[name]}. Choose another --output."
                )
        results["measures"] = {**before["measures"], **results["measures"]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument(
        "--decode",
        nargs="+",
        type=Shape.parse,
        default=[
            Shape(1, 32, 256),
            Shape(1, 32, 256, sampled=True),
            Shape(1, 512, 512),
            Shape(8, 32, 128),
            Shape(32, 32, 32),
        ],
    )
    parser.add_argument("--prefill", nargs="+", type=int, default=[512, 1900])
    parser.add_argument("--prompts", type=int, default=200, help="ragged ones")
    parser.add_argument(
        "--memory", type=Shape.parse, default=Shape(1, 1900, 148)
    )
    parser.add_argument(
        "--config", type=Path, help="JSON; another model than the card's"
    )
    parser.add_argument("--output", type=Path, help="JSON; old measures stay")
    return parser.parse_args(arguments)


def main():
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.config:
        config = json.loads(options.config.read_text())
    else:
        from keras_bwetaf.preset_files import PRESETS

        config = PRESETS["97m"]["config"]
    missing = {name: peer.missing() for name, peer in PEERS.items()}
    missing = {name: packages for name, packages in missing.items() if packages}
    peers = [name for name in options.peers if name not in missing]
    results = {**about(config, missing, options), "measures": {}}
    with Measures(config, peers, options) as measures:
        for kind in options.only:
            warm_up = kind != "memory"
            for turns in getattr(measures, kind)():
                new = take_turns(turns, options.rounds, warm_up)
                results["measures"].update(new)
                if options.output:
                    save(options.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
