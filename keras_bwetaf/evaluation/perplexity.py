"""How well a model predicts text: nats per token, bits per byte."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_bwetaf.checks import positive_int
from keras_bwetaf.evaluation.scoring import Scorer
from keras_bwetaf.models import BwETAFCausalLM


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or one document of packed rows.

    Attributes:
        num_tokens: int. Tokens that were predicted.
        num_bytes: int or `None`. Bytes of UTF-8 that they stand for.
        nats: float. The sum of their losses.
    """

    num_tokens: int
    num_bytes: int | None
    nats: float


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `perplexity` finds. Printed, it is a table.

    Attributes:
        num_tokens: int. Tokens that were predicted.
        num_bytes: int or `None`. Bytes of UTF-8 that they stand for; `None`
            if the model has no tokenizer.
        nats: float. The sum of their losses.
        documents: tuple of `Document`, in the order of the data.
        by_position: float array `(context,)`. The mean loss of the tokens
            that are predicted from 1, 2, 3, ... tokens before them, NaN where
            there are none.
    """

    num_tokens: int
    num_bytes: int | None
    nats: float
    documents: tuple[Document, ...]
    by_position: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The exponential of `loss`; infinite where that has no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as the others are not."""
        if not self.num_bytes:
            return None
        return self.nats / math.log(2) / self.num_bytes

    def summary(self) -> dict[str, float | int | None]:
        """The figures of all documents together, which JSON can hold."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": len(self.documents),
        }

    def __str__(self):
        lines = []
        for name, value in self.summary().items():
            if value is not None:
                is_count = isinstance(value, int)
                value = f"{value:,}" if is_count else f"{value:.4f}"
                lines.append(f"{name.replace('_', ' '):14} {value:>14}")
        return "\n".join(lines)


def perplexity(
    lm: BwETAFCausalLM,
    data: Any,
    *,
    batch_size: int = 16,
    stride: int | None = None,
    dropout: bool = False,
) -> Perplexity:
    """Measures how well a model predicts texts or packed rows.

    Of a text, every token is predicted, the first one from the end token
    alone, as lm-evaluation-harness does; the text's own end is not. A text
    that is longer than the context is read in windows that overlap.

    Packed rows are what `lm.evaluate` reads, and count the same tokens: each
    is predicted from those of its own document, and a document's end, too.

    The logits of a batch never exist at once. It runs under the current
    `keras.distribution`.

    Args:
        lm: `BwETAFCausalLM`.
        data: Texts: a str, or an iterable of str, such as
            `keras_bwetaf.data.read_documents` returns. Or packed rows: a dict
            of `"token_ids"` and `"padding_mask"`, int arrays
            `(rows, length)`, a tuple of it, labels and sample weights, or an
            iterable of batches of these that ends.
        batch_size: int. Rows that are computed together, of texts and of a
            dict.
        stride: int. By how many tokens a window of a long text is further
            than the last one: only so many at its end are predicted anew.
            Defaults to half the context. Smaller is slower, and each token is
            predicted from more.
        dropout: bool. Whether there is dropout, as when the original package
            computes its validation loss.

    Returns:
        `Perplexity`.

    Raises:
        ValueError: If there is nothing to predict, a number is out of range,
            or the data is of another kind.

    Example:

    ```python
    texts = keras_bwetaf.data.read_documents("stories/*.txt")
    result = keras_bwetaf.evaluation.perplexity(lm, texts)
    print(result.loss, result.bits_per_byte)
    ```
    """
    scorer = Scorer(lm, batch_size, dropout)
    if isinstance(data, str):
        data = [data]
    if isinstance(data, Mapping | tuple):
        data = _batches(data, scorer.batch_size)
    context = lm.backbone.max_sequence_length
    if stride is None:
        stride = max(context // 2, 1)
    if positive_int("stride", stride) > context:
        raise ValueError(
            f"`stride` must be at most the model's context of {context} "
            f"tokens. Received: stride={stride}"
        )
    if not isinstance(data, Iterable):
        raise ValueError(
            "Expected texts, or packed rows. Received: data of type "
            f"{type(data).__name__}"
        )
    sums = _Sums(context)
    texts = []
    for each in data:
        if isinstance(each, str):
            texts.append(each)
        else:
            _add_rows(sums, lm, scorer, each)
    if texts:
        _add_texts(sums, lm, scorer, texts, stride)
    return sums.result()


class _Sums:
    """Losses, added up by document and by position."""

    def __init__(self, context):
        self._documents = []
        self._nats = np.zeros(context)
        self._counts = np.zeros(context)

    def add(self, losses, positions, num_bytes):
        """Takes the tokens of a document in, arrays `(tokens,)`."""
        nats = losses.astype("float64")
        self._documents.append(
            Document(len(nats), num_bytes, float(nats.sum()))
        )
        np.add.at(self._nats, positions, nats)
        np.add.at(self._counts, positions, 1)

    def result(self):
        num_tokens = sum(each.num_tokens for each in self._documents)
        if not num_tokens:
            raise ValueError("Expected text. Received: no token to predict")
        sizes = [each.num_bytes for each in self._documents]
        with np.errstate(invalid="ignore"):
            by_position = self._nats / self._counts
        return Perplexity(
            num_tokens=num_tokens,
            num_bytes=None if None in sizes else sum(sizes),
            nats=sum(each.nats for each in self._documents),
            documents=tuple(self._documents),
            by_position=by_position,
        )


def _add_texts(sums, lm, scorer, texts, stride):
    if lm.preprocessor is None:
        raise ValueError(
            "The model has no tokenizer, so it can't read text. Pass packed "
            "rows, or give it a preprocessor."
        )
    tokenizer = lm.preprocessor.tokenizer
    context = lm.backbone.max_sequence_length
    windows, num_new = [], []
    for text in texts:
        tokens = [tokenizer.end_token_id, *map(int, tokenizer(text))]
        starts, ends = _windows(len(tokens) - 1, context, stride)
        windows.append([tokens[i : i + context + 1] for i in starts])
        num_new.append(np.diff([0, *ends]))
    scores = iter(scorer.rows([window for each in windows for window in each]))
    for text, of_text, new in zip(texts, windows, num_new, strict=True):
        losses, positions = [np.zeros(0)], [np.zeros(0, "int")]
        for _, count in zip(of_text, new, strict=True):
            of_window, _ = next(scores)
            losses.append(of_window[-count:])
            positions.append(np.arange(len(of_window))[-count:])
        sums.add(
            np.concatenate(losses),
            np.concatenate(positions),
            len(text.encode()),
        )


def _windows(num_targets, context, stride):
    """Where windows start, and up to which target each of them scores."""
    if not num_targets:
        return [], []
    starts = [0]
    while starts[-1] + context < num_targets:
        starts.append(min(starts[-1] + stride, num_targets - context))
    return starts, [min(start + context, num_targets) for start in starts]


def _add_rows(sums, lm, scorer, batch):
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    data = lm.preprocess_samples(x, y, weights)
    losses, _, weights = scorer.batch(data)
    if not np.isin(weights, (0, 1)).all():
        raise ValueError(
            "Sample weights tell which tokens to count, 0 or 1. Received: "
            f"one of {weights[~np.isin(weights, (0, 1))][0]}"
        )
    x = keras.utils.unpack_x_y_sample_weight(data)[0]
    numbers = np.asarray(x["padding_mask"])
    targets = np.asarray(x["token_ids"])[:, 1:] if y is None else np.asarray(y)
    tokenizer = lm.preprocessor and lm.preprocessor.tokenizer
    for row in range(len(losses)):
        for number in np.unique(numbers[row][weights[row] > 0]):
            (chosen,) = np.nonzero(
                (numbers[row] == number) & (weights[row] > 0)
            )
            (own,) = np.nonzero(numbers[row] == number)
            num_bytes = None
            if tokenizer is not None:
                num_bytes = len(tokenizer.token_bytes(targets[row][chosen]))
            sums.add(losses[row][chosen], chosen - own[0], num_bytes)


def _batches(data, batch_size):
    """Batches of a dict or tuple; the last is filled up with padding."""
    arrays = keras.tree.map_structure(np.asarray, data)
    num_rows = len(keras.tree.flatten(arrays)[0])
    for start in range(0, num_rows, batch_size):
        rows = slice(start, start + batch_size)

        def part(x, rows=rows):
            x = x[rows]
            missing = batch_size - len(x)
            return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

        yield keras.tree.map_structure(part, arrays)
