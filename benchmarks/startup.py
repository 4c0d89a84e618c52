"""How long new processes take to start, next to `import keras_hub`.

Prints medians of the wall time of whole processes, which take turns, their
ratio to `import keras_hub`, and the peak of resident memory. Linux counts a
process at no less than the one that started it: this one has `keras_bwetaf`
imported, so smaller peaks than that are shown as that.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [str(Path(sys.executable).with_name("keras-bwetaf"))]
GENERATE = [
    *COMMAND,
    *("generate", "--preset", "tiny", "Once", "--max-new-tokens", "64"),
]
CACHE = "KERAS_BWETAF_COMPILATION_CACHE"


def python(script):
    return [sys.executable, "-c", script]


PROCESSES = {
    "import keras_hub": python("import keras_hub"),
    "import keras_bwetaf": python("import keras_bwetaf"),
    "--help": [*COMMAND, "--help"],
    "info tiny": [*COMMAND, "info", "tiny"],
    "generate, first start": GENERATE,
    "generate, second start": GENERATE,
}


def measure(command, environment):
    """Seconds and peak of resident memory, in bytes, of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command}: status {status}")
    return seconds, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    measured = {name: [] for name in PROCESSES}
    with tempfile.TemporaryDirectory() as folder:
        kept = {"KERAS_BACKEND": "jax", CACHE: f"{folder}/kept"}
        for command in PROCESSES.values():  # Files into memory, and programs.
            measure(command, kept)
        for i in range(rounds):
            for name, command in PROCESSES.items():
                is_first = name == "generate, first start"
                new = {CACHE: f"{folder}/{i}"} if is_first else {}
                measured[name].append(measure(command, {**kept, **new}))
    seconds = {
        name: statistics.median(each for each, _ in results)
        for name, results in measured.items()
    }
    print("| process | seconds | ratio | peak memory, MB |\n|---|---|---|---|")
    for name, results in measured.items():
        ratio = seconds[name] / seconds["import keras_hub"]
        memory = statistics.median(each for _, each in results) / 1e6
        print(f"| {name} | {seconds[name]:.2f} | {ratio:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
