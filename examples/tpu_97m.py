"""Trains the 97M model from nothing on a TPU of Colab or Kaggle.

Get the repository and install it, in a notebook with a TPU (Colab has v5e-1
and v6e-1, Kaggle v5e-8 and v3-8; REPOSITORY is the address of this one):

    !git clone REPOSITORY keras_bwetaf
    %pip install -q "./keras_bwetaf[tpu,train,data]"

A session ends after some hours, and its disk is deleted. On Colab, keep the
run in your Google Drive:

    from google.colab import drive
    drive.mount("/content/drive")
    !python keras_bwetaf/examples/tpu_97m.py --run /content/drive/MyDrive/run

On Kaggle, choose "Persistence: Files only" in the notebook's settings, which
keeps `/kaggle/working`:

    !python keras_bwetaf/examples/tpu_97m.py --run /kaggle/working/run

The card's recipe: TinyStories first, then FineWeb, 32 rows of 2048 tokens a
step, 3.4 billion tokens in all. When a session has ended, run the same command
in the next one: it goes on with the step after the last checkpoint, exactly.
A single chip, as Colab has, does not hold 32 rows at once: there, add
`--gradient-accumulation-steps 4`.
"""

import argparse
from pathlib import Path

import keras_bwetaf
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.training import Monitor, TrainingCheckpoint

import keras  # isort: skip  after keras_bwetaf, which chooses the backend

STORIES, WEB = "tinystories", "fineweb"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--preset", default="97m")
    parser.add_argument("--first", default=STORIES, help="data to begin with")
    parser.add_argument("--then", default=WEB, help="data to go on with")
    parser.add_argument("--first-rows", type=int, default=200_000)
    parser.add_argument("--validation-fraction", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=51_700)
    parser.add_argument("--steps-per-epoch", type=int, default=517)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    # A notebook has arguments of its own.
    arguments, _ = parser.parse_known_args(arguments)
    if arguments.steps % arguments.steps_per_epoch:
        parser.error("--steps must be a multiple of --steps-per-epoch")
    run, batch_size = arguments.run, arguments.batch_size

    # Each chip (of v3, each core) works on its part of every batch.
    keras.distribution.set_distribution(
        keras_bwetaf.distribution.data_parallel()
    )
    keras.utils.set_random_seed(0)
    lm = keras_bwetaf.from_preset(
        arguments.preset,
        load_weights=False,
        dtype="bfloat16",
        rope_dtype="float32",
    )
    lm.compile(
        keras_bwetaf.recipe("97m", total_steps=arguments.steps),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )

    tokenizer = lm.preprocessor.tokenizer
    options = {
        "sequence_length": lm.backbone.max_sequence_length,
        "batch_size": batch_size,
        "tokenizer": tokenizer,
    }
    first, then = run / "first", run / "then"
    pack(arguments.first, first, tokenizer)
    pack(
        arguments.then,
        then,
        tokenizer,
        validation_fraction=arguments.validation_fraction,
        # Of FineWeb, a third is enough; a notebook has little disk.
        max_tokens=arguments.steps * batch_size * options["sequence_length"],
    )
    lm.fit(
        load_packed([(first, arguments.first_rows), (then, None)], **options),
        steps_per_epoch=arguments.steps_per_epoch,
        epochs=arguments.steps // arguments.steps_per_epoch,
        validation_data=load_packed(
            then, split="validation", repeat=True, **options
        ),
        validation_steps=8,
        verbose=0,
        callbacks=[
            Monitor(run, total_steps=arguments.steps),
            TrainingCheckpoint(run / "checkpoints", save_every=500),
        ],
    )
    lm.save_to_preset(run / "model")
    return lm


if __name__ == "__main__":
    main()
