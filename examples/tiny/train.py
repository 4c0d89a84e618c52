"""Trains the model that is the preset "tiny", from nothing, without network.

    pip install ".[train,tfds]"
    python -m examples.tiny.train runs/tiny

A grammar makes up children's stories; they become a TensorFlow data set,
tokens, batches, and a model that tells stories of its own. Run it again after
an interruption, and it goes on where it was.
"""

import argparse
import os
from pathlib import Path

import converters
import keras_bwetaf
from keras_bwetaf.training import Monitor, TrainingCheckpoint

import keras  # isort: skip  after keras_bwetaf, which chooses the backend

VOCABULARY_SIZE = 1024
SEQUENCE_LENGTH = 256
BATCH_SIZE = 8
EVALUATIONS = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of all that is made")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    if arguments.steps % EVALUATIONS:
        parser.error(f"--steps must be a multiple of {EVALUATIONS}")
    run, steps = arguments.run, arguments.steps
    keras.utils.set_random_seed(0)

    prepare_stories(run / "tfds")
    tokenizer = keras_bwetaf.train_tokenizer(
        keras_bwetaf.data.read_documents("tfds:grammar_stories"),
        VOCABULARY_SIZE,
    )
    train, test = (
        load(split, run / "packed" / split, tokenizer)
        for split in ("train", "test")
    )
    lm = make_model(tokenizer)
    lm.compile(keras_bwetaf.recipe("97m", total_steps=steps))
    lm.fit(
        train,
        steps_per_epoch=steps // EVALUATIONS,
        epochs=EVALUATIONS,
        validation_data=test,
        validation_steps=50,
        verbose=0,
        callbacks=[
            Monitor(run, total_steps=steps),
            TrainingCheckpoint(run / "checkpoints", save_every=500),
        ],
    )
    lm.save_to_preset(run / "model")
    converters.convert(
        run / "model",
        run / "preset",
        to="safetensors",
        dtype="bfloat16",
        overwrite=True,
    )
    print(lm.generate("Once upon a time", max_new_tokens=250, seed=1))


def prepare_stories(folder):
    """Writes the data set, and lets `tfds:grammar_stories` find it."""
    from examples.tiny.stories import GrammarStories

    os.environ["TFDS_DATA_DIR"] = str(folder)
    builder = GrammarStories(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


def load(split, folder, tokenizer):
    """Tokenizes a split, once, and returns batches of it."""
    source = "tfds:grammar_stories"
    keras_bwetaf.data.pack(source, folder, tokenizer, split=split)
    return keras_bwetaf.data.load_packed(
        folder,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        tokenizer=tokenizer,
    )


def make_model(tokenizer):
    """2.6 million parameters, a fortieth of the published model."""
    backbone = keras_bwetaf.BwETAFBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=4,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=256,
        intermediate_dim=512,
        max_sequence_length=SEQUENCE_LENGTH,
        rope_dtype="float32",
        dropout=0.0,
        initializer_range=0.02,
        embedding_initializer_range=0.02,
    )
    preprocessor = keras_bwetaf.BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=SEQUENCE_LENGTH
    )
    return keras_bwetaf.BwETAFCausalLM(backbone, preprocessor)


if __name__ == "__main__":
    main()
