"""Prompts and responses -> a Grain data set of batches."""

import bisect
import collections.abc
import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_bwetaf.data.batching import (
    batches,
    check_arguments,
    processes,
    shuffle_and_repeat,
)
from keras_bwetaf.data.formats import json_records
from keras_bwetaf.optional import import_optional

CHAT_TEMPLATE = {
    "system": "{content}\n\n",
    "user": "User:\n{content}\n\n",
    "assistant": "Assistant:\n{content}\n\n",
}


class _Example(NamedTuple):
    """Attributes:

    where: str. Which example it is, for messages.
    token_ids: int32 array `(length,)`. Prompt, response and end token.
    prompt_length: int. How many of them are the prompt's.
    """

    where: str
    token_ids: np.ndarray
    prompt_length: int


def load_instructions(
    examples: Any,
    tokenizer: Any,
    *,
    sequence_length: int,
    batch_size: int,
    truncation: Any = None,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Any:
    """Loads prompts and responses as a data set for `fit` and `evaluate`.

    The model learns to predict the tokens of a response, and the end token
    after it, from its prompt; the prompt itself is not learned. Prompt and
    response are tokenized apart, so that the model sees a prompt as it does
    in `generate`.

    A row holds as many examples as fit in, each a document of its own that
    sees none of the others. Examples are tokenized once, at the beginning,
    and kept in memory. Which example is at which place of which batch is a
    function of the arguments alone; in each pass over the data, rows are in
    another order, and so are the examples of a row, since to the model it
    makes a difference where in its row a text is. Processes share batches,
    and iterators resume, as those of `load_packed` do.

    Args:
        examples: Iterable of dict, or the path of a `.jsonl` file with one
            in each line: `{"prompt": str, "response": str}`, or `{"messages":
            [{"role": str, "content": str}, ...]}`, the last of which is the
            assistant's and is the response to `chat_prompt` of the others.
        tokenizer: `BwETAFTokenizer`.
        sequence_length: int. Tokens in a row, at least 2.
        batch_size: int. Rows in a batch, of all processes together.
        truncation: What to do with examples of more tokens than a row has:
            `"left"` drops their first tokens, `"right"` their last ones, and
            the examples of whose responses nothing is left; both warn, and
            say how many. `None` raises an error.
        seed: int. Of the order of rows. Defaults to `0`.
        shuffle: bool. Whether rows are in random order. Defaults to `True`.
        repeat: bool. Whether the data set begins again at its end, without
            end, for `fit` with `steps_per_epoch`. Without it, the last batch
            is filled up with empty rows. Defaults to `True`.
        process_index: int. Defaults to `jax.process_index()`.
        process_count: int. Defaults to `jax.process_count()`.

    Returns:
        A `grain.IterDataset` of tuples `(x, y, sample_weight)` of arrays of
        shape `(batch_size / process_count, sequence_length)`: `x` a dict of
        int32 `"token_ids"` and `"padding_mask"`, the number of the example
        that each token belongs to, from 1 in each row, and 0 for padding;
        `y`, int32, the token after each; `sample_weight`, float32, 1 where
        that is a response's, and 0 elsewhere.

    Raises:
        ValueError: If an argument is out of range, there is no example, one
            is malformed, or has an empty prompt or response, or examples are
            too long.

    Example:

    ```python
    data = load_instructions(
        [{"prompt": "The capital of France is", "response": " Paris."}],
        lm.preprocessor.tokenizer,
        sequence_length=512,
        batch_size=16,
    )
    lm.fit(data, steps_per_epoch=100)
    ```
    """
    grain = import_optional("grain", "train", "`load_instructions`")
    process_index, process_count = processes(process_index, process_count)
    sequence_length, batch_size, seed, process_index, process_count = (
        check_arguments(
            sequence_length, batch_size, seed, process_index, process_count
        )
    )
    if truncation not in (None, "left", "right"):
        raise ValueError(
            '`truncation` must be None, "left" or "right". Received: '
            f"truncation={truncation!r}"
        )
    if sequence_length < 2:
        raise ValueError(
            "`sequence_length` must be at least 2, for a prompt and a "
            f"response. Received: sequence_length={sequence_length}"
        )
    tokenized = _tokenize(list(_prompts_and_responses(examples)), tokenizer)
    tokenized = _shorten(tokenized, sequence_length, truncation)
    rows = grain.MapDataset.source(_fit_together(tokenized, sequence_length))
    rows = shuffle_and_repeat(
        rows, seed=(seed,) if shuffle else None, repeat=repeat
    )
    row = functools.partial(_row, sequence_length=sequence_length)
    return batches(
        rows.random_map(row, seed=seed) if shuffle else rows.map(row),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        empty_row=row([]),
        convert=_inputs_and_labels,
    )


def chat_prompt(
    messages: Any, template: Mapping[str, str] = CHAT_TEMPLATE
) -> str:
    """The text that a model is to continue with the assistant's answer.

    Args:
        messages: list of dict with a `"role"`, one of the template's, and
            `"content"`, str.
        template: dict of role to str, with `{content}` in it. One of the
            roles is `"assistant"`; what is before its `{content}` ends the
            prompt.

    Returns:
        str.

    Raises:
        ValueError: If a message is malformed.

    Example:

    ```python
    prompt = chat_prompt([{"role": "user", "content": "Who are you?"}])
    lm.generate(prompt, strip_prompt=True)
    ```
    """
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in template
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                "A message must be a dict with a 'role', one of "
                f"{sorted(template)}, and 'content', a str. Received: "
                f"message={message!r:.200}"
            )
    texts = [
        template[message["role"]].replace("{content}", message["content"])
        for message in messages
    ]
    answer = template["assistant"].partition("{content}")[0]
    return "".join(texts) + answer


def _prompts_and_responses(examples):
    """Yields where an example is, its prompt and its response."""
    if isinstance(examples, str | os.PathLike):
        path = os.fspath(examples)
        if not path.endswith(".jsonl"):
            raise ValueError(
                "A file of examples must be a .jsonl file. Received: "
                f"examples={path!r}"
            )
        records = json_records(path, path)
    elif isinstance(examples, collections.abc.Iterable):
        records = (
            (f"example {number}", record)
            for number, record in enumerate(examples)
        )
    else:
        raise ValueError(
            "`examples` must be an iterable of dict, or the path of a .jsonl "
            f"file. Received: examples={examples!r:.80} of type "
            f"{type(examples).__name__}"
        )
    for where, record in records:
        yield where, *_prompt_and_response(where, record)


def _prompt_and_response(where, record):
    if isinstance(record, dict) and "messages" in record:
        return _last_answer(where, record["messages"])
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), str) for name in ("prompt", "response")
    ):
        raise ValueError(
            f"{where}: expected a dict with 'prompt' and 'response', both "
            f"str, or with 'messages'. Received: {record!r:.200}"
        )
    return record["prompt"], record["response"]


def _last_answer(where, messages):
    """The prompt and the response of a chat."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: expected a list of at least one message. Received: "
            f"messages={messages!r:.200}"
        )
    try:
        chat_prompt(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    *others, answer = messages
    if answer["role"] != "assistant":
        raise ValueError(
            f"{where}: the last message must be the assistant's. Received: "
            f"message={answer!r:.200}"
        )
    return chat_prompt(others), answer["content"]


def _tokenize(examples, tokenizer):
    """Turns triples of str into a list of `_Example`."""
    if not examples:
        raise ValueError(
            "Expected at least one example. Received: examples without any"
        )
    places, prompts, responses = map(list, zip(*examples, strict=True))
    end = [tokenizer.end_token_id]
    result = []
    for where, prompt, response in zip(
        places,
        tokenizer.tokenize(prompts),
        tokenizer.tokenize(responses),
        strict=True,
    ):
        for name, tokens in (("prompt", prompt), ("response", response)):
            if not tokens:
                raise ValueError(
                    f"{where}: the {name} has no tokens. The model has no "
                    "start token, so it needs a prompt to continue from, and "
                    "a response to learn. Leave the example out. Received: "
                    f"{name} without text"
                )
        token_ids = np.array([*prompt, *response, *end], "int32")
        result.append(_Example(where, token_ids, len(prompt)))
    return result


def _shorten(examples, length, truncation):
    """Cuts examples to a length, and drops those without a response."""
    too_long = [each for each in examples if len(each.token_ids) > length]
    if not too_long:
        return examples
    longest = max(too_long, key=lambda each: len(each.token_ids))
    counted = (
        f"{len(too_long)} of {len(examples)} examples have more than "
        f"`sequence_length` tokens, {longest.where} the most with "
        f"{len(longest.token_ids)}"
    )
    if truncation is None:
        raise ValueError(
            f"{counted}. Pass a larger one, leave them out, or pass "
            '`truncation="left"` or `"right"`. Received: sequence_length='
            f"{length}"
        )
    if truncation == "left":
        cut = [
            _Example(
                each.where,
                each.token_ids[-length:],
                max(0, each.prompt_length - (len(each.token_ids) - length)),
            )
            if len(each.token_ids) > length
            else each
            for each in examples
        ]
    else:
        cut = [
            each._replace(token_ids=each.token_ids[:length])
            for each in examples
            if each.prompt_length < length
        ]
    warnings.warn(
        f"{counted}. {len(examples) - len(cut)} are dropped, and the others "
        f"cut on the {truncation}.",
        stacklevel=3,
    )
    if not cut:
        raise ValueError(
            "No example has a response within `sequence_length` tokens. Pass "
            'a larger one, or `truncation="left"`. Received: sequence_length='
            f"{length}"
        )
    return cut


def _fit_together(examples, sequence_length):
    """Puts examples in rows: the longest first, each where it fits best.

    Args:
        examples: list of `_Example`, none longer than `sequence_length`.
        sequence_length: int.

    Returns:
        list of lists of `_Example`.
    """
    rows = []
    spaces = []  # Pairs of free space and row, in this order.
    for example in sorted(examples, key=lambda each: -len(each.token_ids)):
        length = len(example.token_ids)
        place = bisect.bisect_left(spaces, (length,))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = sequence_length, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(spaces, (space - length, row))
    return rows


def _row(examples, random=None, *, sequence_length):
    """One row of a batch.

    Args:
        examples: list of `_Example`.
        random: `numpy.random.Generator`, or None to keep their order.
        sequence_length: int.

    Returns:
        int32 array `(3, length)`: ids, documents, what is a response.
    """
    order = range(len(examples))
    if random is not None:
        order = random.permutation(len(examples))
    row = np.zeros((3, sequence_length), "int32")
    token_ids, documents, is_response = row
    start = 0
    for document, number in enumerate(order, 1):
        example = examples[number]
        stop = start + len(example.token_ids)
        token_ids[start:stop] = example.token_ids
        documents[start:stop] = document
        is_response[start + example.prompt_length : stop] = 1
        start = stop
    return row


def _inputs_and_labels(rows):
    """What `fit` takes.

    Args:
        rows: int32 `(batch, 3, length)`, as `_row` makes them.

    Returns:
        Tuple of inputs, labels and weights.
    """
    token_ids, documents, is_response = np.moveaxis(rows, 1, 0)
    x = {"token_ids": token_ids, "padding_mask": documents}
    return x, _next(token_ids), _next(is_response).astype("float32")


def _next(x):
    """Each row moved to the left by one; a 0 comes in."""
    return np.pad(x[:, 1:], ((0, 0), (0, 1)))
