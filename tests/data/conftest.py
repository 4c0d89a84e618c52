"""A small tokenizer, made-up documents, and a Hub with data sets."""

import random

import pytest

import keras_bwetaf

WORDS = (
    "a the sun moon star wind and or sings sleeps walks home to night day "
    "o'clock it's we'll 12 345 été, naïve! (so) \u4f60\u597d \U0001f600"
).split()


def make_documents(count, seed=0, length=40):
    """Texts, no two alike."""
    rng = random.Random(seed)
    return [
        f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, length)))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def documents():
    return make_documents(300)


@pytest.fixture(scope="session")
def tokenizer(documents):
    return keras_bwetaf.train_tokenizer(documents, 400, min_frequency=2)


@pytest.fixture(scope="session")
def other_tokenizer(documents):
    """As large as `tokenizer`, with other tokens."""
    texts = [text.upper() for text in documents]
    return keras_bwetaf.train_tokenizer(texts, 400, min_frequency=2)
