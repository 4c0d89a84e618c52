"""Packed tokens -> a Grain data set of batches."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import is_int
from keras_bwetaf.data.batching import (
    ENDLESS,
    batches,
    check_arguments,
    processes,
    shuffle_and_repeat,
)
from keras_bwetaf.data.index import (
    damage,
    read_index,
    tokenizer_digest,
)
from keras_bwetaf.data.worker import TRAIN
from keras_bwetaf.optional import import_optional

GOLDEN = (math.sqrt(5) - 1) / 2
# In place of the tokens of an empty row.
EMPTY = -1


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A stream of tokens.

    Attributes:
        path: Path. Of a packed folder or a `.npy` file.
        arrays: list of 1-D integer arrays, the stream in parts. Files are
            mapped into memory, not read.
        end_token_id: int. What ends a document.
        tokenizer_sha256: str, or None if it is not known.
    """

    path: Path
    arrays: list
    end_token_id: int
    tokenizer_sha256: str | None


class _Rows:
    """Rows of tokens, one after the other; a rest that fills none is left.

    Args:
        tokens: `_Tokens`.
        sequence_length: int.

    Raises:
        ValueError: If there is no row.
    """

    def __init__(self, tokens, sequence_length):
        self._arrays = tokens.arrays
        self._sequence_length = sequence_length
        self._stops = np.cumsum([len(array) for array in tokens.arrays])
        self._length = int(self._stops[-1]) // sequence_length
        if not self._length:
            raise ValueError(
                f"{tokens.path}: expected at least `sequence_length` tokens. "
                f"Received: {self._stops[-1]} tokens and sequence_length="
                f"{sequence_length}. Pass a smaller one, or pack more text."
            )

    def __len__(self):
        return self._length

    def cut(self, index, _=None):
        """Row `index`, the same in each pass.

        Returns:
            int32 array `(sequence_length,)`.
        """
        return self._from(index % self._length * self._sequence_length)

    def cut_anew(self, index, _=None):
        """Row `index`, counted over all passes, in each cut elsewhere.

        The first pass begins with the first token. Where others begin is
        spread evenly over a row, by the golden ratio. The last token is
        followed by the first.
        """
        number, row = divmod(index, self._length)
        shift = int(number * GOLDEN % 1 * self._sequence_length)
        return self._from(row * self._sequence_length + shift)

    def _from(self, position):
        position %= int(self._stops[-1])
        number = int(np.searchsorted(self._stops, position, side="right"))
        position -= int(self._stops[number]) - len(self._arrays[number])
        parts, missing = [], self._sequence_length
        while missing:
            part = self._arrays[number][position : position + missing]
            parts.append(part)
            missing -= len(part)
            number, position = (number + 1) % len(self._arrays), 0
        return np.concatenate(parts, dtype="int32", casting="unsafe")


def load_packed(
    source: PathLike | dict[Any, float] | list[Any],
    *,
    sequence_length: int,
    batch_size: int,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    tokenizer: Any = None,
    vocabulary_size: int | None = None,
    verify: bool = True,
) -> Any:
    """Loads packed tokens as a data set for `fit` and `evaluate`.

    Rows of `sequence_length` tokens are cut from the stream of tokens, one
    after the other; a row holds the documents, or parts of them, that lie
    there. Which row is at which place of which batch is a function of the
    arguments alone. With `shuffle`, rows are in another order in each pass
    over the data, and cut in other places: otherwise, a model that reads the
    data several times learns the very rows by heart.

    With several processes, each gets its part of each batch: the batches of
    the processes 0, 1, ..., one on top of the other, are the batch that a
    single process gets.

    The iterator of the data set has `get_state()` and `set_state(state)`,
    which resume exactly; the state is `{"next_index": batch}`.

    Args:
        source: A folder that `pack` wrote, or a `.npy` file with token ids
            of rank 1 or 2, as the original package writes; or a mixture, a
            dict of these to weights: shares of rows; or stages, a list of
            pairs of one of these and how many rows to take of it. In the
            last pair, `None` takes rows without end.
        sequence_length: int.
        batch_size: int. Rows in a batch, of all processes together.
        split: str. `"train"`, or `"validation"` for what `pack` held out.
            A `.npy` file has no splits. Defaults to `"train"`.
        seed: int. Of the order of rows. Defaults to `0`.
        shuffle: bool. Whether rows are in random order, and in each pass cut
            anew. Defaults to `True`.
        repeat: bool. Whether the data set begins again at its end, without
            end, for `fit` with `steps_per_epoch`. Without it, a mixture ends
            with the first of its parts, and the last batch is filled up with
            empty rows, whose `padding_mask` is 0. Stages repeat their parts
            as needed, and never begin again. Defaults to whether the split
            is `"train"`.
        process_index: int. Defaults to `jax.process_index()`.
        process_count: int. Defaults to `jax.process_count()`.
        tokenizer: `BwETAFTokenizer`. If given, tokens must have been made
            with it. Its end token ends documents in `.npy` files; token 0
            does if no tokenizer is given.
        vocabulary_size: int. The model's. If given, or if a tokenizer is,
            token ids must be below it.
        verify: bool. Whether to compare the shards with their digests,
            which reads them once, about a second for a gigabyte; sizes are
            compared in any case. Defaults to `True`.

    Returns:
        A `grain.IterDataset` of dicts of int32 arrays of shape `(batch_size
        / process_count, sequence_length)`: `"token_ids"`, and
        `"padding_mask"`, the number of the document that each token belongs
        to, from 1 in each row.

    Raises:
        ValueError: If an argument is out of range, shards are damaged or
            missing, tokens are of another tokenizer or beyond the
            vocabulary, or there are fewer tokens than a row has.
        FileNotFoundError: If there is no such folder or file.

    Example:

    ```python
    train = load_packed(
        [("stories", 100_000), ({"stories": 0.2, "web": 0.8}, None)],
        sequence_length=2048,
        batch_size=64,
    )
    lm.fit(train, steps_per_epoch=1000, epochs=10)
    ```
    """
    grain = import_optional("grain", "train", "`load_packed`")
    process_index, process_count = processes(process_index, process_count)
    sequence_length, batch_size, seed, process_index, process_count = (
        check_arguments(
            sequence_length, batch_size, seed, process_index, process_count
        )
    )
    has_stages = isinstance(source, list)
    stages = _stages(source) if has_stages else [(_mixture(source), None)]
    opened = {
        path: _open(path, split, tokenizer, vocabulary_size, verify)
        for path in dict.fromkeys(path for parts, _ in stages for path in parts)
    }
    end_token_id = _common_end_token_id(opened.values())
    sources = {}
    for path, tokens in opened.items():
        rows = _Rows(tokens, sequence_length)
        cut = rows.cut_anew if shuffle else rows.cut
        sources[path] = grain.MapDataset.range(len(rows)).map_with_index(cut)
    if repeat is None:
        repeat = split == TRAIN
    rows = [
        _mix(
            sources,
            mixture,
            seed=(seed, number) if shuffle else None,
            repeat=repeat or has_stages,
        )[:num_rows]
        for number, (mixture, num_rows) in enumerate(stages)
    ]
    rows = grain.MapDataset.concatenate(rows) if has_stages else rows[0]
    return batches(
        rows,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        empty_row=np.full(sequence_length, EMPTY, "int32"),
        convert=functools.partial(_inputs, end_token_id=end_token_id),
    )


def _mix(sources, mixture, *, seed, repeat):
    """Rows of a mixture.

    Args:
        sources: dict of paths to `grain.MapDataset` of rows.
        mixture: dict of paths to weights.
        seed: tuple of int, or None for rows in their order.
        repeat: bool.

    Returns:
        A `grain.MapDataset`.
    """
    import grain

    parts = [
        shuffle_and_repeat(  # No two parts are in the same order.
            sources[path],
            seed=None if seed is None else (*seed, number),
            repeat=repeat,
        )
        for number, path in enumerate(mixture)
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, list(mixture.values()))


def _stages(stages):
    """Returns pairs of a mixture and a number of rows."""
    result = []
    for number, stage in enumerate(stages):
        is_last = number == len(stages) - 1
        if not isinstance(stage, tuple) or len(stage) != 2:
            raise ValueError(
                "Stages are a list of pairs (source, rows). Received: "
                f"{stage!r}"
            )
        source, num_rows = stage
        if num_rows is None and is_last:
            num_rows = ENDLESS
        if not is_int(num_rows) or num_rows < 1:
            raise ValueError(
                "The number of rows of a stage must be a positive int, or "
                f"None in the last stage. Received: {num_rows!r} in stage "
                f"{number}"
            )
        result.append((_mixture(source), int(num_rows)))
    if not result:
        raise ValueError("Expected at least one stage. Received: source=[]")
    return result


def _mixture(source):
    """Returns a dict of paths to weights."""
    mixture = source if isinstance(source, dict) else {source: 1}
    if not mixture:
        raise ValueError("Expected at least one folder. Received: source={}")
    for path, weight in mixture.items():
        if not isinstance(path, str | os.PathLike):
            raise ValueError(
                "`source` must be a path, a dict of paths to weights, or a "
                "list of stages, pairs (source, rows). Received: "
                f"{path!r} of type {type(path).__name__}"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(
                "The weights of a mixture must be positive. Received: "
                f"{weight!r} for {os.fspath(path)!r}"
            )
    return {Path(path): weight for path, weight in mixture.items()}


def document_numbers(token_ids: Any, end_token_id: int) -> np.ndarray:
    """The `padding_mask` of rows that hold several documents.

    Args:
        token_ids: int array `(batch, length)`.
        end_token_id: int. A document ends with it; it belongs to it.

    Returns:
        int32 array `(batch, length)`: the number of each token's document,
        from 1 in each row.

    Example:

    ```python
    rows = np.load("rows.npy").astype("int32")
    mask = document_numbers(rows, end_token_id=0)
    lm.evaluate({"token_ids": rows, "padding_mask": mask})
    ```
    """
    ends = (token_ids == end_token_id).astype("int32")
    return 1 + np.cumsum(ends, axis=1, dtype="int32") - ends


def _inputs(token_ids, end_token_id):
    """The model's inputs.

    Args:
        token_ids: int32 `(batch, length)`. Rows of `EMPTY` are no data.
        end_token_id: int. A document ends with it; it belongs to it.

    Returns:
        dict of int32 arrays `(batch, length)`.
    """
    documents = document_numbers(token_ids, end_token_id)
    return {
        "token_ids": np.maximum(token_ids, 0),
        "padding_mask": np.where(token_ids == EMPTY, 0, documents),
    }


def _open(path, split, tokenizer, vocabulary_size, verify):
    """Maps tokens into memory, and checks them; returns `_Tokens`."""
    if vocabulary_size is None and tokenizer is not None:
        vocabulary_size = tokenizer.vocabulary_size()
    if path.suffix == ".npy":
        end_token_id = 0 if tokenizer is None else tokenizer.end_token_id
        return _open_rows(path, end_token_id, vocabulary_size)
    tokens, size = _open_folder(path, split, verify)
    if tokenizer is not None:
        digest = tokenizer_digest(tokenizer)
        if digest != tokens.tokenizer_sha256:
            raise ValueError(
                f"{path}: the tokens were made with another tokenizer, whose "
                f"SHA-256 is {tokens.tokenizer_sha256}. Received: a tokenizer "
                f"with {digest}. Pass the one that the folder was packed "
                "with, or pack the source again."
            )
    if vocabulary_size is not None and size > vocabulary_size:
        raise ValueError(
            f"{path}: expected tokens of a vocabulary of at most "
            f"{vocabulary_size}. Received: tokens of a vocabulary of {size}. "
            "Pack the source with the model's tokenizer."
        )
    return tokens


def _open_folder(folder, split, verify):
    """Returns the `_Tokens` of a folder and the size of their vocabulary."""
    if not folder.is_dir():
        raise FileNotFoundError(
            "Expected a folder that `pack` wrote, or a .npy file. Received: "
            f"{str(folder)!r}"
        )
    index = read_index(folder)
    if not index["complete"]:
        raise ValueError(
            f"{folder}: packing was interrupted. Call `pack` again, with the "
            "same arguments, to go on."
        )
    parts = [
        shard["splits"][split]
        for shard in index["shards"]
        if split in shard["splits"]
    ]
    if not parts:
        splits = {name for shard in index["shards"] for name in shard["splits"]}
        raise ValueError(
            f"{folder}: expected one of the splits {sorted(splits)}. "
            f"Received: split={split!r}. What is held out for validation is "
            "an argument of `pack`."
        )
    for part in parts:
        path = folder / part["file"]
        problem = damage(path, part, index["dtype"], verify=verify)
        if problem:
            raise ValueError(
                f"{path}: {problem}. Call `pack` again, with the same "
                "arguments: it replaces damaged shards."
            )
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    arrays = [np.memmap(folder / part["file"], dtype, "r") for part in parts]
    digest = index["tokenizer_sha256"]
    tokens = _Tokens(folder, arrays, index["end_token_id"], digest)
    return tokens, index["vocabulary_size"]


def _open_rows(path, end_token_id, vocabulary_size):
    """Opens a `.npy` file, as the original package writes them."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file. Received: {str(path)!r}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: expected a whole .npy file of token ids. Received: "
            f"{error}. Write or copy the file again."
        ) from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise ValueError(
            f"{path}: expected integers of rank 1 or 2. Received: "
            f"{array.dtype} of shape {array.shape}"
        )
    array = array.reshape(-1)
    if vocabulary_size is not None:
        _check_ids(path, array, vocabulary_size)
    return _Tokens(path, [array], end_token_id, None)


def _check_ids(path, array, vocabulary_size, num_at_once=2**24):
    for start in range(0, len(array), num_at_once):
        ids = array[start : start + num_at_once]
        for id in (ids.min(), ids.max()):
            if not 0 <= id < vocabulary_size:
                raise ValueError(
                    f"{path}: expected token ids from 0 to "
                    f"{vocabulary_size - 1}. Received: {id}. Was the file "
                    "made with another tokenizer?"
                )


def _common_end_token_id(opened):
    """Returns the end token; parts of one data set must share it."""
    opened = list(opened)
    # A .npy file does not say which tokenizer it is of.
    opened.sort(key=lambda tokens: tokens.tokenizer_sha256 is None)
    first = opened[0]
    for tokens in opened[1:]:
        if (
            tokens.tokenizer_sha256 not in (None, first.tokenizer_sha256)
            or tokens.end_token_id != first.end_token_id
        ):
            raise ValueError(
                f"{first.path} and {tokens.path} were made with different "
                "tokenizers. Pack both with the same one."
            )
    return first.end_token_id
