"""What is measured: each measure as the turns that its peers take."""

import argparse
import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers.floors import decode_seconds, prefill_seconds
from benchmarks.peers.models import OURS, PEERS
from benchmarks.peers.report import FLOOR
from benchmarks.peers.worker import ENVIRONMENT, FLOORS, ROOT, Worker

__all__ = ["KINDS", "Measures", "Shape", "take_turns"]

KINDS = ("decode", "prefill", "ragged", "memory", "start")
RAGGED = dict(shortest=8, longest=400, new=128)
# What the installed script does, under its name: the package imports less then.
COMMAND_LINE = (
    "import sys; sys.argv[0] = 'keras-bwetaf'\n"
    "from keras_bwetaf.cli import main; main()"
)


class Shape(NamedTuple):
    """Rows, tokens of each prompt, new tokens of each row."""

    batch: int
    prompt: int
    new: int
    sampled: bool = False

    @classmethod
    def parse(cls, text):
        """Of "8x32+128", or "8x32+128,sampled"."""
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)(,sampled)?", text)
        if not match:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no shape like 8x32+128 or 1x32+256,sampled"
            )
        return cls(*map(int, match.groups()[:3]), bool(match[4]))

    def __str__(self):
        how = "sampled" if self.sampled else "greedy"
        return f"batch {self.batch}, {self.prompt} + {self.new}, {how}"


class Turn(NamedTuple):
    """One figure: a column of a measure, once.

    title, unit: str. The measure's.
    column: str. A peer's name, or `FLOOR`.
    measure: function of the column. Returns a number in this unit.
    """

    title: str
    unit: str
    column: str
    measure: Callable[[str], float]


class Measures:
    """The measures of a model, and the processes that they need.

    Args:
        config: dict. Arguments of `BwETAFBackbone`.
        peers: list of str. Those that are installed.
        options: What `parse` returns.
    """

    def __init__(self, config, peers, options):
        self._config = config
        self._peers = peers
        self._options = options
        self._exits = contextlib.ExitStack()
        self._workers = {}

    def __enter__(self):
        temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._exits.enter_context(temporary))
        for name in self._peers:
            PEERS[name].prepare(self._config, self._folder)
        return self

    def __exit__(self, *_):
        self._exits.close()

    def _new_worker(self, name):
        return Worker(name, self._config, self._options.dtype, self._folder)

    def _ask(self, name, method, **arguments):
        """Asks the process of a peer, which is started when first needed."""
        if name not in self._workers:
            worker = self._exits.enter_context(self._new_worker(name))
            self._workers[name] = worker
        return self._workers[name].ask(method, **arguments)

    def _machine(self, what):
        """The most of the ways of reading memory, or of multiplying."""
        return max(self._ask(FLOORS, what)["value"].values())

    def decode(self):
        for shape in self._options.decode:
            yield self._decode(shape)

    def _decode(self, shape):
        def speed(name):
            answer = self._ask(name, "generate", **shape._asdict())
            return shape.batch * shape.new / answer["seconds"]

        def floor(_):
            seconds = decode_seconds(
                self._config,
                self._options.dtype,
                shape.batch,
                self._machine("bandwidth"),
                self._machine("products"),
            )
            return shape.batch / seconds

        return [
            *self._turns(str(shape), "tokens/s", shape, speed),
            Turn(str(shape), "tokens/s", FLOOR, floor),
        ]

    def prefill(self):
        for length in self._options.prefill:
            yield self._prefill(length)

    def _prefill(self, length):
        shape = Shape(1, length, 1)
        title = f"first token after {length}"

        def seconds(name):
            return self._ask(name, "generate", **shape._asdict())["seconds"]

        def floor(_):
            products = self._machine("products")
            return prefill_seconds(self._config, length, products)

        return [
            *self._turns(title, "s", shape, seconds),
            Turn(title, "s", FLOOR, floor),
        ]

    def _turns(self, title, unit, shape, measure):
        """One for each peer that does this."""
        return [
            Turn(title, unit, name, measure)
            for name in self._peers
            if PEERS[name].takes(**shape._asdict())
        ]

    def ragged(self):
        if OURS not in self._peers:
            return
        count = self._options.prompts

        def speed(name, rows_per_call):
            answer = self._ask(
                name,
                "ragged",
                count=count,
                rows_per_call=rows_per_call,
                **RAGGED,
            )
            return answer["value"] / answer["seconds"]

        calls = {"in one call": count, "as given, 32 a call": 32}
        yield [
            Turn(
                f"{count} ragged prompts, {how}",
                "tokens/s",
                OURS,
                functools.partial(speed, rows_per_call=rows_per_call),
            )
            for how, rows_per_call in calls.items()
        ]

    def memory(self):
        shape = self._options.memory

        def peak(name):
            with self._new_worker(name) as worker:
                answer = worker.ask("generate", **shape._asdict())
            return answer["peak_memory"]

        yield self._turns(f"peak memory, {shape}", "MiB", shape, peak)

    def start(self):
        # llama.cpp is one package, whatever its weights are.
        packages = {}
        for name in self._peers:
            packages.setdefault(PEERS[name].imports, name)
        names = packages.values()
        yield [Turn("import", "s", name, import_seconds) for name in names]
        yield [
            Turn("memory after import", "MiB", name, import_memory)
            for name in names
        ]
        if OURS in self._peers:
            yield self._command_line()

    def _command_line(self):
        generate = "generate --preset tiny Once --max-new-tokens 64".split()
        cache = None

        def first(_):
            nonlocal cache
            temporary = tempfile.TemporaryDirectory()
            cache = self._exits.enter_context(temporary)
            return run(COMMAND_LINE, *generate, cache=cache)[0]

        def second(_):
            return run(COMMAND_LINE, *generate, cache=cache)[0]

        def options(_):
            return run(COMMAND_LINE, "--help")[0]

        title = "keras-bwetaf generate, tiny, 64 tokens"
        return [
            Turn("keras-bwetaf --help", "s", OURS, options),
            Turn(f"{title}, first start", "s", OURS, first),
            Turn(f"{title}, second start", "s", OURS, second),
        ]


def run(code, *arguments, cache=None):
    """Runs Python code in a process of its own.

    Args:
        code: str.
        *arguments: str. The process's.
        cache: str. A folder for what programs keep; the user's by default.

    Returns:
        The process's seconds, and what it printed.
    """
    environment = {**os.environ, **ENVIRONMENT}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = cache
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    seconds = time.perf_counter() - start
    if result.returncode:
        raise RuntimeError(f"{code!r} has failed:\n{result.stderr}")
    return seconds, result.stdout


def import_seconds(name):
    """Of a process that does nothing else."""
    return run(PEERS[name].imports)[0]


def import_memory(name):
    """MiB that a process holds then."""
    code = (
        f"{PEERS[name].imports}\n"
        "from benchmarks.memory import process_memory\n"
        "print(process_memory('VmRSS'))"
    )
    return float(run(code)[1].split()[-1])


def take_turns(turns, rounds, warm_up):
    """Takes turns; a first round that warms up is not kept.

    Returns:
        dict of title to `{"unit": str, "values": {column: list of float}}`.
    """
    measures = {}
    for number in range(0 if warm_up else 1, rounds + 1):
        name = f"round {number} of {rounds}" if number else "warming up"
        for turn in turns:
            value = turn.measure(turn.column)
            print(
                f"{name}: {turn.title}, {turn.column}: {value:.4g} {turn.unit}",
                file=sys.stderr,
                flush=True,
            )
            if number:
                entry = measures.setdefault(
                    turn.title, {"unit": turn.unit, "values": {}}
                )
                entry["values"].setdefault(turn.column, []).append(
                    float(f"{value:.5g}")
                )
    return measures
