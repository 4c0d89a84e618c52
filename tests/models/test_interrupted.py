"""Whatever ends or uses a running model, nothing that was trained is lost."""

import signal
import threading

import grain
import keras
import numpy as np
import pytest

from keras_bwetaf import BwETAFCausalLM
from keras_bwetaf.step.trainer_state import TrainerState
from keras_bwetaf.training import TrainingCheckpoint, recipe
from tests.models.test_fit import make_lm, packed, rows
from tests.training.resumable import STEPS_PER_EPOCH, read_rows, write_rows
from tests.training.resumable import make_lm as make_resumable

BATCH, NUM_BATCHES = 4, 12
X = packed(rows(BATCH * NUM_BATCHES))
PROMPT = {"token_ids": X["token_ids"][:1, :4], "padding_mask": np.ones((1, 4))}
WAYS = (ValueError, KeyboardInterrupt)


def first(num_batches):
    return {name: array[: BATCH * num_batches] for name, array in X.items()}


def all_variables(lm):
    return lm.variables + lm.optimizer.variables


def values(lm):
    return [np.array(variable) for variable in all_variables(lm)]


def assert_is(lm, expected):
    """The model and its optimizer are in this state, bit for bit."""
    for received, value in zip(values(lm), expected, strict=True):
        np.testing.assert_array_equal(received, value)


def assert_usable(lm, folder):
    """It generates, saves, evaluates and trains on."""
    generated = lm.generate(PROMPT, max_new_tokens=3, stop_token_ids=None)
    assert generated["token_ids"].shape == (1, 7)
    lm.save_to_preset(folder)
    kept = BwETAFCausalLM.from_preset(str(folder), preprocessor=None)
    for ours, theirs in zip(lm.weights, kept.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    before = lm.evaluate(first(2), batch_size=BATCH, verbose=0)[0]
    lm.fit(first(2), batch_size=BATCH, verbose=0)
    assert lm.evaluate(first(2), batch_size=BATCH, verbose=0)[0] < before


@pytest.fixture(scope="module")
def trained():
    """A model, and its states after 0, 1, 2, ... steps, a `fit` for each."""
    lm = make_lm(keras.optimizers.Adam(1e-3))
    lm.optimizer.build(lm.trainable_variables)
    states = [values(lm)]
    for i in range(NUM_BATCHES):
        batch = {name: each[BATCH * i :][:BATCH] for name, each in X.items()}
        lm.fit(batch, shuffle=False, verbose=0)
        states.append(values(lm))
    return lm, states


@pytest.fixture
def lm(trained):
    lm, (start, *_) = trained
    for variable, value in zip(all_variables(lm), start, strict=True):
        variable.assign(value)
    return lm


@pytest.fixture
def states(trained):
    return trained[1]


def call_at(hook, function, number=0):
    """A callback that calls a function in a hook, the `number`th time."""
    times = iter(range(1000))

    def call(*args, **kwargs):
        if next(times) == number:
            function()

    return keras.callbacks.LambdaCallback(**{hook: call})


def raising(error):
    def function():
        raise error("stopped")

    return function


def fit(lm, num_batches=3, *callbacks, **arguments):
    return lm.fit(
        first(num_batches),
        batch_size=BATCH,
        verbose=0,
        shuffle=False,
        callbacks=[*callbacks],
        **arguments,
    ).history


# === Errors and interrupts ===


@pytest.mark.parametrize("error", WAYS)
@pytest.mark.parametrize(
    ("hook", "number", "num_steps"),
    [
        ("on_train_begin", 0, 0),
        ("on_epoch_begin", 0, 0),
        ("on_train_batch_begin", 0, 0),
        ("on_train_batch_begin", 1, 1),
        ("on_train_batch_end", 0, 1),
        ("on_train_batch_end", 2, 3),
        ("on_test_begin", 0, 3),
        ("on_test_batch_begin", 0, 3),
        ("on_test_batch_end", 1, 3),
        ("on_test_end", 0, 3),
        ("on_epoch_end", 0, 3),
        ("on_train_end", 0, 3),
    ],
)
def test_fit_ends_in_a_callback(lm, states, hook, number, num_steps, error):
    class Stops(keras.callbacks.Callback):
        times = 0

    def stop(self, *args, **kwargs):
        self.times += 1
        if self.times > number:
            raise error("stopped")

    setattr(Stops, hook, stop)
    with pytest.raises(error, match="stopped"):
        fit(lm, 3, Stops(), validation_data=(first(2),))
    assert_is(lm, states[num_steps])


@pytest.mark.parametrize("error", WAYS)
@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("hook", ["begin", "batch_begin", "batch_end", "end"])
def test_evaluate_and_predict_end_in_a_callback(
    lm, states, method, hook, error
):
    name = {"evaluate": "test", "predict": "predict"}[method]

    class Stops(keras.callbacks.Callback):
        pass

    def stop(*args, **kwargs):
        raise error("stopped")

    setattr(Stops, f"on_{name}_{hook}", stop)
    with pytest.raises(error, match="stopped"):
        getattr(lm, method)(
            first(2), batch_size=BATCH, verbose=0, callbacks=[Stops()]
        )
    assert_is(lm, states[0])


@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch"])
@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (first(1), dict(y=np.zeros((4, 5), "int32")), "`y` must have"),
        ({"token_ids": X["token_ids"][:4]}, {}, "padding_mask"),
    ],
)
def test_the_first_step_fails(lm, states, tmp_path, method, x, labels, message):
    with pytest.raises((ValueError, KeyError), match=message):
        getattr(lm, method)(x, **labels)
    assert_is(lm, states[0])


def test_a_model_is_usable_after_an_error(lm, states, tmp_path):
    x = {name: array[:4] for name, array in X.items()}
    with pytest.raises(ValueError, match="`y` must have"):
        lm.fit(x, np.zeros((4, 5), "int32"), verbose=0)
    assert_is(lm, states[0])
    assert_usable(lm, tmp_path / "one")
    with pytest.raises(ValueError, match="`y` must have"):
        lm.evaluate(x, np.zeros((4, 5), "int32"), verbose=0)
    assert_usable(lm, tmp_path / "two")


def test_a_later_step_fails(lm, states, monkeypatch):
    """The last batch has other rows, so it is traced anew."""
    train_step = lm.train_step

    def fails(state, data):
        if data["token_ids"].shape[0] != BATCH:
            raise ValueError("stopped")
        return train_step(state, data)

    monkeypatch.setattr(lm, "train_step", fails)
    monkeypatch.setattr(lm, "train_function", None)
    x = {name: array[: 2 * BATCH + 1] for name, array in X.items()}
    with pytest.raises(ValueError, match="stopped"):
        lm.fit(x, batch_size=BATCH, shuffle=False, verbose=0)
    assert_is(lm, states[2])


def test_the_data_fails(lm, states):
    """Keras looks at the first batches before it trains."""

    def read(i):
        if i == 10 * BATCH:
            raise ValueError("stopped")
        return {name: array[i] for name, array in X.items()}

    data = grain.MapDataset.range(BATCH * NUM_BATCHES).map(read).batch(BATCH)
    with pytest.raises(ValueError, match="stopped"):
        lm.fit(data, verbose=0)
    assert_is(lm, states[10])


def test_several_steps_at_a_time(states):
    lm = make_lm(keras.optimizers.Adam(1e-3), steps_per_execution=2)
    with pytest.raises(KeyboardInterrupt):
        fit(lm, 4, call_at("on_train_batch_end", raising(KeyboardInterrupt)))
    assert_is(lm, states[2])


def test_a_loss_of_ones_own():
    lm = make_lm("adam", metrics=["accuracy"])
    y = np.roll(X["token_ids"], -1, axis=1)
    before = lm.get_weights()
    with pytest.raises(KeyboardInterrupt):
        stop = call_at("on_train_batch_begin", raising(KeyboardInterrupt))
        lm.fit(X, y, verbose=0, callbacks=[stop])
    for ours, theirs in zip(lm.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# === Signals ===


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process in the background has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def slow_to_return(lm, ctrl_c, monkeypatch):
    """Steps that call a function when they have taken the state's memory."""
    called = []

    def make_function(step_function, **kwargs):
        def step(state, data):
            result = step_function(state, data)
            assert state[0][0].is_deleted()
            called.pop()()
            return result

        return type(lm)._make_function(lm, step, **kwargs)

    monkeypatch.setattr(lm, "_make_function", make_function)
    for name in ("train", "test", "predict"):
        monkeypatch.setattr(lm, f"{name}_function", None)
    return called


def test_ctrl_c_while_a_step_has_the_weights(lm, states, slow_to_return):
    slow_to_return += [interrupt, int]
    with pytest.raises(KeyboardInterrupt):
        fit(lm)
    assert_is(lm, states[2])
    for method in (lm.evaluate, lm.predict):
        slow_to_return += [interrupt]
        with pytest.raises(KeyboardInterrupt):
            method(first(2), batch_size=BATCH, verbose=0)
        assert_is(lm, states[2])
    slow_to_return += [interrupt]
    batch = {name: array[8:12] for name, array in X.items()}
    with pytest.raises(KeyboardInterrupt):
        lm.train_on_batch(batch)
    assert_is(lm, states[3])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_a_step_is_traced(lm, states, ctrl_c, monkeypatch):
    """At once, since compiling may take minutes."""

    def interrupted(state, data):
        interrupt()
        raise AssertionError("The interrupt came too late.")

    monkeypatch.setattr(lm, "train_step", interrupted)
    monkeypatch.setattr(lm, "train_function", None)
    with pytest.raises(KeyboardInterrupt):
        fit(lm)
    assert_is(lm, states[0])


def test_a_handler_of_ones_own(lm, states, slow_to_return):
    """It is called once for each signal, and may be replaced meanwhile."""
    received = []

    def handle(number, frame):
        received.append(number)

    def other(number, frame):
        raise AssertionError("Not called.")

    signal.signal(signal.SIGINT, handle)
    slow_to_return += [int, interrupt, interrupt]
    fit(lm, 3, call_at("on_epoch_end", interrupt))
    assert received == [signal.SIGINT] * 3
    assert_is(lm, states[3])
    assert signal.getsignal(signal.SIGINT) is handle

    slow_to_return += [int]
    replace = call_at(
        "on_train_batch_end", lambda: signal.signal(signal.SIGINT, other)
    )
    fit(lm, 1, replace)
    assert signal.getsignal(signal.SIGINT) is other


def test_a_step_that_loses_the_weights_says_so(
    lm, states, slow_to_return, tmp_path
):
    lm.save_weights(tmp_path / "lm.weights.h5")

    def fail():
        interrupt()
        raise ValueError("out of memory")

    slow_to_return += [fail]
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(lm)
    assert "out of memory" in str(raised.value.__context__)
    for use in (lm.get_weights, fit):
        with pytest.raises(RuntimeError, match="which are lost. Load them"):
            use(lm) if use is fit else use()
    lm.load_weights(tmp_path / "lm.weights.h5")
    for variable, value in zip(all_variables(lm), states[0], strict=True):
        variable.assign(value)
    slow_to_return += [int]
    fit(lm, 1)
    assert_is(lm, states[1])


# === Use within a run ===


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end"])
def test_a_callback_uses_the_model_by_name(lm, states, hook, tmp_path):
    """And training goes on as if it had not."""
    expected = fit(lm, 4)
    for variable, value in zip(all_variables(lm), states[0], strict=True):
        variable.assign(value)
    step = 1 if hook == "on_train_batch_begin" else 2
    used = []

    def use():
        lm.generate(PROMPT, max_new_tokens=2, stop_token_ids=None)
        assert int(lm.optimizer.iterations) == step
        used.append(lm.evaluate(first(2), batch_size=BATCH, verbose=0)[0])
        used.append(lm.predict(first(1), verbose=0))
        lm.test_on_batch(first(1))
        lm.save(tmp_path / "lm.keras")
        lm.save_to_preset(tmp_path / "preset")
        assert_is(lm, states[step])

    assert fit(lm, 4, call_at(hook, use, 1)) == expected
    assert_is(lm, states[4])
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert_is(loaded, states[step])
    assert used[0] == loaded.evaluate(first(2), batch_size=BATCH, verbose=0)[0]
    np.testing.assert_array_equal(used[1], loaded.predict(first(1), verbose=0))


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end"])
def test_a_callback_uses_the_model_between_epochs(lm, hook):
    expected = fit(lm, 2, epochs=2, validation_data=(first(1),))

    def use():
        lm.generate(PROMPT, max_new_tokens=2, stop_token_ids=None)
        lm.evaluate(first(2), batch_size=BATCH, verbose=0)

    lm = make_lm(keras.optimizers.Adam(1e-3))
    received = fit(
        lm, 2, call_at(hook, use), epochs=2, validation_data=(first(1),)
    )
    assert received == expected


def test_a_callback_changes_the_model_by_name(lm, states):
    """A learning rate of zero ends the training."""

    def change():
        lm.optimizer.learning_rate = 0.0

    rate = float(lm.optimizer.learning_rate)
    try:
        fit(lm, 4, call_at("on_train_batch_end", change, 1))
    finally:
        lm.optimizer.learning_rate = rate
    for variable, value in zip(lm.variables, states[2], strict=False):
        np.testing.assert_array_equal(variable, value)
    assert int(lm.optimizer.iterations) == 4


def test_an_error_in_use_can_be_caught(lm, states):
    """The outer training goes on."""

    def use():
        with pytest.raises(ValueError, match="`y` must have"):
            lm.evaluate(first(1), np.zeros((4, 5), "int32"), verbose=0)

    fit(lm, 4, call_at("on_train_batch_end", use, 1))
    assert_is(lm, states[4])


def reading_data(lm, read):
    """Batches that are made when a step has the state, and look at it."""

    def batch(i):
        read.append(int(lm.optimizer.iterations))
        return {name: array[4 * i : 4 * i + 4] for name, array in X.items()}

    data = grain.MapDataset.range(NUM_BATCHES).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    return data.map(batch)


def test_the_data_reads_the_model(lm, states):
    read = []
    data = reading_data(lm, read)
    lm.fit(data, verbose=0, steps_per_epoch=4, epochs=2)
    assert read[-8:] == [*range(8)]
    assert_is(lm, states[8])


def test_ctrl_c_after_the_data_has_read_the_model(lm, states, slow_to_return):
    slow_to_return += [interrupt, int]
    with pytest.raises(KeyboardInterrupt):
        lm.fit(reading_data(lm, []), verbose=0, steps_per_epoch=4)
    assert_is(lm, states[2])


def test_steps_hand_on_the_state_by_themselves(lm, monkeypatch):
    """It leaves the variables once in an epoch, if nobody reads them."""
    taken = []
    take = TrainerState.take

    def counted(self, parts):
        taken.append(len(parts))
        return take(self, parts)

    monkeypatch.setattr(TrainerState, "take", counted)
    fit(lm, 6, epochs=2, validation_data=(first(1),))
    assert taken == [4, 3, 4, 3]


# === Threads ===


def test_another_thread_gets_an_error(lm, states):
    """Whatever it does, and the training is as it would be."""
    expected = fit(lm, 4)
    for variable, value in zip(all_variables(lm), states[0], strict=True):
        variable.assign(value)
    is_running, is_done = threading.Event(), threading.Event()

    def wait():
        is_running.set()
        assert is_done.wait(60)

    histories = []

    def train():
        histories.append(fit(lm, 4, call_at("on_train_batch_begin", wait, 2)))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert is_running.wait(60)
        for use in (
            lambda: lm.generate(PROMPT, max_new_tokens=2, stop_token_ids=None),
            lambda: lm.evaluate(first(1), verbose=0),
            lambda: lm.predict(first(1), verbose=0),
            lambda: lm.train_on_batch(first(1)),
            lambda: lm(first(1)),
            lambda: fit(lm),
            lm.get_weights,
            lambda: lm.set_weights(states[0][: len(lm.weights)]),
        ):
            with pytest.raises(RuntimeError, match="another thread runs"):
                use()
    finally:
        is_done.set()
        thread.join()
    assert histories == [expected]
    assert_is(lm, states[4])
    lm.generate(PROMPT, max_new_tokens=2, stop_token_ids=None)


# === Moving averages ===


@pytest.mark.parametrize("devices", [1, 8])
def test_weights_that_are_averages(devices):
    """Keras makes the averages the weights, in one and the same memory."""
    distribution = None
    if devices > 1:
        distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    try:
        lm = make_lm(recipe("small", 40, use_ema=True, ema_momentum=0.5))
        start = lm.get_weights()
        stop = call_at("on_train_batch_begin", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lm.fit(first(4), batch_size=8, verbose=0, callbacks=[stop])
        for ours, theirs in zip(lm.get_weights(), start, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        losses = [
            lm.fit(first(4), batch_size=8, verbose=0).history["loss"][0]
            for _ in range(3)
        ]
        assert losses == sorted(losses, reverse=True)
        lm.generate(PROMPT, max_new_tokens=2, stop_token_ids=None)
    finally:
        keras.distribution.set_distribution(None)


# === Several devices, checkpoints ===


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_several_devices(method):
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
    try:
        lm = make_lm(keras.optimizers.Adam(1e-3))
        lm.fit(first(2), batch_size=8, verbose=0)
        before = values(lm)
        shardings = [v.value.sharding for v in all_variables(lm)]
        hook = {"fit": "train", "evaluate": "test", "predict": "predict"}

        class Stops(keras.callbacks.Callback):
            pass

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        setattr(Stops, f"on_{hook[method]}_batch_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            getattr(lm, method)(
                first(4), batch_size=8, verbose=0, callbacks=[Stops()]
            )
        assert_is(lm, before)
        after = [v.value.sharding for v in all_variables(lm)]
        assert after == shardings
        lm.fit(first(2), batch_size=8, verbose=0)
    finally:
        keras.distribution.set_distribution(None)


@pytest.mark.slow
def test_interrupted_between_checkpoints(tmp_path):
    """The model has the steps that no checkpoint has yet."""
    path = write_rows(tmp_path / "rows.npy")
    for num_steps in (5, 4):  # The second goes on in the middle of an epoch.
        lm = make_resumable()
        stop = raising(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            lm.fit(
                read_rows(path),
                steps_per_epoch=STEPS_PER_EPOCH,
                epochs=2,
                verbose=0,
                shuffle=False,
                callbacks=[
                    TrainingCheckpoint(tmp_path / "run", save_every=4),
                    call_at("on_train_batch_end", stop, num_steps - 1),
                ],
            )
        lm.save_weights(tmp_path / "lm.weights.h5")
    assert int(lm.optimizer.iterations) == 4 + num_steps
