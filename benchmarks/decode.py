"""Tokens per second of one prompt, next to the peers and to the floor.

    python -m benchmarks.decode [--prompt 32] [--new 256] [--rounds 3]

All models have the card's configuration, random float32 weights and the same
prompt. They take turns, so that a change in the machine's speed meets all.
"Sampled" is the card's top-p 0.92 at temperature 0.8. BwETAF always samples.
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
from keras_bwetaf.presets import PRESETS

CARD = PRESETS["97m"]["config"]


def ours(inputs, temperature):
    backbone = keras_bwetaf.BwETAFBackbone(**CARD)
    lm = keras_bwetaf.BwETAFCausalLM(backbone)
    return lambda: lm.generate(
        inputs, stop_token_ids=None, temperature=temperature, seed=0
    )


def llama(inputs, sampler):
    names = (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
    )
    backbone = keras_hub.models.LlamaBackbone(
        **{name: CARD[name] for name in names}, tie_word_embeddings=True
    )
    lm = keras_hub.models.LlamaCausalLM(backbone)
    lm.compile(sampler=sampler)
    return lambda: lm.generate(dict(inputs), stop_token_ids=None)


def bwetaf(inputs, num_new):
    generate = original.KV_caching(
        original.model("float32"), top_p=0.92, temperature=0.8
    )
    length = int(inputs["padding_mask"].sum())
    prompt = jax.numpy.array(inputs["token_ids"][0, :length])
    return lambda: list(generate(prompt, max_len=num_new))


def floor(num_parameters, num_new):
    """A product of one vector with as many weights as the model has."""
    width = CARD["hidden_dim"]
    weights = jax.numpy.ones((width, num_parameters // width))

    @jax.jit
    def read(weights):
        def step(_, x):
            return (x @ weights)[:, :width] * 1e-3

        return jax.lax.fori_loop(0, num_new, step, jax.numpy.ones((1, width)))

    return lambda: read(weights).block_until_ready()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    length = arguments.prompt + arguments.new
    token_ids = np.zeros((1, length), "int32")
    rng = np.random.default_rng(0)
    token_ids[0, : arguments.prompt] = rng.integers(1, 16384, arguments.prompt)
    mask = (np.arange(length) < arguments.prompt)[None].astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    count = PRESETS["97m"]["parameters"]

    top_p = keras_hub.samplers.TopPSampler(p=0.92, temperature=0.8, seed=0)
    runs = {
        "keras_bwetaf, greedy": ours(inputs, 0),
        "keras_bwetaf, sampled": ours(inputs, 0.8),
        "KerasHub Llama, greedy": llama(inputs, "greedy"),
        "KerasHub Llama, sampled": llama(inputs, top_p),
        "BwETAF 0.6, sampled": bwetaf(inputs, arguments.new),
        "floor: reading the weights": floor(count, arguments.new),
    }
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
        title=f"97M, float32, batch 1, prompt {arguments.prompt} + "
        f"{arguments.new} new, median of {arguments.rounds}, on "
        f"{jax.devices()[0].device_kind}"
    )
    for column in ("", "tokens/s", "first call, s", "greedy is", "sampled is"):
        table.add_column(column, justify="left" if not column else "right")
    speed = {
        name: arguments.new / np.median(times)
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
