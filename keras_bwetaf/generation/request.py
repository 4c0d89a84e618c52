"""What a call of `generate` asks for, checked."""

import itertools
import operator
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from keras_bwetaf.checks import checked_seed, is_int
from keras_bwetaf.generation.generation import shorter_prompts
from keras_bwetaf.generation.sampling import BwETAFSampler, SamplingSettings

TRUNCATIONS = (None, "left")


class Request(NamedTuple):
    """A batch of prompts, checked and ready to run."""

    prompts: list  # of lists of token ids, none empty
    limits: list  # the most new tokens of each row
    longest: int  # the most new tokens, whatever the prompts in their buckets
    stop_token_ids: list
    settings: SamplingSettings | None  # `None`: the sampler is the user's own
    num_known: int | None = None  # Ids that the tokenizer has; `None`: all

    def of_rows(self, rows):
        """The request of some of the rows.

        Args:
            rows: list of int.

        Returns:
            `Request`.
        """
        settings = self.settings
        if settings is not None:
            settings = settings._replace(seeds=settings.seeds[rows])
        return self._replace(
            prompts=[self.prompts[i] for i in rows],
            limits=[self.limits[i] for i in rows],
            settings=settings,
        )


def make_request(
    lm,
    prompts,
    *,
    max_length,
    max_new_tokens,
    stop_token_ids,
    truncation,
    seed,
    sampling,
):
    """Checks what was asked for and puts it in the form of a `Request`.

    Args:
        lm: `Generator`, compiled.
        prompts: list of sequences of int.
        **others: See `Generator.generate`.

    Raises:
        ValueError: If a prompt is empty or too long, or an argument is out of
            range.
        TypeError: If `sampling` has an unknown name.
    """
    _check_prompts(prompts, lm.backbone.vocabulary_size)
    if max_length is not None and max_new_tokens is not None:
        raise ValueError(
            "Pass `max_length` or `max_new_tokens`, not both. Received: "
            f"max_length={max_length}, max_new_tokens={max_new_tokens}"
        )
    context = lm.backbone.max_sequence_length
    if max_length is None and max_new_tokens is None:
        max_length = min(lm.preprocessor.sequence_length, context)
    prompts, limits, longest = fit_to_context(
        [list(prompt) for prompt in prompts],
        context=context,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        truncation=truncation,
    )
    return Request(
        prompts,
        limits,
        longest,
        _as_stop_token_ids(lm, stop_token_ids),
        _sampling_settings(lm.sampler, sampling, seed, len(prompts)),
        _num_known(lm),
    )


def batches_of(request, batch_size):
    """Takes a request apart, and shows how far its batches are.

    More than one batch have prompts of similar lengths each, the longest
    first: if there is memory for these, there is for all.

    Args:
        request: `Request`.
        batch_size: int. The most rows of a batch.

    Yields:
        Tuple of the rows, a list of int, and the `Request` of them.
    """
    rows = list(range(len(request.prompts)))
    if len(rows) <= batch_size:
        yield rows, request
        return
    rows.sort(key=lambda i: -len(request.prompts[i]))
    with progress_bar("Generating") as progress:
        task = progress.add_task("", total=len(rows))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield batch, request.of_rows(batch)
            progress.advance(task, len(batch))


def progress_bar(title):
    """A progress bar on standard error, if somebody sees it.

    Args:
        title: str.

    Returns:
        `rich.progress.Progress`, a context manager.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal or console.is_jupyter),
    )


def _check_prompts(prompts, vocabulary_size):
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"Prompt {i} has no tokens. The model has no start "
                "token, so it needs at least one to continue from."
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary_size:
            raise ValueError(
                f"Prompt {i} has token ids beyond the model's vocabulary "
                f"of {vocabulary_size}. Use the tokenizer that belongs "
                f"to the model. Received: {min(prompt)} to {max(prompt)}"
            )


def fit_to_context(prompts, *, context, max_new_tokens, max_length, truncation):
    """Decides how many tokens each row gets, and shortens prompts if asked.

    Args:
        prompts: list of lists of int.
        context: int. The most tokens that prompt and new tokens may have.
        max_new_tokens: int or `None`.
        max_length: int or `None`. Of prompt and new tokens together. One of
            the two is given.
        truncation: `None` or `"left"`, which drops the oldest tokens of a
            prompt that leaves too little room.

    Returns:
        Tuple of the prompts, the most new tokens of each, and the most of any
        batch whose prompts are in the same buckets.

    Raises:
        ValueError: If an argument is out of range or a prompt too long.
    """
    if truncation not in TRUNCATIONS:
        raise ValueError(
            f"`truncation` must be one of {TRUNCATIONS}. Received: "
            f"truncation={truncation!r}"
        )
    if max_new_tokens is not None:
        max_new_tokens = _checked_length(
            "max_new_tokens", max_new_tokens, 1, context - 1
        )
        room = context - max_new_tokens
        wanted = f"{max_new_tokens} new tokens in a context of {context}"
    else:
        max_length = _checked_length("max_length", max_length, 2, context)
        room = max_length - 1
        wanted = f"a new token in a max_length of {max_length}"

    if truncation == "left":
        prompts = [prompt[-room:] for prompt in prompts]
    for i, prompt in enumerate(prompts):
        if len(prompt) > room:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens, which leaves no room "
                f"for {wanted}. Shorten it, change the length, or pass "
                "`truncation='left'` to drop its oldest tokens."
            )
    limits = [max_new_tokens or max_length - len(row) for row in prompts]
    shortest = shorter_prompts(min(map(len, prompts))) + 1
    return prompts, limits, max_new_tokens or max_length - shortest


def _checked_length(name, value, smallest, largest):
    if not is_int(value) or not smallest <= value <= largest:
        raise ValueError(
            f"`{name}` must be an int from {smallest} to {largest}, as the "
            f"model's context allows. Received: {name}={value!r}"
        )
    return operator.index(value)


def _as_stop_token_ids(lm, stop_token_ids):
    if stop_token_ids is None:
        return []
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if lm.preprocessor is None:
            raise ValueError(
                "`stop_token_ids='auto'` is the tokenizer's end token, "
                "and this model has `preprocessor=None`. Pass a list of "
                "token ids, or `None` to go on until the length is "
                "reached."
            )
        return [lm.preprocessor.tokenizer.end_token_id]
    vocabulary_size = lm.backbone.vocabulary_size
    ids = list(np.ravel(stop_token_ids))
    if not all(is_int(i) and 0 <= i < vocabulary_size for i in ids):
        raise ValueError(
            "`stop_token_ids` must be a list of ids out of the "
            f"vocabulary of {vocabulary_size} tokens. Received: "
            f"stop_token_ids={stop_token_ids!r}"
        )
    return [int(i) for i in ids]


def _num_known(lm):
    """How many ids the tokenizer has, if the model has more."""
    if lm.preprocessor is None:
        return None
    size = lm.preprocessor.tokenizer.vocabulary_size()
    return size if size < lm.backbone.vocabulary_size else None


def _sampling_settings(sampler, sampling, seed, num_rows):
    if not isinstance(sampler, BwETAFSampler):
        if sampling or seed is not None:
            raise ValueError(
                "The compiled sampler is a class of its own, so its "
                "settings can't be changed in a call. Received: "
                f"{sorted(sampling) or 'seed'} for sampler={sampler}"
            )
        return None
    config = sampler.get_config()
    unknown = sorted(set(sampling) - set(config))
    if unknown:
        raise TypeError(
            f"Unknown arguments: {unknown}. Sampling can be changed by "
            f"{sorted(config)}."
        )
    sampler = BwETAFSampler(**{**config, **sampling})
    seed = sampler.seed if seed is None else seed
    return SamplingSettings.of(sampler, _seeds(seed, num_rows))


def _seeds(seed, num_rows):
    """One seed for each row."""
    if seed is None:
        return np.random.randint(2**32, size=num_rows, dtype="uint32")
    seeds = [seed] * num_rows if np.ndim(seed) == 0 else list(seed)
    if len(seeds) != num_rows:
        raise ValueError(
            f"`seed` must be an int or hold one for each of the {num_rows} "
            f"prompts. Received: seed={seed}"
        )
    return [checked_seed(value) for value in seeds]


def seeds_of_batches(seed, batches):
    """The argument `seed` for each batch of prompts."""
    if np.ndim(seed) == 0:
        return [seed] * len(batches)
    sizes = [
        len(batch["token_ids"]) if isinstance(batch, dict) else np.size(batch)
        for batch in batches
    ]
    seeds = iter(_seeds(seed, sum(sizes)))
    return [list(itertools.islice(seeds, size)) for size in sizes]


def as_texts(inputs):
    """A batch of prompts as a list of str."""
    if hasattr(inputs, "__array__"):
        inputs = [
            text.decode() if isinstance(text, bytes) else text
            for text in np.ravel(inputs).tolist()
        ]
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise ValueError(
            "Prompts must be a str or a list of at least one str. Received: "
            f"{inputs!r}"
        )
    for i, text in enumerate(inputs):
        if not isinstance(text, str):
            raise ValueError(
                f"Prompts must be strings. Received: {text!r} of type "
                f"{type(text).__name__} at index {i}"
            )
    return list(inputs)


def as_stop_strings(stop_strings):
    if stop_strings is None:
        return []
    if isinstance(stop_strings, str):
        stop_strings = [stop_strings]
    if not isinstance(stop_strings, (list, tuple)) or not all(
        isinstance(stop, str) and stop for stop in stop_strings
    ):
        raise ValueError(
            "`stop_strings` must be a str or a list of str, none empty. "
            f"Received: stop_strings={stop_strings!r}"
        )
    return list(stop_strings)


def as_prompts(inputs):
    """Token ids of each row without its padding, and the padded width."""
    if not isinstance(inputs, dict) or set(inputs) != {
        "token_ids",
        "padding_mask",
    }:
        raise ValueError(
            "Without a preprocessor, `generate` takes a dict with "
            f"'token_ids' and 'padding_mask'. Received: {inputs!r}"
        )
    token_ids = np.asarray(inputs["token_ids"])
    mask = np.asarray(inputs["padding_mask"]).astype("bool")
    if (
        token_ids.ndim != 2
        or token_ids.shape != mask.shape
        or not token_ids.size
    ):
        raise ValueError(
            "`token_ids` and `padding_mask` must have the same shape (batch, "
            f"length). Received: shapes {token_ids.shape} and {mask.shape}"
        )
    if np.any(mask[:, 1:] & ~mask[:, :-1]):
        raise ValueError(
            "`padding_mask` must be 1 for the prompt and 0 after it: pad on "
            "the right. Rows may have different lengths."
        )
    prompts = [
        row[:length].tolist()
        for row, length in zip(token_ids, mask.sum(axis=1), strict=True)
    ]
    return prompts, token_ids.shape[1]
