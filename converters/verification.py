"""`verify`: whether two model folders hold the same model."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from converters.checkpoint import same_tokenizer
from converters.formats import find_format
from converters.hub import local_folder
from converters.mapped import blocks, different
from converters.runtimes import is_installed, prepare, runtime

# What the same weights may differ by in two frameworks, in float32.
LOGITS_TOLERANCE = 1e-5
# The same of logits that come step by step. The embedding is rounded to
# bfloat16: where a number turns to the other side, they differ by 1e-4. What
# forgets a token, or takes it for another one, is a thousand times as far.
CACHED_TOLERANCE = 1e-3
PROMPT_LENGTH = 64


def verify(
    left: str | os.PathLike,
    right: str | os.PathLike,
    *,
    optimizer: bool = True,
    logits: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Compares two model folders, whatever their formats.

    Tensors are compared one by one, in the canonical layout, bit for bit.
    Then both models compute logits in float32, each in the framework of its
    format, if this is installed: Flax, safetensors and Keras folders in
    Keras, PyTorch folders in PyTorch. Both continue two prompts of different
    lengths, in one batch and with a cache, by tokens that are sampled from
    the left model with a fixed seed; then they compute the same in one pass.

    A folder's own code is never run, but compared with this package's.

    Args:
        left: str or path. A folder, or `"hf://owner/repo"`.
        right: str or path. As `left`.
        optimizer: bool. Whether to compare the optimizer's state.
        logits: bool. Whether to compute logits.
        progress: callable, optional. Takes the bytes done and the bytes in
            all, after each tensor.

    Returns:
        dict of `"left"`, `"right"`, `"same"` (bool), and the parts of the
        comparison: `"config"`, a dict of name to both values where they
        differ; `"files"`, the names of small files that differ; `"code"`,
        a list of what is wrong with the code of PyTorch folders;
        `"compared"`, a number of tensors; `"tensors"`, a list of dicts of
        `"name"` and `"difference"`; `"logits"`, a dict of `"frameworks"`,
        `"relative_l2"`, `"max_absolute"` and `"same_top_1"` of the two
        passes, and `"cached_relative_l2"`, how far the cached steps of each
        model are from the left one's pass; or of `"skipped"` or `"failed"`,
        the reason. Other settings, such as those of generation, and
        `stats.json` where one folder lacks it, are not compared.

    Raises:
        CheckpointError: if a folder cannot be read.

    Example:

    ```python
    converters.verify("bwetaf-flax", "bwetaf-torch")["same"]
    ```
    """
    folders = [local_folder(left), local_folder(right)]
    layouts = [find_format(folder) for folder in folders]
    one, two = sides = [
        layout.read(folder, optimizer)
        for layout, folder in zip(layouts, folders, strict=True)
    ]
    config = {
        name: [one.config[name], two.config[name]]
        for name in [*one.architecture.config_names, "eos_token_id"]
        if one.config[name] != two.config[name]
    }
    files = _differing_files(one, two)
    compared, differences = _compare(*map(_all_tensors, sides), progress)
    if not logits:
        outcome = {"skipped": "not asked for"}
    elif config:
        outcome = {"skipped": "the configurations differ"}
    else:
        runtimes = [runtime(layout.runtime) for layout in layouts]
        outcome = _compare_logits(runtimes, folders, one.config)
    code = [
        problem
        for layout, folder in zip(layouts, folders, strict=True)
        if (problem := layout.code_problem(folder))
    ]
    return {
        "left": str(left),
        "right": str(right),
        "same": _same_logits(outcome)
        and not (config or files or code or differences),
        "config": config,
        "files": files,
        "code": code,
        "compared": compared,
        "tensors": differences,
        "logits": outcome,
    }


def _differing_files(one, two):
    """The names of small files that two checkpoints differ in."""
    files = []
    if not same_tokenizer(one.tokenizer, two.tokenizer):
        files.append("tokenizer")
    if one.special_tokens != two.special_tokens:
        files.append("special_tokens")
    if None not in (one.stats, two.stats) and one.stats != two.stats:
        files.append("stats")  # Not the model's: one of them may lack it.
    return files


def _all_tensors(checkpoint):
    return checkpoint.tensors | (checkpoint.optimizer or {})


def _compare(left, right, progress):
    """Returns how many tensors were compared, and a list of differences."""
    differences = [
        {"name": name, "difference": f"only in the {side} one"}
        for side, names in (
            ("left", left.keys() - right.keys()),
            ("right", right.keys() - left.keys()),
        )
        for name in sorted(names)
    ]
    common = [name for name in left if name in right]
    total, done = sum(left[name].nbytes for name in common), 0
    for name in common:
        if difference := _difference(left[name], right[name]):
            differences.append({"name": name, "difference": difference})
        done += left[name].nbytes
        if progress:
            progress(done, total)
    return len(common), differences


def _difference(left, right):
    """What differs between two tensors; None if nothing does."""
    for what in ("shape", "dtype"):
        one, two = getattr(left, what), getattr(right, what)
        if one != two:
            return f"{what} {one} and {two}"
    with left.open() as one, right.open() as two:
        count = different(one, two)
        if count == 0:
            return None
        gap = _largest_gap(one, two)
        return f"{count} of {one.size} values, by up to {gap:.3g}"


def _largest_gap(one, two):
    """The largest difference of two arrays; NaN if there is one in them."""
    gap = 0.0
    for a, b in zip(blocks(one), blocks(two), strict=True):
        with np.errstate(all="ignore"):
            apart = np.abs(a.astype("float64") - b.astype("float64"))
            gap = np.maximum(gap, apart.max())
    return gap


def _compare_logits(runtimes, folders, config):
    """Runs both models; a failure is an outcome, too."""
    missing = {each.name for each in runtimes if not is_installed(each)}
    if missing:
        return {"skipped": f"not installed: {', '.join(sorted(missing))}"}
    prepare(runtimes)
    vocab_size = config["vocab_size"]
    # Fixed, spread over the vocabulary, and without the end token, 0.
    token_ids = 1 + np.arange(PROMPT_LENGTH) * 7919 % max(1, vocab_size - 1)
    room = min(PROMPT_LENGTH, config["max_position_embeddings"])
    generator = np.random.default_rng(0)

    def run(index, choose):
        model = runtimes[index].load(folders[index])
        return _run(model, token_ids % vocab_size, room, choose)

    try:
        one = run(
            0, lambda x: (x + generator.gumbel(size=x.shape)).argmax(axis=-1)
        )
        sampled = iter(one.tokens)
        two = run(1, lambda _: next(sampled))
    except Exception as error:  # whatever a framework raises
        return {"failed": f"{type(error).__name__}: {error}"}
    same = np.array_equal(one.logits, two.logits, equal_nan=True)
    return {
        "frameworks": [runtime.name for runtime in runtimes],
        "relative_l2": _relative_l2(one.logits, two.logits),
        "max_absolute": _number(
            0.0 if same else np.abs(one.logits - two.logits).max()
        ),
        "same_top_1": bool(
            (one.logits.argmax(-1) == two.logits.argmax(-1)).all()
        ),
        "cached_relative_l2": [
            _relative_l2(one.expected, each.steps) for each in (one, two)
        ],
    }


class _Run(NamedTuple):
    """What a model computed; the batch comes first."""

    logits: np.ndarray  # of prompts and new tokens, in one pass
    expected: np.ndarray  # those from which the new tokens are chosen
    steps: np.ndarray  # the same, step by step
    tokens: list  # the new tokens of each step


def _run(model, token_ids, room, choose):
    """Continues two prompts of different lengths, the starts of one row."""
    lengths = np.array([max(1, room // 2), max(1, room // 4)])
    num_tokens = max(1, room // 8)
    steps, tokens = [], []

    def keep(logits):
        steps.append(logits)
        tokens.append(choose(logits))
        return tokens[-1]

    prompts = [token_ids[:length] for length in lengths]
    model.generate(prompts, keep, num_tokens)
    rows = np.tile(token_ids, (len(prompts), 1))
    places = lengths[:, None] + np.arange(num_tokens)
    np.put_along_axis(rows, places, np.stack(tokens, axis=1), axis=1)
    logits = model.logits(rows)
    expected = np.take_along_axis(logits, places[..., None] - 1, axis=1)
    return _Run(logits, expected, np.stack(steps, axis=1), tokens)


def _same_logits(outcome):
    """Whether an outcome of `_compare_logits` tells of no difference."""
    if "skipped" in outcome or "failed" in outcome:
        return "skipped" in outcome
    gaps = [(outcome["relative_l2"], LOGITS_TOLERANCE)]
    gaps += [(gap, CACHED_TOLERANCE) for gap in outcome["cached_relative_l2"]]
    return all(gap is not None and gap <= limit for gap, limit in gaps)


def _relative_l2(one, two):
    if np.array_equal(one, two, equal_nan=True):
        return 0.0
    return _number(np.linalg.norm(one - two) / np.linalg.norm(one))


def _number(value):
    """A number that JSON has; None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
