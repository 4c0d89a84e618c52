import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf.evaluation import Scorer
from tests import trained

# A context, and the lengths of its continuations.
GROUPS = [(5, (1, 2, 3)), (40, (7, 1)), (1, (2, 2, 2, 2)), (60, (5, 9))]


@pytest.fixture(scope="module")
def lm():
    return keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def groups(lm):
    rng = np.random.default_rng(0)

    def random(length):
        return rng.integers(1, lm.backbone.vocabulary_size, length).tolist()

    return [
        (random(context), [random(length) for length in lengths])
        for context, lengths in GROUPS
    ]


def expected(lm, row):
    """Losses and likeliest tokens by plain logits, in float64."""
    token_ids = np.zeros((1, -(-len(row) // 64) * 64), "int32")
    token_ids[0, : len(row)] = row
    logits = lm.predict(
        {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)},
        verbose=0,
    )
    logits = np.asarray(logits[0, : len(row) - 1], "float64")
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, np.array([row[1:]]).T, 1)[:, 0], (
        np.argmax(logits, axis=-1) == row[1:]
    )


@pytest.mark.fast
def test_rows_are_scored_as_by_logits(lm, groups):
    rows = [[*context, *tokens[0]] for context, tokens in groups]
    scores = Scorer(lm, batch_size=3).rows(rows)
    for row, (losses, is_greedy) in zip(rows, scores, strict=True):
        wanted, is_likeliest = expected(lm, row)
        np.testing.assert_allclose(losses, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(is_greedy, is_likeliest)


@pytest.mark.parametrize(
    "quantized", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_continuations_are_scored_as_alone(groups, quantized):
    lm = keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")
    if quantized:
        lm.quantize("int8")
    scorer = Scorer(lm, batch_size=3)
    rows = [[*context, *tokens] for context, each in groups for tokens in each]
    alone = iter(scorer.rows(rows))
    scores = scorer.continuations(groups)
    for (_, continuations), of_group in zip(groups, scores, strict=True):
        for tokens, received in zip(continuations, of_group, strict=True):
            end = slice(-len(tokens), None)
            losses, is_greedy = next(alone)
            np.testing.assert_allclose(
                received[0], losses[end], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_array_equal(received[1], is_greedy[end])


def test_a_greedy_continuation_is_known_as_one(lm, monkeypatch):
    prompt = lm.preprocessor.tokenizer("Once upon a time")
    monkeypatch.setattr(lm, "preprocessor", None)  # Token ids, not text.
    made = lm.generate(
        {"token_ids": [prompt], "padding_mask": [[1] * len(prompt)]},
        max_new_tokens=20,
        temperature=0,
        stop_token_ids=None,
        strip_prompt=True,
    )
    text = made["token_ids"][0, :20].tolist()
    other = [text[0], (text[1] + 1) % lm.backbone.vocabulary_size]
    (group,) = Scorer(lm).continuations([(list(prompt), [text, other])])
    assert group[0][1].all()
    assert group[1][1].tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fully sharded", "model"])
def test_several_devices_score_as_one(lm, groups, name):
    rows = [[*context, *tokens[0]] for context, tokens in groups]

    def scores(lm):
        scorer = Scorer(lm, batch_size=3)
        of_groups = scorer.continuations(groups)
        return [losses for losses, _ in scorer.rows(rows)] + [
            losses for group in of_groups for losses, _ in group
        ]

    distribution = {
        "data": keras_bwetaf.distribution.data_parallel,
        "fully sharded": keras_bwetaf.distribution.fully_sharded,
        "model": lambda: keras_bwetaf.distribution.model_parallel(2),
    }[name]()
    assert distribution.device_mesh.devices.size == 8
    expected = scores(lm)
    with distribution.scope():
        sharded = keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")
        received = scores(sharded)
    for a, b in zip(received, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
