"""The model that comes with the package, and the grammar it learned from."""

import random
import re

import pytest

import keras_bwetaf
from examples.tiny import grammar
from keras_bwetaf.preset_files import PRESETS

NAMES = {name: "girl" for name in grammar.GIRLS}
NAMES.update({name: "boy" for name in grammar.BOYS})
WORD = re.compile(r"[A-Za-z]+")


def faults(story):
    """What is wrong with a story; a grammar's story has no fault."""
    words = WORD.findall(story)
    heroes = {word for word in words if word in NAMES}
    if len(heroes) != 1:
        return [f"heroes: {sorted(heroes)}"]
    (hero,) = heroes
    she, her_object, her = grammar.PRONOUNS[NAMES[hero]]
    others = set(sum(grammar.PRONOUNS.values(), ())) - {she, her_object, her}
    found = [word for word in words if word.lower() in others]
    friends = {
        f"{friend} the {animal}"
        for animal, friends in grammar.FRIENDS.items()
        for friend in friends
        if friend in words
    }
    if len(friends) > 1:
        found.append(f"friends: {sorted(friends)}")
    if not story.rstrip().endswith((".", "!", '"')):
        found.append("no end")
    return found


def test_grammar():
    stories = [grammar.tell(random.Random(seed)) for seed in range(2000)]
    assert len(set(stories)) > 1990
    assert grammar.tell(random.Random(5)) == stories[5]
    for story in stories:
        assert not faults(story), story
        assert not set("<>{}") & set(story)
        assert not re.search(r"\b[Aa] [aeiou]", story), story


def test_every_symbol_is_used():
    used = {
        symbol
        for expansions in grammar.GRAMMAR.values()
        for text in expansions
        for symbol in grammar.SYMBOL.findall(text)
    }
    assert used | {"story"} == grammar.GRAMMAR.keys()


@pytest.fixture(scope="module")
def lm():
    return keras_bwetaf.from_preset("tiny")


def test_is_small(lm):
    parameters = PRESETS["tiny"]["parameters"]
    assert lm.count_params() == parameters <= 3_000_000
    files = PRESETS["tiny"]["folder"].iterdir()
    assert sum(path.stat().st_size for path in files) < 6_000_000


def test_tells_stories(lm):
    stories = lm.generate(
        ["Once upon a time"] * 16, max_new_tokens=240, seed=list(range(16))
    )
    assert len(set(stories)) == 16
    with_faults = {story: faults(story) for story in stories if faults(story)}
    assert len(with_faults) <= 2, with_faults
    assert max(map(len, stories)) < 1000  # They end.
