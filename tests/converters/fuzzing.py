"""Damages checkpoints, and watches what the converters make of them.

    python -m tests.converters.fuzzing --cases 30000 --seed 0

A case is a small model folder in which one file is damaged. Reading it must
give the tensors that the file holds, as other libraries read them, and these
must survive a conversion; or it must raise `CheckpointError`. Anything else
is a failure: another error, a crash, a hang, memory or files that a damaged
folder has no claim to.

Cases run in a process of their own, which may crash or be killed. A case
follows from its kind, seed and number alone, so each can be run again:

    python -m tests.converters.fuzzing --kind json --first 1234 --cases 1
"""

import argparse
import codecs
import collections
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import h5py
import msgpack
import numpy as np
import safetensors

import converters
from converters import CheckpointError
from converters.files import read_json
from converters.flax_format import CHUNKED, flatten, read_flax
from converters.formats import FORMATS
from converters.hdf5_format import read_hdf5
from converters.safetensors_format import DTYPE_OF_CODE, read_safetensors

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = {
    "msgpack": ".pkl",
    "safetensors": ".safetensors",
    "json": ".json",
    "hdf5": ".h5",
}
KINDS = tuple(ENDINGS)
MODULE = "tests.converters.fuzzing"

# A case takes milliseconds. It fails above the first and is killed at the
# second, with all its process.
MAX_SECONDS = 5
KILL_SECONDS = 20
# Of one case: a fixed part, for a configuration may ask for 4096 layers, whose
# tensors are all listed, and a multiple of the damaged file's size.
MAX_BYTES, MAX_BYTES_PER_BYTE = 100_000_000, 30
# It is measured in one of so many cases, for it takes three times as long.
TRACED = 4
# Of all cases of a process, with what C libraries allocate.
MAX_PROCESS_BYTES = 2**30


# The folders that are damaged.


def make_corpus(folder):
    """Writes small valid folders of every format.

    Args:
        folder: path. It exists and is empty.
    """
    import flax.serialization
    import jax
    import optax

    from tests.converters.folders import (
        CONFIG_V2,
        CONFIG_V4,
        normal,
        write_original,
        write_original_v4,
    )
    from tests.original import manager

    config = dict(
        num_heads=2,
        attention_dim=8,
        vocab_size=12,
        num_blocks=2,
        ff_dim=6,
        max_len=16,
        gqa_repeats=2,
    )
    model = manager(**config)
    model.save_model(str(folder / "flax"), opt_state=False)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3)
    )
    numbers = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: numbers.integers(1, 9, leaf.shape).astype(leaf.dtype),
        optimizer.init(model.params),
    )
    (folder / "flax" / "make_stuff_better.pkl").write_bytes(
        flax.serialization.to_bytes(state)
    )
    _write_tokenizer(folder / "flax" / "tokenizer")
    (folder / "flax" / "stats.json").write_text('{"losses": [3.5, 2.25]}')
    path = folder / "flax" / "understanding_good_stuff.json"
    settings = json.loads(path.read_text()) | {"attn_chunks": 2, "note": "π"}
    path.write_text(json.dumps(settings))

    plain = manager(**config | {"num_heads": (2, 4)}, dtype="bfloat16")
    plain.save_model(str(folder / "flax-chunked"), opt_state=False)
    with mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", 64):
        (folder / "flax-chunked" / "good_stuff.pkl").write_bytes(
            flax.serialization.to_bytes(plain.params)
        )

    write_original(
        folder / "flax-v2",
        moments=normal("float32"),
        settings=CONFIG_V2,
        **dict(num_heads=2, attention_dim=8, vocab_size=12, ff_dim=6),
    )

    write_original_v4(
        folder / "flax-v4",
        moments=normal("float32"),
        config=CONFIG_V4
        | {
            "arc": {
                **dict(num_heads=2, attention_dim=8, num_blocks=2, ff_dim=6),
                "vocab_size": 12,
            }
        },
    )

    def convert(source, target, **options):
        converters.convert(folder / source, folder / target, **options)

    convert("flax", "safetensors", to="safetensors")
    convert("flax-chunked", "plain", to="safetensors", duplicate_head=True)
    convert("safetensors", "shards", to="safetensors", max_shard_size=900)
    convert("flax", "torch", to="torch")
    convert("torch", "keras", to="keras")
    convert("plain", "keras-shards", to="keras")
    convert("flax-v2", "torch-v2", to="torch")
    convert("torch-v2", "keras-v2", to="keras")
    convert("flax-v4", "torch-v4", to="torch")
    convert("torch-v4", "keras-v4", to="keras")
    shard = "model_00000.weights.h5"
    path = folder / "keras-shards" / "model.weights.h5"
    path.rename(path.with_name(shard))
    path.with_name("model.weights.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"layers": [shard]}})
    )


def _write_tokenizer(folder):
    folder.mkdir()
    words = ["<|end|>", "<|unk|>", *"abcdefghij"]
    added = [
        {"id": number, "content": words[number], "special": True}
        for number in range(2)
    ]
    model = {
        "type": "BPE",
        "vocab": {word: number for number, word in enumerate(words)},
        "merges": [],
    }
    (folder / "yap.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": added, "model": model})
    )
    (folder / "understanding_yap.json").write_text(
        json.dumps(
            {
                "name": "words",
                "vocab_size": 12,
                "special_tokens": words[:2],
                "eos_token": words[0],
                "uk_token": words[1],
            }
        )
    )


# Damage to bytes. All damages take a random.Random, the bytes of the file and
# those of the other files of its kind, and return bytes.


def flip_a_bit(rng, data, others):
    position = rng.randrange(len(data))
    changed = data[position] ^ 1 << rng.randrange(8)
    return data[:position] + bytes([changed]) + data[position + 1 :]


def set_a_byte(rng, data, others):
    position = rng.randrange(len(data))
    value = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return data[:position] + bytes([value]) + data[position + 1 :]


def set_a_number(rng, data, others):
    value = rng.choice([0, 1, 2**15, 2**31 - 1, 2**31, 2**63, 2**64 - 1])
    width = rng.choice([2, 4, 8])
    order = rng.choice(["little", "big"])
    value = (value & (2 ** (8 * width) - 1)).to_bytes(width, order)
    position = rng.randrange(len(data))
    return data[:position] + value + data[position + width :]


def truncate(rng, data, others):
    return data[: rng.randrange(len(data))]


def insert(rng, data, others):
    position = rng.randrange(len(data) + 1)
    new = rng.choice([b"\0", b"\xff", b"{", rng.randbytes(1)])
    new *= rng.choice([1, 2, 8, 100])
    return data[:position] + new + data[position:]


def cut(rng, data, others):
    start, end = _slice(rng, data)
    return data[:start] + data[end:]


def repeat(rng, data, others):
    start, end = _slice(rng, data)
    return data[:end] + data[start:]


def splice(rng, data, others):
    start, end = _slice(rng, data)
    other = rng.choice(others)
    first, last = _slice(rng, other)
    return data[:start] + other[first:last] + data[end:]


def swap(rng, data, others):
    ends = sorted(rng.choices(range(len(data) + 1), k=4))
    a, b, c, d = ends
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _slice(rng, data):
    start = rng.randrange(len(data) + 1)
    length = rng.choice([1, 4, 16, rng.randrange(len(data) + 1)])
    return start, min(start + length, len(data))


BYTES = (
    *(flip_a_bit, set_a_byte, set_a_number, truncate, insert, cut, repeat),
    *(splice, swap),
)


# Damage to JSON.

DIGITS = "9" * 4300
# What json.dumps cannot write, by what stands for it until then.
RAW = {
    "<digits>": DIGITS,
    "<negative digits>": f"-{DIGITS}",
    "<more digits>": f"{DIGITS}9",
    "<infinite>": "1e999",
    "<NaN>": "NaN",
    "<Infinity>": "-Infinity",
    "<deep>": "[" * 70 + "]" * 70,
    "<very deep>": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "<twice>": '{"a": 1, "a": 2}',
    "<wide>": "[" + "[]," * 5000 + "[]]",
    "<number>": "0x10",
    "<half>": '"\\udc80',
    "<escape>": r'"\ud83d\ude00\u0000"',
}
PLACES = (
    *("../escaped", "../../escaped.json", "/escaped", "..", ".", "", "a/b"),
    *("~/escaped", "..\\escaped", "C:\\escaped", "\0", "a\0.safetensors"),
    *("../flax/good_stuff.safetensors", "x" * 300 + ".safetensors"),
    *("model.safetensors/../../escaped.safetensors", "\ud800.safetensors"),
    *("../model_00000.weights.h5", "model_/../x.weights.h5"),
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 16, -1, 0.0, -0.0, 0.5, 1.0, 1e308, 5e-324),
    *(2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 4096),
    *(10**400, -(10**400)),
)
VALUES = (
    *(None, True, False, [], {}, [[]], [1] * 40, [2, 4], [0, 4], [-1, -1]),
    *("float32", "float16", "F64", "BF16", "bool", "O", "|O8", "adam", "step"),
    *("<|end|>", "\ud800", "a" * 2000, {"content": "<|end|>"}, {"inside": 1}),
    *({"order": [], "changes": {}}, {"kept": 1}, {"generated": None}),
    *({"": None}, {"\ud800": "\udfff"}, ["a", "b"], "1", "é"),
    *(*NUMBERS, *PLACES, *RAW),
)


def change_a_value(rng, tree, others):
    holder, key = rng.choice(_places(tree))
    holder[key] = copy.deepcopy(rng.choice(VALUES))


def nudge_a_number(rng, tree, others):
    numbers = [
        (holder, key)
        for holder, key in _places(tree)
        if type(holder[key]) in (int, float)
    ]
    if numbers:
        holder, key = rng.choice(numbers)
        old = holder[key]
        holder[key] = rng.choice(
            [old + 1, old - 1, -old, 2 * old, float(old % 2**53), *NUMBERS]
        )


def remove_a_key(rng, tree, others):
    holder, key = rng.choice(_places(tree))
    del holder[key]


def rename_a_key(rng, tree, others):
    names = [each for each in _places(tree) if isinstance(each[0], dict)]
    holder, key = rng.choice(names or _places(tree))
    new = rng.choice([*PLACES, *RAW, "__metadata__", "model_type", f"{key}2"])
    if isinstance(holder, dict):
        holder[new] = holder.pop(key)


def exchange_values(rng, tree, others):
    (holder, key), (other, name) = rng.choices(_places(tree), k=2)
    values = copy.deepcopy((holder[key], other[name]))
    other[name], holder[key] = values


def borrow_a_value(rng, tree, others):
    holder, key = rng.choice(_places(tree))
    other, name = rng.choice(_places([rng.choice(others)]))
    holder[key] = copy.deepcopy(other[name])


def add_a_value(rng, tree, others):
    holder, _ = rng.choice(_places(tree))
    other, name = rng.choice(_places([rng.choice(others)]))
    if isinstance(holder, dict):
        holder[str(name)] = copy.deepcopy(other[name])
    else:
        holder.append(copy.deepcopy(other[name]))


TREES = (
    *(change_a_value, nudge_a_number, remove_a_key, rename_a_key),
    *(exchange_values, borrow_a_value, add_a_value),
)


def damage_json(rng, data, others):
    """Damages a document: its values, its text or its bytes."""
    documents = [_parse(each) for each in others]
    # The root is in a list, so that it has a place as well.
    tree = [_parse(data)]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        if _places(tree):
            rng.choice(TREES)(rng, tree, documents)
    return _dump(rng, tree)


# What a side file may speak of: the documents of a format, and their keys.
SETTINGS = (
    *("num_heads", "attention_dim", "note", "vocab_size", "init_std"),
    *("use_rope", "emb_splt", "use_fash_attention", "res_scale"),
    *("arc", "attn", "moe"),
)
KEPT = {
    "flax": {
        "understanding_good_stuff.json": SETTINGS,
        "make_stuff_better.pkl": ("0", "1", "2", "a", "\ud800", "x" * 1100),
        "tokenizer/understanding_yap.json": ("eos_token", "uk_token", "name"),
    },
    "keras": {
        "config.json": ("registered_name", "config", "hidden_dim", "note"),
        "tokenizer.json": ("config", "end_token", "unk_token"),
        "metadata.json": ("tasks", "parameter_count"),
        "task.json": ("module", "config", "backbone"),
    },
    "hugging_face": {
        "config.json": ("model_type", "auto_map", "rope_theta", "note"),
        "tokenizer_config.json": ("eos_token", "unk_token", "pad_token"),
        "generation_config.json": ("eos_token_id", "temperature"),
    },
}


def change_what_was_kept(rng, data, others):
    """Writes differences of documents that could have been kept."""
    tree = _parse(data)

    def value(keys, depth):
        if depth and rng.random() < 0.3:
            several = rng.sample(keys, rng.randrange(1, 3))
            return {key: value(keys, depth - 1) for key in several}
        other = copy.deepcopy(rng.choice(VALUES))
        return rng.choice(["adam", "step", 7, None, {}, other])

    def change(keys, depth):
        if rng.random() < 0.2:
            return rng.choice([None, {}, copy.deepcopy(rng.choice(VALUES))])
        changes = {}
        for key in rng.sample(keys, rng.randrange(len(keys))):
            if depth and rng.random() < 0.3:
                changes[key] = {"inside": change(keys, depth - 1)}
                continue
            changes[key] = {"kept": value(keys, 3)}
            if rng.random() < 0.6:
                changes[key]["generated"] = _generated(rng, key)
        return {"order": rng.sample(keys, 2), "changes": changes}

    if not isinstance(tree, dict):
        tree = {}
    for _ in range(rng.choice([1, 1, 3])):
        layout = rng.choice(list(KEPT))
        if not isinstance(tree.get(layout), dict):
            tree[layout] = {}
        name = rng.choice([*KEPT[layout], rng.choice(PLACES)])
        keys = KEPT[layout].get(name, SETTINGS)
        tree[layout][name] = change(keys, 3)
        if rng.random() < 0.05:
            tree[rng.choice([*PLACES, layout])] = tree.pop(layout)
    return _dump(rng, [tree])


def _generated(rng, key):
    """What a document may hold without the side file."""
    known = {
        "0": "adam",
        "1": {},
        "2": {"count": "step"},
        "eos_token": "<|end|>",
        "end_token": "<|end|>",
        "unk_token": "<|unk|>",
        "uk_token": "<|unk|>",
        "model_type": "bwetaf",
        "eos_token_id": 0,
    }
    return copy.deepcopy(known.get(key, rng.choice(VALUES)))


def _parse(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return {}


def _dump(rng, tree):
    root = tree[0] if tree else None
    text = json.dumps(
        root,
        indent=rng.choice([None, None, 1]),
        ensure_ascii=rng.random() < 0.8,
    )
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    encoding = rng.choice(["utf-8"] * 30 + ["utf-8-sig", "utf-16", "latin-1"])
    errors = rng.choice(["surrogatepass", "replace"])
    if encoding == "latin-1":
        errors = "replace"
    return text.encode(encoding, errors)


def _places(node):
    """Every (container, key) of a tree of dicts and lists."""
    keys = node if isinstance(node, dict) else range(len(node))
    result = [(node, key) for key in keys]
    for holder, key in list(result):
        if isinstance(holder[key], (dict, list)):
            result += _places(holder[key])
    return result


# Damage to safetensors.


def damage_header(rng, data, others):
    """Damages the JSON of a safetensors file, and what must agree with it."""
    header, values = _split(data)
    headers = [_split(each)[0] for each in others]
    header = rng.choice([damage_json, damage_json, damage_header_text])(
        rng, header, headers
    )
    header += b" " * rng.choice([0, 0, 1, 7, 1000])
    return struct.pack("<Q", len(header)) + header + values


def damage_header_text(rng, header, others):
    return rng.choice(BYTES)(rng, header or b"{}", others)


def damage_entry(rng, data, others):
    """Gives a tensor another shape, dtype or place, which may even fit."""
    header, values = _split(data)
    header = _parse(header)
    entries = [each for each in header.values() if isinstance(each, dict)]
    entry = rng.choice(entries or [{}])
    shape = entry.get("shape")
    shape = shape if isinstance(shape, list) else []
    match rng.randrange(6):
        case 0:
            entry["shape"] = rng.choice(
                [shape[::-1], [*shape, 1], [*shape, 0], [1] * 33 + shape]
            )
        case 1:
            entry["dtype"] = rng.choice(
                ["F16", "BF16", "F32", "F64", "I32", "U8", "F8_E4M3", "C64"]
            )
        case 2:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(2)]
        case 3:
            old = entry.get("data_offsets")
            begin, end = old if _are_numbers(old) else (0, 4)
            by = rng.choice([*NUMBERS, int(DIGITS) - end])
            entry["data_offsets"] = rng.choice(
                [[by, by + end - begin], [begin + by, end + by], [by, end]]
            )
        case 4:
            names = list(header)
            rng.shuffle(names)
            header = {name: header[name] for name in names}
        case 5:
            header["empty"] = {
                "dtype": "F32",
                "shape": [rng.choice([0, 2**40, 2**63]), 0],
                "data_offsets": rng.choice([[0, 0], [len(values)] * 2]),
            }
    header = _dump(rng, [header])
    return struct.pack("<Q", len(header)) + header + values


def _are_numbers(value):
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) is int for each in value)
    )


def damage_length(rng, data, others):
    (length,) = struct.unpack_from("<Q", data.ljust(8, b"\0"))
    wrong = rng.choice(
        [0, 1, 2, length - 1, length + 1, len(data) - 8, 2**32, 2**63]
    )
    return struct.pack("<Q", wrong % 2**64) + data[8:]


def damage_values(rng, data, others):
    header, values = _split(data)
    values = rng.choice(BYTES)(rng, values or b"\0", others)
    return struct.pack("<Q", len(header)) + header + values


def _split(data):
    (length,) = struct.unpack_from("<Q", data.ljust(8, b"\0"))
    return data[8 : 8 + length], data[8 + length :]


# Damage to Flax's msgpack.


@dataclass
class Array:
    """An array in msgpack: an extension around another value."""

    code: int
    parts: object


class Encoder:
    """Writes msgpack, not always in the shortest form, nor the truth.

    Args:
        rng: random.Random.
        lies: float. How often a length is not the true one.
        wide: float. How often a length takes more bytes than it needs.
    """

    def __init__(self, rng, lies, wide):
        self.rng, self.lies, self.wide = rng, lies, wide

    def encode(self, node):
        if isinstance(node, dict):
            start = self.header(len(node), {0: (0x80, 16), 2: 0xDE, 4: 0xDF})
            pairs = [part for pair in node.items() for part in pair]
            return start + b"".join(map(self.encode, pairs))
        if isinstance(node, (list, tuple)):
            start = self.header(len(node), {0: (0x90, 16), 2: 0xDC, 4: 0xDD})
            return start + b"".join(map(self.encode, node))
        if isinstance(node, Array):
            inner = self.encode(node.parts)
            start = self.header(len(inner), {1: 0xC7, 2: 0xC8, 4: 0xC9})
            return start + bytes([node.code % 256]) + inner
        if isinstance(node, str):
            data = node.encode("utf-8", "surrogatepass")
            forms = {0: (0xA0, 32), 1: 0xD9, 2: 0xDA, 4: 0xDB}
            return self.header(len(data), forms) + data
        if isinstance(node, bytes):
            forms = {1: 0xC4, 2: 0xC5, 4: 0xC6}
            return self.header(len(node), forms) + node
        if isinstance(node, int) and not -(2**63) <= node < 2**64:
            node = float("inf")
        return msgpack.packb(node)

    def header(self, length, forms):
        if self.rng.random() < self.lies:
            length = self.rng.choice(
                [0, max(0, length - 1), length + 1, 2 * length, 255, 65535]
                + [100_000, 2**31 - 1, 2**32 - 1]
            )
        fitting = [
            width
            for width, first in forms.items()
            if length < (2 ** (8 * width) if width else first[1])
        ]
        wide = self.rng.random() < self.wide
        width = self.rng.choice(fitting) if wide else fitting[0]
        if not width:
            return bytes([forms[0][0] + length])
        return bytes([forms[width]]) + length.to_bytes(width, "big")


def damage_tree(rng, data, others):
    """Damages the values of a tree, or only how they are written."""
    tree = _unpack(data)
    for _ in range(rng.choice([0, 1, 1, 2])):
        holder, key = rng.choice(_places([tree]))
        leaves = [
            (at, name)
            for at, name in _places([tree])
            if isinstance(at[name], Array)
        ]
        if leaves and rng.random() < 0.7:
            holder, key = rng.choice(leaves)
            damage_array(rng, holder, key)
        elif rng.random() < 0.3 and isinstance(holder, dict):
            new = [*PLACES, 1, 2**63, b"\xff", b"w", None, CHUNKED, "x" * 1025]
            holder[rng.choice(new)] = holder.pop(key)
        elif isinstance(holder, dict) and rng.random() < 0.3:
            del holder[key]
        else:
            other, name = rng.choice(_places([tree]))
            new = [*VALUES[:60], b"bytes", {CHUNKED: True}, other[name]]
            holder[key] = copy.deepcopy(rng.choice(new))
    lies = rng.choice([0, 0, 0.01, 0.05])
    return Encoder(rng, lies, wide=rng.choice([0, 0.3])).encode(tree)


def damage_array(rng, holder, key):
    """Damages an array, or writes it in another way."""
    array = holder[key]
    if not isinstance(array.parts, list) or len(array.parts) != 3:
        array.code = 1
        return
    shape, dtype, values = array.parts
    shape = shape if isinstance(shape, list) else []
    values = values if isinstance(values, bytes) else b""
    match rng.randrange(7):
        case 0:
            array.code = rng.choice([0, 1, 2, 3, 4, 127, -1])
        case 1:
            shapes = [shape[::-1], [*shape, 1], [-1], [0], [1] * 33, [], None]
            shapes += [[2**32, 2**32], [True], [2.0], ["2"], [2**64 - 1] * 2]
            array.parts = [rng.choice(shapes), dtype, values]
        case 2:
            dtypes = ["object", "O", "|O", "float16", "int32", "uint64", "V4"]
            dtypes += [">f4", "complex64", "datetime64[s]", "U1", None, 4]
            dtypes += [b"float32", "float32 ", "", "f4,f4", "float128", "bool"]
            array.parts = [shape, rng.choice(dtypes), values]
        case 3:
            new = [values[:-1], values + b"\0", b"", None, 0, "text"]
            array.parts = [shape, dtype, rng.choice(new)]
        case 4:
            sizes = [array.parts[:2], [*array.parts, 1], {}, array.parts[::-1]]
            array.parts = rng.choice(sizes)
        case 5:
            array.parts = [shape, dtype, rng.randbytes(len(values))]
        case 6:
            cuts = [0, *sorted(rng.choices(range(0, len(values), 4), k=2))]
            cuts = [*cuts, len(values)]
            chunks = [
                Array(1, [[(end - start) // 4], dtype, values[start:end]])
                for start, end in zip(cuts, cuts[1:], strict=False)
            ]
            sizes = rng.choice([shape, shape, [*shape, 1], [-1], [True], "ab"])
            pieces = {str(number): each for number, each in enumerate(chunks)}
            if rng.random() < 0.2:
                pieces[rng.choice(["0", "7", "x"])] = rng.choice([1, chunks[0]])
            holder[key] = {
                CHUNKED: True,
                "shape": {str(n): size for n, size in enumerate(sizes)},
                "chunks": pieces,
            }


def nest(rng, data, others):
    """Puts a file, or nothing, deep inside containers."""
    depth = rng.choice([1, 10, 31, 33, 600, 5000, 100_000])
    shell = rng.choice(
        [b"\x81\xa1a", b"\x81\xa6params", b"\x91", b"\xdd\0\0\0\1"]
    )
    return shell * depth + rng.choice([data, b"", b"\x80"])


def _unpack(data):
    def array(code, inner):
        try:
            parts = msgpack.unpackb(inner, strict_map_key=False)
        except ValueError:
            parts = inner
        return Array(code, parts)

    return msgpack.unpackb(data, ext_hook=array, strict_map_key=False)


# Damage to HDF5.


def damage_metadata(rng, data, others):
    """Changes bytes near those that describe the rest."""
    marks = [b"TREE", b"HEAP", b"SNOD", b"OHDR", b"\x89HDF", b"dtype", b"vars"]
    start = data.find(rng.choice(marks), rng.randrange(len(data)))
    position = max(start, 0) + rng.randrange(200)
    for _ in range(rng.choice([1, 1, 2, 8])):
        change = rng.choice([flip_a_bit, set_a_byte, set_a_number])
        near = data[position : position + 16]
        if near:
            new = change(rng, near, others)
            data = data[:position] + new + data[position + len(near) :]
    return data


def rebuild(rng, data, others):
    """Lets the library write what a checkpoint has no need of."""
    path = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"])) / "rebuilt.h5"
    path.write_bytes(data)
    try:
        with h5py.File(path, "r+") as file:
            places = []
            file.visit(places.append)
            arrays = [each for each in places if "vars/" in each]
            place = rng.choice(arrays or places)
            _rebuild(rng, file, place, rng.choice(places))
        return path.read_bytes()
    finally:
        shutil.rmtree(path.parent)


def _rebuild(rng, file, place, other):
    values = np.ones((2, 3), "f4")
    if isinstance(file[place], h5py.Dataset):
        values = file[place][()]
    old = file[place]
    if rng.random() < 0.8:
        del file[place]
    else:
        place = "extra"
    match rng.randrange(12):
        case 0:
            file[place] = h5py.SoftLink(f"/{other}")
        case 1:
            file[place] = h5py.ExternalLink("../flax/escaped.h5", "/a")
        case 2:
            file[place] = file[other]
        case 3:
            file[place] = file
        case 4:
            file.create_dataset(place, data=values, chunks=values.shape or None)
        case 5:
            external = [("../flax/stats.json", 0, values.nbytes)]
            file.create_dataset(
                place, values.shape, values.dtype, external=external
            )
        case 6:
            kinds = [">f4", "f2", "f8", "i4", "bool", "c8", "S4", "V4"]
            kind = rng.choice(kinds)
            file.create_dataset(place, data=np.zeros(values.shape, kind))
        case 7:
            kinds = [h5py.string_dtype(), h5py.ref_dtype, h5py.vlen_dtype("i4")]
            file.create_dataset(place, values.shape, rng.choice(kinds))
        case 8:
            file.create_dataset(place, (2**40, 2**20), "f4")
        case 9:
            file.create_dataset(place, data=h5py.Empty("f4"))
        case 10:
            file["/".join([place, *"a" * rng.choice([5, 40])])] = values
        case 11:
            file[place] = old
            names = ["dtype", "other"]
            attributes = ["bfloat16", b"\xff", [1] * 9, ["bfloat16"] * 2, 1.5]
            old.attrs[rng.choice(names)] = rng.choice(attributes)


DAMAGES = {
    "msgpack": (damage_tree, damage_tree, damage_tree, nest),
    "safetensors": (
        *(damage_header, damage_entry, damage_entry, damage_length),
        damage_values,
    ),
    "json": (damage_json,) * 5,
    "kept": (change_what_was_kept,) * 4 + (damage_json,) * 2,
    "hdf5": (damage_metadata, damage_metadata, damage_metadata, rebuild),
}


def damage(rng, kind, data, others):
    """Damages a file, mostly once.

    Args:
        rng: random.Random.
        kind: str, a key of `DAMAGES`.
        data: bytes, of the file.
        others: list of bytes, of files of its kind.

    Returns:
        bytes, and a list with the name of every damage.
    """
    names = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        ways = BYTES if rng.random() < 0.3 else DAMAGES[kind]
        way = rng.choice(ways)
        try:
            data = way(rng, data or b"\0", others)
        except Exception:
            # An earlier damage left nothing that this one understands.
            way = flip_a_bit
            data = way(rng, data or b"\0", others)
        names.append(way.__name__)
    return data, names


# What is watched while a case runs.


class Watch:
    """Notes what Python does that reading a checkpoint has no need of.

    Args:
        readable: list of path. Folders in which files may be read.
        writable: list of path. What written paths may start with.
    """

    EXECUTES = {
        *("exec", "compile", "pickle.find_class", "marshal.loads"),
        *("os.system", "os.exec", "os.posix_spawn", "os.fork"),
        *("subprocess.Popen", "socket.connect", "ctypes.dlopen"),
    }
    CHANGES = {
        *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"),
        *("os.link", "os.symlink", "os.chmod", "os.chown", "os.utime"),
    }

    def __init__(self, readable, writable):
        self.readable = tuple(map(str, readable))
        self.writable = tuple(map(str, writable))
        self.seen = []
        self.active = False
        sys.addaudithook(self._note)

    def __enter__(self):
        self.seen.clear()
        self.active = True

    def __exit__(self, *error):
        self.active = False

    def _note(self, event, arguments):
        if not self.active:
            return
        if event in self.EXECUTES:
            self.seen.append(event)
        elif event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._check(event, path, bool(writes))
        elif event in self.CHANGES:
            # Names relative to a descriptor come from rmtree, and making
            # the parents of a folder tries those that there are.
            paths = [each for each in arguments if not isinstance(each, int)]
            known = event == "os.mkdir" and os.path.isdir(paths[0])
            if arguments[-1] != -1 or known:
                return
            for path in paths:
                self._check(event, path, True)

    def _check(self, event, path, writes):
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if not writes and os.path.basename(path) == path:
            return
        allowed = self.writable if writes else self.readable + self.writable
        if not os.path.abspath(path).startswith(allowed):
            self.seen.append(f"{event} {path!r:.200}")


@dataclass
class Result:
    """What came of a case.

    Args:
        number: int.
        outcome: str. `"refused"`, `"loaded"` (but the other format cannot
            hold it) or `"converted"` (and read again).
        seconds: float.
        peak: int. Bytes of memory, 0 where it was not measured.
        damages: list of str. What was done to the file.
        failures: list of str.
    """

    number: int
    outcome: str = "refused"
    seconds: float = 0.0
    peak: int = 0
    damages: list = field(default_factory=list)
    failures: list = field(default_factory=list)


class Bench:
    """Where one process runs its cases.

    Args:
        corpus: path. What `make_corpus` wrote.
        sandbox: path of an empty folder.
    """

    def __init__(self, corpus, sandbox):
        self.sandbox = sandbox
        # Deep inside, so that a name can climb out of it and still be found.
        self.work = sandbox / "a" / "b"
        shutil.copytree(corpus, self.work)
        self.target = self.work / "target"
        self.files = {
            path.relative_to(self.work): path.read_bytes()
            for path in sorted(self.work.rglob("*"))
            if path.is_file()
        }
        self.watch = Watch(
            readable=[self.work, Path(converters.__file__).parent],
            writable=[self.target, self.work / ".target."],
        )
        for codec in ("ascii", "unicode_escape"):  # of messages
            codecs.lookup(codec)
        # Whatever is imported or compiled on first use, is so before a case.
        for folder in sorted(self.work.iterdir()):
            for to in FORMATS:
                self._convert(folder, to, {}, Result(0))
                shutil.rmtree(self.target)
        self.before = self._listing()

    def run(self, kind, number, seed):
        """Runs a case.

        Args:
            kind: str.
            number: int.
            seed: int.

        Returns:
            `Result`.
        """
        rng = random.Random(f"{seed} {kind} {number}")
        names = [name for name in self.files if name.suffix == ENDINGS[kind]]
        name = rng.choice(names)
        is_kept = name.name == "conversion_extras.json"
        others = [self.files[each] for each in names]
        data, damages = damage(
            rng, "kept" if is_kept else kind, self.files[name], others
        )
        to = rng.choice(list(FORMATS))
        options = {}
        if to in ("safetensors", "torch") and rng.random() < 0.5:
            options["max_shard_size"] = 500

        result = Result(number, damages=damages)
        path = self.work / name
        path.write_bytes(data)
        try:
            self._measure(kind, path, to, options, result)
        except Exception:
            result.failures.append(traceback.format_exc())
        finally:
            shutil.rmtree(self.target, ignore_errors=True)
            path.write_bytes(self.files[name])
        if result.seconds > MAX_SECONDS:
            result.failures.append(f"took {result.seconds:.1f} s")
        if result.peak > MAX_BYTES + MAX_BYTES_PER_BYTE * len(data):
            result.failures.append(
                f"took {result.peak} bytes of memory for {len(data)}"
            )
        result.failures += self.watch.seen
        result.failures += [
            f"{each} was left or lost" for each in self._listing() ^ self.before
        ]
        result.failures = [
            f"{name} -> {to}, {', '.join(damages)}: {failure}"
            for failure in result.failures
        ]
        return result

    def _measure(self, kind, path, to, options, result):
        folder = self.work / path.relative_to(self.work).parts[0]
        if result.number % TRACED == 0:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            with self.watch:
                try:
                    found = READ[kind](path)
                except CheckpointError:
                    found = None
                source, target = self._convert(folder, to, options, result)
        finally:
            result.seconds = time.perf_counter() - start
            result.peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()  # Does nothing where it has not started.
        if found is not None:
            _compare(found, REFERENCE[kind](path), f"{path.name} as read")
        if target is not None:
            for part in ("tensors", "optimizer"):
                _compare(
                    _arrays(getattr(target, part) or {}),
                    _arrays(getattr(source, part) or {}),
                    f"converted {part}",
                )
            for part in ("config", "tokenizer", "stats"):
                _compare(getattr(target, part), getattr(source, part), part)

    def _convert(self, folder, to, options, result):
        """Reads, converts and reads again, as far as that goes."""
        try:
            source = converters.read_checkpoint(folder)
        except CheckpointError:
            return None, None
        result.outcome = "loaded"
        try:
            converters.convert(folder, self.target, to=to, **options)
        except CheckpointError:
            return source, None
        result.outcome = "converted"
        try:
            return source, converters.read_checkpoint(self.target)
        except CheckpointError as error:
            raise AssertionError("what was written cannot be read") from error

    def _listing(self):
        return {
            os.path.join(parent, name)
            for parent, folders, files in os.walk(self.sandbox)
            for name in folders + files
        }


# What other libraries read from what our readers accept.


def _flax_reference(path):
    import flax.serialization

    tree = flax.serialization.msgpack_restore(path.read_bytes())
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def _safetensors_reference(path):
    return {
        name: np.frombuffer(
            entry["data"], DTYPE_OF_CODE[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def _hdf5_reference(path):
    arrays = {}

    def add(place, item):
        if isinstance(item, h5py.Dataset):
            arrays[place] = item[()]

    with h5py.File(path, "r") as file:
        # Unlike visititems, goes into a group again under another name.
        groups = [file]
        while groups:
            for item in groups.pop().values():
                if isinstance(item, h5py.Group):
                    groups.append(item)
                else:
                    add(item.name.lstrip("/"), item)
    return arrays


READ = {
    "msgpack": lambda path: _arrays(flatten(read_flax(path))),
    "safetensors": lambda path: _arrays(read_safetensors(path)),
    "hdf5": lambda path: _arrays(read_hdf5(path)),
    "json": read_json,
}
REFERENCE = {
    "msgpack": _flax_reference,
    "safetensors": _safetensors_reference,
    "hdf5": _hdf5_reference,
    "json": lambda path: json.loads(path.read_bytes()),
}


def _arrays(tensors):
    return {name: tensor.array() for name, tensor in tensors.items()}


def _compare(found, expected, what):
    if isinstance(found, dict) and isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key, value in found.items():
            _compare(value, expected[key], f"{what}: {key!r:.80}")
    elif isinstance(found, np.ndarray):
        expected = np.asarray(expected)
        # h5py knows no bfloat16.
        assert found.dtype == expected.dtype or expected.dtype == "V2", what
        assert found.shape == expected.shape, what
        assert found.tobytes() == expected.tobytes(), what
    else:
        assert repr(found) == repr(expected), what


# The process that runs cases, and the one that watches over it.


def work(kind, first, cases, seed, corpus, sandbox):
    """Runs cases and prints a line of JSON for each."""
    bench = Bench(corpus, sandbox)
    if kind == "msgpack":
        import flax.serialization  # noqa: F401
    warnings.simplefilter("error")
    # Cases are about what is written, not about when the disk has it.
    os.fsync = lambda file: None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_PROCESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, first + cases):
        # Unhandled, it ends the process, whatever C code hangs in it.
        signal.alarm(KILL_SECONDS)
        print(json.dumps(vars(bench.run(kind, number, seed))), flush=True)


def fuzz(kind, corpus, folder, cases, seed=0, first=0, progress=None):
    """Runs cases of a kind in a process of their own.

    Args:
        kind: str, one of `KINDS`.
        corpus: path. What `make_corpus` wrote.
        folder: path. Where temporary folders may be made.
        cases: int.
        seed: int.
        first: int. Number of the first case.
        progress: callable, optional. Takes each `Result`.

    Returns:
        list of `Result`. A case that ended its process has that as its
        failure, and the next one runs in a new process.
    """
    results, end = [], first + cases
    while (number := first + len(results)) < end:
        with tempfile.TemporaryDirectory(dir=folder) as sandbox:
            inside = Path(sandbox) / "sandbox"
            inside.mkdir()
            command = [sys.executable, "-m", MODULE, "--kind", kind]
            command += ["--first", str(number), "--cases", str(end - number)]
            command += ["--seed", str(seed), "--worker", corpus, inside]
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"TMPDIR": sandbox, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                text=True,
            ) as worker:
                for line in worker.stdout:
                    results.append(Result(**json.loads(line)))
                    if progress:
                        progress(results[-1])
        if worker.returncode > 0:
            raise RuntimeError("the process that runs cases has failed")
        if worker.returncode < 0:
            name = signal.Signals(-worker.returncode).name
            failure = f"{kind} {first + len(results)}: process ended by {name}"
            results.append(
                Result(first + len(results), "ended", failures=[failure])
            )
            if progress:
                progress(results[-1])
    return results


def summary(kind, results):
    """One line about the cases of a kind."""
    counts = collections.Counter(each.outcome for each in results)
    return (
        f"{kind:12} {len(results):6} cases"
        + "".join(
            f" {counts[outcome]:6} {outcome}"
            for outcome in ("refused", "loaded", "converted", "ended")
        )
        + f"  slowest {max(each.seconds for each in results):.2f} s"
        + f"  most memory {max(each.peak for each in results) / 1e6:.1f} MB"
        + f"  failures {sum(bool(each.failures) for each in results)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="default: all in turn")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        numbers = options.first, options.cases, options.seed
        return work(options.kind, *numbers, *options.worker)

    kinds = [options.kind] if options.kind else KINDS
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "corpus"
        corpus.mkdir()
        make_corpus(corpus)
        for kind in kinds:

            def show(result, kind=kind):
                for failure in result.failures:
                    print(f"\n{kind} {result.number}: {failure}", flush=True)
                if result.number % 500 == 499:
                    print(f"{kind}: {result.number + 1}", flush=True)

            results = fuzz(
                kind,
                corpus,
                folder,
                -(-options.cases // len(kinds)),
                options.seed,
                options.first,
                show,
            )
            lines.append(summary(kind, results))
            failed |= any(each.failures for each in results)
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
