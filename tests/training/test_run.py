"""A run in a folder: from text to a model, and on again."""

import json

import numpy as np
import pytest
import yaml

import keras_bwetaf
from converters.files import read_json
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.training.settings import TrainingSettings
from tests.data.conftest import make_documents

MODEL = {
    "num_layers": 1,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "max_sequence_length": 32,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as lines:
        for text in make_documents(200):
            print(json.dumps({"story": text}), file=lines)
    return path


@pytest.fixture(scope="module")
def settings(corpus):
    return {
        "data": str(corpus),
        "text_column": "story",
        "preset": "tiny",
        "model": MODEL,
        "vocabulary_size": 300,
        "steps": 6,
        "batch_size": 4,
        "validate_every": 3,
        "validation_fraction": 0.2,
        "recipe": {"warmup": 0.5},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings):
    """The folder of a run, and its model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, keras_bwetaf.train(folder, **settings)


def test_from_text_to_a_model(trained, settings):
    folder, lm = trained
    saved = TrainingSettings(
        **yaml.safe_load((folder / "config.yaml").read_text())
    )
    assert saved == TrainingSettings(**settings)
    assert lm.optimizer._learning_rate.warmup_steps == 3
    assert int(lm.optimizer.iterations) == 6
    stats = read_json(folder / "stats.json")
    (losses,), (validation,) = stats["loss"], stats["val_loss"]
    assert len(losses) == 6 and validation[-1] < 6
    assert (folder / "losses.png").stat().st_size > 10_000
    loaded = keras_bwetaf.from_preset(folder / "model")
    for ours, theirs in zip(lm.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tokenizer = loaded.preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == 300
    load_packed(  # of this tokenizer
        folder / "packed", sequence_length=32, batch_size=4, tokenizer=tokenizer
    )


def test_goes_on_without_settings(trained, settings):
    folder, lm = trained
    again = keras_bwetaf.train(folder)
    for ours, theirs in zip(lm.weights, again.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="\nsteps: 6 in the run"):
        keras_bwetaf.train(folder, **{**settings, "steps": 7})


def test_fine_tuning_with_lora(tmp_path, corpus):
    folder = tmp_path / "run"
    lm = keras_bwetaf.train(
        folder,
        data=str(corpus),
        text_column="story",
        preset="tiny",
        lora_rank=2,
        sequence_length=32,
        steps=2,
        batch_size=2,
        validation_fraction=0,
    )
    base = keras_bwetaf.from_preset("tiny")
    changed = [
        weight.path
        for weight, old in zip(lm.weights, base.weights, strict=True)
        if not np.array_equal(weight, old)
    ]
    assert changed and all("attention" in path for path in changed)
    assert read_json(folder / "stats.json")["val_loss"] == [[]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "nothing.txt"}, "Expected a file"),
        ({"steps": None}, "steps: expected int"),
        ({"validate_every": 4}, "multiple of `validate_every`.*steps=6"),
        ({"preset": "huge"}, "Unknown preset"),
        ({"data": "rows.npy"}, "tokenizer on text.*data='rows.npy'"),
        ({"sizes": 3}, "unexpected keyword argument 'sizes'"),
    ],
)
def test_wrong_settings(tmp_path, settings, changes, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        keras_bwetaf.train(tmp_path / "run", **{**settings, **changes})
    assert not (tmp_path / "run" / "config.yaml").exists()  # Not begun.


def test_missing_settings(tmp_path):
    with pytest.raises(ValueError, match=r"needs.*Received: \['data'\]"):
        keras_bwetaf.train(tmp_path, data="corpus.txt")


@pytest.mark.parametrize("kind", ["mixture", "stages"])
def test_packed_data(tmp_path, kind, settings):
    tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset("tiny")
    folders = [str(tmp_path / name) for name in ("first", "then")]
    for number, folder in enumerate(folders):
        texts = make_documents(50, seed=number)
        pack(texts, folder, tokenizer, validation_fraction=0.3)
    data = {
        "mixture": dict.fromkeys(folders, 0.5),
        "stages": [[folders[0], 4], [folders[1]]],
    }[kind]
    settings = {**settings, "data": data, "from_scratch": True, "steps": 3}
    settings = {**settings, "validate_every": 3, "vocabulary_size": None}
    keras_bwetaf.train(tmp_path / "run", **settings)
    stats = read_json(tmp_path / "run" / "stats.json")
    assert len(stats["val_loss"][0]) == 1
