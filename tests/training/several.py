"""One of several processes of a training, which a test starts.

`python -m tests.training.several ADDRESS NUM_PROCESSES PROCESS_ID FOLDER JSON`
trains the model of `resumable` on `FOLDER/rows.npy`. Each process writes
`steps-ID.txt`, a line for each step of all runs, and in the end
`final-ID.npz`. The JSON holds `"epochs"`, the `"strategy"`, and `"process"`,
`"signal"` and `"step"`: which process sends itself what, and when.
"""

import json
import signal
import sys
import time
from pathlib import Path

import keras_bwetaf

import keras  # isort: skip  after keras_bwetaf, which chooses the backend
import numpy as np

from keras_bwetaf import processes
from keras_bwetaf.training import Monitor, TrainingCheckpoint
from tests.training.resumable import (
    SAVE_EVERY,
    STEPS_PER_EPOCH,
    Interruption,
    Steps,
    make_lm,
    read_rows,
    state,
)


class NoticedInterruption(Interruption):
    """Gives JAX the second after which it looks for a signal."""

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        if self.epoch * STEPS_PER_EPOCH + batch + 1 == self.step:
            time.sleep(4)


def main(address, num_processes, process_id, folder, arguments):
    keras_bwetaf.initialize(
        address, num_processes, process_id, heartbeat_timeout_seconds=20
    )
    strategy = getattr(
        keras_bwetaf.distribution, arguments.get("strategy", "data_parallel")
    )
    keras.distribution.set_distribution(strategy())
    lm = make_lm()
    callbacks = [
        Monitor(folder / "monitor", every=1),
        TrainingCheckpoint(
            folder / "checkpoints", save_every=SAVE_EVERY, keep_last=9
        ),
        Steps(folder / f"steps-{process_id}.txt"),
    ]
    if arguments.get("process") == process_id:
        is_noticed = arguments["signal"] == signal.SIGTERM
        kind = NoticedInterruption if is_noticed else Interruption
        callbacks.append(kind(arguments["step"], arguments["signal"]))
    lm.fit(
        read_rows(folder / "rows.npy", seed=3),
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=arguments["epochs"],
        validation_data=read_rows(folder / "rows.npy", shuffle=False),
        validation_steps=2,
        callbacks=callbacks,
        verbose=2,
    )
    lm.save_to_preset(folder / "model", include_optimizer=True)
    with processes.gathered(lm.variables + lm.optimizer.variables):
        np.savez(folder / f"final-{process_id}.npz", **state(lm))


if __name__ == "__main__":
    address, num_processes, process_id, folder, arguments = sys.argv[1:]
    main(
        address,
        int(num_processes),
        int(process_id),
        Path(folder),
        json.loads(arguments),
    )
