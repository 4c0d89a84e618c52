"""A short run of the fuzzer; a long one is `python -m` of its module."""

import pytest

from tests.converters import fuzzing

CASES = {"msgpack": 600, "safetensors": 600, "json": 500, "hdf5": 300}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    fuzzing.make_corpus(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_damaged_files_load_correctly_or_are_refused(kind, corpus, tmp_path):
    results = fuzzing.fuzz(kind, corpus, tmp_path, CASES[kind])
    print(fuzzing.summary(kind, results))
    failures = [failure for each in results for failure in each.failures]
    assert not failures, "\n".join(failures[:10])
    assert len(results) == CASES[kind]
    outcomes = [each.outcome for each in results]
    for outcome in ("refused", "converted"):
        assert outcomes.count(outcome) >= CASES[kind] // 20
    damages = {damage for each in results for damage in each.damages}
    assert damages >= {damage.__name__ for damage in fuzzing.DAMAGES[kind]}
