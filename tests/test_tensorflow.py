"""TensorFlow and the like: not loaded by us, whole for who loads them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # New processes, which compile.

# Texts, arrays and Grain's data through the model, and saved models.
WITHOUT = """
import sys
import keras, numpy as np
import keras_bwetaf
from keras_bwetaf.training import TrainingCheckpoint

folder = sys.argv[1]
keras.utils.set_random_seed(1)
lm = keras_bwetaf.from_preset("tiny", num_layers=1, load_weights=False)
lm.generate("Once", max_new_tokens=2)
lm.compile("adamw")
texts = ["Once upon a time", "Lily ran."] * 2
lm.preprocessor.sequence_length = 16
lm.fit(texts, batch_size=2, verbose=0)
arrays = {
    "token_ids": np.ones((2, 16), "int32"),
    "padding_mask": np.ones((2, 16), "int32"),
}
lm.fit(arrays, verbose=0)
import grain
batches = grain.MapDataset.source(texts).batch(2)
lm.fit(batches, verbose=0)
lm.fit(
    batches.repeat().to_iter_dataset(grain.ReadOptions(4, 4)),
    steps_per_epoch=1,
    verbose=0,
    callbacks=[TrainingCheckpoint(f"{folder}/checkpoints", save_every=1)],
)
lm.save(f"{folder}/lm.keras")
keras.saving.load_model(f"{folder}/lm.keras")
lm.save_to_preset(f"{folder}/preset")
keras_bwetaf.from_preset(f"{folder}/preset")
loaded = {"tensorflow", "tensorflow_text"} & sys.modules.keys()
assert not loaded, loaded
"""

# KerasHub's layers and data sets of `tf.data`, by themselves and with ours.
WITH = """
import keras, keras_hub, numpy as np
import tensorflow as tf

assert tf.config.get_visible_devices("GPU") == []
words = keras_hub.tokenizers.WordPieceTokenizer(
    ["[UNK]", "the", "sk", "##y"], sequence_length=4
)
assert np.array(words(["the sky"])).tolist() == [[1, 2, 3, 0]]
texts = tf.data.Dataset.from_tensor_slices(["the sky"] * 4).batch(2)
ids = next(iter(texts.map(words)))
assert isinstance(ids, tf.Tensor) and ids.numpy().tolist() == [[1, 2, 3, 0]] * 2
pairs = keras_hub.tokenizers.BytePairTokenizer(
    {"a": 0, "b": 1, "ab": 2}, ["a b"]
)
assert next(iter(texts.map(lambda _: pairs(["ab"])))).to_list() == [[2]]
assert isinstance(pairs.cache, tf.Module)
with open("corpus.txt", "w") as file:
    file.write("the sky the sky the sky")
pieces = keras_hub.tokenizers.compute_word_piece_vocabulary(["corpus.txt"], 20)
assert {"[UNK]", "t", "##h"} <= set(pieces), pieces
packer = keras_hub.layers.StartEndPacker(3, start_value=7)
assert np.array(packer(tf.ragged.constant([[1], [2, 3]]))).tolist() == [
    [7, 1, 0], [7, 2, 3]
]

lm = keras_bwetaf.from_preset("tiny", num_layers=1, load_weights=False)
lm.preprocessor.sequence_length = 16
lm.compile("adamw")
lm.fit(texts, verbose=0)
assert lm.generate(texts, temperature=0, max_new_tokens=2) == lm.generate(
    ["the sky"] * 4, temperature=0, max_new_tokens=2
)
assert lm.preprocessor.tokenizer(tf.constant("the sky")).shape[0] == len(
    lm.preprocessor.tokenizer("the sky")
)
assert keras.saving.serialize_keras_object(tf.TensorShape([1, 2])) == [1, 2]
"""


# Keras's wrappers for scikit-learn, and KerasHub's metrics from rouge_score.
OTHERS = """
import sys
import keras_bwetaf
import keras, keras_hub, numpy as np

loaded = {"sklearn", "rouge_score", "nltk"} & sys.modules.keys()
assert not loaded, loaded
Classifier = keras.wrappers.SKLearnClassifier
assert not isinstance(1, Classifier)
assert "sklearn" not in sys.modules

def model(X, y):
    model = keras.Sequential([keras.layers.Dense(2, activation="softmax")])
    model.compile(loss="categorical_crossentropy")
    return model

class Own(Classifier):
    pass

x, y = np.ones((4, 3)), np.array([0, 1, 0, 1])
for each in (Classifier, Own):
    classifier = each(model, fit_kwargs={"verbose": 0}).fit(x, y)
    assert classifier.predict(x).shape == (4,)
    assert isinstance(classifier, Classifier)
from sklearn.base import BaseEstimator, clone
assert isinstance(clone(classifier), Own) and issubclass(Own, BaseEstimator)

scores = keras_hub.metrics.RougeL()(["a b c"], ["a b d"])
assert round(float(scores["f1_score"]), 3) == 0.667
"""


def run(script, folder):
    # Those of the tests keep TensorFlow silent anyway.
    hidden = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    environment = {
        name: value for name, value in os.environ.items() if name not in hidden
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_texts_arrays_grain_and_saved_models_do_not_load_it(tmp_path):
    run(WITHOUT, tmp_path)


def test_imported_first(tmp_path):
    run("import tensorflow, keras_bwetaf\n" + WITH, tmp_path)


def test_imported_afterwards(tmp_path):
    seed = "import keras; keras.utils.set_random_seed(5)\n"
    check = (
        "import tensorflow as tf; first = tf.random.uniform([]).numpy()\n"
        "tf.random.set_seed(5)\n"
        "assert first == tf.random.uniform([]).numpy()\n"
    )
    stderr = run("import keras_bwetaf\n" + seed + check + WITH, tmp_path)
    assert "oneDNN" not in stderr and "cpu_feature_guard" not in stderr


def test_scikit_learn_and_rouge_score(tmp_path):
    run(OTHERS, tmp_path)
