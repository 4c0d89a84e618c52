"""A training that a test interrupts and runs again.

`python -m tests.training.resumable FOLDER JSON` trains a small model on
`FOLDER/rows.npy`, and writes `steps.txt`, a line for each step of all runs,
and in the end `final.npz`. The JSON holds arguments of `TrainingCheckpoint`,
and `"signal"` and `"step"`: what the process sends itself, and when.
"""

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np

import keras_bwetaf
from keras_bwetaf.data import load_packed
from keras_bwetaf.training import TrainingCheckpoint, recipe

LENGTH, BATCH, VOCABULARY = 16, 4, 64
STEPS_PER_EPOCH, EPOCHS, SAVE_EVERY = 6, 3, 4


def build_lm(hidden_dim=16):
    keras.utils.set_random_seed(0)
    backbone = keras_bwetaf.BwETAFBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=hidden_dim,
        intermediate_dim=24,
        max_sequence_length=LENGTH,
        dropout=0.2,
    )
    return keras_bwetaf.BwETAFCausalLM(backbone)


def make_lm(hidden_dim=16, **compile_arguments):
    lm = build_lm(hidden_dim)
    lm.compile(recipe("97m", total_steps=40), **compile_arguments)
    return lm


def write_rows(path, num_rows=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, VOCABULARY, (num_rows, LENGTH))
    np.save(path, rows.astype("uint16"))
    return path


def read_rows(path, **arguments):
    return load_packed(
        path,
        **{"sequence_length": LENGTH, "batch_size": BATCH, **arguments},
    )


def state(lm):
    """The bytes of each array that the next step depends on."""
    variables = lm.variables + lm.optimizer.variables
    return {
        f"{i} {variable.dtype} {tuple(variable.shape)}": np.frombuffer(
            np.array(variable.value).tobytes(), "uint8"
        )
        for i, variable in enumerate(variables)
    }


class Steps(keras.callbacks.Callback):
    """Writes a line for each step; a state of its own is saved, too."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.total = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.total += float(logs["loss"])
        numbers = [float(logs["loss"]), float(logs["accuracy"]), self.total]
        line = " ".join(number.hex() for number in numbers)
        with self.path.open("a") as file:
            file.write(f"{self.epoch * STEPS_PER_EPOCH + batch + 1} {line}\n")

    def get_state(self):
        return {"total": self.total}

    def set_state(self, state):
        self.total = state["total"]


class Interruption(keras.callbacks.Callback):
    """Sends the process a signal after a step."""

    def __init__(self, step, signal):
        super().__init__()
        self.step, self.signal = step, signal

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch * STEPS_PER_EPOCH + batch + 1 == self.step:
            os.kill(os.getpid(), self.signal)


def main(folder, arguments):
    signal, step = arguments.pop("signal", None), arguments.pop("step", None)
    callbacks = [
        TrainingCheckpoint(
            folder / "checkpoints",
            **{"save_every": SAVE_EVERY, "keep_last": 9, **arguments},
        ),
        Steps(folder / "steps.txt"),
    ]
    if signal:
        callbacks += [Interruption(step, signal)]
    lm = make_lm()
    history = lm.fit(
        read_rows(folder / "rows.npy", seed=3),
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=EPOCHS,
        validation_data=read_rows(folder / "rows.npy", shuffle=False),
        validation_steps=2,
        callbacks=callbacks,
        verbose=2,
    )
    np.savez(folder / "final.npz", **state(lm))
    logs = {"epoch": history.epoch, **history.history}
    (folder / "history.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
