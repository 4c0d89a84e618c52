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
from keras_bwetaf import hardware
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.recommendation import SPARE, estimated_memory
from keras_bwetaf.run import folder as run_folder
from keras_bwetaf.run import runner
from keras_bwetaf.run.settings import TrainingSettings
from keras_bwetaf.training import Monitor, TrainingCheckpoint
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
        mock.patch.object(runner, "Monitor", monitor),
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
    best = read_json(folder / "result.json")["models"]["model"]["val_loss"]
    evaluation = stats["evaluation"]
    assert evaluation["loss"] == pytest.approx(best, rel=1e-4)
    assert evaluation["bits_per_byte"] > 0
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
        keras_bwetaf.train(folder, **{**settings, "steps": 3})
    with pytest.raises(ValueError, match="\nbatch_size: 4 in the run"):
        keras_bwetaf.train(folder, steps=9, batch_size=2)


@pytest.mark.slow
def test_goes_on_after_an_interruption(tmp_path, corpus, settings, trained):
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus, own)
    folder = tmp_path / "run"
    interrupt(folder, 5, **{**settings, "data": str(own), "save_every": 2})
    own.unlink()  # Its tokens are packed.
    assert_same_weights(keras_bwetaf.train(folder, save_every=1), trained[1])


def test_goes_on_from_the_checkpoint_before(tmp_path, trained):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / "result.json").unlink()  # Killed while it saved the model.
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


def test_a_finished_run_says_so_at_once(trained, capsys, monkeypatch):
    folder, lm = trained
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(runner, "_train", lambda *_: pytest.fail("it trains"))
    assert_same_weights(lm, keras_bwetaf.train("run"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (losses,) = read_json(folder / "stats.json")["val_loss"]
    best = 3 * (1 + int(np.argmin(losses)))
    assert lines == [
        "Finished: 6 steps.",
        "  run/model",
        f"    the best: step {best}, validation loss {min(losses):.4f}",
        "  run/model-last",
        f"    the last: step 6, validation loss {losses[-1]:.4f}",
        "Try it:",
        "  keras-bwetaf generate --preset run 'Once upon a time'",
        "Train on:",
        "  keras-bwetaf train run --steps 12",
    ]
    settings = run_folder.kept(folder)
    assert run_folder.finished(folder, settings)
    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "MODEL", "removed")
        assert run_folder.finished(folder, settings) is None


@pytest.fixture(scope="module")
def worsened(tmp_path_factory, settings):
    """The folder of a run whose last model is not the best."""
    folder = tmp_path_factory.mktemp("runs") / "worsened"
    rising = {"initial_learning_rate": 1e-3, "peak_learning_rate": 0.3}
    keras_bwetaf.train(
        folder,
        **{**settings, "recipe": {**rising, "warmup": 0.9}},
        sample=["the light"],
    )
    return folder


def saved_weights(folder, step):
    lm = keras_bwetaf.from_preset(folder / "model")
    checkpoint = TrainingCheckpoint(folder / "checkpoints", save_every=1)
    checkpoint.restore(lm, step)
    return lm


def test_keeps_the_best_model_and_the_last(worsened):
    (losses,) = read_json(worsened / "stats.json")["val_loss"]
    assert losses[0] < losses[1]
    for name, step in (("model", 3), ("model-last", 6)):
        lm = keras_bwetaf.from_preset(worsened / name)
        assert_same_weights(lm, saved_weights(worsened, step))
    assert read_json(worsened / "result.json")["models"] == {
        "model": {"step": 3, "val_loss": pytest.approx(losses[0])},
        "model-last": {"step": 6, "val_loss": pytest.approx(losses[1])},
    }


def test_a_run_is_a_preset(worsened, tmp_path):
    lm = keras_bwetaf.from_preset(worsened)
    assert_same_weights(lm, keras_bwetaf.from_preset(worsened / "model"))
    tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset(str(worsened))
    assert tokenizer.vocabulary_size() == 300
    shutil.copy(worsened / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="no model yet.*keras-bwetaf train"):
        keras_bwetaf.from_preset(tmp_path)


def test_samples_of_a_run(worsened):
    (samples,) = read_json(worsened / "stats.json")["samples"]
    assert [sample["step"] for sample in samples] == [3, 6]
    for sample in samples:
        assert sample["prompt"] == "the light"
        assert sample["text"].startswith("the light")


@pytest.mark.slow
def test_more_steps_go_on(worsened, tmp_path, capsys):
    folder = shutil.copytree(worsened, tmp_path / "run")
    lm = keras_bwetaf.train(folder, steps=9)
    output = capsys.readouterr().out
    assert "Going on after step 6 of 9.\nCompiling" in output
    assert "the last: step 9" in output
    stats, before = (
        read_json(each / "stats.json") for each in (folder, worsened)
    )
    assert stats["loss"][0][:6] == before["loss"][0]
    assert stats["val_step"] == [[3, 6, 9]]
    schedule = lm.optimizer._learning_rate  # Of a run of nine steps.
    for step in (6, 7, 8):
        received = stats["learning_rate"][0][step]
        assert received == pytest.approx(float(schedule(step)), rel=1e-6)
    assert "validate_every: 3\n" in (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match="of `validate_every`, such as 9 or"):
        keras_bwetaf.train(folder, steps=10)


def test_more_steps_are_evaluated_as_often(tmp_path):
    """Although a new run of as many would be after others."""
    settings = TrainingSettings(data="a.txt", steps=40)
    run_folder.keep(tmp_path, settings)
    assert run_folder.resolve(tmp_path, {"steps": 50}).epochs == 10
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    extended = run_folder.resolve(tmp_path, {"steps": 50})
    assert (extended.validate_every, extended.epochs) == (2, 25)


def test_says_how_to_go_on(tmp_path, settings, capsys):
    folder = tmp_path / "a run"
    interrupt(folder, 1, **settings)
    output = capsys.readouterr().out
    assert output.endswith(
        f"\nStopped. No step is saved yet. To go on:\n"
        f"  keras-bwetaf train '{folder}'\n"
    )
    (folder / "checkpoints" / "1200").mkdir(parents=True)
    (folder / "checkpoints" / "1300.orbax-checkpoint-tmp").mkdir()
    assert "Step 1,200 is saved." in run_folder.how_to_go_on(folder)
    assert "same command" in run_folder.how_to_go_on(tmp_path / "new")


@pytest.mark.slow
def test_several_devices_share_a_batch(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    settings = {**settings, "steps": 1, "validate_every": 1}
    settings["batch_size"] = None  # 16 on a CPU.
    lm = keras_bwetaf.train(tmp_path / "run", **settings)
    assert "batch_size: 16\n" in (tmp_path / "run/config.yaml").read_text()
    weight = lm.weights[0].value
    assert weight.sharding.is_fully_replicated
    assert len(weight.sharding.device_set) == 8


def test_too_little_to_validate(trained, settings):
    options = {"sequence_length": 10**6}
    with pytest.warns(UserWarning, match="fewer tokens.*: [0-9]+ tokens"):
        validation = runner._validation(
            trained[0] / "packed", TrainingSettings(**settings), options
        )
    assert validation == {}


def test_steps_that_hardly_divide():
    assert runner._epochs(TrainingSettings(data="a", steps=10_000)) == 20
    with pytest.warns(UserWarning, match="into 1 equal parts.*steps=1009"):
        assert runner._epochs(TrainingSettings(data="a", steps=1009)) == 1


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
        ({"text_column": "tale"}, "expected one column 'tale'"),
        ({"sequence_length": 10**6}, "at least `sequence_length` tokens"),
    ],
)
def test_wrong_settings(tmp_path, settings, changes, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        keras_bwetaf.train(tmp_path / "run", **{**settings, **changes})
    assert not (tmp_path / "run" / "config.yaml").exists()  # Not begun.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"recipe": {"learning_rate": 1e-3}}, "learning_rate"),
        ({"recipe": {"peak_lr": 1e-3}}, "peak_lr"),
        ({"recipe": {"peak_learning_rate": "1e-3"}}, "must be a number"),
        ({"recipe": {"warmup": 2}}, "share of the steps"),
        ({"model": {"layers": 2}}, r"layers \(did you mean num_layers\?"),
        ({"model": {"num_layers": "2"}}, "`num_layers` must be a positive"),
        ({"model": {"dropout": "0.1"}}, "`dropout` is the share"),
        ({"model": {"num_query_heads": 3}}, "must divide `hidden_dim`"),
        ({"model": MODEL, "vocabulary_size": None}, "does not fit the weights"),
        ({"preset": "tinny"}, "Unknown preset"),
        ({"batch_size": 0}, "`batch_size` must be an int of at least 1"),
        ({"gradient_accumulation_steps": 3}, "a multiple of `gradient_acc"),
        ({"sequence_length": 1}, "`sequence_length` must be an int"),
        ({"vocabulary_size": 200}, "`vocabulary_size` must be an int of"),
        ({"dtype": "fp16"}, "`dtype` must be one of float32, bfloat16"),
        ({"remat": "most"}, "`remat` must be one of none, attention"),
        ({"validation_fraction": 1.5}, "`validation_fraction` must be at"),
        ({"validation_batches": 0}, "`validation_batches` must be an int"),
        ({"validate_every": 4}, "multiple of `validate_every`, such as 4 or 8"),
        ({"errors": "ignore"}, "`errors` must be one of strict, replace"),
        ({"on_damage": "skip"}, "`on_damage` must be one of raise, previous"),
        ({"lora_rank": 0}, "`lora_rank` must be an int of at least 1"),
        ({"sample": ["a", ""]}, "`sample` must hold texts"),
        ({"seed": 2**32}, "`seed` must be below"),
        ({"steps": 0}, "`steps` must be an int of at least 1"),
    ],
)
def test_settings_are_checked_first(tmp_path, settings, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        keras_bwetaf.train(tmp_path / "run", **{**settings, **changes})
    assert not (tmp_path / "run").exists()


def test_default_batch_size(settings, monkeypatch):
    """As recommended where the device is known, and kept in the folder."""
    settings = {k: v for k, v in settings.items() if k != "batch_size"}
    config = runner._config(TrainingSettings(**settings))

    def chosen(**changes):
        wanted = TrainingSettings(**{**settings, **changes})
        return runner._with_batch_size(wanted, config)

    assert chosen().batch_size == 16
    with pytest.raises(ValueError, match="batch_size=16, .*steps=3"):
        chosen(gradient_accumulation_steps=3)

    cpu = hardware.Device("cpu", 1, 1, 1, 1)
    state, row = estimated_memory(config, "float32", 32, cpu, "none", 1)
    cpu = cpu._replace(memory=(state + 9 * row) / (1 - SPARE))
    monkeypatch.setattr(hardware, "DEVICES", [cpu])
    found = chosen()
    assert found.batch_size == 32
    assert found.gradient_accumulation_steps == 4  # Of 8 rows.
    given = {"gradient_accumulation_steps": 8, "remat": "block"}
    assert chosen(**given) == TrainingSettings(
        **settings, **given, batch_size=32
    )
    given = {"batch_size": 3}
    assert chosen(**given) == TrainingSettings(**settings, **given)


def test_rows_divide_among_devices(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="a multiple of 8.*batch_size=4"):
        keras_bwetaf.train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_corrected_command_goes_on(tmp_path, settings):
    """With the tokenizer and tokens that are there, if they are of use."""
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="at least `sequence_length` tokens"):
        keras_bwetaf.train(folder, **{**settings, "sequence_length": 10**6})

    def made():
        paths = [folder / "tokenizer.json", *(folder / "packed").glob("*.bin")]
        return {path.name: path.stat().st_mtime_ns for path in paths}

    def prepare(**changes):
        wanted = TrainingSettings(**{**settings, **changes})
        return runner._tokenizer_and_data(folder, wanted)

    before = made()
    prepare(batch_size=2)
    assert made() == before
    tokenizer, data = prepare(vocabulary_size=320)
    assert tokenizer.vocabulary_size() == 320
    load_packed(data, sequence_length=32, batch_size=4, tokenizer=tokenizer)
    tokens = made()
    assert not tokens.items() & before.items()
    prepare(vocabulary_size=320, validation_fraction=0.0)
    assert not (folder / "packed" / "validation-00000.bin").exists()


@pytest.mark.parametrize("name", ["input.txt", "input.md"])
def test_the_end_of_one_file_is_held_out(tmp_path, name):
    path = tmp_path / name
    text = "Some words, and more of them. " * 200
    path.write_text(text)
    settings = TrainingSettings(data=str(path), steps=1, preset="tiny")
    tokenizer, data = runner._tokenizer_and_data(tmp_path / "run", settings)
    parts = [
        tokenizer.detokenize(np.fromfile(data / f"{split}-00000.bin", "<u2"))
        for split in ("train", "validation")
    ]
    parts = [part.removesuffix("<|EOS|>") for part in parts]
    assert "".join(parts) == text
    assert len(parts[1]) / len(text) == pytest.approx(0.1, abs=0.01)
    options = {"sequence_length": 32, "batch_size": 4, "tokenizer": tokenizer}
    assert runner._validation(data, settings, options)["validation_steps"] > 0


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
