"""`verify`: whether two model folders hold the same model."""

import numpy as np

from converters.bwetaf_v3_config import CANONICAL_NAMES
from converters.checkpoint import same_tokenizer
from converters.formats import detect_format, read_checkpoint
from converters.hub import local_folder
from converters.mapped import blocks, different
from converters.runtimes import RUNTIMES, is_installed

# What the same weights may differ by in two frameworks, in float32.
LOGITS_TOLERANCE = 1e-5
PROMPT_LENGTH = 64


def verify(left, right, *, optimizer=True, logits=True, progress=None):
    """Compares two model folders, whatever their formats.

    Tensors are compared one by one, in the canonical layout, bit for bit.
    Then both models compute the logits of a fixed prompt in float32, each in
    the framework of its format, if this is installed: Flax, safetensors and
    Keras folders in Keras, PyTorch folders in PyTorch. A folder's own code is
    never run.

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
        differ; `"files"`, the names of small files that differ;
        `"compared"`, a number of tensors; `"tensors"`, a list of dicts of
        `"name"` and `"difference"`; `"logits"`, a dict of `"frameworks"`,
        `"relative_l2"`, `"max_absolute"` and `"same_top_1"`, or of
        `"skipped"` or `"failed"`, the reason. Other settings, such as those
        of generation, and `stats.json` where one folder lacks it, are not
        compared.

    Raises:
        CheckpointError: if a folder cannot be read.

    Example:

    ```python
    converters.verify("bwetaf-flax", "bwetaf-torch")["same"]
    ```
    """
    folders = [local_folder(left), local_folder(right)]
    sides = [read_checkpoint(folder, optimizer) for folder in folders]
    one, two = sides
    config = {
        name: [one.config[name], two.config[name]]
        for name in [*CANONICAL_NAMES, "eos_token_id"]
        if one.config[name] != two.config[name]
    }
    files = []
    if not same_tokenizer(one.tokenizer, two.tokenizer):
        files.append("tokenizer")
    if one.special_tokens != two.special_tokens:
        files.append("special_tokens")
    if None not in (one.stats, two.stats) and one.stats != two.stats:
        files.append("stats")  # Not the model's: one of them may lack it.
    compared, differences = _compare(*map(_all_tensors, sides), progress)
    if not logits:
        outcome = {"skipped": "not asked for"}
    elif config:
        outcome = {"skipped": "the configurations differ"}
    else:
        outcome = _compare_logits(folders, one.config["vocab_size"])
    gap = outcome.get("relative_l2", 0.0)
    same_logits = "failed" not in outcome and (
        gap is not None and gap <= LOGITS_TOLERANCE
    )
    return {
        "left": str(left),
        "right": str(right),
        "same": same_logits and not (config or files or differences),
        "config": config,
        "files": files,
        "compared": compared,
        "tensors": differences,
        "logits": outcome,
    }


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
        left[name].release()
        right[name].release()
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
    one, two = left.array(), right.array()
    count = different(one, two)
    if count == 0:
        return None
    gap = 0.0
    for a, b in zip(blocks(one), blocks(two), strict=True):
        with np.errstate(all="ignore"):
            apart = np.abs(a.astype("float64") - b.astype("float64"))
            gap = np.maximum(gap, apart.max())
    return f"{count} of {one.size} values, by up to {gap:.3g}"


def _compare_logits(folders, vocab_size):
    """Runs both models; a failure is an outcome, too."""
    runtimes = [RUNTIMES[detect_format(folder)] for folder in folders]
    missing = {each.name for each in runtimes if not is_installed(each)}
    if missing:
        return {"skipped": f"not installed: {', '.join(sorted(missing))}"}
    # Fixed, spread over the vocabulary, and without the end token, 0.
    token_ids = 1 + np.arange(PROMPT_LENGTH) * 7919 % max(1, vocab_size - 1)
    try:
        one, two = (
            runtime.logits(folder, token_ids % vocab_size)
            for runtime, folder in zip(runtimes, folders, strict=True)
        )
    except Exception as error:  # whatever a framework raises
        return {"failed": f"{type(error).__name__}: {error}"}
    if np.array_equal(one, two, equal_nan=True):
        gap = farthest = 0.0
    else:
        gap = np.linalg.norm(one - two) / np.linalg.norm(one)
        farthest = np.abs(one - two).max()
    return {
        "frameworks": [runtime.name for runtime in runtimes],
        "relative_l2": _number(gap),
        "max_absolute": _number(farthest),
        "same_top_1": bool((one.argmax(-1) == two.argmax(-1)).all()),
    }


def _number(value):
    """A number that JSON has; None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
