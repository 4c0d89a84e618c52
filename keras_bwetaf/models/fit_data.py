"""What `fit`, `evaluate` and `predict` take, in a form that Keras takes.

KerasHub knows data sets of `tf.data` and Grain, and takes whatever else there
is for arrays, which it puts in a data set that can't be shuffled. So data are
tokenized here and passed to plain Keras. Only Grain's `MapDataset` and
`DataLoader` go through KerasHub, which knows the number of their batches.
"""

import collections.abc
import contextlib
import math
import sys
import warnings

import keras
import numpy as np

from keras_bwetaf.layers.sharding import num_row_groups
from keras_bwetaf.step.loss import IGNORED

EXPECTED = (
    "Expected a list of str, a dict of the arrays 'token_ids' and "
    "'padding_mask', or batches of either: a data set of Grain or `tf.data`, "
    "a `keras.utils.PyDataset`, a PyTorch DataLoader or an iterator"
)
INPUTS = {"token_ids", "padding_mask"}
AUTOTUNE = -1  # Of `tf.data`.


def is_for_keras_hub(data):
    """Whether the data is left to KerasHub."""
    return _is_one_of(data, "grain", "MapDataset", "DataLoader")


def _is_pipeline(data):
    return _is_tf_dataset(data) or _is_one_of(
        data, "grain", "MapDataset", "IterDataset", "DataLoader"
    )


def _is_tf_dataset(data):
    return hasattr(data, "as_numpy_iterator")


def _is_data_loader(data):
    return _is_one_of(data, "torch.utils.data", "DataLoader")


def _is_one_of(data, module, *names):
    module = sys.modules.get(module)  # What is not imported has no instances.
    return module is not None and isinstance(
        data, tuple(getattr(module, name) for name in names)
    )


def _is_in_batches(data):
    return (
        _is_pipeline(data)
        or _is_data_loader(data)
        or isinstance(data, (keras.utils.PyDataset, collections.abc.Iterator))
    )


def unpack(data):
    """Inputs, labels and sample weights of what may hold the inputs only.

    Args:
        data: Inputs, which may be a list or tuple of str; or a tuple or list
            of inputs, labels and sample weights, of which the last may lack.

    Returns:
        Tuple of the three, `None` for what lacks.

    Raises:
        ValueError: If a tuple or list holds something else.
    """
    if not isinstance(data, (list, tuple)) or _is_text(*data[:1]):
        return data, None, None
    if not 1 <= len(data) <= 3:
        raise ValueError(
            "A tuple must hold inputs, labels and sample weights, or the "
            f"first of them. {EXPECTED}. Received: a {type(data).__name__} "
            f"of {len(data)} elements"
        )
    return (*data, None, None)[:3]


def _is_text(x=None):
    return isinstance(x, (str, bytes))


def for_fit(
    model,
    x,
    y,
    sample_weight,
    validation_data,
    *,
    batch_size,
    shuffle,
    epochs=1,
    initial_epoch=0,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    **_,
):
    """The arguments of Keras's `fit`, or KerasHub's, that are data.

    Args:
        model: `BwETAFCausalLM`.
        **_: All other arguments are as `fit` takes them.

    Returns:
        dict.

    Raises:
        ValueError: If something is given that can't be used.
    """
    num_passes = epochs - initial_epoch
    shuffle = _shuffle(x, shuffle)
    if validation_data is not None:
        validation = unpack(validation_data)
        if validation_batch_size is None and not _is_in_batches(validation[0]):
            validation_batch_size = batch_size
        prepare = _for_keras_hub if is_for_keras_hub(x) else for_keras
        validation_data = prepare(
            model, *validation, batch_size=validation_batch_size
        )
        _check_passes(
            "validation_steps", validation_data[0], validation_steps, num_passes
        )
    if not is_for_keras_hub(x):
        x, y, sample_weight = for_keras(
            model, x, y, sample_weight, batch_size=batch_size, shuffle=shuffle
        )
    _check_passes("steps_per_epoch", x, steps_per_epoch, num_passes)
    return dict(
        x=x,
        y=y,
        sample_weight=sample_weight,
        validation_data=validation_data,
        batch_size=batch_size,
        # Texts are shuffled as they are read.
        shuffle=shuffle and not isinstance(x, _TextDataset),
    )


def _shuffle(x, shuffle):
    """The argument of that name, whose default depends on the data."""
    can_be_shuffled = not _is_in_batches(x) or (
        isinstance(x, keras.utils.PyDataset) and x.num_batches is not None
    )
    if shuffle and not can_be_shuffled:
        warnings.warn(
            "`shuffle=True` was passed, but will be ignored: the batches of "
            f"a {type(x).__name__} come in the order in which it gives them.",
            stacklevel=4,
        )
        return False
    return can_be_shuffled if shuffle is None else shuffle


def _check_passes(name, data, steps, num_passes):
    is_read_once = isinstance(data, collections.abc.Iterator)
    if is_read_once and steps is None and num_passes > 1:
        raise ValueError(
            "An iterator, or a DataLoader without a length, is read once. Say "
            f"how many batches an epoch has, with `{name}`, or pass data that "
            "can be read again, such as a `keras.utils.PyDataset`. Received: "
            f"{num_passes} epochs, {name}=None"
        )


def _for_keras_hub(model, x, y, sample_weight, *, batch_size):
    """Validation data beside data that is left to KerasHub."""
    if _is_pipeline(x):
        return x
    if _is_in_batches(x) or batch_size:
        raise ValueError(
            "Beside a `grain.MapDataset`, `validation_data` must be a data "
            "set of Grain or `tf.data`, or texts or arrays without a batch "
            "size. Call `to_iter_dataset()` on it for others. Received: "
            f"validation_data={type(x).__name__}, batch size {batch_size}"
        )
    if _is_for_preprocessor(model, x):
        x = as_texts(x)
    return _prepared(model, *_fill_up(x, y, sample_weight))


def for_keras(
    model, x, y=None, sample_weight=None, *, batch_size=None, shuffle=False
):
    """Data that plain Keras takes as if there were no preprocessor.

    Args:
        model: `BwETAFCausalLM`.
        x, y, sample_weight: As `fit` takes them.
        batch_size: int or `None`, of texts.
        shuffle: bool or `"batch"`. As `fit` takes it, for texts.

    Returns:
        Tuple of such data, labels and sample weights, the last two `None`
        where the batches hold them.

    Raises:
        ValueError: If something is given that can't be used.
    """
    if not _is_in_batches(x):
        return _rows(model, x, y, sample_weight, batch_size, shuffle)
    beside = dict(y=y, sample_weight=sample_weight, batch_size=batch_size)
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise ValueError(
            "Data that comes in batches has its labels and sample weights in "
            "them, in tuples. Pass none of `y`, `sample_weight` and "
            f"`batch_size` beside it. Received: x={type(x).__name__}, {given}"
        )
    return _batches(model, x), None, None


def _batches(model, data):
    def prepare(batch):
        return _prepared(model, *unpack(batch))

    if _is_tf_dataset(data):
        data = data.map(model.preprocess_samples, num_parallel_calls=AUTOTUNE)
        return data.prefetch(AUTOTUNE)
    if _is_pipeline(data):
        return data.map(prepare)
    if isinstance(data, keras.utils.PyDataset):
        return _MappedDataset(data, prepare)
    if _is_data_loader(data) and hasattr(data.dataset, "__len__"):
        return _LoaderDataset(data, prepare)
    return (_as_tuple(prepare(batch)) for batch in data)


def _as_tuple(batch):
    return batch if isinstance(batch, tuple) else (batch,)


def _prepared(model, x, y=None, sample_weight=None):
    """What the model takes of some rows, in NumPy arrays."""
    if _is_for_preprocessor(model, x):
        x = as_texts(x)
    elif isinstance(x, collections.abc.Mapping):
        x, y, sample_weight = _as_arrays((x, y, sample_weight))
    return _as_arrays(model.preprocess_samples(x, y, sample_weight))


def _as_arrays(tree):
    if isinstance(tree, tuple):
        return tuple(map(_as_arrays, tree))
    if isinstance(tree, collections.abc.Mapping):
        return {name: _as_arrays(value) for name, value in tree.items()}
    if tree is None or isinstance(tree, np.ndarray):
        return tree
    return np.asarray(tree.cpu() if hasattr(tree, "cpu") else tree)


def _rows(model, x, y, sample_weight, batch_size, shuffle):
    is_text = _is_for_preprocessor(model, x)
    if is_text:
        x = as_texts(x)
        check_beside_texts(x, y, sample_weight)
    if model.has_default_loss or y is None:  # Labels of the rest would count.
        x, y, sample_weight = _fill_up(x, y, sample_weight)
    if is_text:
        texts = _TextDataset(model, x, sample_weight, batch_size, shuffle)
        return texts, None, None
    return keras.utils.unpack_x_y_sample_weight(
        _prepared(model, x, y, sample_weight)
    )


def _is_for_preprocessor(model, x):
    return model.preprocessor is not None and not isinstance(
        x, collections.abc.Mapping
    )


def as_texts(x):
    """A list of str.

    Args:
        x: Sequence or array of str or of bytes of UTF-8.

    Raises:
        ValueError: If it is something else, or there is none.
    """
    if hasattr(x, "__array__") and np.ndim(x) == 1:
        x = np.asarray(x).tolist()
    if _is_text(x) or not isinstance(x, collections.abc.Sequence):
        received = f"{x!r:.80}" if _is_text(x) else type(x).__name__
        if hasattr(x, "shape"):
            received += f" of shape {tuple(x.shape)}"
        raise ValueError(f"{EXPECTED}. Received: x={received}")
    if len(x) == 0:
        raise ValueError("Expected at least one text. Received: x=[]")
    return [_as_text(text, i) for i, text in enumerate(x)]


def _as_text(text, index):
    if isinstance(text, str):
        return text
    if not isinstance(text, bytes):
        raise ValueError(
            f"Texts must be str. {EXPECTED}. Received: x[{index}]={text!r:.80}"
        )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            "Bytes must be text in UTF-8. Decode them with the encoding that "
            f"they have. Received: x[{index}]={text!r:.80}"
        ) from error


def check_beside_texts(texts, y, sample_weight):
    """Checks what is given beside texts.

    Args:
        texts: list of str.
        y: Anything.
        sample_weight: Array, or `None`.

    Raises:
        ValueError: If there are labels, or not one finite weight a text.
    """
    if y is not None:
        raise ValueError(
            "The labels of texts are their own tokens, so `y` can't be given "
            "beside texts. Pass arrays, or `load_instructions`, to learn "
            f"something else. Received: y={type(y).__name__}"
        )
    if sample_weight is None:
        return
    if np.shape(sample_weight) != (len(texts),):
        raise ValueError(
            "`sample_weight` beside texts must hold one number for each of "
            f"the {len(texts)} texts. Pass arrays to weigh single tokens. "
            f"Received: sample_weight of shape {np.shape(sample_weight)}"
        )
    _check_finite(sample_weight)


def _check_finite(sample_weight):
    if not np.isfinite(sample_weight).all():
        raise ValueError(
            "`sample_weight` must be finite. Received: sample_weight with "
            f"{np.sum(~np.isfinite(sample_weight))} numbers that are not"
        )


def check_token_rows(x, y, sample_weight, vocabulary_size):
    """Checks rows of token ids, their labels and weights.

    What is not in NumPy arrays has its keys checked only.

    Args:
        x: dict of `"token_ids"` and `"padding_mask"`, int arrays
            `(batch, length)`.
        y: int array `(batch, length)`, or `None`.
        sample_weight: float array `(batch, length)` or `(batch,)`, or `None`.
        vocabulary_size: int.

    Raises:
        ValueError: If there is no such input or something else beside it,
            shapes differ, or numbers are out of range.
    """
    if not isinstance(x, collections.abc.Mapping):
        raise ValueError(
            "Expected a dict with 'token_ids' and 'padding_mask', or a model "
            f"with a preprocessor that makes one. Received: "
            f"x={type(x).__name__}, preprocessor=None"
        )
    if set(x) != INPUTS:
        raise ValueError(
            "Expected a dict with 'token_ids' and 'padding_mask' only. Labels "
            "and sample weights come beside it, in a tuple. Received: "
            f"x={sorted(x)}"
        )
    token_ids, mask = x["token_ids"], x["padding_mask"]
    shape = np.shape(token_ids)
    if isinstance(token_ids, np.ndarray):
        if len(shape) != 2 or np.shape(mask) != shape:
            raise ValueError(
                "`token_ids` and `padding_mask` must have the same shape "
                f"(batch, length). Received: shapes {shape} and "
                f"{np.shape(mask)}"
            )
        _check_ids("token_ids", token_ids, vocabulary_size)
        if token_ids.size and token_ids.min() < 0:
            _check_not_negative(token_ids[np.asarray(mask) > 0])
    if isinstance(y, np.ndarray):
        if y.shape != shape:
            raise ValueError(
                f"`y` must have the shape of `token_ids`, {shape}. Received: "
                f"y of shape {y.shape}"
            )
        _check_ids("y", y, vocabulary_size)
    if isinstance(sample_weight, np.ndarray):
        if sample_weight.shape not in (shape, shape[:1]):
            raise ValueError(
                f"`sample_weight` must have the shape {shape} or {shape[:1]}. "
                f"Received: sample_weight of shape {sample_weight.shape}"
            )
        _check_finite(sample_weight)


def _check_ids(name, ids, vocabulary_size):
    if ids.size and ids.max() >= vocabulary_size:
        raise ValueError(
            f"`{name}` has token ids beyond the model's vocabulary of "
            f"{vocabulary_size}. Use the tokenizer that belongs to the "
            f"model. Received: {name} up to {ids.max()}"
        )


def _check_not_negative(token_ids):
    if token_ids.size and token_ids.min() < 0:
        raise ValueError(
            "`token_ids` must not be negative, but at padding. Labels, beside "
            f"them, may be: those are ignored. Received: {token_ids.min()}"
        )


def next_tokens(x):
    """Labels that stand for none, for `fit` drops weights without labels.

    Args:
        x: dict of `"token_ids"` and `"padding_mask"`, int arrays
            `(batch, length)`.

    Returns:
        int array `(batch, length)`, the next token of the row, and -1 where
        it is padding.
    """
    labels = np.full(np.shape(x["token_ids"]), IGNORED, "int32")
    is_real = np.asarray(x["padding_mask"])[:, 1:] > 0
    np.copyto(labels[:, :-1], x["token_ids"][:, 1:], where=is_real)
    return labels


def num_rows(x):
    """How many, `None` for a data set."""
    if _is_in_batches(x):
        return None
    if isinstance(x, collections.abc.Mapping):
        return min(map(num_rows, x.values()), default=0)
    return len(x) if hasattr(x, "__len__") else None


def _fill_up(x, *labels):
    """Adds rows that weigh nothing, until they divide over the devices.

    Args:
        x: Strings, arrays, or a data set, which stays as it is.
        *labels: arrays, or `None`.

    Returns:
        tuple of them.
    """
    missing = -(num_rows(x) or 0) % num_row_groups()

    def fill(x):
        if isinstance(x, collections.abc.Mapping):
            return {name: fill(each) for name, each in x.items()}
        if x is None or not missing:
            return x
        x = np.asarray(x)
        if x.dtype.kind in "OUS":
            return [*x.tolist(), *[type(x[0])()] * missing]
        return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    return tuple(fill(each) for each in (x, *labels))


def split(data, fraction):
    """The first rows for training and the last ones for validation.

    Args:
        data: Tuple of rows, labels and sample weights.
        fraction: float, between 0 and 1. Of the rows, for validation.

    Returns:
        Two such tuples.

    Raises:
        ValueError: If the data is a data set, or one part would be empty.
    """
    num = num_rows(data[0])
    if num is None:
        raise ValueError(
            "`validation_split` needs texts or arrays. Pass "
            "`validation_data` beside data that comes in batches. Received: "
            f"validation_split={fraction}, x={type(data[0]).__name__}"
        )
    place = math.floor(num * (1 - fraction))
    if not 0 < place < num:
        raise ValueError(
            "`validation_split` must leave at least one row for training and "
            f"one for validation. Received: validation_split={fraction} of "
            f"{num} rows"
        )

    def cut(x, start, stop):
        if isinstance(x, collections.abc.Mapping):
            return {name: cut(each, start, stop) for name, each in x.items()}
        if hasattr(x, "iloc"):  # pandas, whose rows have names of their own.
            return x.iloc[start:stop]
        return x if x is None else x[start:stop]

    return (
        tuple(cut(each, 0, place) for each in data),
        tuple(cut(each, place, num) for each in data),
    )


@contextlib.contextmanager
def no_false_alarm(steps):
    """Without a number of steps, data that ends does not end too early.

    Keras says that it does, where it can't know the number of batches.

    Args:
        steps: int, or `None`.
    """
    if steps is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            "Your input ran out of data",
            module=r"keras\.src\.trainers",
        )
        yield


class _TextDataset(keras.utils.PyDataset):
    """Batches of texts, which are tokenized when their turn comes."""

    def __init__(self, model, texts, weights, batch_size, shuffle):
        super().__init__()
        self._model = model
        self._texts = texts
        self._weights = _as_arrays(weights)
        self._batch_size = batch_size or 32
        self._shuffle = shuffle
        self._order = np.arange(len(texts))

    @property
    def num_batches(self):
        return -(-len(self._texts) // self._batch_size)

    def __getitem__(self, index):
        if index == 0 and self._shuffle is True:  # A pass begins.
            np.random.shuffle(self._order)
        start = index * self._batch_size
        rows = self._order[start : start + self._batch_size]
        texts = [self._texts[row] for row in rows]
        weights = None if self._weights is None else self._weights[rows]
        return _prepared(self._model, texts, None, weights)


class _MappedDataset(keras.utils.PyDataset):
    """A `PyDataset` with a function of its batches."""

    def __init__(self, dataset, function):
        super().__init__(
            dataset.workers,
            dataset.use_multiprocessing,
            dataset.max_queue_size,
        )
        self._dataset = dataset
        self._function = function

    @property
    def num_batches(self):
        return self._dataset.num_batches

    def __getitem__(self, index):
        return self._function(self._dataset[index])

    def on_epoch_begin(self):
        self._dataset.on_epoch_begin()

    def on_epoch_end(self):
        self._dataset.on_epoch_end()


class _LoaderDataset(keras.utils.PyDataset):
    """The batches of a DataLoader, in the order in which it gives them."""

    def __init__(self, loader, function):
        super().__init__()
        self._loader = loader
        self._function = function

    @property
    def num_batches(self):
        return len(self._loader)

    def __getitem__(self, index):
        if index == 0:  # A pass begins.
            self._iterator = iter(self._loader)
        return self._function(next(self._iterator))
