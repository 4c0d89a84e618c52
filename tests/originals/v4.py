"""BwETAF 0.7.4. Runs in the process of `tests.originals.run` only."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

with contextlib.redirect_stdout(io.StringIO()):
    import BwETAF
    from BwETAF.api import predictv4
    from BwETAF.model import flash_attn, layers, model, moe, sharded_layers

# The published settings, in small.
TINY = {
    "arc": {
        "num_heads": 4,
        "attention_dim": 32,
        "num_blocks": 2,
        "ff_dim": 24,
        "vocab_size": 61,
    },
    "attn": {"attn_chunks": 1, "gqa_repeats": 2, "theeta": 10000},
    "moe": {"num_experts": 8, "top_k": 2, "capacity": 1.25},
    "dropout_rate": 0.0,
}


class _InFloat32:
    """`jax.numpy`, with float32 in the place of bfloat16."""

    bfloat16 = jnp.float32

    def __getattr__(self, name):
        return getattr(jnp, name)


@contextlib.contextmanager
def computing_in(dtype):
    """The package computes in bfloat16, always: here, in this dtype."""
    modules = (model, layers, sharded_layers, moe, flash_attn, predictv4)
    numpy = _InFloat32() if dtype == "float32" else jnp
    for module in modules:
        module.jnp = numpy
    jax.clear_caches()  # Or what was traced before would run again.
    try:
        yield
    finally:
        for module in modules:
            module.jnp = jnp
        jax.clear_caches()


def path():
    """Where the package is, which tells its version."""
    return BwETAF.__file__


def config_with(changes):
    """`TINY` with settings changed by their names, whatever their group."""
    changes, config = dict(changes), {}
    for key, value in TINY.items():
        if isinstance(value, dict):
            config[key] = {n: changes.pop(n, x) for n, x in value.items()}
        else:
            config[key] = changes.pop(key, value)
    assert not changes, changes
    return config


def _manager(config):
    """A `ModelManager` of zeros: it would compile each random tensor."""

    def init(self, *arguments):
        shapes = jax.eval_shape(
            lambda: flax.linen.Module.init(self, *arguments)
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    with mock.patch.object(model.Model, "init", init):
        return model.ModelManager(**config)


def save(folder, seed=0, dtype="float32", optimizer=False, **changes):
    """Saves a model whose every tensor is random.

    Args:
        folder: str or path.
        seed: int.
        dtype: str. Of the weights.
        optimizer: bool. Whether the state of AdamW belongs to it, random, too.
        **changes: Changes to `TINY`.
    """
    config = config_with(changes)
    manager = _manager({**config, "dtype": jnp.dtype(dtype)})
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape)
        if "scale" in name:
            values = 1 + 0.2 * values
        elif "'b'" in name or "bias" in name:
            values = 0.1 * values
        elif "embedding" in name:
            values = 0.5 * values
        else:
            values = 1.2 * values / np.sqrt(leaf.shape[-2])
        return jnp.asarray(values, leaf.dtype)

    manager.params = jax.tree_util.tree_map_with_path(draw, manager.params)
    manager.save_model(str(folder), opt_state=False)
    if optimizer:
        groups = jax.tree.map(lambda leaf: "default", manager.params)
        adamw = optax.adamw(lambda step: 1e-3)
        state = optax.multi_transform({"default": adamw}, groups).init(
            manager.params
        )
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


def _load(folder):
    """The settings of a folder and its parameters.

    Dropout is off: in whole sequences, it would act in inference, too.
    """
    folder = Path(folder)
    config = json.loads((folder / "understanding_good_stuff.json").read_text())
    params = flax.serialization.msgpack_restore(
        (folder / "good_stuff.pkl").read_bytes()
    )
    return {**config, "dropout_rate": 0.0}, params


def logits(folder, token_ids, mask=None, training=False, dtype="float32"):
    """Logits of whole sequences, and the auxiliary losses of all layers."""
    ids = jnp.asarray(token_ids, "int32")
    mask = jnp.ones_like(ids) if mask is None else jnp.asarray(mask)
    config, params = _load(folder)

    @jax.jit
    def apply(params, ids, mask):
        whole = model.Model(
            **config["arc"], **config["attn"], **config["moe"], dropout_rate=0.0
        )
        keys = {"dropout": jax.random.key(0), "noise": jax.random.key(0)}
        return whole.apply(params, ids, mask, 0, training, rngs=keys)

    with computing_in(dtype):
        result, losses = apply(params, ids, mask)
        return np.asarray(result, "float32"), np.asarray(losses, "float32")


def loads(folder, dtype="float32"):
    """Logits by the package's own `load_model`, which reads our folders."""
    with computing_in(dtype):
        manager = BwETAF.load_model(str(folder), jnp.float32)
        ids = jnp.arange(8)[None]
        result = manager(ids, jnp.ones_like(ids))[0]
        return np.asarray(result, "float32")


def decode(folder, token_ids, dtype="float32"):
    """Logits of the generator, of each row and token by itself."""
    ids = jnp.asarray(token_ids, "int32")
    with computing_in(dtype), contextlib.redirect_stdout(io.StringIO()):
        data, params = _load(folder)
        manager = _manager(data)
        manager.params = jax.tree.map(
            lambda leaf, new: jax.device_put(new, leaf.sharding),
            manager.params,
            params,
        )
        with jax.set_mesh(manager.shar_obj.mesh):
            generator = _generator(manager)
            return np.concatenate(
                [_decode_row(generator, row[None]) for row in ids]
            )


def _decode_row(generator, ids):
    """Logits of one row, `(1, length, vocabulary)`."""
    data, numpy = generator.model.data, predictv4.jnp
    mesh = generator.model.shar_obj.mesh
    width = data["arc"]["attention_dim"] // data["attn"]["gqa_repeats"]
    shape = (data["arc"]["num_blocks"], *ids.shape, width)

    def put(x, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
        return jax.device_put(x, sharding)

    keys, values = (
        put(numpy.zeros(shape, numpy.bfloat16), None, "data", None, "model")
        for _ in range(2)
    )
    results = []
    for i in range(ids.shape[1]):
        is_seen = (jnp.arange(ids.shape[1]) <= i)[None, None, None]
        one, keys, values = generator.single_predict_step(
            [generator.popped_params, generator.rest_params],
            put(ids[:, i : i + 1], "data", None),
            put(is_seen, "data", None),
            *(jnp.array(i), keys, values, jax.random.PRNGKey(0)),
        )
        results.append(np.asarray(one, "float32"))
    return np.stack(results, axis=1)


def _generator(manager):
    """The package's generator, whose sampler gives the logits instead."""

    class Logits(predictv4.KV_caching):
        def __init__(self):
            self.model, self.max_len = manager, 0
            params, data = manager.params["params"], manager.data
            self.popped_params = {"params": params["blocks"]["block"]}
            self.rest_params = {
                "params": {name: params[name] for name in ("f_ln", "emb")}
            }
            arguments = {**data["arc"], **data["attn"], **data["moe"]}
            for name in ("num_blocks", "vocab_size"):
                del arguments[name]
            # As the generator itself sets it.
            arguments["capacity"] = arguments["num_experts"]
            self.block = sharded_layers.Block(
                **arguments, dropout_rate=0.0, KV_cache=True
            )

        def sample_token(self, logits, rng):
            return logits[:, -1]

    return Logits()


def modules(folder, hidden_states, dtype="float32"):
    """What each module of the first block makes of the same hidden states.

    Args:
        folder: str or path.
        hidden_states: float32 array `(batch, length, attention_dim)`.
        dtype: str.

    Returns:
        dict of float32 arrays.
    """
    with computing_in(dtype):
        data, params = _load(folder)
        params = jax.tree.map(
            lambda leaf: leaf[0], params["params"]["blocks"]["block"]
        )
        x = jnp.asarray(hidden_states, dtype)
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((length, length)))[None, None]
        mask = jnp.broadcast_to(mask, (len(x), 1, length, length))
        arc, attn = data["arc"], data["attn"]
        attention = sharded_layers.Attention(
            arc["num_heads"],
            arc["attention_dim"],
            chunks=1,
            repeats=attn["gqa_repeats"],
            theeta=attn["theeta"],
        )
        experts = moe.MoE_dense(**data["moe"], features=arc["ff_dim"])
        noise = {"noise": jax.random.key(0)}
        results = {
            "norm": sharded_layers.RMSNorm().apply(
                {"params": params["ln1"]}, x
            ),
            "attention": attention.apply({"params": params["attn"]}, x, mask),
            "experts": experts.apply(
                {"params": params["MoE_FFN"]}, x, 0, rngs=noise
            )[0],
        }
        return {n: np.asarray(y, "float32") for n, y in results.items()}
