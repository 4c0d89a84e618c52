"""A run in a folder: from text to a model, and on again."""

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
import yaml

import keras_bwetaf
from converters.files import read_json
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.training import Monitor, run
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


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """As on a laptop."""
    with mock.patch.object(jax, "device_count", return_value=1):
        yield


class Interrupted(Monitor):
    """Ends a training before some step."""

    def __init__(self, *args, before, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_left = before

    def on_train_batch_begin(self, batch, logs=None):
        if not self.num_left:
            raise KeyboardInterrupt
        self.num_left -= 1
        super().on_train_batch_begin(batch, logs)


def interrupt(folder, before, **settings):
    """Begins a run that is interrupted before some step, from 0."""

    def monitor(*args, **kwargs):
        return Interrupted(*args, before=before, **kwargs)

    with (
        mock.patch.object(run, "Monitor", monitor),
        pytest.raises(KeyboardInterrupt),
    ):
        keras_bwetaf.train(folder, **settings)


def assert_same_weights(ours, theirs):
    for our, their in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(our, their)


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
    assert_same_weights(lm, loaded)
    assert loaded.backbone.rope_dtype == "float32"  # It imitates no rounding.
    tokenizer = loaded.preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == 300
    load_packed(  # of this tokenizer
        folder / "packed", sequence_length=32, batch_size=4, tokenizer=tokenizer
    )


def test_goes_on_without_settings(trained, settings):
    folder, lm = trained
    assert_same_weights(lm, keras_bwetaf.train(folder))
    with pytest.raises(ValueError, match="\nsteps: 6 in the run"):
        keras_bwetaf.train(folder, **{**settings, "steps": 7})


def test_goes_on_after_an_interruption(tmp_path, corpus, settings, trained):
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus, own)
    folder = tmp_path / "run"
    interrupt(folder, 5, **{**settings, "data": str(own), "save_every": 2})
    own.unlink()  # Its tokens are packed.
    assert_same_weights(keras_bwetaf.train(folder, save_every=1), trained[1])


def test_goes_on_from_the_checkpoint_before(tmp_path, trained):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (last,) = (folder / "checkpoints").glob("6")
    for path in last.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match='on_damage="previous"'):
        keras_bwetaf.train(folder)
    with pytest.warns(UserWarning, match="checkpoints/6"):
        lm = keras_bwetaf.train(folder, on_damage="previous")
    assert_same_weights(lm, trained[1])


def test_other_settings_before_the_first_checkpoint(tmp_path, settings):
    folder = tmp_path / "run"
    interrupt(folder, 1, **settings)
    other = {**settings, "batch_size": 2, "steps": 2, "validate_every": 2}
    lm = keras_bwetaf.train(folder, **{**other, "recipe": {"name": "small"}})
    assert int(lm.optimizer.iterations) == 2
    assert lm.optimizer._learning_rate.initial_learning_rate == 0
    assert "batch_size: 2\n" in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_several_devices_share_a_batch(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    settings = {**settings, "steps": 1, "validate_every": 1, "batch_size": 8}
    lm = keras_bwetaf.train(tmp_path / "run", **settings)
    weight = lm.weights[0].value
    assert weight.sharding.is_fully_replicated
    assert len(weight.sharding.device_set) == 8


def test_too_little_to_validate(trained, settings):
    options = {"sequence_length": 10**6}
    with pytest.warns(UserWarning, match="fewer tokens.*: [0-9]+ tokens"):
        validation = run._validation(
            trained[0] / "packed", TrainingSettings(**settings), options
        )
    assert validation == {}


def test_steps_that_hardly_divide():
    assert run._epochs(TrainingSettings(data="a", steps=10_000)) == 20
    with pytest.warns(UserWarning, match="into 1 equal parts.*steps=1009"):
        assert run._epochs(TrainingSettings(data="a", steps=1009)) == 1


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
        ({"data": ["a.txt", "b.txt"]}, "data: a list has stages"),
        ({"keep_last": 0}, "`keep_last` must be an int"),
        ({"batch_size": 0}, "`batch_size` must be an int"),
        ({"recipe": {"name": "large"}}, "recipes for.*name='large'"),
        ({"recipe": {"warmup": "0.1"}}, "a number.*warmup='0.1' of type str"),
        ({"text_column": "tale"}, "expected a column 'tale'"),
        ({"sequence_length": 10**6}, "at least `sequence_length` tokens"),
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
