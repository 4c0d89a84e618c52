"""Trains a model like one that the original trained, and compares their losses.

    python -m benchmarks.quality CHECKPOINT DOCUMENTS VALIDATION RUN

CHECKPOINT is a folder that the original package saved. A new model of its
configuration is trained from nothing, on as many steps and rows, with the
card's recipe or another; then both are evaluated on the same rows. RUN gets
the losses and checkpoints; the same command goes on after an interruption.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import keras_bwetaf
from keras_bwetaf.data import document_numbers
from keras_bwetaf.training import Monitor, TrainingCheckpoint
from keras_bwetaf.training.recipes import RECIPES

import keras  # isort: skip  after keras_bwetaf, which chooses the backend


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "documents", type=Path, help='JSON: {"train": [text, ...], ...}'
    )
    parser.add_argument("validation", type=Path, help=".npy, rows of tokens")
    parser.add_argument("run", type=Path, help="a folder for each seed")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=48, help="for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="97m")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="to train in; the original trained in bfloat16",
    )
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)

    new = keras_bwetaf.from_preset(
        arguments.checkpoint, dtype=arguments.dtype, load_weights=False
    )
    tokenizer = new.preprocessor.tokenizer
    new.compile(keras_bwetaf.recipe(arguments.recipe, arguments.steps))
    documents = json.loads(arguments.documents.read_text("utf-8"))["train"]
    tokens = arguments.run / "tokens"
    keras_bwetaf.data.pack(documents, tokens, tokenizer)
    dataset = keras_bwetaf.data.load_packed(
        tokens,
        sequence_length=new.backbone.max_sequence_length,
        batch_size=arguments.batch,
        tokenizer=tokenizer,
        seed=arguments.seed,
    )
    new.fit(
        dataset,
        steps_per_epoch=arguments.steps,
        verbose=0,
        callbacks=[
            Monitor(arguments.run, total_steps=arguments.steps, every=10),
            TrainingCheckpoint(arguments.run / "checkpoints", save_every=50),
        ],
    )

    # Both are evaluated in float32.
    original, ours = (
        keras_bwetaf.from_preset(arguments.checkpoint, dtype="float32")
        for _ in range(2)
    )
    ours.set_weights(new.get_weights())
    rows = np.load(arguments.validation)[: arguments.rows].astype("int32")
    print("mask       original  keras_bwetaf")
    for name, mask in (
        ("causal", np.ones_like(rows)),
        ("documents", document_numbers(rows, tokenizer.end_token_id)),
    ):
        inputs = {"token_ids": rows, "padding_mask": mask}
        losses = [
            lm.evaluate(inputs, batch_size=8, verbose=0, return_dict=True)
            for lm in (original, ours)
        ]
        print(f"{name:10}", *(f"{each['loss']:9.4f}" for each in losses))


if __name__ == "__main__":
    main()
