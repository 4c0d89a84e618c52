"""New tokens per second, next to the peers and to the floor.

    python -m benchmarks.decode [--batch 1] [--prompt 32] [--new 256]
        [--rounds 3] [--dtype float32]

All models have the card's configuration, random weights and the same prompts.
They take turns, so that a change in the machine's speed meets all. "Sampled"
is the card's top-p 0.92 at temperature 0.8. BwETAF always samples, and takes
one prompt; it has no part in larger batches.
"""

import argparse
import time

import jax
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_bwetaf
from benchmarks import original
from keras_bwetaf.preset_files import PRESETS

CARD = PRESETS["97m"]["config"]


def ours(inputs, temperature, dtype):
    backbone = keras_bwetaf.BwETAFBackbone(**CARD, dtype=dtype)
    lm = keras_bwetaf.BwETAFCausalLM(backbone)
    return lambda: lm.generate(
        inputs, stop_token_ids=None, temperature=temperature, seed=0
    )


def llama(inputs, sampler, dtype):
    names = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
    )
    backbone = keras_hub.models.LlamaBackbone(
        **{name: CARD[name] for name in names},
        tie_word_embeddings=True,
        dtype=dtype,
    )
    lm = keras_hub.models.LlamaCausalLM(backbone)
    lm.compile(sampler=sampler)
    return lambda: lm.generate(dict(inputs), stop_token_ids=None)


def bwetaf(inputs, num_new, dtype):
    generate = original.KV_caching(
        original.model(dtype), top_p=0.92, temperature=0.8
    )
    length = int(inputs["padding_mask"].sum())
    prompt = jax.numpy.array(inputs["token_ids"][0, :length])
    return lambda: list(generate(prompt, max_len=num_new))


def floor(num_parameters, batch_size, num_new, dtype):
    """A product of a vector for each row with as many weights as the model's.

    Returns:
        function.
    """
    width = CARD["hidden_dim"]
    weights = jax.numpy.ones((width, num_parameters // width), dtype)
    vectors = jax.numpy.ones((batch_size, width), dtype)

    @jax.jit
    def read(weights):
        def step(_, x):
            return (x @ weights)[:, :width] * 1e-3

        return jax.lax.fori_loop(0, num_new, step, vectors)

    return lambda: read(weights).block_until_ready()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32"
    )
    arguments = parser.parse_args()
    batch_size, dtype = arguments.batch, arguments.dtype

    shape = (batch_size, arguments.prompt + arguments.new)
    is_prompt = np.broadcast_to(np.arange(shape[1]) < arguments.prompt, shape)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(1, CARD["vocabulary_size"], shape, "int32")
    inputs = {
        "token_ids": token_ids * is_prompt,
        "padding_mask": is_prompt.astype("int32"),
    }
    count = PRESETS["97m"]["parameters"]

    top_p = keras_hub.samplers.TopPSampler(p=0.92, temperature=0.8, seed=0)
    runs = {
        "keras_bwetaf, greedy": ours(inputs, 0, dtype),
        "keras_bwetaf, sampled": ours(inputs, 0.8, dtype),
        "KerasHub Llama, greedy": llama(inputs, "greedy", dtype),
        "KerasHub Llama, sampled": llama(inputs, top_p, dtype),
    }
    if batch_size == 1:
        runs["BwETAF 0.6, sampled"] = bwetaf(inputs, arguments.new, dtype)
    runs["floor: reading the weights"] = floor(
        count, batch_size, arguments.new, dtype
    )
    seconds = {name: [] for name in runs}
    first = {}
    console = Console()
    for round_ in range(arguments.rounds + 1):
        console.print(f"round {round_} of {arguments.rounds}")
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_ == 0:
                first[name] = elapsed
            else:
                seconds[name].append(elapsed)

    table = Table(
        title=f"97M, {dtype}, batch {batch_size}, prompt {arguments.prompt} + "
        f"{arguments.new} new, median of {arguments.rounds}, on "
        f"{jax.devices()[0].device_kind}"
    )
    for column in ("", "tokens/s", "first call, s", "greedy is", "sampled is"):
        table.add_column(column, justify="left" if not column else "right")
    speed = {
        name: batch_size * arguments.new / np.median(times)
        for name, times in seconds.items()
    }
    for name in runs:
        table.add_row(
            name,
            f"{speed[name]:.1f}",
            f"{first[name]:.1f}",
            f"{speed['keras_bwetaf, greedy'] / speed[name]:.2f} x",
            f"{speed['keras_bwetaf, sampled'] / speed[name]:.2f} x",
        )
    console.print(table)


if __name__ == "__main__":
    main()
