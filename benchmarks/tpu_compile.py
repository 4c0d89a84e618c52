"""What the programs of this package need on TPUs, compiled without one.

    pip install libtpu  # the release that belongs to the installed jax
    python -m benchmarks.tpu_compile [--topology v3:2x2 v6e:1x1 ...]
        [--batch 4] [--accumulation 1] [--length 2048]
        [--strategy data_parallel ...] [--remat none attention:10,block:2]
        [--kernel plain] [--largest-batch] [--programs train prefill decode]
        [--original] [--preset v4-preview]

The 97M model, or another, in bfloat16 with the card's recipe: the train step
of `fit`, and the prompt pass and the decode loop of `generate`, whose prompts
are half of the length. TPU's compiler runs on any Linux machine; nothing is
executed.

`--batch` is the number of rows for each core at once: with `model_parallel_2`,
two cores have twice as many together. With `--accumulation 2`, a train step
works on twice as many, one half after the other. Figures are of one core and
one step; of `decode`, of one token. FLOPs, bytes and seconds are the
compiler's own estimate. It counts what is in a loop once, so those of a train
step are of one without the loop over parts of the head and loss. Of a Pallas
kernel it counts nothing: with splash attention, FLOPs and seconds are too
small. Where it gives no seconds, none are shown. Estimated cycles are the sum
of those that the compiler notes at its instructions, loops counted as often as
they run: of kernels, collectives and copies in the background there are none.

`--largest-batch` looks for the most rows whose train step leaves a tenth of a
core's memory free, where the line through the peaks of what it has compiled
says that they are: two to four compilations, with those that the table needs.

`--original` compiles the train step of BwETAF 0.6 and optax next to it.
"""

import os

# Read by libtpu, and by JAX when it is imported.
os.environ.update(
    JAX_PLATFORMS="cpu",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v3-8",
)

import argparse
import collections
import contextlib
import functools
import itertools
import math
import re
import time
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from keras_bwetaf import distribution
from keras_bwetaf.generation.decoding import Decoder, GenerationState
from keras_bwetaf.generation.sampling import BwETAFSampler, SamplingSettings
from keras_bwetaf.hardware import GIB, device
from keras_bwetaf.layers import attention, attention_kernel
from keras_bwetaf.layers.initializers import skip_initialization
from keras_bwetaf.layers.sharding import device_axes
from keras_bwetaf.layers.transformer_block import REMAT
from keras_bwetaf.models.registry import causal_lm_class
from keras_bwetaf.preset_files import PRESETS, load_architecture
from keras_bwetaf.recommendation import SPARE
from keras_bwetaf.step import train_step
from keras_bwetaf.step.loss import head_cross_entropy
from keras_bwetaf.training import recipe

PRESET = "97m"
CARD = PRESETS[PRESET]["config"]
DTYPE = "bfloat16"
TOTAL_STEPS = 1000
NUM_STOP_TOKENS = 8

# From devices to a `keras.distribution.Distribution`.
STRATEGIES = {
    "data_parallel": distribution.data_parallel,
    "fully_sharded": distribution.fully_sharded,
    "model_parallel_2": functools.partial(distribution.model_parallel, 2),
    "model_parallel_2_fully_sharded": functools.partial(
        distribution.model_parallel, 2, True
    ),
    "model_parallel_4": functools.partial(distribution.model_parallel, 4),
    "model_parallel_8": functools.partial(distribution.model_parallel, 8),
}


# === What is compiled ===


class Program(NamedTuple):
    function: object  # what `jax.jit` returned
    arguments: tuple  # of `jax.ShapeDtypeStruct`s with shardings


def our_model(num_parts=1, preset=PRESET):
    architecture, config = load_architecture(preset)
    lm_class = causal_lm_class(architecture)
    config = CARD if preset == PRESET else config
    with skip_initialization():
        lm = lm_class(lm_class.backbone_cls(**config, dtype=DTYPE))
    lm.compile(
        recipe(preset, TOTAL_STEPS), gradient_accumulation_steps=num_parts
    )
    lm.optimizer.build(lm.trainable_variables)
    return lm


def remats_of_blocks(remat, num_layers):
    """From `"none"` or, say, `"attention:10,block:2"` to a list."""
    if ":" not in remat:
        return [remat] * num_layers
    parts = (part.split(":") for part in remat.split(","))
    return [value for value, count in parts for _ in range(int(count))]


def train(lm, remat, strategy, batch_size, length):
    """The step of `fit`, placed as Keras's trainer places it.

    `batch_size` is that of each part of a step, if `lm` accumulates gradients.
    """
    batch_size *= lm.gradient_accumulation_steps
    each = remats_of_blocks(remat, lm.backbone.num_layers)
    for block, value in zip(lm.backbone.transformer_layers, each, strict=True):
        block.remat = value
    layouts = _layouts(lm, strategy)
    state = tuple(
        [_struct(v, layouts[v.path]) for v in variables]
        for variables in (
            lm.trainable_variables,
            lm.non_trainable_variables,
            lm.optimizer.variables,
            lm.metrics_variables,
        )
    )
    rows = jax.ShapeDtypeStruct((batch_size, length), "int32")
    rows = _struct(rows, strategy.get_data_layout(rows.shape))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        # A new function each time, as JAX keeps what it has traced.
        lambda state, data: lm.train_step(state, data),
        donate_argnums=0,
        out_shardings=(None, shardings),
    )
    return Program(step, (state, {"token_ids": rows, "padding_mask": rows}))


def prefill(lm, strategy, batch_size, length):
    """Prompts of half the length, with caches for all of it."""
    decoder = Decoder(lm)
    return Program(
        decoder._prefill,
        (
            _weights(lm, strategy),
            length,
            *_prompts(strategy, batch_size, length // 2),
            [],
        ),
    )


def decode(lm, strategy, batch_size, length):
    """The loop that makes tokens after such prompts."""
    decoder = Decoder(lm)
    values = _weights(lm, strategy)
    token_ids, request, settings = _prompts(strategy, batch_size, length // 2)
    state, _ = jax.eval_shape(
        lambda *arguments: decoder._prefill_step(
            arguments[0], length, *arguments[1:]
        ),
        values,
        token_ids,
        request,
        settings,
        [],
    )
    shared = ("prompt_slots", "stop_token_ids", "num_tokens", "tokens")
    placed = {
        name: _placed(value, strategy, by_row=name not in shared)
        for name, value in state._asdict().items()
    }
    rows, heads = device_axes(batch_size, lm.backbone.num_key_value_heads)
    placed["cache"] = _with_spec(state.cache, strategy, (*rows, *heads))
    state = GenerationState(**placed)
    num_steps = _placed(
        jax.ShapeDtypeStruct((), "int32"), strategy, by_row=False
    )
    return Program(
        decoder._decode, (values, state, settings, num_steps, num_steps, [])
    )


PROGRAMS = ("train", "prefill", "decode")


def bwetaf(strategy, batch_size, length):
    """The same with BwETAF 0.6 and optax."""
    from benchmarks import original  # Only this needs the package.

    manager = original.model(DTYPE)
    optimizer = original.optimizer(TOTAL_STEPS)
    state = (
        manager.params,
        jax.eval_shape(optimizer.init, manager.params),
    )
    state, key = _placed((state, manager.key), strategy, by_row=False)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows = jax.ShapeDtypeStruct((batch_size, length), "int32")
    step = jax.jit(
        original.train_step(manager, optimizer),
        donate_argnums=0,
        out_shardings=(None, shardings),
    )
    return Program(step, (state, _placed(rows, strategy, by_row=True), key))


def _layouts(lm, strategy):
    """Layouts by path of all variables of a model and its optimizer.

    Nothing can be put on devices that are not there, so the layouts are asked
    for; moments have those of their weights.
    """
    optimizer = lm.optimizer
    variables = [*lm.variables, *lm.metrics_variables, *optimizer.variables]
    layouts = {v.path: strategy.get_variable_layout(v) for v in variables}
    for moments in (optimizer._momentums, optimizer._velocities):
        for weight, moment in zip(lm.trainable_variables, moments, strict=True):
            layouts[moment.path] = layouts[weight.path]
    return layouts


def _struct(value, layout):
    return jax.ShapeDtypeStruct(
        value.shape, value.dtype, sharding=layout.backend_layout
    )


def _placed(values, strategy, by_row):
    """Arrays split by their first axis, or whole on every device."""
    axes = (strategy.batch_dim_name,) if by_row else ()
    return _with_spec(values, strategy, *axes)


def _with_spec(values, strategy, *axes):
    sharding = jax.sharding.NamedSharding(
        strategy.device_mesh.backend_mesh, jax.sharding.PartitionSpec(*axes)
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        values,
    )


def _weights(lm, strategy):
    return [_struct(v, strategy.get_variable_layout(v)) for v in lm.variables]


def _prompts(strategy, batch_size, prompt_length):
    """Prompts, `Decoder.prefill`'s state, and the sampler's settings."""
    rows = np.zeros(batch_size, "int32")
    settings = SamplingSettings.of(BwETAFSampler(), seeds=rows)
    placed = {
        name: _placed(value, strategy, by_row=name == "seeds")
        for name, value in settings._asdict().items()
    }
    token_ids = np.zeros((batch_size, prompt_length), "int32")
    token_ids, lengths = _placed((token_ids, rows), strategy, by_row=True)
    stop_token_ids = np.zeros(NUM_STOP_TOKENS, "int32")
    request = {
        "prompt_lengths": lengths,
        "limits": lengths,
        "stop_token_ids": _placed(stop_token_ids, strategy, by_row=False),
    }
    return token_ids, request, SamplingSettings(**placed)


# === What comes out ===

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
DTYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


class Instruction(NamedTuple):
    opcode: str
    shapes: list  # of tuples of dtype and dimensions, the result's arrays
    line: str
    times: int  # how often the program runs it


def instructions(hlo):
    """The instructions of a compiled program, and how often each runs.

    Args:
        hlo: str. Text of a compiled module.

    Yields:
        `Instruction`. Bodies of loops whose length is not known count once.
    """
    computations = {}
    entry = None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = []
            if header[1]:
                entry = name
        elif " = " in line and line.startswith(" "):
            computations[name].append(line)

    def visit(name, times):
        for line in computations[name]:
            opcode = re.search(r" = .*?[\]})] ([a-z][\w-]*)\(", line)
            if opcode is None:
                continue
            opcode = opcode[1]
            result = line.split(" = ", 1)[1].split(f" {opcode}(")[0]
            shapes = [
                (dtype, tuple(int(x) for x in dims.split(",") if x))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
            ]
            yield Instruction(opcode, shapes, line, times)
            if opcode == "while":
                body = re.search(r"body=%?([\w.-]+)", line)[1]
                condition = re.search(r"condition=%?([\w.-]+)", line)[1]
                # A loop from 0 compares with the one constant that it has.
                count = re.findall(
                    r"s32\[\]\S* constant\((\d+)\)",
                    "\n".join(computations[condition]),
                )
                count = int(count[0]) if len(count) == 1 else 1
                yield from visit(condition, times * count)
                yield from visit(body, times * count)
            elif opcode in ("call", "conditional", "async-start"):
                called = re.findall(
                    r"(?:calls|to_apply|_computation|branch_computations)="
                    r"\{?((?:%?[\w.-]+(?:, )?)+)",
                    line,
                )
                for name in re.findall(r"[\w.-]+", " ".join(called)):
                    if name in computations:
                        yield from visit(name, times)

    yield from visit(entry, 1)


def num_bytes(shape):
    dtype, dims = shape
    return DTYPE_BYTES.get(dtype, 4) * int(np.prod(dims))


@contextlib.contextmanager
def head_in_one():
    """Train steps made inside work on all of the head and loss at once."""
    in_one = functools.partial(head_cross_entropy, num_chunks=1)
    with mock.patch.object(train_step, "head_cross_entropy", in_one):
        yield


def compiled(program):
    return program.function.lower(*program.arguments).compile()


class Figures:
    """What the compiler says of a program.

    Args:
        make_program: function that returns a `Program`.
        without_loops: bool. Whether FLOPs, bytes and seconds are those of the
            program without its loop, which is compiled for that.
    """

    def __init__(self, make_program, without_loops):
        start = time.perf_counter()
        program = compiled(make_program())
        self.seconds_to_compile = time.perf_counter() - start
        memory = program.memory_analysis()
        self.arguments = memory.argument_size_in_bytes
        self.temporaries = memory.temp_size_in_bytes
        self.peak = memory.peak_memory_in_bytes
        self.hlo = program.as_text()
        self.instructions = list(instructions(self.hlo))
        if without_loops:
            with head_in_one():
                program = compiled(make_program())
        cost = program.cost_analysis()
        self.cycles = sum(
            each.times * int(cycles)
            for each in self.instructions
            for cycles in re.findall(r'"estimated_cycles":"(\d+)"', each.line)
        )
        self.flops = cost["flops"]
        self.bytes = cost["bytes accessed"]
        self.seconds = cost.get("optimal_seconds", 0)

    def collectives(self):
        """dict of kind to a tuple of how many run and their bytes."""
        counts = collections.defaultdict(lambda: (0, 0))
        for instruction in self.instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [num_bytes(shape) for shape in instruction.shapes]
            # The result of a start lists what it reads, too.
            size = max(sizes) if kind != instruction.opcode else sum(sizes)
            count, total = counts[kind]
            times = instruction.times
            counts[kind] = count + times, total + times * size
        return dict(sorted(counts.items()))

    def kernels(self):
        """dict of the name of a Pallas kernel to how often it runs."""
        counts = collections.Counter()
        for instruction in self.instructions:
            if 'custom_call_target="tpu_custom_call"' in instruction.line:
                name = re.match(r"\s*(?:ROOT )?%?([\w-]+)", instruction.line)[1]
                counts[name] += instruction.times
        return dict(sorted(counts.items()))

    def copies_of(self, shapes):
        """How many copies of arrays of these shapes there are.

        Returns:
            Tuple of copies within the main memory, and of moves between it
            and those on the chip, in which the compiler works on what fits.
        """
        copies = [
            # The core's own memory, and the one that v4's cores share.
            re.search(r"S\([13]\)", instruction.line) is not None
            for instruction in self.instructions
            if instruction.opcode in ("copy", "copy-start")
            and any(dims in shapes for _, dims in instruction.shapes)
        ]
        return len(copies) - sum(copies), sum(copies)


def largest_batch(peak_of, limit, peaks):
    """The most rows whose peak is within a limit.

    Peaks are almost linear in the number of rows, so the line through the two
    largest that are known says where to look next; and that one row more is
    too many, unless its peak is near the limit.

    Args:
        peak_of: function of the number of rows to bytes, infinite if they
            don't fit at all.
        limit: float. Bytes.
        peaks: dict of numbers of rows to bytes, of 0 and of another.

    Returns:
        int.
    """
    peaks = dict(peaks)
    while True:
        fitting = max(rows for rows, peak in peaks.items() if peak <= limit)
        too_many = min(
            (rows for rows, peak in peaks.items() if peak > limit),
            default=math.inf,
        )
        finite = sorted(rows for rows in peaks if peaks[rows] < math.inf)
        candidate = too_many // 2
        if len(finite) > 1:
            one, two = finite[-2:]
            slope = (peaks[two] - peaks[one]) / (two - one)
            room = (limit - peaks[two]) / slope
            if two == fitting and room < 0.9:
                return fitting
            candidate = two + math.floor(room)
        if too_many == fitting + 1:
            return fitting
        candidate = min(max(candidate, fitting + 1), too_many - 1)
        peaks[candidate] = peak_of(candidate)


def peak_memory(make_program):
    """Bytes, or infinity if the compiler can't make it fit."""
    try:
        return compiled(make_program()).memory_analysis().peak_memory_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


# === The command ===


def program_makers(lm, arguments):
    """Functions of distribution, rows and length that make a `Program`."""
    makers = {
        f"train, remat={remat}": functools.partial(train, lm, remat)
        for remat in arguments.remat
    }
    if arguments.original:
        makers["train, BwETAF 0.6"] = bwetaf
    makers["prefill"] = functools.partial(prefill, lm)
    makers["decode"] = functools.partial(decode, lm)
    return {
        name: make
        for name, make in makers.items()
        if name.split(",")[0] in arguments.programs
    }


def rows_of(name, figures, cache_shapes):
    """What the table says of a program, by name of the row."""
    collectives = (
        f"{count} {kind}, {size / 2**20:.1f} MiB"
        for kind, (count, size) in figures.collectives().items()
    )
    kernels = (
        f"{count} {kernel}" for kernel, count in figures.kernels().items()
    )
    seconds = figures.seconds
    copies, moves = figures.copies_of(cache_shapes)
    return {
        "arguments, GiB": f"{figures.arguments / GIB:.3f}",
        "temporaries, GiB": f"{figures.temporaries / GIB:.3f}",
        "peak, GiB": f"{figures.peak / GIB:.3f}",
        "FLOPs": f"{figures.flops:.4g}",
        "bytes": f"{figures.bytes:.4g}",
        "estimated seconds": f"{seconds:.5g}" if seconds > 0 else "",
        "estimated cycles": f"{figures.cycles:.4g}",
        "collectives": "\n".join(collectives),
        "Pallas kernels": "\n".join(kernels),
        "copies of a cache": str(copies) if name == "decode" else "",
        "moves of a cache": str(moves) if name == "decode" else "",
        "seconds to compile": f"{figures.seconds_to_compile:.0f}",
    }


def tpu_devices(topology):
    """The devices of a topology, such as `"v3:2x2"`."""
    options = {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    elif topology.startswith("v4"):
        # Both cores of a chip are one device, as JAX uses them.
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    ).devices


def report(topology, strategy_name, lm, arguments, console):
    """Prints a table, and returns the lines of it that `summary` needs."""
    devices = tpu_devices(topology)
    strategy = STRATEGIES[strategy_name](devices=list(devices))
    kind = devices[0].device_kind
    num_rows = arguments.batch * len(devices)
    table = Table(
        title=f"{arguments.preset}, {DTYPE}, {topology} "
        f"({len(devices)} x {kind}), "
        f"{strategy_name}, {arguments.batch} x {arguments.length} a core"
    )
    table.add_column("of one core")
    columns = {}
    with strategy.scope():
        for name, make in program_makers(lm, arguments).items():
            console.print(f"{topology}, {strategy_name}: {name}")

            def make_program(num_rows=num_rows, make=make):
                return make(strategy, num_rows, arguments.length)

            figures = Figures(
                make_program,
                without_loops="train" in name and not arguments.no_estimate,
            )
            columns[name] = rows_of(
                name,
                figures,
                cache_shapes(lm.backbone, strategy, num_rows, arguments.length),
            )
            if "train" in name and arguments.no_estimate:
                for row in ("FLOPs", "bytes", "estimated seconds"):
                    columns[name][row] = ""
            table.add_column(name, justify="right", overflow="fold")
            if arguments.largest_batch and "train" in name:
                rows = largest_batch(
                    lambda batch, make=make_program: peak_memory(
                        lambda: make(batch * len(devices))
                    ),
                    limit=(1 - SPARE) * device(kind).memory * GIB,
                    peaks={0: figures.arguments, arguments.batch: figures.peak},
                )
                columns[name]["largest batch a core"] = str(rows)
    for row in next(iter(columns.values())):
        table.add_row(
            row, *(column.get(row, "") for column in columns.values())
        )
    console.print(table)
    return columns


def cache_shapes(backbone, strategy, num_rows, length):
    """What a device has of the keys of a layer, and of the values."""
    num_heads = backbone.num_key_value_heads
    axes = itertools.chain(*device_axes(num_rows, num_heads))
    num_parts = math.prod(
        strategy.device_mesh.backend_mesh.shape[axis] for axis in axes
    )
    head_dim = backbone.hidden_dim // backbone.num_query_heads
    num_heads = num_rows * num_heads // num_parts
    return (num_heads, head_dim, length), (num_heads, length, head_dim)


def summary(reports):
    """A table in Markdown of all programs, a line for each.

    Args:
        reports: dict of topology and strategy to what `report` returned.
    """
    names = (
        "arguments, GiB",
        "temporaries, GiB",
        "peak, GiB",
        "FLOPs",
        "estimated seconds",
        "estimated cycles",
        "collectives",
        "Pallas kernels",
        "copies of a cache",
        "largest batch a core",
    )
    used = [
        name
        for name in names
        if any(
            column.get(name)
            for columns in reports.values()
            for column in columns.values()
        )
    ]
    lines = [["TPU", "strategy", "program", *used], ["---"] * (3 + len(used))]
    for (topology, strategy_name), columns in reports.items():
        for program, column in columns.items():
            cells = (column.get(name, "").replace("\n", "; ") for name in used)
            lines.append([topology, strategy_name, program, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", nargs="+", default=["v3:2x2"])
    parser.add_argument("--batch", type=int, default=4, help="rows of a core")
    parser.add_argument(
        "--accumulation",
        type=int,
        default=1,
        help="parts of a train step, of --batch rows a core each",
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--preset", choices=PRESETS, default=PRESET)
    parser.add_argument(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        default=["data_parallel"],
    )
    parser.add_argument(
        "--remat",
        nargs="+",
        default=["none"],
        help=f"{', '.join(REMAT)}; or of how many blocks each, such as "
        "attention:10,block:2",
    )
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS
    )
    parser.add_argument(
        "--kernel", choices=attention.KERNELS, help="instead of the chosen"
    )
    parser.add_argument(
        "--largest-batch", action="store_true", help="search for it"
    )
    parser.add_argument("--original", action="store_true")
    parser.add_argument(
        "--no-estimate",
        action="store_true",
        help="compile train steps once, and leave out FLOPs and seconds",
    )
    arguments = parser.parse_args()

    console = Console()
    lm = our_model(arguments.accumulation, arguments.preset)
    overrule = (
        attention_kernel(arguments.kernel)
        if arguments.kernel
        else contextlib.nullcontext()
    )
    reports = {}
    with overrule:
        for topology, name in itertools.product(
            arguments.topology, arguments.strategy
        ):
            reports[topology, name] = report(
                topology, name, lm, arguments, console
            )
    print(summary(reports))


if __name__ == "__main__":
    main()
