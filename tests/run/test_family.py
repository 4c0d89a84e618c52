"""A run in a folder, of a model of each generation."""

import json

import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import BwETAFV2CausalLM, BwETAFV4CausalLM
from keras_bwetaf.training import recipe
from tests.data.conftest import make_documents
from tests.run.test_run import assert_same_weights, interrupt, one_device

__all__ = ["one_device"]  # A fixture.

MODELS = {
    "v2-53m": (
        BwETAFV2CausalLM,
        {
            "num_layers": 1,
            "num_query_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "max_sequence_length": 32,
        },
    ),
    "v4-preview": (
        BwETAFV4CausalLM,
        {
            "num_layers": 1,
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "num_experts": 4,
            "max_sequence_length": 32,
            "router_noise_steps": 4,
        },
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as lines:
        for text in make_documents(200):
            print(json.dumps({"text": text}), file=lines)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("preset", MODELS)
def test_text_to_model(preset, corpus, tmp_path):
    """With a tokenizer of its own; interrupted, it ends as if it were not."""
    cls, model = MODELS[preset]
    settings = dict(
        data=str(corpus),
        preset=preset,
        steps=6,
        batch_size=8,
        vocabulary_size=300,
        model=model,
        save_every=2,
        validation_fraction=0.1,
    )
    whole = keras_bwetaf.train(tmp_path / "whole", **settings)
    assert type(whole) is cls
    interrupt(tmp_path / "halves", before=4, **settings)
    halves = keras_bwetaf.train(tmp_path / "halves", **settings)
    assert_same_weights(whole, halves)

    lm = keras_bwetaf.from_preset(tmp_path / "whole")
    assert type(lm) is cls
    assert type(lm.preprocessor.tokenizer) is cls.preprocessor_cls.tokenizer_cls
    assert lm.preprocessor.tokenizer.end_token == "<|EOS|>"
    prompt = "The night"
    text = lm.generate(prompt, max_new_tokens=8, seed=1)
    assert text.startswith(prompt)
    pieces = lm.stream(prompt, max_new_tokens=8, seed=1, tokens_per_dispatch=3)
    assert prompt + "".join(pieces) == text
    stats = json.loads((tmp_path / "whole" / "stats.json").read_text())
    assert stats["evaluation"]["bits_per_byte"] > 0


def test_recipes_are_the_cards():
    for name, peak in (("v2-53m", 1.3e-3), ("v2-130m", 5e-4)):
        optimizer = recipe(name, total_steps=1000)
        rates = [float(optimizer._learning_rate(i)) for i in range(1001)]
        np.testing.assert_allclose(max(rates), peak, rtol=1e-6)
        assert rates[-1] < 2e-7
        assert np.argmax(rates) == {"v2-53m": 40, "v2-130m": 30}[name]
