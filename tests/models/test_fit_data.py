"""What data `fit`, `evaluate` and `predict` take, and what they refuse."""

import itertools
import re

import grain
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

from keras_bwetaf import BwETAFCausalLMPreprocessor, train_tokenizer
from tests.models.test_fit import make_lm

TEXTS = [f"{letter} light of the day" for letter in "abcdefghijkl"]
NUM = len(TEXTS)
LENGTH = 8
WEIGHTS = np.linspace(0, 2, NUM).astype("float32")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 9, 280)


@pytest.fixture(scope="module")
def arrays(tokenizer):
    """Inputs, labels and weights of the texts."""
    return numpy(BwETAFCausalLMPreprocessor(tokenizer, LENGTH)(TEXTS))


def numpy(tree):
    return keras.tree.map_structure(np.asarray, tree)


class Recorder:
    """A model whose steps train nothing, and keep the batches."""

    def __init__(self, tokenizer, has_preprocessor=True, **arguments):
        self.lm = make_lm(
            keras.optimizers.SGD(0.0),
            vocabulary_size=280,
            run_eagerly=True,
            **arguments,
        )
        if has_preprocessor:
            self.lm.preprocessor = BwETAFCausalLMPreprocessor(tokenizer, LENGTH)
        self.batches, self.validation = [], []
        self.lm.train_step = self._step(self.batches)
        self.lm.test_step = self._step(self.validation)

    def _step(self, batches):
        def step(state, data):
            x, y, weights = keras.utils.unpack_x_y_sample_weight(numpy(data))
            batches.append((x, y, weights))
            return {"loss": 0.0}, state

        return step

    def fit(self, x, *args, **arguments):
        self.batches.clear()
        self.validation.clear()
        self.lm.fit(x, *args, verbose=0, **arguments)
        return self

    def evaluate(self, x, *args, **arguments):
        self.validation.clear()
        self.lm.evaluate(x, *args, verbose=0, **arguments)
        return self

    def order(self, arrays, validation=False):
        """Numbers of the rows of each batch."""
        known = arrays[0]["token_ids"].tolist()
        return [
            [known.index(row) for row in x["token_ids"].tolist()]
            for x, _, _ in (self.validation if validation else self.batches)
        ]


@pytest.fixture
def recorder(tokenizer):
    return Recorder(tokenizer)


@pytest.fixture(scope="module")
def lm(tokenizer):
    lm = make_lm(keras.optimizers.SGD(0.0), vocabulary_size=280)
    lm.preprocessor = BwETAFCausalLMPreprocessor(tokenizer, LENGTH)
    return lm


def rows(data, start, stop):
    return keras.tree.map_structure(lambda array: array[start:stop], data)


def flat(batches):
    return list(itertools.chain(*batches))


# === Order ===


@pytest.mark.parametrize("kind", ["texts", "arrays"])
def test_rows_are_shuffled_by_the_seed(recorder, arrays, kind):
    x = (TEXTS,) if kind == "texts" else arrays

    def order(seed, **arguments):
        keras.utils.set_random_seed(seed)
        x_, y, weights = (*x, None, None)[:3]
        recorder.fit(x_, y, 5, sample_weight=weights, epochs=2, **arguments)
        return recorder.order(arrays)

    batches = order(1)
    assert [len(batch) for batch in batches] == [5, 5, 2] * 2
    first, second = flat(batches[:3]), flat(batches[3:])
    assert sorted(first) == sorted(second) == list(range(NUM))
    assert len({tuple(first), tuple(second), tuple(range(NUM))}) == 3
    assert order(1) == batches == order(1, shuffle=True) != order(2)
    assert flat(order(1, shuffle=False)) == [*range(NUM)] * 2


def test_weights_stay_with_their_texts(recorder, arrays):
    recorder.fit(TEXTS, batch_size=5, sample_weight=WEIGHTS)
    assert flat(recorder.order(arrays)) != list(range(NUM))
    for numbers, (_, y, weights) in zip(
        recorder.order(arrays), recorder.batches, strict=True
    ):
        np.testing.assert_array_equal(y, arrays[1][numbers])
        expected = WEIGHTS[numbers][:, None] * arrays[2][numbers]
        np.testing.assert_array_equal(weights, expected)


def test_batches_of_a_py_dataset_are_shuffled(recorder, arrays):
    keras.utils.set_random_seed(0)
    recorder.fit(Numbered(arrays), epochs=2)
    batches = recorder.order(arrays)
    assert sorted(batches[:4]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert sorted(batches[:4]) == sorted(batches[4:]) != batches[:4]


def test_order_that_is_given_stays(recorder, arrays):
    for make in (loader_of_rows, loader_of_texts, generator):
        recorder.fit(make(arrays))
        assert flat(recorder.order(arrays)) == list(range(NUM))
        with pytest.warns(UserWarning, match="`shuffle=True` was passed, but"):
            recorder.fit(make(arrays), shuffle=True)
        assert flat(recorder.order(arrays)) == list(range(NUM))


# === Batches ===


class Numbered(keras.utils.PyDataset):
    def __init__(self, data, **arguments):
        super().__init__(**arguments)
        self.data = data
        self.num_begun = self.num_ended = 0

    def __len__(self):
        return NUM // 3

    def __getitem__(self, index):
        return rows(self.data, 3 * index, 3 * index + 3)

    def on_epoch_begin(self):
        self.num_begun += 1

    def on_epoch_end(self):
        self.num_ended += 1


class NumberedTexts(Numbered):
    def __getitem__(self, index):
        return TEXTS[3 * index : 3 * index + 3]


def batches_of(data):
    return [rows(data, start, start + 3) for start in range(0, NUM, 3)]


def generator(arrays):
    return (batch for batch in batches_of(arrays))


def samples(arrays):
    """Copies, since PyTorch warns of arrays that can't be written to."""
    x, y, weights = keras.tree.map_structure(np.array, arrays)
    return [
        ({name: array[i] for name, array in x.items()}, y[i], weights[i])
        for i in range(NUM)
    ]


def loader_of_rows(arrays):
    return torch.utils.data.DataLoader(samples(arrays), batch_size=3)


def loader_of_texts(arrays):
    return torch.utils.data.DataLoader(TEXTS, batch_size=3)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


KINDS = {
    "generator": generator,
    "generator of texts": lambda arrays: (
        TEXTS[i : i + 3] for i in range(0, NUM, 3)
    ),
    "iterator": lambda arrays: iter(batches_of(arrays)),
    "PyDataset": Numbered,
    "PyDataset of texts": NumberedTexts,
    "PyDataset with threads": lambda arrays: Numbered(arrays, workers=2),
    "DataLoader": loader_of_rows,
    "DataLoader of texts": loader_of_texts,
    "DataLoader without a length": lambda arrays: torch.utils.data.DataLoader(
        Stream(samples(arrays)), batch_size=3
    ),
    "Grain, iterated": lambda arrays: grain.MapDataset.source(
        batches_of(arrays)
    ).to_iter_dataset(),
    "Grain, iterated texts": lambda arrays: (
        grain.MapDataset.source(TEXTS).to_iter_dataset().batch(3)
    ),
    "Grain of texts": lambda arrays: grain.MapDataset.source(TEXTS).batch(3),
    "tf.data": lambda arrays: tf.data.Dataset.from_tensor_slices(arrays).batch(
        3
    ),
    "tf.data of texts": lambda arrays: tf.data.Dataset.from_tensor_slices(
        TEXTS
    ).batch(3),
}


def assert_all_rows(batches, arrays):
    assert len(batches) == NUM // 3
    x = {
        name: np.concatenate([batch[0][name] for batch in batches])
        for name in arrays[0]
    }
    order = np.argsort(x["token_ids"][:, 0], kind="stable")
    expected = np.argsort(arrays[0]["token_ids"][:, 0], kind="stable")
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(x[name][order], array[expected])
    for i in (1, 2):
        received = np.concatenate([batch[i] for batch in batches])
        np.testing.assert_array_equal(received[order], arrays[i][expected])


@pytest.mark.parametrize("kind", KINDS)
def test_batches(recorder, arrays, kind):
    """All are read, once, and nothing warns."""
    make = KINDS[kind]
    can_follow = not kind.startswith("Grain of")  # KerasHub's own `fit`.
    validation = make(arrays) if can_follow else arrays
    recorder.fit(make(arrays), validation_data=validation)
    assert_all_rows(recorder.batches, arrays)
    if can_follow:
        assert_all_rows(recorder.validation, arrays)
    recorder.evaluate(make(arrays))
    assert_all_rows(recorder.validation, arrays)


@pytest.mark.parametrize(
    "kind", ["PyDataset", "DataLoader of texts", "Grain, iterated"]
)
def test_batches_are_read_again(recorder, arrays, kind):
    make = KINDS[kind]
    recorder.fit(make(arrays), epochs=3, validation_data=make(arrays))
    for i in range(0, 12, 4):
        assert_all_rows(recorder.batches[i : i + 4], arrays)
        assert_all_rows(recorder.validation[i : i + 4], arrays)


def test_a_py_dataset_is_told_of_epochs(recorder, arrays):
    dataset = Numbered(arrays)
    recorder.fit(dataset, epochs=2)
    assert dataset.num_begun == 2 <= dataset.num_ended


def test_an_endless_py_dataset(recorder, arrays):
    class Endless(Numbered):
        num_batches = None

        def __getitem__(self, index):
            return super().__getitem__(index % 4)

    recorder.fit(Endless(arrays), steps_per_epoch=4, epochs=2)
    assert flat(recorder.order(arrays)) == [*range(NUM)] * 2


def test_data_that_ends_too_early_still_warns(recorder, arrays):
    with pytest.warns(UserWarning, match="Your input ran out of data"):
        recorder.fit(KINDS["Grain, iterated"](arrays), steps_per_epoch=9)
    with pytest.warns(UserWarning, match="Your input ran out of data"):
        recorder.evaluate(generator(arrays), steps=9)


def test_an_iterator_is_read_once(recorder, arrays):
    with pytest.raises(ValueError, match="2 epochs, steps_per_epoch=None"):
        recorder.fit(generator(arrays), epochs=2)
    with pytest.raises(ValueError, match="2 epochs, validation_steps=None"):
        recorder.fit(TEXTS, epochs=2, validation_data=generator(arrays))
    recorder.fit(generator(arrays), epochs=2, steps_per_epoch=2)
    assert flat(recorder.order(arrays)) == list(range(NUM))


def test_nothing_beside_batches(recorder, arrays):
    for kind in ("generator", "PyDataset", "DataLoader", "Grain, iterated"):
        for name, value in (
            ("y", arrays[1]),
            ("sample_weight", arrays[2]),
            ("batch_size", 4),
        ):
            with pytest.raises(ValueError, match=rf"Received.*\['{name}'\]"):
                recorder.fit(KINDS[kind](arrays), **{name: value})


def test_validation_beside_a_map_dataset(recorder, arrays):
    """KerasHub takes it."""
    data = KINDS["Grain of texts"](arrays)
    recorder.fit(data, validation_data=(TEXTS, None, WEIGHTS))
    ((x, y, weights),) = recorder.validation
    np.testing.assert_array_equal(weights, WEIGHTS[:, None] * arrays[2])
    for other in (generator(arrays), Numbered(arrays)):
        with pytest.raises(ValueError, match="`to_iter_dataset"):
            recorder.fit(data, validation_data=other)
    with pytest.raises(ValueError, match="batch size 4"):
        recorder.fit(data, validation_data=TEXTS, validation_batch_size=4)


# === Texts ===


class Column(list):
    """Such as `datasets` has: a sequence."""


TEXT_KINDS = {
    "list": list,
    "tuple": tuple,
    "objects": lambda texts: np.array(texts, object),
    "characters": np.array,
    "array of bytes": lambda texts: np.array(texts, "S"),
    "tensor": tf.constant,
    "bytes": lambda texts: [text.encode() for text in texts],
    "column": Column,
}


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_texts(recorder, arrays, kind):
    texts = TEXT_KINDS[kind](TEXTS)
    recorder.fit(texts, shuffle=False, validation_data=texts)
    for batches in (recorder.batches, recorder.validation):
        ((x, y, weights),) = batches
        np.testing.assert_array_equal(x["token_ids"], arrays[0]["token_ids"])
        np.testing.assert_array_equal(y, arrays[1])


def test_two_texts_are_no_texts_and_labels(recorder, arrays):
    for texts in (TEXTS[:2], tuple(TEXTS[:3]), TEXTS[:1]):
        recorder.fit(texts, validation_data=texts)
        ((x, _, _),) = recorder.validation
        assert len(x["token_ids"]) == len(texts)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("a text", "Expected a list of str.*Received: x='a text'"),
        (b"bytes", "Received: x=b'bytes'"),
        (np.array("a text"), r"Received: x=ndarray of shape \(\)"),
        (np.array([TEXTS]), r"Received: x=ndarray of shape \(1, 12\)"),
        ([], r"Expected at least one text. Received: x=\[\]"),
        ([1, 2], r"Texts must be str.*Received: x\[0\]=1"),
        (["a", None], r"Texts must be str.*Received: x\[1\]=None"),
        ([TEXTS], r"Texts must be str.*Received: x\[0\]=\['a light"),
        (["a", b"\xff"], r"UTF-8.*Received: x\[1\]=b'\\xff'"),
        (np.ones((2, 8), int), r"Received: x\[0\]|ndarray of shape \(2, 8\)"),
        (None, "Received: x=NoneType"),
        ({"input_ids": np.ones((2, 8), int)}, r"Received: x=\['input_ids'\]"),
    ],
)
def test_other_inputs_are_refused(recorder, x, message):
    for call in (recorder.fit, recorder.evaluate, recorder.lm.predict):
        with pytest.raises(ValueError, match=message) as error:
            call(x)
        assert len(str(error.value)) < 400


def test_what_a_tuple_holds(recorder, arrays):
    with pytest.raises(ValueError, match="Received: a tuple of 4 elements"):
        recorder.fit(TEXTS, validation_data=(*arrays, arrays[1]))
    with pytest.raises(ValueError, match="Received: a list of 0 elements"):
        recorder.fit(TEXTS, validation_data=[])


def test_without_a_preprocessor(tokenizer, arrays):
    recorder = Recorder(tokenizer, has_preprocessor=False)
    for kind in ("generator", "iterator", "PyDataset", "DataLoader"):
        recorder.fit(KINDS[kind](arrays))
        assert_all_rows(recorder.batches, arrays)
    for kind in ("generator of texts", "PyDataset of texts"):
        with pytest.raises(ValueError, match="x=list, preprocessor=None"):
            recorder.fit(KINDS[kind](arrays))
    with pytest.raises(ValueError, match="x=list, preprocessor=None"):
        recorder.fit(TEXTS * 1000)


# === Parts ===


@pytest.mark.parametrize("kind", ["texts", "arrays"])
def test_validation_split(recorder, arrays, kind):
    x, y, weights = arrays if kind == "arrays" else (TEXTS, None, WEIGHTS)
    recorder.fit(x, y, sample_weight=weights, validation_split=0.25)
    assert sorted(flat(recorder.order(arrays))) == list(range(9))
    assert flat(recorder.order(arrays, validation=True)) == [9, 10, 11]
    expected = weights if kind == "arrays" else weights[:, None] * arrays[2]
    np.testing.assert_array_equal(recorder.validation[0][2], expected[9:])


def test_validation_split_that_can_not_be(recorder, arrays):
    for share in (0.99, 1.5, -0.5):
        with pytest.raises(ValueError, match=f"split={share} of 12 rows"):
            recorder.fit(TEXTS, validation_split=share)
    with pytest.raises(ValueError, match="needs texts or arrays.*x=Numbered"):
        recorder.fit(Numbered(arrays), validation_split=0.5)


def test_validation_batch_size(recorder, arrays):
    def sizes(**arguments):
        recorder.fit(TEXTS, validation_data=TEXTS, **arguments)
        return [len(x["token_ids"]) for x, _, _ in recorder.validation]

    assert sizes() == [12]
    assert sizes(batch_size=5) == [5, 5, 2]
    assert sizes(batch_size=5, validation_batch_size=7) == [7, 5]


# === Labels and weights ===


@pytest.mark.slow
def test_weights_count_alike(lm, arrays):
    """Beside texts, arrays, and arrays without labels."""
    x, y, weights = arrays
    expected = lm.evaluate(
        x, y, sample_weight=WEIGHTS[:, None] * weights, verbose=0
    )
    without = lm.evaluate(TEXTS, verbose=0)
    for data in (
        (TEXTS, None, WEIGHTS),
        (TEXTS, None, WEIGHTS.tolist()),
        (x, np.where(weights, y, -1), WEIGHTS),
        (iter([(TEXTS, None, WEIGHTS)]), None, None),
    ):
        inputs, labels, given = data
        received = lm.evaluate(inputs, labels, sample_weight=given, verbose=0)
        assert received == pytest.approx(expected, rel=1e-6)
    history = lm.fit(
        TEXTS, validation_data=(TEXTS, None, WEIGHTS), verbose=0
    ).history
    assert history["val_loss"][0] == pytest.approx(expected[0], rel=1e-6)
    history = lm.fit(TEXTS, sample_weight=WEIGHTS, verbose=0).history
    assert history["loss"][0] == pytest.approx(expected[0], rel=1e-6)
    received = lm.train_on_batch(TEXTS, sample_weight=WEIGHTS)
    assert received[0] == pytest.approx(expected[0], rel=1e-6)
    assert abs(without[0] / expected[0] - 1) > 1e-5


def test_weights_without_labels(recorder, arrays):
    """A position predicts the next token, and weighs what it was given."""
    x, _, _ = arrays
    recorder.fit(x, sample_weight=WEIGHTS, shuffle=False)
    ((_, y, weights),) = recorder.batches
    np.testing.assert_array_equal(weights, WEIGHTS)
    is_next = x["padding_mask"][:, 1:] > 0
    np.testing.assert_array_equal(
        y[:, :-1], np.where(is_next, x["token_ids"][:, 1:], -1)
    )
    assert (y[:, -1] == -1).all()
    assert not is_next.all()


@pytest.mark.parametrize("call", ["fit", "evaluate", "validation_data"])
def test_what_texts_can_not_have(recorder, arrays, call):
    def give(y, sample_weight):
        if call == "validation_data":
            recorder.fit(TEXTS, validation_data=(TEXTS, y, sample_weight))
        else:
            getattr(recorder, call)(TEXTS, y, sample_weight=sample_weight)

    with pytest.raises(ValueError, match="`y` can't.*Received: y=ndarray"):
        give(arrays[1], None)
    for wrong in (arrays[2], WEIGHTS[:3], WEIGHTS[:, None], 1.0):
        shape = re.escape(str(np.shape(wrong)))
        with pytest.raises(ValueError, match=f"sample_weight of shape {shape}"):
            give(None, wrong)
    with pytest.raises(ValueError, match="with 12 numbers that are not"):
        give(None, np.full(NUM, np.nan))


def test_class_weight_is_refused(recorder, arrays):
    for x in (TEXTS, arrays[0], Numbered(arrays)):
        with pytest.raises(ValueError, match="there is no `class_weight`"):
            recorder.fit(x, class_weight={0: 1.0})


def wrong(arrays, **changes):
    x, y, weights = keras.tree.map_structure(np.copy, arrays)
    for name, (place, value) in changes.items():
        array = {**x, "y": y, "weights": weights}[name]
        array[place] = value
    return x, y, weights


def test_numbers_out_of_range_are_refused(tokenizer, arrays):
    arrays = arrays[0], arrays[1], arrays[2].astype("float32")
    padding = tuple(np.argwhere(arrays[0]["padding_mask"] == 0)[0])
    for changes, message in (
        (dict(token_ids=((1, 0), 280)), "token_ids up to 280"),
        (dict(token_ids=((1, 0), -1)), "must not be negative.*Received: -1"),
        (dict(y=((1, 0), 280)), "Received: y up to 280"),
        (dict(weights=((1, 0), np.inf)), "with 1 numbers that are not"),
    ):
        recorder = Recorder(tokenizer)
        data = wrong(arrays, **changes)
        calls = (
            lambda lm, x, y, w: lm.fit(x, y, sample_weight=w),
            lambda lm, x, y, w: lm.evaluate(x, y, sample_weight=w),
            lambda lm, *data: lm.fit(TEXTS, validation_data=data),
            lambda lm, *data: lm.fit(iter([data])),
            lambda lm, *data: lm.fit(Numbered(data), shuffle=False),
        )
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(recorder, *data)
    x, y, weights = wrong(arrays, token_ids=(padding, -100), y=((1, 0), -100))
    Recorder(tokenizer).fit(x, y, sample_weight=weights)


def test_shapes_that_differ_are_refused(recorder, arrays):
    x, y, weights = arrays
    for data, message in (
        (({**x, "token_ids": y[0]}, None, None), "the same shape"),
        (({**x, "padding_mask": y[:2]}, None, None), "the same shape"),
        ((x, y[:, 1:], None), r"y of shape \(12, 7\)"),
        ((x, y, weights[:, 1:]), r"sample_weight of shape \(12, 7\)"),
        (({**x, "labels": y}, None, None), r"x=\['labels', 'padding_mask'"),
    ):
        with pytest.raises(ValueError, match=message):
            recorder.evaluate(data[0], data[1], sample_weight=data[2])


def test_every_negative_label_is_ignored(lm, arrays):
    """As by a mask, also beside documents."""
    x, y, weights = arrays
    x = {**x, "padding_mask": np.ones_like(x["padding_mask"], "int32")}
    x["padding_mask"][:, 3:] = 2
    expected = lm.evaluate(x, y, sample_weight=weights, verbose=0)
    for ignored in (-1, -100, -5):
        labels = np.where(weights > 0, y, ignored)
        assert lm.evaluate(x, labels, verbose=0) == pytest.approx(expected)
    assert lm.evaluate(x, y, verbose=0)[0] != pytest.approx(expected[0])


def test_predict(lm, arrays):
    """The same logits, whatever holds the rows."""
    expected = lm.predict(arrays[0], verbose=0)
    assert expected.shape == (NUM, LENGTH, 280)
    for x in (TEXTS, Numbered(arrays), loader_of_texts(arrays)):
        np.testing.assert_allclose(
            lm.predict(x, verbose=0), expected, atol=1e-5
        )
