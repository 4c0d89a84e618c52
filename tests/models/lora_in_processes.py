"""One of several processes that train factors of LoRA, which a test starts.

`python -m tests.models.lora_in_processes ADDRESS NUM_PROCESSES PROCESS_ID
FOLDER` writes what it starts from and what it ends with to
`factors-ID.npz`.
"""

import sys
from pathlib import Path

import keras_bwetaf

import keras  # isort: skip  after keras_bwetaf, which chooses the backend
import numpy as np


def main(address, num_processes, process_id, folder):
    keras_bwetaf.initialize(address, num_processes, process_id)
    # It computes when it is imported, and `initialize` comes before that.
    from tests.models.test_lora import ALL, X, make_lm, values

    keras.distribution.set_distribution(
        keras_bwetaf.distribution.data_parallel()
    )
    lm = make_lm(num_layers=2)
    lm.backbone.enable_lora(2, ALL)
    start = values(lm.trainable_weights)
    lm.compile(keras.optimizers.Adam(0.01))
    mine = slice(process_id, None, num_processes)
    rows = {name: x[mine] for name, x in X.items()}
    lm.fit(rows, batch_size=2, epochs=3, verbose=0)
    end = values(lm.trainable_weights)
    np.savez(
        folder / f"factors-{process_id}.npz",
        **{f"start {path}": value for path, value in start.items()},
        **{f"end {path}": value for path, value in end.items()},
    )
    lm.backbone.save_lora_weights(folder / "lora.safetensors")


if __name__ == "__main__":
    address, num_processes, process_id, folder = sys.argv[1:]
    main(address, int(num_processes), int(process_id), Path(folder))
