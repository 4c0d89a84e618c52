"""The original's folder: Flax msgpack, JSON with names of its own."""

import contextlib
from dataclasses import dataclass

import numpy as np

from converters import kept
from converters.architectures import architecture_of_flax
from converters.checkpoint import (
    MOMENTS,
    STEP,
    check_coverage,
    same_tokenizer,
    token_ids,
)
from converters.errors import CheckpointError, refuse
from converters.files import read_bytes, read_json
from converters.flax_format import flatten, nest, read_flax, write_flax
from converters.format import Format
from converters.mapped import Held, View
from converters.transforms import view

CONFIG = "understanding_good_stuff.json"
WEIGHTS = "good_stuff.pkl"
OPTIMIZER = "make_stuff_better.pkl"
TOKENIZER = "tokenizer/yap.json"
TOKENIZER_CONFIG = "tokenizer/understanding_yap.json"
# The state of a chain of Adam, weight decay (which keeps nothing) and the
# schedule's step.
ADAM = "adam"
OPTAX_CHAIN = {"0": ADAM, "1": {}, "2": {"count": STEP}}


class FlaxFolder(Format):
    """The original's format."""

    name = entry = "flax"
    sign = f"{CONFIG} (Flax)"
    runtime = "keras_bwetaf"
    config = CONFIG
    tokenizer = TOKENIZER
    tokenizer_config = TOKENIZER_CONFIG
    required = (CONFIG, TOKENIZER)
    settings = (CONFIG, TOKENIZER, TOKENIZER_CONFIG)
    heads = weights = (WEIGHTS,)
    optimizer = (OPTIMIZER,)

    def recognizes(self, folder):
        return (folder / CONFIG).is_file()

    def read_documents(self, folder):
        documents = {CONFIG: read_json(folder / CONFIG)}
        if (folder / TOKENIZER).parent.is_dir():
            path = folder / TOKENIZER_CONFIG
            documents[TOKENIZER_CONFIG] = read_json(path)
        return documents

    def read_tokenizer(self, folder):
        """The folder's tokenizer, or that of the architecture, or None."""
        if (folder / TOKENIZER).parent.is_dir():
            return read_bytes(folder / TOKENIZER)
        known = _known_tokenizer(read_json(folder / CONFIG))
        return known and known.content

    def has_known_tokenizer(self, folder):
        return _known_tokenizer(read_json(folder / CONFIG)) is not None

    def own_tokenizer(self, checkpoint):
        """Without that of the architecture, which folders do not have."""
        known = checkpoint.architecture.tokenizer(
            checkpoint.config["vocab_size"]
        )
        if known and same_tokenizer(known.content, checkpoint.tokenizer):
            return None
        return checkpoint.tokenizer

    def special_tokens(self, folder, documents, tokenizer):
        if TOKENIZER_CONFIG not in documents:
            return dict(_known_tokenizer(documents[CONFIG]).special_tokens)
        settings = documents[TOKENIZER_CONFIG]
        return {
            "eos_token": settings.get("eos_token"),
            "unk_token": settings.get("uk_token"),
        }

    def canonical_config(self, folder, documents, eos_token_id=None):
        architecture = architecture_of_flax(documents[CONFIG])
        return architecture, architecture.config_from_flax(
            documents[CONFIG],
            eos_token_id=eos_token_id,
            source=folder / CONFIG,
        )

    def read_weights(self, folder, rows):
        path = folder / WEIGHTS
        found = flatten(read_flax(path))
        check_coverage(path, {row.flax: row.flax_shape for row in rows}, found)
        return {
            row.name: View(found[row.flax], row.kind.from_flax) for row in rows
        }

    def read_optimizer(self, folder, rows):
        path = folder / OPTIMIZER
        if not path.is_file():
            return None, {}
        adam, chain = _find_adam(path)
        shapes = {("count",): ()} | {
            (moment, *row.flax): row.flax_shape
            for _, moment, _ in MOMENTS
            for row in rows
        }
        check_coverage(path, shapes, adam, counts={("count",)})
        state = {STEP: View(adam["count",])} | {
            f"{name}.{row.name}": View(
                adam[moment, *row.flax], row.kind.from_flax
            )
            for name, moment, _ in MOMENTS
            for row in rows
        }
        step = int(state[STEP].array())
        chain = _replace_leaves(chain, {step: STEP}, lambda number: number)
        return state, {OPTIMIZER: chain}

    def documents(self, checkpoint):
        """See `Format`; the chain of optax is a document, too."""
        documents = {
            CONFIG: checkpoint.architecture.flax_settings(
                checkpoint.config, source=checkpoint.source
            ),
            TOKENIZER_CONFIG: {},
        }
        if self.own_tokenizer(checkpoint) is not None:
            ids, special = token_ids(checkpoint.tokenizer, checkpoint.source)
            documents[TOKENIZER_CONFIG] = {
                "name": "tokenizer",
                "vocab_size": len(ids),
                "special_tokens": list(special),
                "eos_token": checkpoint.special_tokens["eos_token"],
                "uk_token": checkpoint.special_tokens["unk_token"],
            }
        if checkpoint.optimizer is not None:
            documents[OPTIMIZER] = checkpoint.architecture.optimizer_state(
                OPTAX_CHAIN
            )
        return documents

    def checked(self, documents, checkpoint):
        _check_halves(checkpoint)
        architecture, source = checkpoint.architecture, checkpoint.source
        if architecture_of_flax(documents[CONFIG]) is not architecture:
            raise CheckpointError(
                f"{source}: the side file's settings of {CONFIG} are not those "
                f"of a {architecture.name} model. Remove {kept.FILE_NAME} to "
                "go on without it."
            )
        written = architecture.config_from_flax(
            documents[CONFIG], source=source
        )
        architecture.check_equal(checkpoint.config, written, source=source)
        return documents

    def write_documents(self, folder, documents):
        files = {
            name: each for name, each in documents.items() if name != OPTIMIZER
        }
        super().write_documents(folder, files)

    def write_tensors(self, folder, checkpoint, documents):
        write_flax(folder / WEIGHTS, _tree(checkpoint))
        if checkpoint.optimizer is None:
            return
        step = checkpoint[STEP]
        adam = {"count": step} | {
            moment: _tree(checkpoint, f"{name}.") for name, moment, _ in MOMENTS
        }
        chain = documents[OPTIMIZER]
        state = _optax_state(chain, adam, step, checkpoint.source)
        write_flax(folder / OPTIMIZER, state)


def _known_tokenizer(flax):
    """The `KnownTokenizer` for a folder that has none, or None."""
    return architecture_of_flax(flax).tokenizer(flax.get("vocab_size"))


@dataclass(frozen=True)
class _Joined:
    """The canonical tensors that are one tensor in Flax.

    Args:
        rows: list of `architecture.Tensor`.
        tensors: list of `View`, one for each.
    """

    rows: list
    tensors: list

    @contextlib.contextmanager
    def open(self):
        """Yields the values in Flax's layout, and in the dtype to write."""
        array = np.empty(self.rows[0].flax_shape, self.tensors[0].dtype)
        for row, tensor in zip(self.rows, self.tensors, strict=True):
            # Written through the view that reading goes through.
            place = view(row.kind.from_flax, array)
            with tensor.open() as part:
                # What a cast makes infinite is refused elsewhere.
                with np.errstate(over="ignore", invalid="ignore"):
                    place[...] = part
        yield array


def _tree(checkpoint, prefix=""):
    """The Flax tree of a checkpoint's weights, or of a moment of them.

    Args:
        checkpoint: `Checkpoint`.
        prefix: str. What a moment's names start with.
    """
    leaves = {}
    for row in checkpoint.rows:
        leaves.setdefault(row.flax, []).append(row)
    return nest(
        {
            path: _Joined(
                rows, [checkpoint[f"{prefix}{row.name}"] for row in rows]
            )
            for path, rows in leaves.items()
        }
    )


def _find_adam(path):
    """Finds Adam's state in the state of a chain of optax.

    Args:
        path: path of the file.

    Returns:
        Two dicts: the flat tree of count, mu and nu, and the chain as
        `OPTAX_CHAIN` shows it, with a number for every count.
    """
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
    return adams[0], chain


def _optax_state(chain, adam, step, source):
    """The tree to write, for a chain that is not trusted."""

    def count(value):
        if type(value) is int and abs(value) < 2**31:
            return View(Held(np.array(value, "int32")))
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


FLAX = FlaxFolder()
