"""BwETAF 0.6 in the card's configuration, as the benchmarks run it."""

import contextlib
import io
from unittest import mock

import jax
import optax

from keras_bwetaf.preset_files import PRESETS

CARD = PRESETS["97m"]["config"]

# Importing it downloads a tokenizer that this model never uses.
with (
    mock.patch("tiktoken.get_encoding"),
    contextlib.redirect_stdout(io.StringIO()),
):
    from BwETAF._utils import loss_fn
    from BwETAF.api.predictv2 import KV_caching
    from BwETAF.independent import create_lr_schedule
    from BwETAF.model.model import ModelManager

__all__ = ["KV_caching", "model", "optimizer", "train_step"]


def model(dtype, dropout=CARD["dropout"], config=CARD):
    """The original's `ModelManager`, with random weights.

    Args:
        dtype: str.
        dropout: float.
        config: dict. Arguments of `BwETAFBackbone`.
    """
    num_heads = config["num_query_heads"]
    with contextlib.redirect_stdout(io.StringIO()):
        return ModelManager(
            num_heads=num_heads,
            attention_dim=config["hidden_dim"],
            vocab_size=config["vocabulary_size"],
            num_blocks=config["num_layers"],
            ff_dim=config["intermediate_dim"],
            dropout_rate=dropout,
            max_len=config["max_sequence_length"],
            gqa_repeats=num_heads // config["num_key_value_heads"],
            emb_init_range=config["embedding_initializer_range"],
            dtype=jax.numpy.dtype(dtype),
        )


def optimizer(total_steps):
    """The card's settings, in optax."""
    with contextlib.redirect_stdout(io.StringIO()):
        schedule = create_lr_schedule(
            peaklr=1.5e-3,
            min_warmup_value=6e-4,
            min_value=1.8e-4,
            warmup_percent=0.02,
            total_steps=total_steps,
            training_decay="cosine",
        )
    return optax.chain(
        optax.clip_by_global_norm(7.0),
        optax.adamw(schedule, b1=0.95, b2=0.98, eps=1.5e-8, weight_decay=0.1),
    )


def train_step(manager, optimizer):
    """A train step, which the original's package does not have.

    Returns:
        function of a state, `(params, optimizer's state)`, token ids
        `(batch, length)` and a key. Returns the loss and the new state.
    """
    struct = manager.model_struct

    def step(state, token_ids, key):
        params, moments = state
        batch = token_ids, jax.numpy.ones_like(token_ids), token_ids
        loss, gradients = jax.value_and_grad(loss_fn)(
            params, struct, batch, key
        )
        updates, moments = optimizer.update(gradients, moments, params)
        return loss, (optax.apply_updates(params, updates), moments)

    return step
