"""A mixture of experts beside the computation of all its experts.

    python -m benchmarks.experts [--dtype float32] [--batch 2] [--length 512]

One layer of the v4 preview's sizes: its forward pass, forward and backward
pass, and a step of decoding, once as `MixtureOfExperts` computes them and once
with every expert on every token, masked. Medians in milliseconds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from keras_bwetaf.layers import MixtureOfExperts
from keras_bwetaf.preset_files import PRESETS

CARD = PRESETS["v4-preview"]["config"]


class AllExperts(MixtureOfExperts):
    """Computes every expert of every token."""

    def _mix(self, inputs, weights, experts, projections, expert_axes):
        gate, intermediate, output = projections
        # b = batch, t = length, e = experts, i = inputs, o = outputs
        share = jax.nn.one_hot(experts, self.num_experts) * weights[..., None]
        share = jnp.sum(share, axis=2).astype(inputs.dtype)

        def project(equation, x, kernels, biases):
            return jnp.einsum(equation, x, kernels) + biases[:, None]

        hidden = jax.nn.silu(project("bti,eio->beto", inputs, *gate))
        hidden *= project("bti,eio->beto", inputs, *intermediate)
        outputs = project("beto,eoi->beti", hidden, *output)
        return jnp.einsum("beti,bte->bti", outputs, share)


def functions(layer):
    """The layer's functions by name, of weights and inputs."""

    def forward(weights, x):
        return layer.stateless_call(weights, [], x)[0]

    def loss(weights, x):
        return jnp.sum(jnp.square(forward(weights, x)))

    return {
        "forward": forward,
        "train": jax.grad(loss, argnums=(0, 1)),
        "decode": forward,
    }


def milliseconds(function, *arguments, repeats=7):
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    width = CARD["hidden_dim"]
    shape = (arguments.batch, arguments.length, width)
    x = jax.random.normal(jax.random.key(0), shape, arguments.dtype)
    results = {}
    for cls in (MixtureOfExperts, AllExperts):
        layer = cls(
            num_experts=CARD["num_experts"],
            num_experts_per_token=CARD["num_experts_per_token"],
            intermediate_dim=CARD["intermediate_dim"],
            initializer_range=width**-0.5,
            dtype=arguments.dtype,
        )
        layer.build(shape)
        weights = [weight.value for weight in layer.trainable_variables]
        for name, function in functions(layer).items():
            for rows in (1, arguments.batch) if name == "decode" else (None,):
                inputs = x if rows is None else x[:rows, :1]
                key = name if rows is None else f"{name}, {rows} rows"
                results.setdefault(key, []).append(
                    milliseconds(function, weights, inputs)
                )
    for name, (ours, all_experts) in results.items():
        print(
            f"{name}: {ours:.2f} ms, all experts {all_experts:.2f} ms, "
            f"{all_experts / ours:.1f} times as long"
        )


if __name__ == "__main__":
    main()
