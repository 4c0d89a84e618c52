"""A model in canonical terms, whatever format it was read from."""

import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from converters.architectures import architecture_of
from converters.errors import refuse
from converters.files import parse_json
from converters.mapped import View

Float = Literal["float16", "bfloat16", "float32", "float64"]
FLOATS = get_args(Float)
# The optimizer's step counter and its moments under PyTorch's names, and what
# optax and Keras call the moments.
STEP = "step"
MOMENTS = (("exp_avg", "mu", "momentum"), ("exp_avg_sq", "nu", "velocity"))
# The template of a post-processor that adds nothing to a text.
WHOLE_TEXT = [{"Sequence": {"id": "A", "type_id": 0}}]


@dataclass(frozen=True)
class Checkpoint:
    """A model whose tensors are still in their files.

    Args:
        source: str or path. Of the folder, for messages.
        config: dict. The canonical configuration.
        tensors: dict of canonical name to `View`, in canonical layout.
        optimizer: dict of name to `View`: `"step"`, and for every tensor
            `"exp_avg.NAME"` and `"exp_avg_sq.NAME"`. None without a state.
        tokenizer: bytes of a `tokenizers` JSON, or None.
        special_tokens: dict of `"eos_token"` and `"unk_token"` to str or
            None.
        stats: bytes of the original's `stats.json`, or None.
        kept: dict of format to what only this format has a place for; see
            `converters.kept`.
    """

    source: str | os.PathLike
    config: dict[str, Any]
    tensors: dict[str, View]
    optimizer: dict[str, View] | None = None
    tokenizer: bytes | None = None
    special_tokens: dict[str, Any] = field(default_factory=dict)
    stats: bytes | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self):
        """The `Architecture` that the configuration is of."""
        return architecture_of(self.config, source=self.source)

    @property
    def rows(self):
        """The table's row of every tensor, in canonical order."""
        return self.architecture.tensors(self.config)

    def __getitem__(self, name):
        """The `View` of a weight or of a part of the optimizer's state."""
        if name in self.tensors:
            return self.tensors[name]
        return self.optimizer[name]

    def tensor(self, name):
        """The values of what `[name]` gives, for a `with` statement."""
        return self[name].open()

    def cast(self, dtype):
        """The checkpoint with weights of another dtype.

        The optimizer's state keeps its own.
        """
        return replace(
            self,
            config=self.config | {"dtype": dtype.name},
            tensors={
                name: replace(tensor, dtype=dtype)
                for name, tensor in self.tensors.items()
            },
        )


def optimizer_shapes(rows):
    """Names and shapes of the state that belongs to tensors.

    Args:
        rows: list of `architecture.Tensor`.

    Returns:
        dict of str to tuple of int.
    """
    return {STEP: ()} | {
        f"{moment}.{row.name}": row.shape
        for moment, _, _ in MOMENTS
        for row in rows
    }


def check_coverage(source, shapes, found, counts=()):
    """Compares tensors with what they should be.

    Args:
        source: str or path. Where they come from, for the message.
        shapes: dict of expected name to shape. A name is a str, or a tuple of
            str that are a path.
        found: dict of name to something with `shape` and `dtype`.
        counts: collection of names whose dtype is int32; all others are of
            floats.

    Raises:
        CheckpointError: that lists every tensor that is missing, left over,
            misshapen or of another dtype.
    """

    def text(name):
        return name if isinstance(name, str) else "/".join(name)

    problems = [
        f"missing tensor {text(name)}, expected with shape {shape}"
        for name, shape in shapes.items()
        if name not in found
    ]
    for name, tensor in found.items():
        if name not in shapes:
            problems.append(
                f"unexpected tensor {text(name)} of shape {tensor.shape}"
            )
            continue
        if tensor.shape != shapes[name]:
            problems.append(
                f"tensor {text(name)} has shape {tensor.shape}, but the "
                f"configuration gives {shapes[name]}"
            )
        allowed = ("int32",) if name in counts else FLOATS
        if tensor.dtype.name not in allowed:
            problems.append(
                f"tensor {text(name)} has dtype {tensor.dtype.name}, expected "
                f"one of {', '.join(allowed)}"
            )
    refuse(source, problems)


def common_dtype(tensors):
    """The dtype of all tensors; of a mixture, one that holds each exactly."""
    names = {tensor.dtype.name for tensor in tensors.values()}
    if len(names) == 1:
        return names.pop()
    return "float64" if "float64" in names else "float32"


def token_ids(tokenizer, source):
    """Every token of a `tokenizers` JSON and its id.

    Args:
        tokenizer: bytes.
        source: str or path. Where they come from, for messages.

    Returns:
        Two dicts of str to int: of all tokens, and of the special ones.

    Raises:
        CheckpointError: if it is no JSON object.
    """
    content = parse_json(tokenizer, source)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    special = {
        token["content"]: token["id"]
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
    }
    return (
        vocabulary if isinstance(vocabulary, dict) else {}
    ) | special, special


def same_tokenizer(left, right):
    """Whether two `tokenizers` JSON make the same tokens of a text.

    `transformers` writes a file in the newest form, with the truncation and
    padding that it was last called with, and a post-processor that may add
    nothing.

    Args:
        left, right: bytes, or None.
    """
    if None in (left, right):
        return left == right
    left, right = (
        _tokens_of(parse_json(each, "the tokenizer")) for each in (left, right)
    )
    return left == right


def _tokens_of(content):
    """What of a `tokenizers` JSON decides on the tokens."""
    content = content | {"truncation": None, "padding": None}
    post = content.get("post_processor")
    if isinstance(post, dict) and post.get("single") == WHOLE_TEXT:
        content["post_processor"] = None
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [
            each.split(" ") if isinstance(each, str) else each
            for each in model["merges"]
        ]
        content["model"] = {"ignore_merges": False, **model, "merges": merges}
    return content


def end_token_id(tokenizer, tokenizer_source, end_token, settings_source):
    """The id of the token that ends a document.

    Args:
        tokenizer: bytes, or None.
        tokenizer_source: str or path. For messages.
        end_token: The token's text, from a settings file.
        settings_source: str or path. That file, for messages.

    Returns:
        int, or None without a tokenizer.

    Raises:
        CheckpointError: if the tokenizer has no such token.
    """
    if tokenizer is None:
        return None
    ids, _ = token_ids(tokenizer, tokenizer_source)
    known = isinstance(end_token, str) and type(ids.get(end_token)) is int
    refuse(
        settings_source,
        []
        if known
        else [
            f"the end token must be a token of {tokenizer_source}. Received: "
            f"{end_token!r:.80}"
        ],
    )
    return ids[end_token]
