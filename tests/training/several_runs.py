"""One of several processes that call `train`.

`python -m tests.training.several_runs ADDRESS PROCESSES PROCESS FOLDER JSON`,
where the JSON holds the run's settings.
"""

import json
import sys

import keras_bwetaf

if __name__ == "__main__":
    address, num_processes, process, folder, settings = sys.argv[1:]
    keras_bwetaf.initialize(address, int(num_processes), int(process))
    keras_bwetaf.train(folder, **json.loads(settings))
