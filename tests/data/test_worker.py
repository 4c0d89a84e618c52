"""What runs in the tokenizing processes."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_bwetaf.data import worker
from tests.data.conftest import make_documents

# Everything around which the pattern for words, or the normalization, turns.
TROUBLE = list("aZ09 \n\t\r'.,é\u0301\u00a0\u2028\u200b\x00\u4f60") + [
    "'s",
    "'ll",
    "  ",
    " \u0301",
    "\U0001f600",
    "n\n n",
    "<|EOS|>",
]


def encoder(tokenizer, fraction=0.0):
    specification = tokenizer._encoder(()).to_str()
    return worker.DocumentEncoder(specification, 0, "uint16", fraction)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(TROUBLE), max_size=60),
    length=st.integers(1, 8),
)
def test_pieces_have_the_ids_of_the_whole(tokenizer, pieces, length):
    text = "".join(pieces)
    encode = encoder(tokenizer).tokenizer.encode
    cut = list(worker.safe_pieces(text, length))
    assert "".join(cut) == text
    ids = [id for piece in cut for id in encode(piece).ids]
    assert ids == encode(text).ids


def test_a_text_of_many_words_is_cut():
    text = "word and " * 1000
    pieces = list(worker.safe_pieces(text, 100))
    assert len(pieces) > 80 and max(map(len, pieces)) < 110


def test_only_known_tokenizers_are_cut(tokenizer):
    assert encoder(tokenizer).can_split
    whole = json.loads(tokenizer._encoder(()).to_str())
    assert worker.can_split(whole)
    assert worker.can_split({**whole, "normalizer": None})
    words = whole["pre_tokenizer"]
    token = {"id": 0, "content": "a b", "special": False}
    for change in (
        {"added_tokens": [token]},
        {"normalizer": {"type": "Strip"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "X"}]}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**words, "add_prefix_space": True}},
        {"pre_tokenizer": {**words, "use_regex": False}},
        {"model": {"type": "Unigram"}},
        {"post_processor": {"type": "ByteLevel"}},
    ):
        assert not worker.can_split({**whole, **change}), change


def test_ids_are_those_of_the_tokenizer(tokenizer, documents):
    result = encoder(tokenizer).encode(documents)
    expected = tokenizer.tokenize(documents)
    assert len(result["train"]) == len(documents) and not result["validation"]
    for received, ids in zip(result["train"], expected, strict=True):
        assert received.tolist() == [*ids, tokenizer.end_token_id]
        assert received.dtype == "uint16"


def test_special_tokens_in_a_text_stay_text(tokenizer):
    (ids,) = encoder(tokenizer).encode(["a<|EOS|>b"])["train"]
    assert (ids == 0).tolist() == [False] * (len(ids) - 1) + [True]


def test_padding_and_truncation_are_off(tokenizer, documents):
    specification = tokenizers.Tokenizer.from_str(
        tokenizer._encoder(()).to_str()
    )
    specification.enable_padding(length=64)
    specification.enable_truncation(3)
    received = worker.DocumentEncoder(specification.to_str(), 0, "uint16", 0)
    expected = encoder(tokenizer).encode(documents)["train"]
    for ids, other in zip(
        received.encode(documents)["train"], expected, strict=True
    ):
        np.testing.assert_array_equal(ids, other)


def test_documents_without_tokens_are_counted(tokenizer):
    result = encoder(tokenizer).encode(["", "a", "\u0301", " ", "\0"])
    assert result["documents"] == 5 and result["empty_documents"] == 2
    assert len(result["train"]) == 3
    assert result["bytes"] == 5


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_share_held_out(fraction):
    documents = make_documents(4000)
    share = np.mean([worker.is_held_out(d, fraction) for d in documents])
    assert abs(share - fraction) < 0.03


def test_a_larger_share_holds_out_the_same_and_more():
    documents = make_documents(1000)
    small = {d for d in documents if worker.is_held_out(d, 0.1)}
    large = {d for d in documents if worker.is_held_out(d, 0.3)}
    assert small < large


def test_copies_are_on_one_side():
    for document in make_documents(300):
        for copy in (
            f"\n{document}  ",
            document.upper(),
            document.replace("é", "e\u0301").replace(" ", "\n"),
            document.replace("é", "e").replace("ï", "i"),
            document.replace("'", "\u2019"),
        ):
            held_out = worker.is_held_out(document, 0.5)
            assert worker.is_held_out(copy, 0.5) == held_out


def test_documents_that_differ_in_a_digit_are_independent():
    sides = [worker.is_held_out(f"text {n}", 0.5) for n in range(100)]
    assert 25 < sum(sides) < 75


@pytest.mark.parametrize(
    "text, fraction, end",
    [
        ("one two three four", 0.6, " three four"),
        ("one two three four", 0.3, " four"),
        ("one\ntwo", 0.9, "\ntwo"),
        ("un broken", 0.25, ""),
        ("", 0.5, ""),
    ],
)
def test_the_end_of_a_text(text, fraction, end):
    start, received = worker.without_end(text, fraction)
    assert (start + received, received) == (text, end)


def test_the_only_document_is_on_both_sides(tokenizer):
    specification = tokenizer._encoder(()).to_str()
    only = worker.DocumentEncoder(specification, 0, "uint16", 0.25, True)
    text = " ".join(make_documents(10))
    result = only.encode([text])
    assert result["documents"] == 1 and result["empty_documents"] == 0
    start, end = worker.without_end(text, 0.25)
    for split, part in (("train", start), ("validation", end)):
        (ids,) = result[split]
        assert ids[-1] == 0
        assert ids[:-1].tolist() == only.token_ids(part).tolist()
    assert only.encode([""])["empty_documents"] == 1
    everything = worker.DocumentEncoder(specification, 0, "uint16", 0.0, True)
    assert not everything.encode([text])["validation"]
