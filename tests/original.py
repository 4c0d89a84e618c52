"""The original package, BwETAF 0.6: the judge of every parity test.

Importing it downloads GPT-2's tokenizer, which this model never uses, so
tiktoken is replaced by a stub first.
"""

import contextlib
import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

with (
    mock.patch("tiktoken.get_encoding"),
    contextlib.redirect_stdout(io.StringIO()),
):
    import BwETAF  # noqa: F401
    from BwETAF._utils import loss_fn
    from BwETAF.data.data_loader import ProgressTracker
    from BwETAF.model import layers
    from BwETAF.model.model import Model, ModelManager
    from BwETAF.tokenizer import main as tokenizer

__all__ = [
    "CARD",
    "Model",
    "ModelManager",
    "BwETAF",
    "ProgressTracker",
    "layers",
    "loss_fn",
    "manager",
    "randomize",
    "tokenizer",
]

CARD = dict(
    num_heads=8,
    attention_dim=768,
    vocab_size=16384,
    num_blocks=12,
    ff_dim=2304,
    dropout_rate=0.05,
    max_len=2048,
    gqa_repeats=2,
    emb_init_range=0.02,
)


def randomize(params, seed=0):
    """Gives every tensor random values, norm scales and biases included.

    Kernels are scaled so that activations keep a variance near one.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape, dtype="float32")
        if "scale" in name:
            values = 1 + 0.2 * values
        elif "'b'" in name:
            values = 0.1 * values
        elif "embedding" not in name:
            values = values / np.sqrt(leaf.shape[0])
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


def manager(dtype="float32", seed=0, **config):
    """A model of the original with random weights.

    Args:
        dtype: str. Of weights and computation.
        seed: int. Of the weights.
        **config: Changes to the card's configuration.
    """
    model = ModelManager(**{**CARD, **config}, dtype=jnp.dtype(dtype))
    model.params = randomize(model.params, seed)
    return model
