"""Trains a model on several hosts, which run this script at the same time.

Plain hosts: on each, with the first one's name, any free port, and its number.

    python -m examples.two_hosts --coordinator host0:8476 --processes 2 \\
        --process 0 --data corpus.txt --run /shared/run

One machine and two terminals do, too, with `--coordinator localhost:8476`. On
SLURM and on TPU pods, JAX finds out by itself who the others are:

    srun --nodes 2 --ntasks-per-node 1 \\
        python -m examples.two_hosts --data corpus.txt --run /shared/run
    gcloud compute tpus tpu-vm ssh NAME --worker=all \\
        --command "python -m examples.two_hosts --data ... --run /shared/run"

All hosts must see the folder of the run. When one of them stops, the others
stop, too: start all again, and the training goes on, exactly.
"""

import argparse
from pathlib import Path

import keras_bwetaf
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.training import Monitor, TrainingCheckpoint

import keras  # isort: skip  after keras_bwetaf, which chooses the backend


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is")
    parser.add_argument("--data", required=True, help="text, for `pack`")
    parser.add_argument("--run", type=Path, required=True, help="a folder")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="of all")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--steps-per-epoch", type=int, default=200)
    arguments = parser.parse_args(arguments)
    if arguments.steps % arguments.steps_per_epoch:
        parser.error("--steps must be a multiple of --steps-per-epoch")
    run = arguments.run

    # First of all: nothing may be computed before.
    keras_bwetaf.initialize(
        arguments.coordinator, arguments.processes, arguments.process
    )
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(
        keras_bwetaf.distribution.data_parallel()
    )
    lm = keras_bwetaf.from_preset(arguments.preset, load_weights=False)
    lm.compile(keras_bwetaf.recipe("97m", total_steps=arguments.steps))
    tokenizer = lm.preprocessor.tokenizer
    pack(arguments.data, run / "packed", tokenizer)  # The first process does.
    lm.fit(
        load_packed(
            run / "packed",
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            tokenizer=tokenizer,
        ),
        steps_per_epoch=arguments.steps_per_epoch,
        epochs=arguments.steps // arguments.steps_per_epoch,
        verbose=0,
        callbacks=[
            Monitor(run, total_steps=arguments.steps),
            TrainingCheckpoint(
                run / "checkpoints", save_every=arguments.steps_per_epoch
            ),
        ],
    )
    lm.save_to_preset(run / "model")
    if keras_bwetaf.is_first_process():
        print(f"The model is in {run / 'model'}.")


if __name__ == "__main__":
    main()
