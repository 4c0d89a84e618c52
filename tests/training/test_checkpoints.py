"""A training that was interrupted goes on as if it had not been."""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import keras
import numpy as np
import orbax.checkpoint
import pytest

from keras_bwetaf.data import track
from keras_bwetaf.data.tracked_batches import KEPT, TrackedBatches
from keras_bwetaf.training import Monitor, TrainingCheckpoint, recipe
from keras_bwetaf.training.checkpoint_store import CheckpointStore
from tests.training.resumable import (
    BATCH,
    EPOCHS,
    SAVE_EVERY,
    STEPS_PER_EPOCH,
    Steps,
    build_lm,
    make_lm,
    read_rows,
    state,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    # When it fails to read an array, Orbax leaves those of the others.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def what_orbax_leaves():
    """Is collected here, where its warnings are ignored."""
    yield
    gc.collect()


class Recorder(keras.callbacks.Callback):
    """What callbacks are told, and the state after each step."""

    def __init__(self, with_states=False):
        super().__init__()
        self.with_states = with_states
        self.events, self.states = [], {}

    def on_train_begin(self, logs=None):
        self.events.append("begin")

    def on_train_end(self, logs=None):
        self.events.append("end")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        step = self.epoch * STEPS_PER_EPOCH + batch + 1
        self.events.append(step)
        if self.with_states:
            self.states[step] = state(self.model)


class After(keras.callbacks.Callback):
    """Calls a function of the model after a step of this `fit`."""

    def __init__(self, step, function):
        super().__init__()
        self.step, self.function = step, function

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            self.function(self.model)


def stop(model):
    model.stop_training = True


def fit(lm, folder, *callbacks, data=None, validate=True, **arguments):
    """Trains as `resumable.main` does."""
    options = {"save_every": SAVE_EVERY, "keep_last": 9}
    for name in ("keep_last", "keep_best", "monitor", "mode", "on_damage"):
        if name in arguments:
            options[name] = arguments.pop(name)
    if validate:
        arguments["validation_data"] = read_rows(
            folder / "rows.npy", shuffle=False
        )
        arguments["validation_steps"] = 2
    return lm.fit(
        data or read_rows(folder / "rows.npy", seed=3),
        callbacks=[
            TrainingCheckpoint(folder / "checkpoints", **options),
            *callbacks,
        ],
        **{
            "steps_per_epoch": STEPS_PER_EPOCH,
            "epochs": EPOCHS,
            "verbose": 0,
            **arguments,
        },
    )


def clear(lm):
    for variable in lm.variables + lm.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    different = [
        name
        for name in expected
        if received[name].tobytes() != expected[name].tobytes()
    ]
    assert not different


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def lines(folder):
    """The last line of each step, in order."""
    text = (folder / "steps.txt").read_text().splitlines()
    return {int(line.split()[0]): line for line in text}


@pytest.fixture(scope="module")
def shared_lm():
    lm = make_lm()
    lm.optimizer.build(lm.trainable_variables)
    return lm


@pytest.fixture(scope="module")
def initial(shared_lm):
    variables = shared_lm.variables + shared_lm.optimizer.variables
    return [np.array(variable.value) for variable in variables]


def reset(lm, initial):
    variables = lm.variables + lm.optimizer.variables
    for variable, value in zip(variables, initial, strict=True):
        variable.assign(value)


@pytest.fixture
def lm(shared_lm, initial):
    """As new; its functions are compiled once."""
    reset(shared_lm, initial)
    return shared_lm


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "rows.npy")
    return tmp_path


@pytest.fixture(scope="module")
def whole(shared_lm, initial, tmp_path_factory):
    """The folder and the record of a training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.npy")
    record = Recorder(with_states=True)
    reset(shared_lm, initial)
    record.history = fit(shared_lm, folder, Steps(folder / "steps.txt"), record)
    record.folder = folder
    return record


@pytest.fixture
def copied(whole, tmp_path):
    """A folder whose latest checkpoint may be damaged."""
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


def restore(lm, folder, step="latest", include_optimizer=True, **options):
    checkpoint = TrainingCheckpoint(
        folder / "checkpoints", save_every=SAVE_EVERY, **options
    )
    return checkpoint.restore(lm, step, include_optimizer)


# === Interruptions ===


def run_script(folder, **arguments):
    command = [sys.executable, "-m", "tests.training.resumable", folder]
    return subprocess.run(
        [*command, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_processes_that_get_signals(whole, folder, lm):
    killed = random.randint(SAVE_EVERY + 3, 11)
    stopped = random.randint(13, NUM_STEPS - 1)
    print(f"SIGKILL after step {killed}, SIGTERM after step {stopped}")
    expected = lines(whole.folder)

    process = run_script(folder, signal=signal.SIGKILL, step=killed)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert lines(folder) == {n: expected[n] for n in range(1, killed + 1)}

    process = run_script(folder, signal=signal.SIGTERM, step=stopped)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "going on after step" in process.stdout
    assert lines(folder) == {n: expected[n] for n in range(1, stopped + 1)}
    assert restore(lm, folder)["step"] == stopped
    assert_same(state(lm), whole.states[stopped])

    damage_arrays(folder / "checkpoints" / str(stopped) / "weights")
    process = run_script(folder, on_damage="previous")
    assert process.returncode == 0, process.stderr
    assert f"{stopped}: the checkpoint is damaged" in process.stderr
    assert lines(folder) == expected
    history = json.loads((folder / "history.json").read_text())
    assert history == {"epoch": [0, 1, 2], **whole.history.history}
    final = dict(np.load(folder / "final.npz"))
    assert_same(final, whole.states[NUM_STEPS])


@pytest.mark.fast
def test_goes_on_within_an_epoch(whole, folder, lm):
    log = folder / "steps.txt"
    fit(lm, folder, After(9, stop), Steps(log))
    assert names(folder) == ["4", "6", "8", "9"]
    first_lines = lines(folder)
    record = Recorder()
    clear(lm)
    history = fit(lm, folder, record, Steps(log))
    assert record.events == ["begin", *range(10, NUM_STEPS + 1), "end"]
    assert lines(folder) == lines(whole.folder)
    assert first_lines == {n: lines(whole.folder)[n] for n in range(1, 10)}
    assert history.epoch == [0, 1, 2]
    assert history.history == whole.history.history
    assert lm.history is history
    assert_same(state(lm), whole.states[NUM_STEPS])


def test_stops_in_the_rest_of_an_epoch(folder, lm):
    fit(lm, folder, After(3, stop))
    record = Recorder()
    history = fit(lm, folder, After(2, stop), record)
    assert record.events == ["begin", 4, 5, "end"]
    assert history.epoch == [0]
    assert names(folder) == ["3", "4", "5"]


def test_a_finished_training_returns_at_once(whole, copied, lm, capsys):
    record = Recorder()
    history = fit(lm, copied, record, verbose=2)
    assert record.events == []
    assert "after step 18, with 3 of 3 epochs complete" in (
        capsys.readouterr().out
    )
    assert history.history == whole.history.history
    assert lm.history is history
    assert_same(state(lm), whole.states[NUM_STEPS])


def test_that_nothing_is_left_is_said(copied, lm, capsys):
    fit(lm, copied)
    assert capsys.readouterr().out == (
        f"{copied / 'checkpoints'}: nothing is left to train after step 18, "
        "with 3 of 3 epochs complete. To go on, pass a larger `epochs`; to "
        "begin anew, another folder.\n"
    )
    fit(lm, copied, epochs=4)
    assert not capsys.readouterr().out


def test_more_epochs_go_on(copied, lm):
    record = Recorder()
    history = fit(lm, copied, record, epochs=EPOCHS + 1)
    assert record.events == ["begin", *range(19, 25), "end"]
    assert history.epoch == [0, 1, 2, 3]


def test_sigterm_handlers(folder, lm):
    """Ours saves, calls the one before, and leaves."""
    received = []

    def handler(signum, frame):
        received.append(signum)

    def terminate(model):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit) as exit:
            fit(lm, folder, After(3, terminate))
        assert exit.value.code == 143
        assert received == [signal.SIGTERM] and names(folder) == ["3"]
        assert signal.getsignal(signal.SIGTERM) is handler
        # After the last step of an epoch, it is saved with the epoch's logs.
        with pytest.raises(SystemExit):
            fit(lm, folder, After(3, terminate))
        assert names(folder) == ["3", "4", "6"]
        assert "val_loss" in restore(lm, folder)["logs"]
        assert len(received) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt(model):
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c(whole, folder, lm, capsys):
    """Saves the step, and is then what it is without the callback."""
    before = signal.getsignal(signal.SIGINT)
    for step in (3, 3, 8):  # Also the last of an epoch, and in another one.
        with pytest.raises(KeyboardInterrupt):
            fit(lm, folder, After(step, interrupt))
        assert signal.getsignal(signal.SIGINT) is before
        assert capsys.readouterr().err.startswith("\nCtrl-C: stopping once")
    assert names(folder) == ["12", "14", "3", "4", "6", "8"]
    assert "val_loss" in restore(lm, folder, 6)["logs"]
    clear(lm)
    history = fit(lm, folder)
    assert history.history == whole.history.history
    assert_same(state(lm), whole.states[NUM_STEPS])


def test_a_second_ctrl_c_stops_at_once(folder, lm):
    def interrupt_twice(model):
        interrupt(model)
        interrupt(model)
        pytest.fail("it goes on")

    with pytest.raises(KeyboardInterrupt):
        fit(lm, folder, After(3, interrupt_twice))
    assert names(folder) == []


def test_ctrl_c_before_the_first_step(copied, lm):
    """Nothing is compiled for a step."""

    class Impatient(keras.callbacks.Callback):
        def set_state(self, state):
            if not state["is_told"]:
                interrupt(None)
            state["is_told"] = True

        def get_state(self):
            return {"is_told": False}

    record = Recorder()
    shutil.rmtree(copied / "checkpoints" / "18")
    fit(lm, copied, After(1, stop), Impatient(), epochs=3)
    with pytest.raises(KeyboardInterrupt):
        fit(lm, copied, Impatient(), record, epochs=4)
    assert record.events == ["begin"]


def test_handlers_of_ctrl_c(folder, lm):
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(1))
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(lm, folder, After(2, interrupt))
        assert received == [1] and names(folder) == ["2"]
        # As a shell starts what runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        fit(lm, folder, After(2, interrupt), epochs=1)
        assert names(folder) == ["2", "4", "6"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread(folder, lm):
    before = signal.getsignal(signal.SIGTERM)
    handlers = []

    def look(model):
        handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(
        target=fit, args=(lm, folder, After(2, look)), kwargs={"epochs": 1}
    )
    thread.start()
    thread.join()
    assert handlers == [before]
    assert names(folder) == ["4", "6"]


# === What is stored ===


@pytest.mark.fast
def test_stores_the_state_of_its_step(whole, copied, lm):
    """Although training went on with the same buffers meanwhile."""
    for step in (4, 6, 8, 12, 16, 18):
        run = restore(lm, copied, step)
        assert_same(state(lm), whole.states[step])
        assert run["step"] == step and run["epoch"] == step // STEPS_PER_EPOCH
        expected = {
            name: values[run["epoch"] - 1]
            for name, values in whole.history.history.items()
        }
        assert run["logs"] == (None if step % STEPS_PER_EPOCH else expected)


def test_restores_weights_into_another_model(whole, copied, lm):
    other = build_lm()
    losses = whole.history.history["val_loss"]
    best = STEPS_PER_EPOCH * (1 + int(np.argmin(losses)))
    assert restore(other, copied, "best", False)["step"] == best
    received = [np.array(v.value) for v in other.trainable_variables]
    restore(lm, copied, best)
    for array, variable in zip(received, lm.trainable_variables, strict=True):
        np.testing.assert_array_equal(array, variable.value)
        assert array.any() or "bias" in variable.path


@pytest.mark.fast
def test_keeps_the_last_and_the_best(folder, lm):
    class Score(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            logs["score"] = [1.0, 3.0, float("nan"), 2.0][epoch]

    options = {"monitor": "score", "mode": "max", "keep_last": 2}
    fit(lm, folder, Score(), validate=False, epochs=3, **options)
    assert names(folder) == ["12", "16", "18"]
    fit(lm, folder, Score(), validate=False, epochs=4, **options)
    assert names(folder) == ["12", "20", "24"]
    assert restore(lm, folder, "best", monitor="score", mode="max") == {
        "step": 12,
        "epoch": 2,
        "logs": {
            **restore(lm, folder, 12)["logs"],
            "score": 3.0,
        },
    }


def test_warns_without_what_is_monitored(folder, lm):
    with pytest.warns(UserWarning, match="without 'val_los' in the logs"):
        fit(lm, folder, monitor="val_los", epochs=1)


def test_never_saves_what_is_not_finite(folder, lm):
    def spoil(model):
        variable = model.trainable_variables[3]
        value = np.array(variable.value)
        value.flat[-1] = np.inf
        variable.assign(value)

    with pytest.warns(UserWarning, match="Step 6 is not saved, since"):
        fit(lm, folder, After(5, spoil), epochs=1)
    assert names(folder) == ["4"]


def test_a_half_checkpoint_is_none(copied, lm):
    checkpoints = copied / "checkpoints"
    (checkpoints / "18").rename(checkpoints / "18.orbax-checkpoint-tmp")
    assert restore(lm, copied)["step"] == 16
    record = Recorder()
    fit(lm, copied, record)
    assert record.events == ["begin", 17, 18, "end"]
    assert names(copied) == ["12", "16", "18", "4", "6", "8"]


@pytest.mark.slow
def test_means_of_an_epoch_that_goes_on(tmp_path):
    norms = {}
    for interruptions in ([], [After(4, stop)]):
        folder = tmp_path / f"{len(interruptions)}"
        folder.mkdir()
        write_rows(folder / "rows.npy")
        lm = make_lm()
        for callbacks in (*([each] for each in interruptions), []):
            history = fit(
                lm, folder, Monitor(), *callbacks, epochs=1, validate=False
            )
        norms[folder.name] = history.history["gradient_norm"][-1]
    assert norms["0"] == norms["1"]


# === Damage ===


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place : place + 1] = [each ^ 0x55 for each in content[place:][:1]]
    path.write_bytes(content)


def damage_arrays(item):
    """Changes all files of arrays; single bytes of one may mean nothing."""
    for path in item.rglob("d/*"):
        path.write_bytes(bytes(each ^ 0x55 for each in path.read_bytes()))


@pytest.mark.slow
def test_each_damage_is_found_or_harmless(whole, copied, lm):
    rng = random.Random(0)
    checkpoint = copied / "checkpoints" / "18"
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(paths) > 20
    found = set()

    def look(path):
        clear(lm)
        try:
            restore(lm, copied)
        except ValueError as error:
            assert "18: the checkpoint is damaged" in str(error)
            assert "The one before is 16; to go on" in str(error)
            found.add(path.parent.name)
        else:
            assert_same(state(lm), whole.states[18])

    for path in paths:
        content = path.read_bytes()
        for place in {0, rng.randrange(len(content) or 1)}:
            damage(path, place)
            look(path)
            path.write_bytes(content)
        path.write_bytes(content[: len(content) // 2])
        look(path)
        path.unlink()
        look(path)
        path.write_bytes(content)
    restore(lm, copied)
    assert {"weights", "optimizer", "run", "d"} <= found


def test_goes_on_from_the_previous_one(whole, copied, lm):
    checkpoints = copied / "checkpoints"
    damage_arrays(checkpoints / "18" / "optimizer")
    (checkpoints / "16" / "run" / "metadata").write_text('{"run": "{}"}')
    with pytest.raises(ValueError, match="18: the checkpoint is damaged"):
        fit(lm, copied)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(lm, copied, on_damage="previous")
    messages = [str(warning.message) for warning in caught]
    for step in (16, 18):
        start = f"{checkpoints / str(step)}: the checkpoint is damaged"
        assert sum(message.startswith(start) for message in messages) == 1
    assert_same(state(lm), whole.states[NUM_STEPS])
    assert restore(lm, copied)["step"] == NUM_STEPS


def test_no_checkpoint_is_intact(copied, lm):
    for path in (copied / "checkpoints").iterdir():
        shutil.rmtree(path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="4: .*There is none before it"):
            restore(lm, copied, on_damage="previous")
    assert names(copied) == ["12", "16", "18", "4", "6", "8"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")]
)
def test_a_failure_is_no_damage(copied, lm, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, "restore", fail)
    with pytest.raises(type(error)):
        fit(lm, copied, on_damage="previous")
    assert names(copied) == ["12", "16", "18", "4", "6", "8"]


def test_a_full_disk_is_one_line(folder, lm, caplog):
    """Orbax logs a traceback of each thread besides."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    fit(lm, folder, epochs=1, validate=False)
    try:
        with pytest.raises(OSError) as error:
            fit(lm, folder, After(1, fill), epochs=2, validate=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == (
        f"{folder / 'checkpoints'}: a checkpoint can't be written. Is there "
        "room on the disk? Run the training again to go on from the latest "
        "that is complete: step 6. Received: File too large"
    )
    assert not [each for each in caplog.records if each.exc_info]
    fit(lm, folder, epochs=2, validate=False)
    assert restore(lm, folder)["step"] == 12


# === What does not fit ===


def test_another_model_or_optimizer(copied):
    with pytest.raises(ValueError) as error:
        restore(make_lm(hidden_dim=8), copied)
    assert (
        "- weights/token_embedding/embeddings: saved float32 (64, 16), model "
        "has float32 (64, 8)"
    ) in str(error.value)
    differences = str(error.value).splitlines()[1:]
    assert len(differences) == 11
    assert re.fullmatch(r"- and \d+ more", differences[-1])
    lm = make_lm()
    lm.compile("sgd")
    with pytest.raises(ValueError) as error:
        restore(lm, copied)
    assert (
        "- optimizer/adam_w/iteration: saved int32 (), model has nothing"
    ) in str(error.value)


def with_recipe(**changes):
    lm = build_lm()
    lm.compile(recipe("97m", **{"total_steps": 40, **changes}))
    return lm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peak_learning_rate": 3e-3},
            "- learning_rate.peak_learning_rate: saved 0.0015, optimizer has "
            "0.003",
        ),
        ({"decay": "linear"}, "learning_rate.decay: saved 'cosine', "),
        ({"weight_decay": 0.2}, "- weight_decay: saved 0.1, optimizer has 0.2"),
        ({"global_clipnorm": None}, "- global_clipnorm: saved 7.0, "),
    ],
)
def test_another_recipe(copied, changes, message):
    """Even if nothing is left to train. The model stays as it is."""
    lm = with_recipe(**changes)
    before = state(lm)
    with pytest.raises(ValueError) as error:
        fit(lm, copied)
    first, *differences = str(error.value).splitlines()
    assert "18: the checkpoint is of an optimizer with other set" in first
    assert len(differences) == 1 and message in differences[0]
    assert_same({name: state(lm)[name] for name in before}, before)
    assert restore(lm, copied, include_optimizer=False)["step"] == 18


@pytest.mark.slow
def test_a_longer_recipe(copied):
    """With more epochs, the training is a longer one."""
    record = Recorder()
    fit(with_recipe(total_steps=80), copied, record, epochs=EPOCHS + 1)
    assert record.events == ["begin", *range(19, 25), "end"]


@pytest.mark.slow
def test_a_learning_rate_that_callbacks_change(folder):
    lm = build_lm()
    lm.compile(keras.optimizers.SGD(0.5))
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    for epochs in (1, 2):
        fit(lm, folder, halve, epochs=epochs)
    assert float(lm.optimizer.learning_rate) == 0.125
    lm = build_lm()
    lm.compile(keras.optimizers.SGD(0.5))
    fit(lm, folder, halve, epochs=3)
    assert float(lm.optimizer.learning_rate) == 0.0625
    lm.compile(keras.optimizers.SGD(0.4))
    with pytest.raises(ValueError, match="rate: saved 0.5, optimizer has 0.4"):
        fit(lm, folder, epochs=3)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version(folder, monkeypatch):
    """It tells nothing of the optimizer's settings."""
    save = CheckpointStore.save

    def save_as_before(store, model, run):
        del run["optimizer"]
        return save(store, model, run)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_as_before)
        fit(with_recipe(), folder, epochs=1, validate=False)
    lm = with_recipe(weight_decay=0.2)
    fit(lm, folder, epochs=2, validate=False)
    with pytest.raises(ValueError, match="weight_decay: saved 0.2, .* has 0.1"):
        fit(with_recipe(), folder, epochs=2, validate=False)


def test_other_metrics(folder, lm):
    fit(lm, folder, After(3, stop))
    with pytest.raises(ValueError, match="metrics only that it was saved"):
        fit(make_lm(weighted_metrics=None), folder)


@pytest.mark.parametrize(
    "arguments", [{"seed": 4}, {"batch_size": 8}, {"sequence_length": 8}]
)
def test_another_data_set(copied, lm, arguments):
    data = read_rows(copied / "rows.npy", **{"seed": 3, **arguments})
    with pytest.raises(ValueError, match="another batch 17 than the one"):
        fit(lm, copied, data=data, epochs=4)


def test_a_shorter_data_set(copied, lm):
    data = read_rows(copied / "rows.npy", seed=3, repeat=False)
    with pytest.raises(ValueError, match="at a position of another data set"):
        fit(lm, copied, data=data, epochs=4)


def test_a_data_set_that_ends(folder, lm):
    data = read_rows(folder / "rows.npy", repeat=False)
    with (
        pytest.warns(UserWarning, match="ran out of data"),
        pytest.raises(ValueError, match="ended within an epoch.*: 4 batches"),
    ):
        fit(lm, folder, data=data, validate=False)


def test_another_number_of_steps(copied, lm):
    with pytest.raises(ValueError, match="has epochs of 6 steps.*epoch=7"):
        fit(lm, copied, steps_per_epoch=7)


def test_what_fit_needs(folder, lm):
    rows = {"token_ids": np.ones((4, 16), "int32")}
    rows["padding_mask"] = rows["token_ids"]
    with pytest.raises(
        ValueError, match="needs data whose position.*can not be"
    ):
        fit(lm, folder, data=rows)
    with pytest.raises(
        ValueError, match="steps_per_epoch=None, .* can be read"
    ):
        fit(lm, folder, steps_per_epoch=None)
    other = TrainingCheckpoint(folder, save_every=1)
    with pytest.raises(ValueError, match="Expected one `TrainingCheckpoint`"):
        fit(lm, folder, other)
    with pytest.raises(ValueError, match="every step.*execution=2"):
        fit(make_lm(steps_per_execution=2), folder)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs `BwETAFCausalLM.fit`"):
        model.fit(np.ones((2, 1)), np.ones(2), callbacks=[other], verbose=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"save_every": 0}, "`save_every` must be an int of at least 1"),
        ({"keep_last": 0}, "`keep_last` must be an int of at least 1"),
        ({"keep_best": -1}, "`keep_best` must be an int of at least 0"),
        ({"mode": "auto"}, r"`mode` must be one of \('min', 'max'\)"),
        ({"on_damage": "x"}, "`on_damage` must be one of .*Received: on_d"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingCheckpoint("folder", **{"save_every": 1, **arguments})


@pytest.mark.parametrize("step", ["best", "last", 5])
def test_no_such_checkpoint(folder, lm, step):
    with pytest.raises(ValueError, match="has no such.*Received: step="):
        restore(lm, folder, step)


# === The numbers of batches ===


def test_numbers_of_batches(folder, lm):
    data = read_rows(folder / "rows.npy", seed=3)
    fit(lm, folder, data=data, validate=False, epochs=1)
    batches = track(data)
    fit(lm, folder, data=batches, validate=False, epochs=2)
    for number, expected in zip(range(12), data, strict=False):
        if number >= 5:  # Those before were read by the first `fit`.
            batch = batches.batch(number)
            np.testing.assert_array_equal(
                batch["token_ids"], expected["token_ids"]
            )
    with pytest.raises(ValueError, match="read, 5 to 11. Received: number=4"):
        batches.batch(4)


def test_each_fit_begins_anew(folder, lm):
    """Also after an evaluation, which counts no batches."""
    data = read_rows(folder / "rows.npy", seed=3)
    batches = track(data)
    assert track(batches) is batches
    first = next(iter(data))["token_ids"]
    for _ in range(2):
        lm.fit(
            batches,
            steps_per_epoch=2,
            verbose=0,
            validation_data=batches,
            validation_steps=1,
        )
        np.testing.assert_array_equal(batches.batch(0)["token_ids"], first)
        assert batches.first_number == 0
    finite = track(read_rows(folder / "rows.npy", repeat=False))
    lm.evaluate(finite, verbose=0)
    assert finite.first_number == 0 and not finite.was_read(0)


def test_what_has_no_numbers():
    with pytest.raises(ValueError, match="Only batches.*of type list"):
        track(["a text"])


def test_numbers_go_on_when_the_data_begins_anew(folder):
    data = read_rows(folder / "rows.npy", seed=3, repeat=False)
    batches = TrackedBatches(data)
    with pytest.raises(ValueError, match="and none was. Received: number=0"):
        batches.batch(0)
    expected = [*data, *data]
    assert len(expected) == 2 * 10
    for number, batch in enumerate([*batches, *batches]):
        again = batches.batch(number)["token_ids"]
        np.testing.assert_array_equal(again, batch["token_ids"])
        np.testing.assert_array_equal(again, expected[number]["token_ids"])


def test_old_batches_are_forgotten(folder):
    batches = TrackedBatches(read_rows(folder / "rows.npy"))
    for _ in zip(range(KEPT + 3), batches, strict=False):
        pass
    assert batches.batch(4)["token_ids"].shape[0] == BATCH
    with pytest.raises(ValueError, match="one of the last 256 batches"):
        batches.batch(2)
    iterator = iter(batches)
    again = next(iterator)["token_ids"]
    np.testing.assert_array_equal(
        again, next(iter(read_rows(folder / "rows.npy")))["token_ids"]
    )
    state = json.loads(json.dumps(iterator.get_state()))
    expected = next(iterator)["token_ids"]
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["token_ids"], expected)
