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

The card's recipe: TinyStories first, then FineWeb, 3.4 billion tokens in all.
How many rows a step has, and in how many parts, is what
`distribution.recommend` says for the TPU that is there. When a session has
ended, run the same command in the next one, on the same kind of TPU: it goes on
with the step after the last checkpoint, exactly.
"""

import argparse
from pathlib import Path

import keras_bwetaf
from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.training import Monitor, TrainingCheckpoint

import keras  # isort: skip  after keras_bwetaf, which chooses the backend

STORIES, WEB = "tinystories", "fineweb"
ROWS = 1_654_400  # of 2048 tokens, in all


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--preset", default="97m")
    parser.add_argument("--first", default=STORIES, help="data to begin with")
    parser.add_argument("--then", default=WEB, help="data to go on with")
    parser.add_argument("--first-rows", type=int, default=200_000)
    parser.add_argument("--validation-fraction", type=float, default=0.001)
    parser.add_argument("--steps", type=int, help="for 3.4 billion tokens")
    parser.add_argument("--steps-per-epoch", type=int, default=517)
    parser.add_argument("--batch-size", type=int, help="as recommended")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    # A notebook has arguments of its own.
    arguments, _ = parser.parse_known_args(arguments)
    run, batch_size = arguments.run, arguments.batch_size
    num_parts, remat = arguments.gradient_accumulation_steps, "none"
    if batch_size is None:
        recommended = keras_bwetaf.distribution.recommend(arguments.preset)
        print(recommended)
        batch_size = recommended.batch_size
        num_parts = recommended.gradient_accumulation_steps
        remat = recommended.remat
    steps, steps_per_epoch = arguments.steps, arguments.steps_per_epoch
    if steps is None:
        epochs = max(round(ROWS / batch_size / steps_per_epoch), 1)
        steps = epochs * steps_per_epoch
    if steps % steps_per_epoch:
        parser.error("--steps must be a multiple of --steps-per-epoch")

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
        keras_bwetaf.recipe("97m", total_steps=steps),
        remat=remat,
        gradient_accumulation_steps=num_parts,
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
        max_tokens=steps * batch_size * options["sequence_length"],
    )
    lm.fit(
        load_packed([(first, arguments.first_rows), (then, None)], **options),
        steps_per_epoch=steps_per_epoch,
        epochs=steps // steps_per_epoch,
        validation_data=load_packed(
            then, split="validation", repeat=True, **options
        ),
        validation_steps=8,
        verbose=0,
        callbacks=[
            Monitor(run, total_steps=steps),
            TrainingCheckpoint(run / "checkpoints", save_every=500),
        ],
    )
    lm.save_to_preset(run / "model")
    return lm


if __name__ == "__main__":
    main()
