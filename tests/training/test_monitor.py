"""What is seen and written of a training, next to direct computations."""

import contextlib
import functools
import io
import json
import math
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot
import numpy as np
import pytest
import tensorflow as tf

from keras_bwetaf import hardware, processes
from keras_bwetaf.hardware import flops_per_token, peak_flops
from keras_bwetaf.step.train_step import STEP_VALUE_NAMES
from keras_bwetaf.training import (
    Monitor,
    WarmupDecay,
    monitor,
    statistics,
)
from keras_bwetaf.training.statistics import (
    Statistics,
    read_statistics,
    smooth,
)
from tests import original
from tests.models.test_fit import OF_KERAS, make_lm, uneven

BATCH_SIZE = 4
TIMES = ("seconds", "total time", "compile time", "tokens per second")


def schedule():
    return WarmupDecay(
        initial_learning_rate=0.1,
        peak_learning_rate=0.4,
        final_learning_rate=0.05,
        warmup_steps=2,
        total_steps=10,
    )


class Listener(keras.callbacks.Callback):
    """Keeps the values of the last step."""

    values = None

    def on_step_values(self, values):
        self.values = values


@functools.cache
def compiled(kind):
    """A model and its first state."""
    optimizer = keras.optimizers.SGD(schedule(), global_clipnorm=0.5)
    arguments = {}
    if kind == "scaled":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    if kind == "accumulated":
        arguments["gradient_accumulation_steps"] = 3
    lm = make_lm(optimizer, **arguments)
    return lm, state_of(lm)


def state_of(lm):
    lm.optimizer.build(lm.trainable_variables)
    variables = lm.weights + lm.optimizer.variables
    return [np.array(variable.value) for variable in variables]


def set_state_of(lm, state):
    variables = lm.weights + lm.optimizer.variables
    for variable, value in zip(variables, state, strict=True):
        variable.assign(value)


@pytest.fixture
def lm():
    lm, state = compiled("plain")
    set_state_of(lm, state)
    return lm


def rows(num_batches):
    return uneven(num_batches * BATCH_SIZE)


def fit(lm, x, callbacks=(), **arguments):
    settings = dict(batch_size=BATCH_SIZE, shuffle=False, verbose=0)
    return lm.fit(x, callbacks=list(callbacks), **settings, **arguments)


# === Values of a step ===


@functools.cache
def direct():
    """Loss and gradient from all the logits at once."""
    lm, _ = compiled("plain")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def direct(trainable, x):
        non_trainable = [v.value for v in lm.non_trainable_variables]
        logits, _ = lm.stateless_call(trainable, non_trainable, x)
        losses = -jax.nn.log_softmax(logits[:, :-1])
        targets = x["token_ids"][:, 1:, None]
        losses = jnp.take_along_axis(losses, targets, axis=-1)[..., 0]
        is_real = (x["padding_mask"][:, 1:] > 0) & (
            x["padding_mask"][:, :-1] > 0
        )
        num_tokens = is_real.sum()
        return (losses * is_real).sum() / num_tokens, num_tokens

    return direct


@pytest.mark.parametrize("kind", ["plain", "accumulated", "scaled"])
def test_values_of_steps(kind):
    """Before clipping, of the whole batch, and without the loss's factor."""
    lm, state = compiled(kind)
    set_state_of(lm, state)
    x = uneven(BATCH_SIZE)
    for step in range(3):
        trainable = [jnp.array(v.value) for v in lm.trainable_variables]
        (loss, num_tokens), gradients = direct()(trainable, x)
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in gradients))
        rate = float(schedule()(step))
        listener = Listener()
        fit(lm, x, callbacks=[listener])
        values = np.asarray(listener.values)
        received = dict(zip(STEP_VALUE_NAMES, values, strict=True))
        assert norm > 0.6  # It is clipped.
        assert received["loss"] == pytest.approx(float(loss), 1e-5)
        assert received["gradient_norm"] == pytest.approx(norm, 1e-4)
        assert received["learning_rate"] == pytest.approx(rate)
        assert received["num_tokens"] == num_tokens
        assert received["sequence_length"] == 32


def test_watching_changes_nothing(lm):
    x = rows(2)
    watched = fit(lm, x, callbacks=[Monitor()], epochs=2).history
    weights = lm.get_weights()
    lm = make_lm(keras.optimizers.SGD(schedule(), global_clipnorm=0.5))
    alone = fit(lm, x, epochs=2).history
    assert alone == {name: watched[name] for name in alone}
    added = set(watched) - set(alone)
    assert added == {"gradient_norm", "tokens_per_second"}
    for ours, theirs in zip(weights, lm.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    listener = Listener()
    fit(lm, x, callbacks=[listener])
    first = listener.values
    assert first is not None
    logs = lm.train_on_batch(x, return_dict=True)
    assert set(logs) == {"loss", "accuracy", "perplexity"}
    fit(lm, x)
    assert listener.values is first  # Only while its own `fit` runs.


def test_callbacks_in_a_list_of_keras(lm):
    """Each callback hears of a step once, however often it is there."""
    listener = Listener()
    listener.on_step_values = mock.Mock()
    nested = keras.callbacks.CallbackList(
        [listener, Monitor()], add_history=True, model=lm
    )
    lm.fit(rows(2), batch_size=BATCH_SIZE, verbose=0, callbacks=nested)
    assert listener.on_step_values.call_count == 2
    fit(lm, rows(1), callbacks=[listener, listener])
    assert listener.on_step_values.call_count == 3


def test_a_refused_monitor_leaves_the_model_as_it_was():
    lm, x, listener = make_lm(loss=OF_KERAS), rows(1), Listener()
    y = np.roll(x["token_ids"], -1, axis=1)
    with pytest.raises(ValueError, match="compiled with the default loss"):
        fit(lm, x, y=y, callbacks=[Monitor()])
    fit(lm, x, y=y, callbacks=[listener])
    assert listener.values is None


def test_no_step_is_waited_for(lm):
    """Values are read when the next step is on its way, or asked for."""
    watching = Monitor()
    read, synced, asked = [], [], []

    def begin(batch, logs):
        read.append(len(watching.statistics))
        synced.append(lm._jax_state_synced)

    def end(batch, logs):
        if batch == 2:
            asked.append(len(watching.get_state()["entries"]["step"]))

    fit(
        lm,
        rows(6),
        callbacks=[
            watching,
            keras.callbacks.LambdaCallback(
                on_train_batch_begin=begin, on_train_batch_end=end
            ),
        ],
    )
    assert read == [0, 0, 1, 3, 3, 4]
    assert synced == [True] + [False] * 5
    assert asked == [3]
    assert len(watching.statistics) == 6
    # Keras waits for every step if a callback has this.
    assert "on_train_batch_end" not in vars(Monitor)


# === What is written ===


def test_files(lm, tmp_path):
    x, validation = rows(3), uneven(4, seed=1)
    watching = Monitor(tmp_path / "run", total_steps=6)
    history = fit(
        lm, x, callbacks=[watching], epochs=2, validation_data=validation
    ).history
    written = read_statistics(tmp_path / "run")
    assert written["name"] == "run"
    assert written["num_params"] == lm.count_params()
    assert written["step"] == [[1, 2, 3, 4, 5, 6]]
    tokens = (x["padding_mask"] > 0).sum(axis=1) - 1
    tokens = tokens.reshape(3, -1).sum(axis=1).tolist()
    assert written["tokens"] == [tokens * 2]
    assert written["total tokens"] == 2 * sum(tokens)
    means = np.average(
        np.reshape(written["loss"], (2, 3)), axis=1, weights=tokens
    )
    np.testing.assert_allclose(means, history["loss"], rtol=1e-6)
    assert written["val_step"] == [[3, 6]]
    np.testing.assert_allclose(
        written["val_loss"], [history["val_loss"]], rtol=1e-6
    )
    rates = [float(schedule()(step)) for step in range(6)]
    np.testing.assert_allclose(written["learning_rate"], [rates], rtol=1e-6)
    assert written["lr"] == [pytest.approx(0.4)]
    norms = np.reshape(written["gradient_norm"], (2, 3))
    np.testing.assert_allclose(history["gradient_norm"], norms.mean(axis=1))
    first, *others = written["seconds"][0]
    assert first is None and min(others) > 0
    assert written["total time"] == pytest.approx(
        written["compile time"] + sum(others)
    )
    speed = (written["total tokens"] - tokens[0]) / sum(others)
    assert written["tokens per second"] == pytest.approx(speed)
    assert set(written["stats"]) == set(written) - {"stats"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "stats.json",
        "losses.png",
    }


def test_the_original_reads_the_file(lm, tmp_path, trained_checkpoint):
    """Shows, plots and continues it; and it has the keys of its own files."""
    fit(lm, rows(3), callbacks=[Monitor(tmp_path)])
    with (
        mock.patch("tiktoken.get_encoding"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        from BwETAF.data.data_loader import ProgressTracker

    path = tmp_path / "stats.json"
    losses = ProgressTracker.show(path, "loss")[0]
    assert len(losses) == 3
    module = original.BwETAF.model.model
    with mock.patch.object(matplotlib.pyplot, "show"):
        module.plot(losses, chop_off=1)
        (axes,) = matplotlib.pyplot.gcf().axes
        np.testing.assert_array_equal(axes.lines[1].get_ydata(), losses[1:])
        matplotlib.pyplot.close("all")
    theirs = read_statistics(trained_checkpoint)
    ours = read_statistics(tmp_path)
    assert set(theirs) <= set(ours)
    for key in set(theirs) - {"val_loss"}:
        assert type(theirs[key]) is type(ours[key])
    ProgressTracker.add(path, [1.0], [2.0], 0.1, 3.0, 5)
    again = read_statistics(tmp_path)
    assert again["loss"] == [losses, [1.0]]
    assert again["total tokens"] == ours["total tokens"] + 5


def test_going_on_from_a_checkpoint(lm, tmp_path):
    """As if nothing had happened, whatever came after the checkpoint."""
    x, validation = rows(3), uneven(4, seed=1)
    _, start = compiled("plain")
    settings = dict(validation_data=validation)
    fit(lm, x, callbacks=[Monitor(tmp_path / "whole")], epochs=2, **settings)

    set_state_of(lm, start)
    first = Monitor(tmp_path / "parts")
    fit(lm, x, callbacks=[first], **settings)
    state, weights = json.dumps(first.get_state()), state_of(lm)
    fit(lm, x, callbacks=[first], **settings)  # What is lost.
    assert len(first.statistics) == 6
    assert json.dumps(first.get_state()) != state

    set_state_of(lm, weights)
    second = Monitor(tmp_path / "parts")
    second.set_state(json.loads(state))
    second.set_model(lm)
    second.on_train_begin()  # And once more, in `fit`.
    fit(lm, x, callbacks=[second], epochs=2, initial_epoch=1, **settings)
    whole, parts = (
        read_statistics(tmp_path / name) for name in ("whole", "parts")
    )
    assert parts["seconds"][0][:3] == json.loads(state)["entries"]["seconds"]
    for key in set(whole) - {"name", *TIMES}:
        assert whole[key] == parts[key], key
    smoothed = smooth(whole["loss"][0])[-1]
    assert second.statistics.smoothed_loss == pytest.approx(smoothed, 1e-6)


def steps_of(statistics, numbers):
    for number in numbers:
        statistics.add_step(
            step=number,
            loss=10 / number,
            gradient_norm=math.inf if number == 3 else number / 8,
            learning_rate=0.5,
            tokens=number,
            seconds=0.25,
            compiles=number == 1,
        )


@pytest.mark.parametrize("interrupted_at", [None, 5, 16, 17, 99])
def test_a_long_training(monkeypatch, tmp_path, interrupted_at):
    """As many values as ever are kept, and all of them are counted."""
    monkeypatch.setattr(statistics, "MOST_STEPS", 16)
    whole = Statistics()
    steps_of(whole, range(1, interrupted_at or 101))
    if interrupted_at:
        state = json.loads(json.dumps(whole.get_state()))
        whole = Statistics()
        whole.set_state(state)
        steps_of(whole, range(interrupted_at, 101))
    assert len(json.dumps(whole.get_state())) < 2000
    written = whole.write(tmp_path, "long", 1)
    assert written["step"] == [[*range(8, 101, 8)]]
    assert written["loss"] == [
        pytest.approx([10 / n for n in range(8, 101, 8)])
    ]
    assert written["total tokens"] == 5050
    assert written["compile time"] == 0.25
    assert written["total time"] == 25
    assert written["tokens per second"] == pytest.approx(5049 / 24.75)
    norms = [n / 8 for n in range(1, 101) if n != 3]
    assert whole.epoch.mean_gradient_norm() == pytest.approx(np.mean(norms))
    assert whole.smoothed_loss == pytest.approx(
        smooth([10 / n for n in range(1, 101)])[-1]
    )
    assert whole.last("loss") == pytest.approx(0.1)
    if not interrupted_at:
        assert whole.tokens_per_second() == np.mean(range(51, 101)) / 0.25
        assert whole.seconds_per_step() == 0.25


def test_the_state_of_an_earlier_version(monkeypatch):
    """It has the values of all steps, and no sums."""
    expected = Statistics()
    steps_of(expected, range(1, 101))
    expected.add_validation(100, 0.5)
    state = expected.get_state()
    monkeypatch.setattr(statistics, "MOST_STEPS", 16)
    received = Statistics()
    received.set_state(
        {name: state[name] for name in ("entries", "compile_seconds")}
    )
    assert received.totals == expected.totals
    assert received.compile_seconds == 0.25
    assert received.entries["step"] == [*range(8, 101, 8)]
    assert received.entries["val_loss"] == [0.5]
    assert received.smoothed_loss == pytest.approx(expected.smoothed_loss)


def test_smoothing_is_unbiased():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert smooth([1.0, 4.0], decay=0.5) == pytest.approx([1.0, 3.0])


def test_no_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder with stats.json"):
        read_statistics(tmp_path)
    (tmp_path / "stats.json").write_text('{"loss": [[]]}')
    with pytest.raises(ValueError, match=r"Received: loss=\[\[\]\]"):
        read_statistics(tmp_path)


def test_tensorboard(lm, tmp_path):
    """Keras's own callback gets what the monitor adds to the logs."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    history = fit(
        lm,
        rows(2),
        [Monitor(), keras.callbacks.TensorBoard(tmp_path)],
        epochs=2,
    ).history
    events = event_accumulator.EventAccumulator(str(tmp_path / "train"))
    events.Reload()
    assert "epoch_learning_rate" in events.Tags()["tensors"]
    for name in ("loss", "gradient_norm", "tokens_per_second"):
        written = [
            float(tensor_util.make_ndarray(event.tensor_proto))
            for event in events.Tensors(f"epoch_{name}")
        ]
        assert written == pytest.approx(history[name], 1e-6)


def test_logs_for_any_tracker(lm):
    """A callback behind this one gets plain numbers, such as JSON takes."""
    received = []
    track = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: received.append(json.dumps(logs))
    )
    history = fit(lm, rows(2), [Monitor(), track], epochs=2).history
    for epoch, logs in enumerate(map(json.loads, received)):
        assert logs == {name: each[epoch] for name, each in history.items()}
    assert len(received) == 2 and "gradient_norm" in logs


# === What is shown ===


def test_lines(lm, capsys):
    """Where there is no terminal. The last line is that of the epoch."""
    fit(lm, rows(5), callbacks=[Monitor(total_steps=8, every=2)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 2/8",
        "step 4/8",
        "step 5/8",
    ]
    for name in ("loss", "left 0:00:0", "tokens/s"):
        assert f"  {name}" in lines[-1]
    assert "validation" not in lines[-1]


def test_a_step_is_printed_once(lm, capsys):
    """The last one of an epoch, with the loss of the validation."""
    fit(
        lm,
        rows(4),
        callbacks=[Monitor(total_steps=8, every=2)],
        epochs=2,
        validation_data=rows(1),
    )
    lines = capsys.readouterr().out.splitlines()
    numbers = [line.split("  ")[0] for line in lines]
    assert numbers == ["step 2/8", "step 4/8", "step 6/8", "step 8/8"]
    are_of_epochs = ["validation loss" in line for line in lines]
    assert are_of_epochs == [False, True, False, True]
    assert max(map(len, lines)) <= 80


def test_lines_fit_80_columns():
    """The first fields matter most."""
    fields = {"step": "900,000/1,000,000", "loss": "3.1416"}
    fields |= {"validation loss": "3.1000", "left": "12:00:00"}
    line = "  ".join(f"{name} {text}" for name, text in fields.items())
    assert len(line) == 74
    for speed in ("1", "12", "123,456"):
        received = monitor._line({**fields, "x": speed, "MFU": "45.6%"})
        longer = f"{line}  x {speed}"
        assert received == (longer if len(longer) <= 80 else line)


def test_table(lm, capsys, monkeypatch):
    """In a terminal, it is there during the epoch, and a line afterwards."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(monitor, "REFRESH_SECONDS", 0.0)
    watching = Monitor(total_steps=5)
    fit(lm, rows(5), callbacks=[watching], validation_data=rows(1))
    table, line = capsys.readouterr().out.rsplit("\x1b[?25h", 1)
    for name in (
        "step",
        "loss",
        "left",
        "tokens/s",
        "MFU",
        "gradient norm",
        "learning rate",
        "smoothed",
        "tokens",
        "first step",
        "attention",
    ):
        assert table.count(f"│ {name} ") >= 4
    assert "step 5/5  loss" in line and "validation loss" in line
    assert "│" not in line


def test_other_processes_are_silent(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "is_first_process", lambda: False)
    watching = Monitor(tmp_path / "run", every=1)
    fit(lm, rows(2), callbacks=[watching])
    assert len(watching.statistics) == 2
    assert not capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# === Utilisation ===


@pytest.mark.parametrize(
    ("device_kind", "bfloat16", "float32"),
    [
        ("TPU v2", 22.5, 22.5),
        ("TPU v3", 61.5, 61.5),
        ("TPU v4", 275, 275),
        ("TPU v5 lite", 197, 197),
        ("TPU v5p", 459, 459),
        ("TPU v6 lite", 918, 918),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.5, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989.5, 494.7),
        ("NVIDIA L4", 121, 60),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla T4", 65, 8.1),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("Tesla V100-PCIE-16GB", 112, 14),
    ],
)
def test_peaks(device_kind, bfloat16, float32):
    assert peak_flops(device_kind, "bfloat16") == 1e12 * bfloat16
    assert peak_flops(device_kind, "float16") == 1e12 * bfloat16
    assert peak_flops(device_kind, "float32") == 1e12 * float32


def test_unknown_devices_have_no_peak():
    assert peak_flops("cpu", "float32") is None
    assert peak_flops("NVIDIA L400", "bfloat16") is None


def test_flops_per_token():
    lm = make_lm()
    size = lm.count_params()
    attention = 6 * 2 * 32 * 100
    assert flops_per_token(lm, 100) == 6 * size + attention
    block = lm.backbone.transformer_layers[0]
    block.trainable = False
    frozen = block.count_params()
    assert flops_per_token(lm, 100) == 6 * size - 2 * frozen + attention


def test_utilisation_of_several_devices(capsys, monkeypatch):
    """Sharded over two devices, and the peak is that of both."""
    monkeypatch.setattr(
        hardware, "DEVICES", [hardware.Device("cpu", 0.0, 1e-3, 0, 0)]
    )
    devices = [f"cpu:{i}" for i in range(2)]
    with keras.distribution.DataParallel(devices=devices).scope():
        lm = make_lm(keras.optimizers.SGD(0.1))
        watching = Monitor()
        fit(lm, rows(3), callbacks=[watching])
    line = capsys.readouterr().out
    speed = watching.statistics.tokens_per_second()
    share = speed * flops_per_token(lm, 32) / (2 * 1e9)
    assert f"  MFU {share:.1%}  " in line


# === What must not be ===


class KeptBatches(keras.callbacks.Callback):
    """Keeps batches by number, the first of which is number 5."""

    first_number = 5

    def __init__(self, monitor, *data):
        super().__init__()
        self._monitor = monitor
        self._data = data

    def on_train_begin(self, logs=None):
        self._monitor.set_train_batches(self)

    def batch(self, number):
        if not self._data:
            raise ValueError(f"Received: number={number}")
        first = (number - 5) * BATCH_SIZE
        return jax.tree.map(lambda a: a[first : first + BATCH_SIZE], self._data)


@pytest.fixture
def broken(lm):
    """Data whose third batch has no finite loss."""
    x = rows(4)
    y = np.roll(x["token_ids"], -1, axis=1)
    weights = np.ones(y.shape, "float32")
    weights[2 * BATCH_SIZE :] = 3e38  # Whose sum is beyond float32.
    return dict(x=x, y=y, sample_weight=weights)


def test_a_loss_that_is_not_finite(lm, broken, tmp_path):
    x, y, weights = broken.values()
    monitor = Monitor(tmp_path / "run")
    with pytest.raises(FloatingPointError, match="of step 3 is not") as error:
        fit(
            lm,
            **broken,
            callbacks=[monitor, KeptBatches(monitor, x, y, weights)],
        )
    path = tmp_path / "run" / "non_finite_step_3.npz"
    assert f"Its batch is saved to {path}." in str(error.value)
    assert "Received: loss=nan, gradient_norm=nan" in str(error.value)
    with np.load(path) as arrays:
        third = slice(2 * BATCH_SIZE, 3 * BATCH_SIZE)
        assert set(arrays) == {*x, "y", "sample_weight"}
        np.testing.assert_array_equal(
            arrays["token_ids"], x["token_ids"][third]
        )
        np.testing.assert_array_equal(arrays["y"], y[third])
        assert (arrays["sample_weight"] == np.float32(3e38)).all()
    assert read_statistics(tmp_path / "run")["step"] == [[1, 2]]


def test_tokens_beyond_the_vocabulary(lm, tmp_path):
    x = rows(4)
    x["token_ids"][BATCH_SIZE, 3] = lm.backbone.vocabulary_size
    # Arrays would be refused.
    data = tf.data.Dataset.from_tensor_slices(x).batch(BATCH_SIZE)
    monitor = Monitor(tmp_path / "run")
    callbacks = [monitor, KeptBatches(monitor, x)]
    with pytest.raises(FloatingPointError, match="of step 2.*another tokeniz"):
        lm.fit(data, verbose=0, callbacks=callbacks)


def test_a_batch_that_is_not_saved(lm, broken, tmp_path):
    for folder, are_kept, message in (
        (None, True, "the monitor has no folder"),
        (tmp_path, False, "batches are kept for Grain data sets only"),
        (tmp_path, True, "could not be read again: .* number=7"),
    ):
        set_state_of(lm, compiled("plain")[1])
        monitor = Monitor(folder)
        others = [KeptBatches(monitor)] if are_kept else []
        with pytest.raises(FloatingPointError, match=message):
            fit(lm, **broken, callbacks=[monitor, *others])


def test_other_processes_stop(lm, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first_process", lambda: False)
    with pytest.raises(FloatingPointError, match="by the first process"):
        fit(lm, **broken, callbacks=[Monitor(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_steps_that_the_optimizer_skips():
    """A factor too large for the gradient is made smaller, as ever."""
    lm, state = compiled("scaled")
    set_state_of(lm, state)
    lm.optimizer.dynamic_scale.assign(3e38)
    watching = Monitor()
    fit(lm, rows(2), callbacks=[watching])
    assert watching.statistics.entries["gradient_norm"][0] is None
    assert all(map(math.isfinite, watching.statistics.entries["loss"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(every=0), "Received: every=0"),
        (dict(every=1.5), "Received: every=1.5"),
        (dict(every=True), "Received: every=True"),
        (dict(total_steps="10"), "Received: total_steps='10'"),
        (dict(total_steps=0), "Received: total_steps=0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Monitor(**arguments)


def test_models_whose_steps_cannot_be_told_apart():
    lm = make_lm(loss="mse", weighted_metrics=None)
    with pytest.raises(ValueError, match="of class BwETAFCausalLM"):
        Monitor().set_model(lm)
    with pytest.raises(ValueError, match="of class SimpleNamespace"):
        Monitor().set_model(SimpleNamespace())
    lm = make_lm(steps_per_execution=2)
    with pytest.raises(ValueError, match="steps_per_execution=2"):
        Monitor().set_model(lm)
