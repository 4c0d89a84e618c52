"""The original's folder: Flax msgpack, JSON with names of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from converters import kept
from converters.bwetaf_v3 import tensors
from converters.bwetaf_v3_config import (
    check_equal,
    config_from_flax,
    config_to_flax,
)
from converters.checkpoint import (
    MOMENTS,
    STEP,
    Checkpoint,
    check_coverage,
    common_dtype,
    end_token_id,
    token_ids,
)
from converters.errors import CheckpointError, all_of, refuse
from converters.files import (
    read_bytes,
    read_json,
    read_stats,
    write_files,
)
from converters.flax_format import flatten, nest, read_flax, write_flax
from converters.mapped import View
from converters.transforms import view

CONFIG = "understanding_good_stuff.json"
WEIGHTS = "good_stuff.pkl"
OPTIMIZER = "make_stuff_better.pkl"
TOKENIZER = "tokenizer/yap.json"
TOKENIZER_CONFIG = "tokenizer/understanding_yap.json"
STATS = "stats.json"
FILES = (CONFIG, WEIGHTS, OPTIMIZER, TOKENIZER, TOKENIZER_CONFIG, STATS)

# In the order in which the original writes them; the two without a place in
# the canonical configuration change no number.
SETTINGS = (
    *("num_heads", "attention_dim", "vocab_size", "num_blocks", "ff_dim"),
    *("dropout_rate", "possible_opt_path", "max_len", "attn_chunks"),
    *("gqa_repeats", "emb_init_range", "param_init_rage"),
)
NEUTRAL = {"possible_opt_path": "", "attn_chunks": 1}
# The state of the original's optimizer, a chain of Adam, weight decay (which
# keeps nothing) and the schedule's step.
ADAM = "adam"
OPTAX_CHAIN = {"0": ADAM, "1": {}, "2": {"count": STEP}}


def read(folder, optimizer=True):
    """Reads and checks a folder.

    Args:
        folder: str or path.
        optimizer: bool. Whether to read the optimizer's state, if any.

    Returns:
        `Checkpoint`.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit the
            others; the message lists every problem of a file.
    """
    folder = Path(folder)
    documents = {CONFIG: read_json(folder / CONFIG)}
    tokenizer, special_tokens = None, {}
    if (folder / TOKENIZER).parent.is_dir():
        tokenizer = read_bytes(folder / TOKENIZER)
        settings = read_json(folder / TOKENIZER_CONFIG)
        documents[TOKENIZER_CONFIG] = settings
        special_tokens = {
            "eos_token": settings.get("eos_token"),
            "unk_token": settings.get("uk_token"),
        }
    config = config_from_flax(
        documents[CONFIG],
        eos_token_id=end_token_id(
            tokenizer,
            folder / TOKENIZER,
            special_tokens.get("eos_token"),
            folder / TOKENIZER_CONFIG,
        ),
        source=folder / CONFIG,
    )
    rows = tensors(config)
    found, (state, chain) = all_of(
        lambda: _read_weights(folder / WEIGHTS, rows),
        lambda: (
            _read_optimizer(folder / OPTIMIZER, rows)
            if optimizer
            else (None, None)
        ),
    )
    config["dtype"] = common_dtype(found)
    if state is not None:
        documents[OPTIMIZER] = chain
    checkpoint = Checkpoint(
        source=folder,
        config=config,
        tensors={
            row.name: View(found[row.flax], row.kind.from_flax) for row in rows
        },
        optimizer=state,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        stats=read_stats(folder / STATS),
    )
    return replace(
        checkpoint,
        kept=kept.keep(
            kept.read_kept(folder), "flax", documents, _documents(checkpoint)
        ),
    )


def write(folder, checkpoint, read, done):
    """Writes a checkpoint as the original would.

    Args:
        folder: path. It exists and is empty.
        checkpoint: `Checkpoint`.
        read: callable. Takes a canonical name, returns the numpy array.
        done: callable. Takes a canonical name whose array was written.

    Raises:
        CheckpointError: if the original cannot express the checkpoint.
    """
    _check_halves(checkpoint)
    documents = kept.apply(
        checkpoint.kept, "flax", _documents(checkpoint), checkpoint.source
    )
    check_equal(
        checkpoint.config,
        config_from_flax(documents[CONFIG], source=checkpoint.source),
        source=checkpoint.source,
    )
    chain = documents.pop(OPTIMIZER, None)
    write_files(
        folder,
        documents
        | {
            TOKENIZER: checkpoint.tokenizer,
            STATS: checkpoint.stats,
            kept.FILE_NAME: kept.others(checkpoint.kept, "flax"),
        },
    )

    def joined(leaf):
        if isinstance(leaf, np.ndarray):
            return leaf
        result = np.empty(leaf[0].flax_shape, checkpoint[leaf[0].name].dtype)
        for row in leaf:
            with np.errstate(over="ignore", invalid="ignore"):
                view(row.kind.from_flax, result)[...] = read(row.name)
        return result

    def written(leaf):
        for row in leaf if isinstance(leaf, list) else ():
            done(row.name)

    write_flax(folder / WEIGHTS, _tree(checkpoint.rows), joined, written)
    if checkpoint.optimizer is not None:
        step = read(STEP)
        adam = {"count": step} | {
            moment: _tree(
                replace(row, name=f"{name}.{row.name}")
                for row in checkpoint.rows
            )
            for name, moment, _ in MOMENTS
        }
        state = _optax_state(chain, adam, step, checkpoint.source)
        write_flax(folder / OPTIMIZER, state, joined, written)
        done(STEP)


def _documents(checkpoint):
    """The JSON files that follow from a checkpoint, and optax's chain."""
    config = config_to_flax(checkpoint.config, source=checkpoint.source)
    config |= NEUTRAL
    documents = {
        CONFIG: {name: config[name] for name in SETTINGS},
        TOKENIZER_CONFIG: {},
    }
    if checkpoint.tokenizer is not None:
        ids, special = token_ids(checkpoint.tokenizer, checkpoint.source)
        documents[TOKENIZER_CONFIG] = {
            "name": "tokenizer",
            "vocab_size": len(ids),
            "special_tokens": list(special),
            "eos_token": checkpoint.special_tokens["eos_token"],
            "uk_token": checkpoint.special_tokens["unk_token"],
        }
    if checkpoint.optimizer is not None:
        documents[OPTIMIZER] = OPTAX_CHAIN
    return documents


def _tree(rows):
    """A Flax tree whose leaves are the rows that are one tensor in Flax."""
    leaves = {}
    for row in rows:
        leaves.setdefault(row.flax, []).append(row)
    return nest(leaves)


def _read_weights(path, rows):
    found = flatten(read_flax(path))
    check_coverage(path, {row.flax: row.flax_shape for row in rows}, found)
    return found


def _read_optimizer(path, rows):
    """Finds Adam's state in the state of a chain of optax.

    Args:
        path: path of the file.
        rows: list of `bwetaf_v3.Tensor`.

    Returns:
        Two dicts: the state by canonical name, and the chain as
        `OPTAX_CHAIN` shows it, with a number for any other count. Two None
        without such a file.
    """
    if not path.is_file():
        return None, None
    adams, problems = [], []

    def without_adam(node, parents=()):
        if isinstance(node, dict):
            if node.keys() == {"count", "mu", "nu"}:
                adams.append(flatten(node))
                return ADAM
            return {
                key: without_adam(child, (*parents, key))
                for key, child in node.items()
            }
        if node.shape == () and node.dtype == np.int32:
            return int(node.array())
        problems.append(
            f"{'/'.join(parents)} has dtype {node.dtype.name} and shape "
            f"{node.shape}; only AdamW's state and int32 counts convert"
        )

    chain = without_adam(read_flax(path))
    if len(adams) != 1:
        problems.append(
            "expected one state of AdamW, a dictionary of count, mu and nu. "
            f"Received: {len(adams)}"
        )
    refuse(path, problems)
    (adam,) = adams
    shapes = {("count",): ()} | {
        (moment, *row.flax): row.flax_shape
        for _, moment, _ in MOMENTS
        for row in rows
    }
    check_coverage(path, shapes, adam, counts={("count",)})
    state = {STEP: View(adam["count",])} | {
        f"{name}.{row.name}": View(adam[moment, *row.flax], row.kind.from_flax)
        for name, moment, _ in MOMENTS
        for row in rows
    }
    return state, _replace_leaves(
        chain, {int(state[STEP].array()): STEP}, lambda number: number
    )


def _optax_state(chain, adam, step, source):
    """The tree to write, for a chain that is not trusted."""

    def count(value):
        if type(value) is int and abs(value) < 2**31:
            return np.array(value, "int32")
        raise CheckpointError(
            f"{source}: the kept optimizer chain must consist of "
            f"{ADAM!r}, {STEP!r} and int32 numbers. Received: {value!r:.80}. "
            f"Remove {kept.FILE_NAME} to go on without it."
        )

    return _replace_leaves(chain, {ADAM: adam, STEP: step}, count)


def _replace_leaves(tree, known, other):
    """Replaces leaves by a dict, or by a function if they are not in it."""
    if isinstance(tree, dict):
        return {
            key: _replace_leaves(child, known, other)
            for key, child in tree.items()
        }
    if isinstance(tree, (str, int)) and tree in known:
        return known[tree]
    return other(tree)


def _check_halves(checkpoint):
    """What is one tensor in Flax needs one dtype."""
    problems = []
    for moment in ("", *(f"{name}." for name, _, _ in MOMENTS)):
        if moment and checkpoint.optimizer is None:
            break
        parts = {}
        for row in checkpoint.rows:
            name = f"{moment}{row.name}"
            parts.setdefault(row.flax, {})[name] = checkpoint[name].dtype.name
        problems += [
            f"{' and '.join(dtypes)} are one tensor in Flax and need one "
            f"dtype. Received: {' and '.join(dtypes.values())}"
            for dtypes in parts.values()
            if len(set(dtypes.values())) > 1
        ]
    refuse(checkpoint.source, problems)
