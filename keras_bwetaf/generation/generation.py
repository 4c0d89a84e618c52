"""The host's half of generation: prompts in, new tokens out."""

import operator
from typing import NamedTuple

import numpy as np

from keras_bwetaf.checks import is_int
from keras_bwetaf.generation.sampling import SamplingSettings
from keras_bwetaf.layers.sharding import num_row_groups

SMALLEST_BUCKET = 64
TRUNCATIONS = (None, "left")


class Request(NamedTuple):
    """A batch of prompts, checked and ready to run."""

    prompts: list  # of lists of token ids, none empty
    limits: list  # the most new tokens of each row
    longest: int  # the most new tokens, whatever the prompts in their buckets
    stop_token_ids: list
    settings: SamplingSettings | None  # `None`: the sampler is the user's own


def bucket(size, smallest=SMALLEST_BUCKET):
    """The smallest doubling of `smallest` that holds `size`.

    Shapes come from a few buckets, so that few programs are compiled.
    """
    while smallest < size:
        smallest *= 2
    return smallest


def cache_bucket(size):
    """Like `bucket` with steps an eighth as large: decoding reads all slots."""
    step = bucket(size) // 8
    return -(-size // step) * step


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
    shortest = min(map(len, prompts))
    shortest = bucket(shortest) // 2 if shortest > SMALLEST_BUCKET else 1
    return prompts, limits, max_new_tokens or max_length - shortest


def _checked_length(name, value, smallest, largest):
    if not is_int(value) or not smallest <= value <= largest:
        raise ValueError(
            f"`{name}` must be an int from {smallest} to {largest}, as the "
            f"model's context allows. Received: {name}={value!r}"
        )
    return operator.index(value)


def generate_tokens(decoder, request, tokens_per_dispatch, finished):
    """Generates new tokens for a batch, some at a time.

    Args:
        decoder: `Decoder`.
        request: `Request`.
        tokens_per_dispatch: int. How many tokens the device makes before the
            host sees them.
        finished: bool numpy array `(batch,)`. The caller may set a row to
            end it early.

    Yields:
        list of lists of int, the tokens that each row has got since the last
        time, up to and including its stop token.
    """
    prompts, limits, longest, stop_token_ids, settings = request
    num_rows = len(prompts)
    # Rows that fill up the bucket have no tokens to make.
    num_padding = bucket(num_rows, num_row_groups()) - num_rows
    prompts = prompts + [[0]] * num_padding
    limits = np.array(limits + [0] * num_padding, "int32")
    if settings is not None:
        seeds = np.pad(settings.seeds, (0, num_padding))
        settings = settings._replace(seeds=seeds)

    lengths = np.array([len(prompt) for prompt in prompts], "int32")
    token_ids = np.zeros((len(prompts), bucket(lengths.max())), "int32")
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    num_stop_slots = bucket(len(stop_token_ids), 8)

    state = decoder.prefill(
        cache_bucket(token_ids.shape[1] + longest),
        token_ids,
        {
            "prompt_lengths": lengths,
            "limits": limits,
            "stop_token_ids": np.array(
                stop_token_ids + [-1] * (num_stop_slots - len(stop_token_ids)),
                "int32",
            ),
        },
        settings,
    )
    num_steps = min(tokens_per_dispatch, longest)
    num_shown = 0
    while True:
        num_tokens = int(state.num_tokens)
        tokens = np.asarray(state.tokens)[:num_rows, num_shown:num_tokens]
        fresh = []
        for i, row in enumerate(tokens.tolist()):
            row = [] if finished[i] else row[: limits[i] - num_shown]
            for end, token in enumerate(row, start=1):
                if token in stop_token_ids:
                    row = row[:end]
                    finished[i] = True
                    break
            fresh.append(row)
        num_shown = num_tokens
        finished |= limits[:num_rows] <= num_shown
        yield fresh
        if finished.all():
            return
        done = np.pad(finished, (0, num_padding), constant_values=True)
        state = decoder.decode(state._replace(done=done), settings, num_steps)
