"""What the machine does at most: bytes read, and products."""

import concurrent.futures
import importlib.util
import os
import statistics
import time

import numpy as np

__all__ = ["Floors", "decode_seconds", "num_weights", "prefill_seconds"]

REPEATS = 5
MATRIX = 2048


class Floors:
    """Several ways each of reading memory and of multiplying matrices.

    Args:
        config: dict. Arguments of `BwETAFBackbone`. As many bytes are read as
            its weights have, but not less than 64 MB, which no cache holds.
        dtype: str.
        folder: Path. Not used.
    """

    def __init__(self, config, dtype, folder):
        self._dtype = dtype
        width = 2 if dtype == "bfloat16" else 4
        self._num_bytes = max(num_weights(config) * width, 2**26)

    def bandwidth(self):
        """Bytes read a second, by way of reading."""
        rows = self._num_bytes // 4096
        array = np.ones((rows, 1024), "float32")
        return {
            name: array.nbytes / seconds(run)
            for name, run in self._readers(array)
        }

    def products(self):
        """Operations a second of a large product of matrices, by library."""
        return {
            name: 2 * MATRIX**3 / seconds(run) for name, run in self._products()
        }

    def _readers(self, array):
        num_threads = len(os.sched_getaffinity(0))
        parts = np.array_split(array, num_threads)
        threads = concurrent.futures.ThreadPoolExecutor(num_threads)
        vector = np.ones(array.shape[1], "float32")
        yield "numpy, sum", lambda: list(threads.map(np.sum, parts))
        yield "numpy, product", lambda: array @ vector
        if installed("jax"):
            import jax

            weights, x = jax.numpy.array(array), jax.numpy.array(vector)
            total = jax.jit(jax.numpy.sum)
            product = jax.jit(jax.numpy.matmul)
            yield "jax, sum", lambda: total(weights).block_until_ready()
            yield (
                "jax, product",
                lambda: product(weights, x).block_until_ready(),
            )
        if installed("torch"):
            import torch

            tensor = torch.from_numpy(array)
            other = torch.from_numpy(vector)
            yield "torch, sum", tensor.sum
            yield "torch, product", lambda: tensor @ other

    def _products(self):
        matrix = np.ones((MATRIX, MATRIX), "float32")
        if self._dtype == "float32":
            yield "numpy", lambda: matrix @ matrix
        if installed("jax"):
            import jax

            x = jax.numpy.array(matrix, self._dtype)
            product = jax.jit(jax.numpy.matmul)
            yield "jax", lambda: product(x, x).block_until_ready()
        if installed("torch"):
            import torch

            tensor = torch.from_numpy(matrix).to(getattr(torch, self._dtype))
            yield "torch", lambda: tensor @ tensor


def installed(package):
    return importlib.util.find_spec(package) is not None


def seconds(run):
    """The median of several runs, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def num_weights(config):
    """How many weights are in products, the head's included."""
    hidden_dim = config["hidden_dim"]
    groups = config["num_query_heads"] // config["num_key_value_heads"]
    attention = 2 * hidden_dim**2 + 2 * hidden_dim * (hidden_dim // groups)
    feed_forward = 3 * hidden_dim * config["intermediate_dim"]
    blocks = config["num_layers"] * (attention + feed_forward)
    return blocks + config["vocabulary_size"] * hidden_dim


def decode_seconds(config, dtype, batch, bandwidth, products):
    """Of one step: reading the weights once, or multiplying with them.

    Args:
        config: dict. Arguments of `BwETAFBackbone`.
        dtype: str.
        batch: int.
        bandwidth: float. Bytes a second.
        products: float. Operations a second.
    """
    weights = num_weights(config)
    num_bytes = weights * (2 if dtype == "bfloat16" else 4)
    return max(num_bytes / bandwidth, 2 * weights * batch / products)


def prefill_seconds(config, length, products):
    """Of a prompt: its products, with the head for the last token only."""
    head = config["vocabulary_size"] * config["hidden_dim"]
    blocks = 2 * (num_weights(config) - head) * length
    # Scores and sums, each of half a square.
    attention = 2 * config["num_layers"] * config["hidden_dim"] * length**2
    return (blocks + 2 * head + attention) / products
