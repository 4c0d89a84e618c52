"""BwETAF 0.5.1. Runs in the process of `tests.originals.run` only."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

with (
    # Importing it downloads GPT-2's tokenizer.
    mock.patch("tiktoken.get_encoding"),
    contextlib.redirect_stdout(io.StringIO()),
):
    import BwETAF
    from BwETAF._utils import loss_fn
    from BwETAF.model import layers
    from BwETAF.model.model import ModelManager

# The published settings, in small.
TINY = {
    "num_heads": 4,
    "attention_dim": 32,
    "vocab_size": 61,
    "num_blocks": 2,
    "ff_dim": 48,
    "dropout_rate": 0.0,
    "max_len": 64,
    "use_fash_attention": False,
    "emb_init_range": 0.02,
    "use_rope": True,
    "emb_scaling_factor": 1,
    "res_scale": 1,
}


def path():
    """Where the package is, which tells its version."""
    return BwETAF.__file__


def save(folder, seed=0, dtype="float32", optimizer=False, **changes):
    """Saves a model whose every tensor is random.

    Args:
        folder: str or path.
        seed: int.
        dtype: str. Of the weights.
        optimizer: bool. Whether the state of AdamW belongs to it, random, too.
        **changes: Changes to `TINY`.
    """
    model = ModelManager(**{**TINY, **changes}, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape)
        if "scale" in name:
            values = 1 + 0.2 * values
        elif "'b'" in name:
            values = 0.1 * values
        elif "embedding" in name:
            values = 0.5 * values
        else:
            values = 1.2 * values / np.sqrt(leaf.shape[0])
        return jnp.asarray(values, leaf.dtype)

    model.params = jax.tree_util.tree_map_with_path(draw, model.params)
    model.save_model(str(folder), opt_state=False)
    if optimizer:
        state = optax.adamw(lambda step: 1e-3).init(model.params)
        state = jax.tree.map(
            lambda leaf: (
                jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
                if leaf.shape
                else jnp.asarray(7, leaf.dtype)
            ),
            state,
        )
        (Path(folder) / "make_stuff_better.pkl").write_bytes(
            flax.serialization.to_bytes(state)
        )
        (Path(folder) / "stats.json").write_text('{"losses": [3.5, 2.25]}')


def logits(folder, token_ids, mask=None, dtype="float32"):
    """The logits of a model folder, a float32 array."""
    model = BwETAF.load_model(str(folder), jnp.dtype(dtype))
    token_ids = jnp.asarray(token_ids, "int32")
    mask = jnp.ones_like(token_ids) if mask is None else jnp.asarray(mask)
    result = model(token_ids, mask)
    assert result.dtype == "float32"
    return np.asarray(result)


def settings(folder):
    """What the package makes of a folder's configuration."""
    data = BwETAF.load_model(str(folder), jnp.float32).data
    return json.loads(json.dumps(data))


def losses(folder, rows, dtype="float32"):
    """The next-token loss of every position of rows, dropout off."""
    logits_of = logits(folder, rows, dtype=dtype)
    return np.asarray(
        optax.softmax_cross_entropy_with_integer_labels(
            logits_of[:, :-1], jnp.asarray(rows[:, 1:], "int32")
        )
    )


def train(folder, target, batches, **hyperparameters):
    """Trains a model by the package's own loss, and saves it.

    Args:
        folder: str or path.
        target: str or path. Gets the trained model.
        batches: int array `(steps, batch, length)`.
        **hyperparameters: Of `optax.adamw`.

    Returns:
        list of float, the loss of each step.
    """
    model = BwETAF.load_model(str(folder), jnp.float32)
    optimizer = optax.adamw(**hyperparameters)
    state, results = optimizer.init(model.params), []
    for batch in jnp.asarray(batches):
        loss, gradients = jax.value_and_grad(loss_fn)(
            model.params,
            model.model_struct,
            (batch, jnp.ones_like(batch), batch),
            model.key,
        )
        updates, state = optimizer.update(gradients, state, model.params)
        model.params = optax.apply_updates(model.params, updates)
        results.append(float(loss))
    model.save_model(str(target), opt_state=False)
    return results


def modules(folder, hidden_states, dtype="float32"):
    """What each module makes of the same hidden states.

    Args:
        folder: str or path.
        hidden_states: float32 array `(batch, length, attention_dim)`.
        dtype: str.

    Returns:
        dict of float32 arrays.
    """
    model = BwETAF.load_model(str(folder), jnp.dtype(dtype))
    data, params = model.data, model.params["params"]["blocks_0"]
    x = jnp.asarray(hidden_states)
    length = x.shape[1]
    mask = jnp.tril(jnp.ones((length, length)))[None, None]
    mask = jnp.broadcast_to(mask, (len(x), 1, length, length))
    types = {"dtype": jnp.dtype(dtype)}
    narrow = x.astype(dtype)
    norm = layers.RMSNorm(**types)
    attention = layers.Attention(
        data["num_heads"], data["attention_dim"], **types
    )
    block = layers.Block(
        data["num_heads"],
        data["attention_dim"],
        data["ff_dim"],
        0.0,
        res_scale=data["res_scale"],
        **types,
    )
    results = {
        "rope": layers.RoPE(x),
        "sinusoids": layers.PosEnc(x.shape[-1], jnp.float32).apply({}, x),
        "norm": norm.apply({"params": params["ln1"]}, x),
        "attention": attention.apply({"params": params["attn"]}, narrow, mask),
        "block": block.apply({"params": params}, x, mask, False),
    }
    return {
        name: np.asarray(result, "float32") for name, result in results.items()
    }
