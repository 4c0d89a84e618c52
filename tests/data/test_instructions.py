"""Prompts and responses -> batches: packing, the mask, gradients."""

import itertools
import json

import grain
import keras
import numpy as np
import pytest

from keras_bwetaf.data import chat_prompt
from keras_bwetaf.data import load_instructions as load_instructions_
from tests.models.test_fit import make_lm, step

LENGTH, BATCH = 32, 4


def make_examples(count, seed=0):
    """No two alike, of 4 to 14 tokens or so."""
    rng = np.random.default_rng(seed)
    words = ["sun", "moon", "star", "wind", "night", "day"]
    return [
        {
            "prompt": f"{number}? " + " ".join(rng.choice(words, a)),
            "response": f"{number}! " + " ".join(rng.choice(words, b)),
        }
        for number, (a, b) in enumerate(rng.integers(1, 5, (count, 2)))
    ]


@pytest.fixture(scope="module")
def examples():
    return make_examples(60)


@pytest.fixture(scope="module")
def load(tokenizer):
    def load(examples, **arguments):
        arguments = {
            "sequence_length": LENGTH,
            "batch_size": BATCH,
            "repeat": False,
            **arguments,
        }
        return load_instructions_(examples, tokenizer, **arguments)

    return load


def concatenate(batches):
    """Inputs, labels, weights of all batches together."""
    batches = list(batches)
    x = {
        name: np.concatenate([x[name] for x, _, _ in batches])
        for name in ("token_ids", "padding_mask")
    }
    return x, *(np.concatenate([b[i] for b in batches]) for i in (1, 2))


def documents(batches):
    """Tuples of token ids, and of those that are learned, of all examples."""
    x, y, weights = concatenate(batches)
    found = []
    for tokens, numbers, labels, learned in zip(
        x["token_ids"], x["padding_mask"], y, weights, strict=True
    ):
        for number in range(1, numbers.max() + 1):
            (places,) = np.nonzero(numbers == number)
            assert (np.diff(places) == 1).all()
            in_document = learned[places] > 0
            found.append(
                (
                    tuple(tokens[places].tolist()),
                    tuple(labels[places][in_document].tolist()),
                )
            )
        assert not learned[numbers == 0].any()
    return found


def expected_documents(examples, tokenizer):
    for example in examples:
        prompt, response = (
            tokenizer.tokenize(example[name]).tolist()
            for name in ("prompt", "response")
        )
        response.append(tokenizer.end_token_id)
        yield tuple(prompt + response), tuple(response)


def assert_same_batches(received, expected):
    for one, two in zip(received, expected, strict=True):
        for a, b in zip(
            keras.tree.flatten(one), keras.tree.flatten(two), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_every_example_is_there_once(examples, tokenizer, load):
    data = load(examples)
    assert isinstance(data, grain.IterDataset)
    expected = sorted(expected_documents(examples, tokenizer))
    assert sorted(documents(data)) == expected
    num_rows = len(list(load(examples, batch_size=1)))
    assert num_rows % 7
    x, _, _ = concatenate(load(examples, batch_size=7))
    assert not x["padding_mask"][num_rows:].any()
    assert len(x["padding_mask"]) == -(-num_rows // 7) * 7
    for x, y, weights in data:
        assert x.keys() == {"token_ids", "padding_mask"}
        for array in (*x.values(), y):
            assert array.shape == (BATCH, LENGTH) and array.dtype == "int32"
        assert weights.shape == (BATCH, LENGTH) and weights.dtype == "float32"


def test_rows_are_full(examples, load):
    x, _, _ = concatenate(load(examples, sequence_length=128, batch_size=1))
    num_tokens = (x["padding_mask"] > 0).sum()
    assert len(x["token_ids"]) == -(-num_tokens // 128) > 3
    assert x["padding_mask"].max() > 6


def test_order(examples, load):
    def take(**arguments):
        return list(itertools.islice(load(examples, **arguments), 20))

    first = take(repeat=True, seed=3)
    assert_same_batches(take(repeat=True, seed=3), first)
    rows, other, in_order = (
        concatenate(batches)[0]["token_ids"]
        for batches in (first, take(repeat=True), take(shuffle=False))
    )
    assert (rows != other).any()
    num_rows = len(list(load(examples, batch_size=1)))
    assert (rows[:num_rows] != in_order[:num_rows]).any()


def test_each_pass_has_another_order(examples, load):
    """Of rows, and of the examples of a row."""
    num_rows = len(list(load(examples, batch_size=1)))
    data = load(examples, batch_size=1, repeat=True)
    batches = list(itertools.islice(data, 2 * num_rows))
    one, two = (
        [documents([batch]) for batch in part]
        for part in (batches[:num_rows], batches[num_rows:])
    )
    assert one != two
    other_rows = sorted(map(sorted, one)), sorted(map(sorted, two))
    assert other_rows[0] == other_rows[1]
    assert sorted(one) != sorted(two)


def test_processes_share_each_batch(examples, load):
    alone = list(load(examples))
    parts = [
        load(examples, process_index=index, process_count=2)
        for index in range(2)
    ]
    received = [concatenate(both) for both in zip(*parts, strict=True)]
    assert_same_batches(received, alone)


def test_resume(examples, load):
    iterator = iter(load(examples, repeat=True))
    for _ in range(11):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 9))
    resumed = iter(load(examples, repeat=True))
    resumed.set_state(state)
    assert_same_batches(list(itertools.islice(resumed, 9)), expected)


# === What is learned ===


@pytest.fixture(scope="module")
def lm(tokenizer):
    return make_lm(vocabulary_size=tokenizer.vocabulary_size())


@pytest.fixture(scope="module")
def batch(load):
    """One row of several examples."""
    x, y, weights = next(iter(load(make_examples(3, seed=1), batch_size=1)))
    assert x["padding_mask"].max() == 3
    return x, y, weights


def test_loss_is_that_of_the_responses(examples, tokenizer, load, lm):
    """Each example alone, from the logits of its own tokens."""
    rows = 2
    (x, y, weights), *_ = load(examples, batch_size=rows)
    received = lm.evaluate(x, y, sample_weight=weights, verbose=0)[0]
    responses = dict(expected_documents(examples, tokenizer))
    losses = []
    # Where it is in its row is a part of the computation.
    for row in range(rows):
        numbers = x["padding_mask"][row]
        for number in range(1, numbers.max() + 1):
            (places,) = np.nonzero(numbers == number)
            alone = {name: np.zeros((rows, LENGTH), "int32") for name in x}
            alone["token_ids"][0, places] = x["token_ids"][row, places]
            alone["padding_mask"][0, places] = 1
            logits = lm.predict(alone, verbose=0)[0, places].astype("float64")
            normalizers = np.log(np.exp(logits).sum(-1))
            token_ids = tuple(x["token_ids"][row, places].tolist())
            first = len(token_ids) - len(responses[token_ids])
            for place in range(first, len(token_ids)):
                logit = logits[place - 1, token_ids[place]]
                losses.append(normalizers[place - 1] - logit)
    assert len(losses) == weights.sum() > 20
    assert abs(received / np.mean(losses) - 1) < 1e-6


def test_labels_of_the_prompt_change_nothing(batch, lm):
    x, y, weights = batch
    expected, logs = step(lm, x, y, weights)
    other = np.where(weights > 0, y, (y + 7) % 64)
    assert (other != y).any()
    lm.reset_metrics()
    received, other_logs = step(lm, x, other, weights)
    assert other_logs == logs
    assert_same_batches(received, expected)
    lm.reset_metrics()
    wrong = np.where(weights > 0, (y + 7) % 64, y)
    assert step(lm, x, wrong, weights)[1]["loss"] != logs["loss"]


def test_an_example_does_not_see_its_neighbours(batch, lm):
    """Other tokens in the first example change no gradient of the second."""
    x, y, weights = batch
    second = weights * (x["padding_mask"] == 2)
    assert second.any()
    tokens = x["token_ids"]
    other = np.where(x["padding_mask"] == 1, 1 + (tokens + 5) % 60, tokens)
    assert (other != tokens).any()
    expected, _ = step(lm, x, y, second)
    received, _ = step(lm, {**x, "token_ids": other}, y, second)
    assert_same_batches(received, expected)
    assert all(change.any() for change in received)
    seen = np.where(x["padding_mask"] == 2, 1 + (tokens + 5) % 60, tokens)
    changed, _ = step(lm, {**x, "token_ids": seen}, y, second)
    assert (changed[1] != expected[1]).any()


def test_fit(batch, load, lm):
    """Grain's tuples are what `fit` takes."""
    data = load(make_examples(3, seed=1), batch_size=1)
    before = lm.get_weights()
    x, y, weights = batch
    lm.reset_metrics()
    expected = lm.train_on_batch(x, y, sample_weight=weights, return_dict=True)
    lm.set_weights(before)
    history = lm.fit(data, steps_per_epoch=1, verbose=0).history
    assert {name: value for name, (value,) in history.items()} == expected
    lm.set_weights(before)


# === Examples ===


def chat(*contents):
    roles = itertools.cycle(["user", "assistant"])
    return {
        "messages": [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=False)
        ]
    }


def test_chats(tokenizer, load):
    """What comes before the last answer is its prompt."""
    system = {"role": "system", "content": "Be {brief}."}
    example = chat("sun?", "moon.", "star?", "wind.")
    example["messages"].insert(0, system)
    prompt = (
        "Be {brief}.\n\nUser:\nsun?\n\nAssistant:\nmoon.\n\nUser:\nstar?\n\n"
        "Assistant:\n"
    )
    assert chat_prompt(example["messages"][:-1]) == prompt
    data = load([example], sequence_length=128, batch_size=1)
    expected = [{"prompt": prompt, "response": "wind."}]
    assert documents(data) == list(expected_documents(expected, tokenizer))


def test_own_template():
    template = {"user": "Q: {content}\n", "assistant": "A: {content}\n"}
    messages = chat("Why?", "So.", "So?")["messages"]
    assert chat_prompt(messages, template) == "Q: Why?\nA: So.\nQ: So?\nA: "


def test_file(examples, load, tmp_path):
    path = tmp_path / "examples.jsonl"
    lines = [json.dumps(example) + "\n" for example in examples]
    path.write_text("\n".join(lines))
    assert_same_batches(list(load(path)), list(load(examples)))
    path.write_text(lines[0] + "[]\n")
    with pytest.raises(ValueError, match="jsonl, line 2: expected a JSON obj"):
        load(path)
    path.write_text(lines[0] + '{"text": "sun"}\n')
    with pytest.raises(ValueError, match="jsonl, line 2: expected a dict with"):
        load(path)
    with pytest.raises(ValueError, match="must be a .jsonl file"):
        load(tmp_path / "examples.txt")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.jsonl")


def test_the_end_token_in_a_text_is_text(tokenizer, load):
    example = {"prompt": "a <|EOS|> b", "response": "c <|EOS|> d"}
    data = load([example], sequence_length=64, batch_size=1)
    ((token_ids, _),) = documents(data)
    assert token_ids.count(tokenizer.end_token_id) == 1


LONG = {"prompt": "sun " * 30, "response": "moon " * 10}
SHORT = {"prompt": "sun", "response": "moon"}


def test_too_long(load):
    with pytest.raises(
        ValueError, match="1 of 2 examples .*example 1 the most.*_length=32"
    ):
        load([SHORT, LONG])


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_truncation(tokenizer, load, truncation):
    backwards = {"prompt": LONG["response"], "response": LONG["prompt"]}
    examples = [LONG, SHORT, backwards]
    whole = list(expected_documents(examples, tokenizer))
    dropped = int(truncation == "right")
    with pytest.warns(
        UserWarning,
        match=f"2 of 3 examples .* {dropped} are dropped.*on the {truncation}",
    ):
        data = load(examples, truncation=truncation)
    received = documents(data)
    assert len(received) == 3 - dropped
    for token_ids, learned in received:
        assert len(token_ids) <= LENGTH
        assert token_ids[-len(learned) :] == learned
        if truncation == "left":
            assert any(
                ids[-len(token_ids) :] == token_ids
                and learned == response[-LENGTH + 1 :]
                for ids, response in whole
            )
        else:
            assert any(
                ids[: len(token_ids)] == token_ids
                and response[: len(learned)] == learned
                for ids, response in whole
            )


def test_nothing_left(load):
    with (
        pytest.warns(UserWarning, match="1 are dropped"),
        pytest.raises(ValueError, match="No example has a response within"),
    ):
        load([LONG], truncation="right")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "", "response": "a"}, "example 1: the prompt has no tok"),
        ({"prompt": "a", "response": ""}, "example 1: the response has no"),
        # An accent alone is stripped by the tokenizer.
        ({"prompt": "\u0301", "response": "a"}, "the prompt has no tokens"),
        ({"prompt": "a"}, "example 1: expected a dict with 'prompt'"),
        ({"prompt": "a", "response": 1}, "both str.*'response': 1"),
        ("text", "example 1: expected a dict.*Received: 'text'"),
        ({"messages": []}, r"at least one message. Received: messages=\[\]"),
        ({"messages": "sun"}, "at least one message. Received: .*'sun'"),
        ({"messages": ["sun"]}, "example 1: A message must be a dict.*'sun'"),
        (chat("sun"), "example 1: the last message must be the assistant's"),
        (
            {"messages": [{"role": "bot", "content": "sun"}]},
            "'role', one of .*Received: .*'bot'",
        ),
        ({"messages": [{"role": "user"}]}, "and 'content', a str"),
    ],
)
def test_malformed_examples(load, example, message):
    with pytest.raises(ValueError, match=message):
        load([SHORT, example])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(truncation="middle"), "Received: truncation='middle'"),
        (dict(sequence_length=1), "at least 2.* Received: sequence_length=1"),
        (dict(batch_size=0), "`batch_size` must be .* Received: batch_size=0"),
        (dict(examples=[]), "Expected at least one example"),
        (dict(examples=5), "must be an iterable of dict, or .* examples=5"),
    ],
)
def test_wrong_arguments(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"examples": [SHORT], **arguments})
