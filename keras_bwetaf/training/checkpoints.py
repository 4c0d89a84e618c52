"""Checkpoints of a running training, from which it goes on exactly."""

import collections
import contextlib
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point

from converters.files import local_path
from keras_bwetaf import processes
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import checked_int
from keras_bwetaf.training.checkpoint_store import (
    CheckpointStore,
    DamagedCheckpointError,
    optimizer_settings,
)

MODES = ("min", "max")
ON_DAMAGE = ("raise", "previous")
AT_CTRL_C = (
    "\nCtrl-C: stopping once the running step is finished and saved. "
    "Ctrl-C again\nstops at once."
)


class TrainingCheckpoint(keras.callbacks.Callback):
    """Saves a training, so that it goes on when the script is run again.

    `BwETAFCausalLM.fit` with this callback first restores the latest
    checkpoint of the folder, if there is one, and then takes the remaining
    steps, also from the middle of an epoch. They are the same, bit for bit,
    as in a training that was never interrupted, if the script, the versions
    and the devices are the same, and if the data are a `grain.IterDataset`
    that does not end, such as `load_packed` returns.

    It saves every `save_every` steps and at the end of each epoch: the model
    with its random state, the optimizer, the metrics of the epoch so far, the
    position in the data, and the state of every other callback that has
    `get_state()`, which returns a dict that JSON can hold, and
    `set_state(state)`. Training waits while the device's memory is copied;
    it is written in the background. A checkpoint appears when it is
    complete. None is saved if a weight is not finite.

    On Ctrl-C, the running step is finished and saved, and then
    `KeyboardInterrupt` is raised; at a second Ctrl-C, at once. On SIGTERM,
    which preemptible machines get before they are taken away, it is saved,
    too, and the process exits with status 143. During a validation, this
    happens after it. Python lets only the main thread do this: in another
    one, `fit` does not answer signals.

    Several processes, which share the folder, save together: each what it
    has, and the first one the rest. SIGTERM to one of them is to all: a few
    steps later, they save the same step and exit. Ctrl-C saves nothing there.
    Any other number of processes can go on; only with the same one is the
    result the same, bit for bit, and the batch before compared.

    Args:
        folder: str or path. Of this training alone.
        save_every: int. Steps.
        keep_last: int. How many of the latest checkpoints to keep.
        keep_best: int. How many to keep besides, of those at the end of an
            epoch, that are best by `monitor`.
        monitor: str. A name in the logs of an epoch.
        mode: `"min"` or `"max"`. Which values of it are better.
        on_damage: `"raise"` or `"previous"`. Whether to go on from an earlier
            checkpoint if the latest is damaged. The damaged is then deleted.

    Raises:
        ValueError: If an argument is out of range. `fit` raises it, too, if
            the latest checkpoint is damaged, or if the model, the optimizer
            and its settings, such as the learning rate, the data or
            `steps_per_epoch` are not as they were.
        OSError: In `fit`, if a checkpoint can't be written, as when the disk
            is full.

    Example:

    ```python
    checkpoint = keras_bwetaf.training.TrainingCheckpoint(
        "run/checkpoints", save_every=500
    )
    lm.fit(
        train,
        steps_per_epoch=1000,
        epochs=10,
        validation_data=validation,
        callbacks=[checkpoint],
    )
    checkpoint.restore(lm, "best")
    lm.save_to_preset("run/best")
    ```
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        save_every: int,
        keep_last: int = 3,
        keep_best: int = 1,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        on_damage: Literal["raise", "previous"] = "raise",
    ):
        super().__init__()
        for name, value, values in (
            ("mode", mode, MODES),
            ("on_damage", on_damage, ON_DAMAGE),
        ):
            if value not in values:
                raise ValueError(
                    f"`{name}` must be one of {values}. Received: "
                    f"{name}={value!r}"
                )
        self.folder = Path(os.path.abspath(local_path("folder", folder)))
        self.save_every = checked_int("save_every", save_every, 1)
        self.keep_last = checked_int("keep_last", keep_last, 1)
        self.keep_best = checked_int("keep_best", keep_best, 0)
        self.monitor = monitor
        self.mode = mode
        self.on_damage = on_damage
        self._store = None

    def restore(
        self,
        model: keras.Model,
        step: int | Literal["latest", "best"] = "latest",
        include_optimizer: bool = False,
    ) -> dict[str, Any]:
        """Puts the weights of a checkpoint into a model.

        Args:
            model: `BwETAFCausalLM`, such as the one that was trained.
            step: `"latest"`; `"best"`, by `monitor`; or int, the number of
                steps trained.
            include_optimizer: bool. Whether to restore the optimizer's
                state, too. The model must be compiled as it was.

        Returns:
            dict: `"step"`; `"epoch"`, how many were complete; and `"logs"`
            of the last of them, or None in the middle of one.

        Raises:
            ValueError: If there is no such checkpoint, it is damaged, or it
                is of another model.
        """
        with self._open_store(create=False) as store:
            steps = {
                "latest": store.steps[-1:],
                "best": store.best_steps[:1],
            }.get(step, [step] if step in store.steps else [])
            if not steps:
                raise ValueError(
                    f"{self.folder} has no such checkpoint. Expected: one of "
                    f"{store.steps}, 'latest', or 'best' if an epoch logged "
                    f"{self.monitor!r}. Received: step={step!r}"
                )
            if step == "latest":
                run = self._restore_latest(store, model, include_optimizer)
            else:
                run = store.restore(model, steps[0], include_optimizer)
        return {name: run[name] for name in ("step", "epoch", "logs")}

    # === While `fit` runs ===

    def on_train_begin(self, logs=None):
        if self._store is None:
            raise ValueError(
                "`TrainingCheckpoint` needs `BwETAFCausalLM.fit`, and to be "
                f"in a list of callbacks. Received: model={self._model!r}"
            )
        if self._restored:
            _set_states(self._others, self._restored["callbacks"])
        if self._signal:  # Before the first step, which compiles.
            self._exit()

    def on_epoch_begin(self, epoch, logs=None):
        if self._restored and self._step_in_epoch:
            _set_metrics(self.model, self._restored["metrics"])
        self._restored = None
        self._is_in_step = False

    def on_train_batch_begin(self, batch, logs=None):
        # Overriding `on_train_batch_end` would make Keras wait for each step.
        if self._is_in_step:
            self._count_step()
            # `self.model` would fetch the state of every step.
            if self._step % self.save_every == 0 or self._signal:
                self._save()
        self._is_in_step = True

    def on_test_begin(self, logs=None):
        # Validation resets the metrics of an epoch that was stopped.
        self._end_steps()

    def on_epoch_end(self, epoch, logs=None):
        self._end_steps()
        if self._step_in_epoch == self._steps_per_epoch:
            self._epoch = epoch + 1
            self._step_in_epoch = 0
            self._warn_without_monitor(logs)
            self._save(logs)
        elif not self._model.stop_training:
            raise ValueError(
                "The data set ended within an epoch. Pass one that does not "
                "end, such as `load_packed` with `repeat=True`. Received: "
                f"{self._step_in_epoch} batches, steps_per_epoch="
                f"{self._steps_per_epoch}"
            )

    def _end_steps(self):
        # A data set that ends does so within a step.
        if self._is_in_step and self._batches.was_read(self._step):
            self._count_step()
            if self._step_in_epoch < self._steps_per_epoch:
                self._save()
        self._is_in_step = False

    def _count_step(self):
        self._step += 1
        self._step_in_epoch += 1
        if processes.are_several() and reached_preemption_sync_point(
            self._step
        ):
            self._signal = signal.SIGTERM

    def _save(self, logs=None):
        is_saved = self._store.save(
            self.model,
            {
                "step": self._step,
                "epoch": self._epoch,
                "step_in_epoch": self._step_in_epoch,
                "steps_per_epoch": self._steps_per_epoch,
                "data": self._batches.position(self._step),
                "logs": logs,
                "metrics": _metrics(self.model) if self._step_in_epoch else [],
                "callbacks": _states(self._others),
                "optimizer": self._optimizer,
            },
        )
        if not is_saved:
            warnings.warn(
                f"Step {self._step} is not saved, since numbers of the "
                "weights or of the optimizer are not finite.",
                stacklevel=2,
            )
        if self._signal:
            self._store.wait()
            self._exit()

    def _warn_without_monitor(self, logs):
        is_validated = any(name.startswith("val_") for name in logs)
        is_expected = is_validated or not self.monitor.startswith("val_")
        if self.keep_best and is_expected and self.monitor not in logs:
            warnings.warn(
                f"The best checkpoints can't be told without {self.monitor!r} "
                f"in the logs. Received: monitor={self.monitor!r}, logs of "
                f"{sorted(logs)}",
                stacklevel=2,
            )

    # === Around `fit` ===

    def drive_fit(
        self,
        fit,
        model,
        batches,
        *,
        callbacks,
        epochs=1,
        initial_epoch=0,
        steps_per_epoch=None,
        verbose="auto",
        **arguments,
    ):
        """Trains from the latest checkpoint on; `fit` calls it.

        Keras begins epochs with their first step. So the rest of an epoch is
        a `fit` of its own, and callbacks are told of one training.

        Args:
            fit: function. Keras's `fit`, but for the data.
            model: `BwETAFCausalLM`.
            batches: `TrackedBatches`, or `None` if the data is something
                else.
            callbacks: list, with this one.
            **arguments: See `keras.Model.fit`.

        Returns:
            `keras.callbacks.History` of all epochs.
        """
        callbacks = keras.tree.flatten(callbacks)
        self._check_arguments(model, batches, callbacks, steps_per_epoch)
        history = _History()
        # The others come first, so that what they saw of a step is saved.
        self._others = [each for each in callbacks if each is not self]
        self._others.append(history)
        self._batches = batches
        self._steps_per_epoch = steps_per_epoch
        self._step, self._epoch, self._step_in_epoch = 0, initial_epoch, 0
        # It may still be True from an earlier `fit`.
        model.stop_training = False
        with self._catch_signals(), self._open_store(create=True) as store:
            self._optimizer = optimizer_settings(model.optimizer)
            self._restored = self._restore_latest(store, model)
            if self._restored:
                self._take_over(self._restored)
                store.delete_after(self._step)  # What is damaged.
                self._tell(epochs, verbose)
            self._store = store
            try:
                self._fit_parts(fit, model, epochs, verbose, arguments)
            finally:
                self._store = None
        if self._signal:  # While the last checkpoint was written.
            self._exit()
        return history

    def _fit_parts(self, fit, model, epochs, verbose, arguments):
        """Trains what is left, each part in a `fit` of Keras."""
        training = _OneTraining(
            [*self._others, self],
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs,
            steps=self._steps_per_epoch,
            model=model,
        )
        for first, last, first_step in self._parts(epochs):
            if model.stop_training:
                break
            if self._step:
                position = self._batches.position(self._step)
                self._batches.go_to(position)
            training.first_step = first_step
            fit(
                callbacks=training,
                initial_epoch=first,
                epochs=last,
                steps_per_epoch=self._steps_per_epoch - first_step,
                verbose=verbose,
                **arguments,
            )
        training.end()

    def _tell(self, epochs, verbose):
        """Says what is left. That nothing is must not go unnoticed."""
        is_left = any(self._parts(epochs))
        if processes.is_first_process() and (verbose or not is_left):
            done = f"after step {self._step}, with {self._epoch} of {epochs} "
            print(
                f"{self.folder}: going on {done}epochs complete."
                if is_left
                else f"{self.folder}: nothing is left to train {done}epochs "
                "complete. To go on, pass a larger `epochs`; to begin anew, "
                "another folder."
            )

    def _check_arguments(self, model, batches, callbacks, steps_per_epoch):
        if batches is None or not steps_per_epoch:
            raise ValueError(
                "`TrainingCheckpoint` needs data whose position can be saved, "
                "and `steps_per_epoch`. Pass a `grain.IterDataset`, such as "
                "`load_packed` returns. Received: steps_per_epoch="
                f"{steps_per_epoch}, data that "
                f"{'can not' if batches is None else 'can'} be read again"
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "`TrainingCheckpoint` has to see every step. Compile the "
                "model with steps_per_execution=1. Received: "
                f"steps_per_execution={model.steps_per_execution}"
            )
        if sum(isinstance(each, TrainingCheckpoint) for each in callbacks) > 1:
            raise ValueError(
                "Expected one `TrainingCheckpoint`. Received: "
                f"callbacks={callbacks}"
            )

    def _open_store(self, create):
        return CheckpointStore(
            self.folder,
            monitor=self.monitor,
            mode=self.mode,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            create=create,
        )

    def _restore_latest(self, store, model, include_optimizer=True):
        """Returns the run of the latest checkpoint, or None without any."""
        damage = None
        for step in reversed(store.steps):
            try:
                return store.restore(model, step, include_optimizer)
            except DamagedCheckpointError as error:
                if self.on_damage == "raise":
                    raise
                warnings.warn(str(error), stacklevel=2)
                damage = error
        if damage:
            raise damage
        return None

    def _take_over(self, run):
        if run["steps_per_epoch"] != self._steps_per_epoch:
            raise ValueError(
                f"{self.folder} has epochs of {run['steps_per_epoch']} steps. "
                "Go on with as many. Received: steps_per_epoch="
                f"{self._steps_per_epoch}"
            )
        self._batches.go_to(run["data"])
        self._step = run["step"]
        self._epoch = run["epoch"]
        self._step_in_epoch = run["step_in_epoch"]
        self._optimizer = run.get("optimizer", self._optimizer)
        # There may be no step left, and so no `on_train_begin`.
        _set_states(self._others, run["callbacks"])

    def _parts(self, epochs):
        """What is left: first epoch, the one after the last, first step."""
        first = self._epoch
        if self._step_in_epoch:
            yield first, first + 1, self._step_in_epoch
            first += 1
        if first < epochs:
            yield first, epochs, 0

    @contextlib.contextmanager
    def _catch_signals(self):
        self._signal = None  # That came.
        self._handlers = {}  # Those before.
        is_main = threading.current_thread() is threading.main_thread()
        # Python lets the main thread only set handlers. With several
        # processes, JAX has set one.
        if not is_main or processes.are_several():
            yield
            return
        numbers = [signal.SIGTERM]
        if callable(signal.getsignal(signal.SIGINT)):  # It is not ignored.
            numbers.append(signal.SIGINT)
        for number in numbers:
            self._handlers[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                # It is None if it was not set from Python.
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number, frame):
        is_first, self._signal = self._signal is None, number
        if number != signal.SIGINT:
            return
        if not is_first:
            self._handlers[number](number, frame)
        # The signal may have come while something was written there.
        with contextlib.suppress(RuntimeError):
            print(AT_CTRL_C, file=sys.stderr, flush=True)

    def _exit(self):
        handler = self._handlers.get(self._signal)
        if callable(handler):
            handler(self._signal, None)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


class _OneTraining(keras.callbacks.CallbackList):
    """Callbacks to which several calls of `fit` are one training."""

    has_begun = False
    first_step = 0
    last_logs = None

    def on_train_begin(self, logs=None):
        if not self.has_begun:
            self.has_begun = True
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        self.last_logs = logs

    def end(self):
        if self.has_begun:
            super().on_train_end(self.last_logs)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(self.first_step + batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(self.first_step + batch, logs)


class _History(keras.callbacks.History):
    """A history that goes on."""

    def get_state(self):
        return {"epoch": self.epoch, "history": self.history}

    def set_state(self, state):
        self.epoch = state["epoch"]
        self.history = state["history"]


def _stateful(callbacks):
    """Callbacks that have a state, by names."""
    counts = collections.Counter()
    named = {}
    for callback in callbacks:
        if hasattr(callback, "get_state"):
            name = type(callback).__name__
            named[f"{name} {counts[name]}"] = callback
            counts[name] += 1
    return named


def _states(callbacks):
    named = _stateful(callbacks)
    return {name: callback.get_state() for name, callback in named.items()}


def _set_states(callbacks, states):
    for name, callback in _stateful(callbacks).items():
        if name in states:  # Or else it is new.
            callback.set_state(states[name])


def _metrics(model):
    """The values of the metrics' variables, as lists."""
    return [
        np.asarray(variable.value).tolist()
        for variable in model.metrics_variables
    ]


def _set_metrics(model, values):
    variables = model.metrics_variables
    shapes = [variable.shape for variable in variables]
    if [np.shape(value) for value in values] != shapes:
        raise ValueError(
            "Within an epoch, training goes on with the metrics only that it "
            "was saved with. Compile the model with the same. Received: "
            f"{[variable.path for variable in variables]}, and saved values "
            f"of the shapes {[np.shape(value) for value in values]}"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(np.asarray(value, variable.dtype))
