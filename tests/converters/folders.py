"""Model folders without a model: the original's files, by its own libraries."""

import itertools
import json

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import optax

import converters
from converters.mapped import Held

FORMATS = ("flax", "safetensors", "keras", "torch")
CONFIG = {
    "num_heads": 4,
    "attention_dim": 32,
    "vocab_size": 512,
    "num_blocks": 2,
    "ff_dim": 48,
    "dropout_rate": 0.05,
    "possible_opt_path": "",
    "max_len": 64,
    "attn_chunks": 1,
    "gqa_repeats": 2,
    "emb_init_range": 0.02,
    "param_init_rage": 0.02,
    "use_fash_attention": False,
}
# In the order in which version 2 writes it.
CONFIG_V2 = {
    "num_heads": 4,
    "attention_dim": 32,
    "vocab_size": 512,
    "num_blocks": 2,
    "ff_dim": 48,
    "dropout_rate": 0.1,
    "possible_opt_path": "",
    "max_len": 64,
    "emb_splt": 256,
    "attn_chunks": 1,
    "use_fash_attention": False,
    "emb_init_range": 0.02,
    "use_rope": True,
    "emb_scaling_factor": 1,
    "res_scale": 1,
}
CONFIG_V4 = {
    "arc": {
        "num_heads": 4,
        "attention_dim": 32,
        "num_blocks": 2,
        "ff_dim": 24,
        "vocab_size": 512,
    },
    "attn": {"attn_chunks": 1, "gqa_repeats": 2, "theeta": 10000},
    "moe": {"num_experts": 4, "top_k": 2, "capacity": 1.25},
    "dropout_rate": 0.03,
}
STATS = b'{"name": "tiny", "num_params": 1, "loss": [[8.25, 7.5]], "lr": []}'


class Unreadable(Held):
    """A tensor that cannot be read."""

    def array(self):
        raise KeyError


def contents(folder):
    """dict of relative path to bytes, of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_folders(received, expected):
    received, expected = contents(received), contents(expected)
    assert received.keys() == expected.keys()
    for name, data in expected.items():
        assert received[name] == data, name


def assert_same_tensors(received, expected):
    """Two dicts of arrays have the same names, dtypes, shapes and bits."""
    assert received.keys() == expected.keys()
    for name, array in expected.items():
        assert received[name].dtype == array.dtype, name
        assert received[name].shape == array.shape, name
        assert received[name].tobytes() == array.tobytes(), name


def normal(*dtypes, seed=0):
    """A function that draws arrays of the dtypes, by turns."""
    rng, turns = np.random.default_rng(seed), itertools.cycle(dtypes)

    def draw(*shape):
        values = rng.standard_normal(shape) / 8
        return values.astype(getattr(ml_dtypes, dtype := next(turns), dtype))

    return draw


def any_bits(*dtypes, seed=0):
    """Like `normal`; NaNs with any payload, -0.0 and denormals as well."""
    rng, turns = np.random.default_rng(seed), itertools.cycle(dtypes)

    def draw(*shape):
        dtype = np.dtype(getattr(ml_dtypes, name := next(turns), name))
        array = np.frombuffer(
            bytearray(rng.bytes(dtype.itemsize * int(np.prod(shape)))), dtype
        ).reshape(shape)
        bits = array.reshape(-1).view(f"uint{8 * dtype.itemsize}")
        exponent = np.array(np.inf, dtype).view(bits.dtype)
        bits[0], bits[1], bits[2] = 1 << 8 * dtype.itemsize - 1, 1, exponent + 1
        return array

    return draw


def parameters(config, draw):
    """The original's tree of parameters, its keys as JAX sorts them.

    That of version 2 is without biases of `d1`, and keys are as many as
    queries.
    """
    v, d, f = (config[n] for n in ("vocab_size", "attention_dim", "ff_dim"))
    k = d // config.get("gqa_repeats", 1)
    tree = {"emb": {"embedding": draw(v, d)}}
    for layer in range(config["num_blocks"]):
        tree[f"blocks_{layer}"] = {
            "ln1": {"scale": draw(d)},
            "attn": {
                "q_dense": {"w": draw(d, d)},
                "k_dense": {"w": draw(d, k)},
                "v_dense": {"w": draw(d, k)},
                "d_out": {"w": draw(d, d), "b": draw(1, 1, d)},
            },
            "ln2": {"scale": draw(d)},
            "d1": {"w": draw(d, 2 * f), "b": draw(1, 1, 2 * f)},
            "d2": {"w": draw(f, d), "b": draw(1, 1, d)},
        }
        if "gqa_repeats" not in config:
            del tree[f"blocks_{layer}"]["d1"]["b"]
    return jax.tree.map(lambda array: array, {"params": tree})


def parameters_v4(config, draw):
    """The tree of version 4, whose layers are stacked."""
    sizes, experts = config["arc"], config["moe"]["num_experts"]
    v, d, f = (sizes[n] for n in ("vocab_size", "attention_dim", "ff_dim"))
    layers, k = sizes["num_blocks"], d // config["attn"]["gqa_repeats"]
    mixture = {
        "key_kernel": draw(layers, experts, d, f),
        "key_bias": draw(layers, experts, f),
        "gate_kernel": draw(layers, experts, d, f),
        "gate_bias": draw(layers, experts, f),
        "out_kernel": draw(layers, experts, f, d),
        "out_bias": draw(layers, experts, d),
    }
    if experts > 1:
        mixture["router"] = draw(layers, d, experts)
    block = {
        "ln1": {"scale": draw(layers, d)},
        "attn": {
            "q_dense": {"w": draw(layers, d, d)},
            "k_dense": {"w": draw(layers, d, k)},
            "v_dense": {"w": draw(layers, d, k)},
            "d_out": {"w": draw(layers, d, d), "b": draw(layers, 1, 1, d)},
        },
        "ln2": {"scale": draw(layers, d)},
        "MoE_FFN": mixture,
    }
    tree = {
        "emb": {"embedding": draw(v, d)},
        "f_ln": {"scale": draw(d)},
        "blocks": {"block": block},
    }
    return jax.tree.map(lambda array: array, {"params": tree})


def write_original_v4(folder, draw=None, *, moments=None, config=CONFIG_V4):
    """As `write_original`, of version 4, which has no stats here."""
    folder.mkdir()
    path = folder / "understanding_good_stuff.json"
    path.write_text(json.dumps(config, indent=2))
    draw = draw or normal("float32")
    write_msgpack(folder / "good_stuff.pkl", parameters_v4(config, draw))
    if moments:
        count = np.array(7, "int32")
        chain = {
            "0": {
                "count": count,
                "mu": parameters_v4(config, moments),
                "nu": parameters_v4(config, moments),
            },
            "1": {},
            "2": {"count": count},
        }
        state = {"inner_states": {"default": {"inner_state": chain}}}
        write_msgpack(folder / "make_stuff_better.pkl", state)
    return folder


def adamw_state(config, draw, step=7):
    """The state of optax's AdamW with a schedule, as the original saves it."""
    tree = parameters(config, normal("float32"))
    optimizer = optax.adamw(optax.linear_schedule(1.0, 0.1, 10))
    state = flax.serialization.to_state_dict(optimizer.init(tree))
    count = np.array(step, "int32")
    state["0"] = {
        "count": count,
        "mu": parameters(config, draw),
        "nu": parameters(config, draw),
    }
    state["2"] = {"count": count}
    return state


def write_original(
    folder,
    draw=None,
    *,
    moments=None,
    tokenizer=None,
    settings=CONFIG,
    **changes,
):
    """Writes a folder as the original does.

    Args:
        folder: path. Must not exist.
        draw: callable. Draws the weights; `normal("float32")` by default.
        moments: callable. Draws the optimizer's state; none by default.
        tokenizer: path of a folder with the tokenizer's two files. None by
            default.
        settings: dict. The configuration.
        **changes: To the configuration.
    """
    config = settings | changes
    folder.mkdir()
    path = folder / "understanding_good_stuff.json"
    path.write_text(json.dumps(config, indent=2))
    tree = parameters(config, draw or normal("float32"))
    write_msgpack(folder / "good_stuff.pkl", tree)
    if moments:
        state = adamw_state(config, moments)
        write_msgpack(folder / "make_stuff_better.pkl", state)
    if tokenizer:
        (folder / "tokenizer").mkdir()
        for name, data in contents(tokenizer).items():
            (folder / "tokenizer" / name).write_bytes(data)
        (folder / "stats.json").write_bytes(STATS)
    return folder


def read_msgpack(path):
    return flax.serialization.msgpack_restore(path.read_bytes())


def write_msgpack(path, tree):
    path.write_bytes(flax.serialization.msgpack_serialize(tree))


def change_msgpack(path, change):
    """Writes a Flax file again after a change to its tree."""
    tree = jax.tree.map(np.array, read_msgpack(path))
    change(tree)
    write_msgpack(path, tree)


def read_json(path):
    return json.loads(path.read_text())


def write_json(path, content):
    """Writes a file again, indented as it was."""
    line = path.read_text().split("\n")[1]
    indent = len(line) - len(line.lstrip())
    path.write_text(json.dumps(content, indent=indent))


def edit_json(path, **changes):
    write_json(path, read_json(path) | changes)


def canonical_names(params):
    """The original's tree under canonical names, in canonical layout.

    Written out here, apart from the converters' table, so that the one
    checks the other.
    """
    params = params["params"]
    names = {"model.embed_tokens.weight": params["emb"]["embedding"]}
    for layer in range(len(params) - 1):
        block = params[f"blocks_{layer}"]
        attention, half = block["attn"], block["d1"]["w"].shape[1] // 2
        names |= {
            f"model.layers.{layer}.{name}": array
            for name, array in {
                "input_layernorm.weight": block["ln1"]["scale"],
                "self_attn.q_proj.weight": attention["q_dense"]["w"].T,
                "self_attn.k_proj.weight": attention["k_dense"]["w"].T,
                "self_attn.v_proj.weight": attention["v_dense"]["w"].T,
                "self_attn.o_proj.weight": attention["d_out"]["w"].T,
                "self_attn.o_proj.bias": attention["d_out"]["b"][0, 0],
                "post_attention_layernorm.weight": block["ln2"]["scale"],
                "mlp.up_proj.weight": block["d1"]["w"][:, :half].T,
                "mlp.up_proj.bias": block["d1"]["b"][0, 0, :half],
                "mlp.gate_proj.weight": block["d1"]["w"][:, half:].T,
                "mlp.gate_proj.bias": block["d1"]["b"][0, 0, half:],
                "mlp.down_proj.weight": block["d2"]["w"].T,
                "mlp.down_proj.bias": block["d2"]["b"][0, 0],
            }.items()
        }
    return names


def convert_to_all(source, folder):
    """The source, and its conversion to each format."""
    folders = {"source": source}
    for to in FORMATS:
        folders[to] = folder / to
        converters.convert(source, folders[to], to=to)
    return folders


ALL = ("float16", "float32", "float64", "bfloat16")
# What draws the weights, what draws the moments, changes to the configuration.
CASES = {
    "float32": (normal("float32"), normal("float32", seed=1), {}),
    "bfloat16": (normal("bfloat16"), normal("bfloat16", seed=1), {}),
    "mixed dtypes": (normal(*ALL), normal(*ALL[::-1], seed=1), {}),
    "any bits": (any_bits(*ALL), any_bits(*ALL[1:], seed=1), {}),
    "heads of each layer": (normal("float32"), None, {"num_heads": [2, 4]}),
    "odd widths": (
        normal("float16"),
        normal("float32", seed=1),
        dict(num_heads=3, attention_dim=15, gqa_repeats=3, ff_dim=7),
    ),
    "eleven blocks, two heads, defaults": (
        normal("bfloat16"),
        normal("float32", seed=1),
        dict(num_blocks=11, num_heads=2, emb_init_range=None, res_scale=0.5),
    ),
}
