"""Trains the 97M model from nothing on all cores of a TPU: Kaggle or Colab.

Paste it into a notebook on a TPU v3-8 or v2-8, or run it:

    pip install "keras-bwetaf[tpu,train,data]"
    python tpu_97m.py --run /kaggle/working/run

The card's recipe: TinyStories first, then FineWeb, 32 rows of 2048 tokens a
step, 3.4 billion tokens in all. When the session ends, start it again with the
same folder: it goes on with the step after the last checkpoint, exactly.
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
    # A notebook has arguments of its own.
    arguments, _ = parser.parse_known_args(arguments)
    if arguments.steps % arguments.steps_per_epoch:
        parser.error("--steps must be a multiple of --steps-per-epoch")
    run, batch_size = arguments.run, arguments.batch_size

    # Each core works on its part of every batch.
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
    lm.compile(keras_bwetaf.recipe("97m", total_steps=arguments.steps))

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
