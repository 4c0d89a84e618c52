"""Trained tokens per second, next to the peers and to a bare loop.

    python -m benchmarks.train [--steps 10] [--rounds 3] [--batch 2]
        [--length 512] [--dtype float32]

All models have the card's configuration, random weights and moments of this
dtype, the same packed rows and AdamW, and no dropout. They take turns, so that
a change in the machine's speed meets all. Before, each runs alone in a process
of its own, whose peak memory is measured: the device's, if JAX knows it, as on
GPUs, or else the process's. If the device's peak is known, so is the share of
it that is used, MFU.

- keras_bwetaf, fit: `lm.fit` with the recipe.
- keras_bwetaf, bare step: the same compiled step in a loop, without Keras's
  trainer: what `fit` could be at most.
- BwETAF 0.6: its `loss_fn` and optax's AdamW in one jitted step. Its package
  has no training loop.
- KerasHub Llama, fit: a model of the same size, as KerasHub trains it.
"""

import argparse
import json
import subprocess
import sys
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_bwetaf
from benchmarks import original
from benchmarks.memory import process_memory
from benchmarks.peers.models import keras_hub_llama
from keras_bwetaf.data import document_numbers
from keras_bwetaf.hardware import flops_per_token, peak_flops
from keras_bwetaf.preset_files import PRESETS
from keras_bwetaf.training import recipe

import keras  # isort: skip  after keras_bwetaf, which chooses the backend
import keras_hub  # isort: skip  like Keras

CARD = {**PRESETS["97m"]["config"], "dropout": 0.0}
TOTAL_STEPS = 1000
OURS = "keras_bwetaf, fit"


def packed_rows(arguments):
    """Rows in which a document ends after every hundredth token or so."""
    rng = np.random.default_rng(0)
    shape = (arguments.batch * arguments.steps, arguments.length)
    token_ids = rng.integers(1, CARD["vocabulary_size"], shape, "int32")
    token_ids[rng.random(shape) < 0.01] = 0
    documents = document_numbers(token_ids, end_token_id=0)
    return {"token_ids": token_ids, "padding_mask": documents}


def our_model(dtype):
    backbone = keras_bwetaf.BwETAFBackbone(**CARD, dtype=dtype)
    lm = keras_bwetaf.BwETAFCausalLM(backbone)
    lm.compile(recipe("97m", TOTAL_STEPS, moments_dtype=dtype))
    return lm


def fit(x, arguments):
    lm = our_model(arguments.dtype)

    def run():
        lm.fit(x, batch_size=arguments.batch, verbose=0)

    return run


def bare_step(x, arguments):
    lm = our_model(arguments.dtype)
    lm.optimizer.build(lm.trainable_variables)
    step = jax.jit(lm.train_step, donate_argnums=0)
    # Donated: the model's variables are of no use after the first step.
    state = tuple(
        [variable.value for variable in variables]
        for variables in (
            lm.trainable_variables,
            lm.non_trainable_variables,
            lm.optimizer.variables,
            lm.metrics_variables,
        )
    )

    def run():
        nonlocal state
        for batch in batches(x, arguments.batch):
            logs, state = step(state, batch)
        jax.block_until_ready(logs)

    return run


def bwetaf(x, arguments):
    manager = original.model(arguments.dtype, dropout=0.0)
    optimizer = original.optimizer(TOTAL_STEPS)
    step = jax.jit(original.train_step(manager, optimizer), donate_argnums=0)
    state = manager.params, optimizer.init(manager.params)
    manager.params, key = None, manager.key

    def run():
        nonlocal state
        for batch in batches(x, arguments.batch):
            loss, state = step(state, batch["token_ids"], key)
        loss.block_until_ready()

    return run


def llama(x, arguments):
    backbone = keras_hub_llama(CARD, arguments.dtype)
    lm = keras_hub.models.LlamaCausalLM(backbone)
    lm.compile(
        keras.optimizers.AdamW(
            recipe("97m", TOTAL_STEPS)._learning_rate,
            beta_1=0.95,
            beta_2=0.98,
            weight_decay=0.1,
            global_clipnorm=7.0,
        )
    )
    # It knows no documents.
    mask = np.ones_like(x["padding_mask"])
    inputs = {"token_ids": x["token_ids"], "padding_mask": mask}
    y = np.roll(x["token_ids"], -1, axis=1)

    def run():
        lm.fit(inputs, y, batch_size=arguments.batch, verbose=0)

    return run


RUNS = {
    OURS: fit,
    "keras_bwetaf, bare step": bare_step,
    "BwETAF 0.6, jitted step with optax": bwetaf,
    "KerasHub Llama, fit": llama,
}


def batches(x, size):
    for start in range(0, len(x["token_ids"]), size):
        yield {name: rows[start : start + size] for name, rows in x.items()}


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory():
    """The most memory that the device, or this process, has held, in MiB."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    return process_memory()


def memory_alone(name, arguments):
    """Peak memory of one of `RUNS` in a process of its own, in MiB."""
    command = [sys.executable, "-m", "benchmarks.train", "--only", name]
    for option in ("steps", "batch", "length", "dtype"):
        command += [f"--{option}", str(getattr(arguments, option))]
    result = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument("--only", choices=RUNS, help="print its peak memory")
    arguments = parser.parse_args()
    x = packed_rows(arguments)

    if arguments.only:
        RUNS[arguments.only](x, arguments)()
        print(json.dumps(peak_memory()))
        return

    console = Console()
    memory = {}
    for name in RUNS:
        console.print(f"peak memory of {name}")
        memory[name] = memory_alone(name, arguments)
    runs = {name: make(x, arguments) for name, make in RUNS.items()}
    first = {}
    seconds = {name: [] for name in runs}
    for round_ in range(arguments.rounds + 1):
        console.print(f"round {round_} of {arguments.rounds}")
        for name, run in runs.items():
            elapsed = timed(run)
            if round_ == 0:
                first[name] = elapsed
            else:
                seconds[name].append(elapsed)

    device_kind = jax.devices()[0].device_kind
    peak = peak_flops(device_kind, arguments.dtype)
    flops = flops_per_token(our_model(arguments.dtype), arguments.length)
    table = Table(
        title=f"97M, {arguments.dtype}, "
        f"batch {arguments.batch} x {arguments.length}, "
        f"median of {arguments.rounds} times {arguments.steps} steps, on "
        f"{device_kind}"
    )
    columns = ("", "tokens/s", "MFU", "first round, s", "fit is", "peak MiB")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    speed = {
        name: x["token_ids"].size / np.median(times)
        for name, times in seconds.items()
    }
    for name in runs:
        table.add_row(
            name,
            f"{speed[name]:.0f}",
            f"{speed[name] * flops / peak:.1%}" if peak else "n/a",
            f"{first[name]:.1f}",
            f"{speed[OURS] / speed[name]:.2f} x",
            f"{memory[name]:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
