"""Where documents come from: files, data sets, tables, iterables."""

import collections.abc
import contextlib
import hashlib
import itertools
import os
from typing import Any, Literal

from converters.hub import is_address
from keras_bwetaf.data import files, formats, hub_files
from keras_bwetaf.data.documents import Documents, missing_column
from keras_bwetaf.optional import import_optional

TFDS = "tfds:"
# The two data sets of the model card; `{split}` is filled in.
NAMES = {
    "tinystories": (
        "hf://datasets/roneneldan/TinyStories/data/{split}-*.parquet",
        ("train", "validation"),
    ),
    "fineweb": (
        "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet",
        ("train",),
    ),
}


def read_documents(
    source: Any,
    split: str = "train",
    column: str = "text",
    *,
    errors: Literal["strict", "replace"] = "strict",
) -> Documents:
    """Opens a source of documents.

    | source | |
    |---|---|
    | `"tfds:NAME"`, `"tfds:NAME/CONFIG"` | a TensorFlow data set; only one that is stored in a format without random access, such as `tfrecord`, needs TensorFlow |
    | a path, glob or folder | `.parquet`, `.jsonl` with a document a row, `.txt` or `.md` with a document a file |
    | a list of `pathlib.Path` | such files, in this order |
    | `"hf://datasets/owner/name/PATH"` | such files of a repository; `PATH` may be a folder or glob; `@revision` may follow the name |
    | `"tinystories"`, `"fineweb"` | the data sets of the model card: roneneldan/TinyStories, and the 10-billion-token sample of HuggingFaceFW/fineweb |
    | a table of pandas, polars, pyarrow or `datasets`, or a dict of columns | the texts of `column` |
    | a dict of splits, such as a `DatasetDict` | the source that is called `split` |
    | an iterable of str | documents |
    | an iterable of dicts, such as a streaming data set of `datasets` or one of `tf.data` | the texts of `column` |

    Files are in the order of their paths. Text and JSON Lines may be
    compressed (`.gz`, `.bz2`, `.xz`). In a folder and for the `**` of a glob,
    linked folders are read, too, and hidden files and folders are not; the
    `skipped` of the result says what a folder has besides. Once downloaded,
    files of the Hub are read from its cache when it can't be reached.

    Null in a file is an empty document, and in Python's objects an error.

    Args:
        source: str, path, or iterable. See above.
        split: str. The split of a TensorFlow data set or a named source.
            Defaults to `"train"`.
        column: str. Where records hold their text. Defaults to `"text"`.
        errors: str. What to do with invalid UTF-8: `"strict"` or
            `"replace"`. Defaults to `"strict"`.

    Returns:
        `Documents`: iterable as often as the source is, and readable from
        any document on with `starting_at(number)`.

    Raises:
        ValueError: If there is no such source, or, when read, if a document
            is not text, a column is missing, or there is no document.
        FileNotFoundError: If no file is found.
        ImportError: If reading needs a package that is not installed.

    Example:

    ```python
    for document in read_documents("corpus/*.jsonl"):
        print(document[:80])
    ```
    """  # noqa: E501  tables have long lines
    if errors not in ("strict", "replace"):
        raise ValueError(
            '`errors` must be "strict" or "replace". Received: '
            f"errors={errors!r}"
        )
    if isinstance(source, str) and source in NAMES:
        return _read_named(source, split, column, errors)
    if isinstance(source, str) and source.startswith(TFDS):
        return _read_tfds(source, split, column, errors)
    if isinstance(source, str) and is_address(source):
        return hub_files.read_hub(source, {"source": source}, column, errors)
    if isinstance(source, str | os.PathLike):
        return _read_path(os.fspath(source), column, errors)
    columns = _columns(source)
    if columns is None:
        return _read_iterable(source, column, errors)
    if columns.count(column) == 1:
        return _read_iterable(source[column], column, errors, is_column=True)
    if not isinstance(source, collections.abc.Mapping):
        raise missing_column("`source`", column, columns)
    if split in source:
        return read_documents(source[split], split, column, errors=errors)
    raise ValueError(
        f"`source`: expected a dict with a column {column!r} or a split "
        f"{split!r}. Received one with {columns}. Name the column of the text "
        "with `column`, or the split with `split`."
    )


def _read_named(name, split, column, errors):
    pattern, splits = NAMES[name]
    if split not in splits:
        raise ValueError(
            f"The source {name!r} has the splits {splits}. Received: "
            f"split={split!r}"
        )
    source = pattern.replace("{split}", split)
    description = {"source": name, "split": split}
    return hub_files.read_hub(source, description, column, errors)


def _read_path(source, column, errors):
    paths, skipped = files.find(source)
    if not paths:
        raise FileNotFoundError(
            "Expected a file, a folder with files in "
            f"{sorted(formats.FORMATS)}, a glob that matches some, or one of "
            f"the names {sorted(NAMES)}. Received: {source!r}"
        )
    description = {"source": files.printable(source)}
    return files.read_local(paths, description, skipped, column, errors)


# Tables, iterables and TensorFlow data sets.


def _columns(source):
    """The names of a table's columns, or None if it is none.

    Tables are those of pandas, polars, pyarrow and `datasets`, and whatever
    has names of columns and gives a column by its name, as they do.
    """
    if isinstance(source, collections.abc.Mapping):
        return list(source)
    names = getattr(source, "column_names", None)
    if names is None and isinstance(source, collections.abc.Iterable):
        names = getattr(source, "columns", None)
    if names is None or not hasattr(type(source), "__getitem__"):
        return None
    return list(names)


def _read_iterable(source, column, errors, *, is_column=False):
    """Documents of an iterable of texts, or of records with a text each."""
    if isinstance(source, str | bytes) or not isinstance(
        source, collections.abc.Iterable
    ):
        raise ValueError(
            "`source` must be a name, a path, a table, or an iterable of "
            "paths, str, or dicts with the text in `column`. Received: source="
            f"{source!r:.80} of type {type(source).__name__}"
        )
    num_documents = _length(source)
    # Reading from an iterator would use it up.
    first = None if num_documents is None else next(iter(source), None)
    if isinstance(first, os.PathLike):
        paths = [os.fspath(path) for path in source]
        description = {"source": "paths"}
        return files.read_local(paths, description, {}, column, errors)
    if isinstance(first, str) and _is_file(first):
        raise ValueError(
            "An iterable of str holds documents, but the first is the name "
            "of a file. Pass `pathlib.Path` objects for files. Received: "
            f"{first!r}"
        )
    # TensorFlow's data sets give tensors otherwise.
    iterate = getattr(source, "as_numpy_iterator", source.__iter__)
    place = f"column {column!r}, row" if is_column else "document"

    def read(start):
        documents = itertools.islice(iterate(), start, None)
        for number, content in enumerate(documents, start):
            where = f"{place} {number}"
            yield where, _content(content, where, column)

    def describe():
        description = {"source": "iterable", "documents": num_documents}
        if is_column:
            description |= {"source": "table", "column": column}
        if _is_repeatable(source, num_documents, is_column):
            description["sha256"] = _digest(iterate())
        return description

    return Documents(describe, read, errors, num_documents)


def _length(source):
    """How many documents an iterable has, or None if it does not say."""
    try:
        return len(source)
    except TypeError:
        return None


def _content(content, where, column):
    """The text of a document or of a record."""
    if isinstance(content, collections.abc.Mapping):
        if column not in content:
            raise missing_column(where, column, list(content))
        content = content[column]
    if hasattr(content, "as_py"):  # Of Arrow.
        content = content.as_py()
    if content is None:
        raise ValueError(
            f"{where}: expected text. Received: None. Fill or leave out what "
            "is missing."
        )
    if isinstance(content, os.PathLike):
        raise ValueError(
            f"{where}: expected text. Received: the path "
            f"{os.fspath(content)!r} from an iterator. Pass a list of paths."
        )
    return content


def _is_repeatable(source, num_documents, is_column):
    """Whether all texts can be read beforehand, to know them again.

    Other iterables may be read once only, or never end.
    """
    is_array = isinstance(source, list | tuple) or hasattr(source, "__array__")
    return num_documents is not None and (is_array or is_column)


def _digest(texts):
    """A SHA-256 that tells iterables of texts from each other."""
    digest = hashlib.sha256()
    for text in texts:
        if not isinstance(text, bytes):
            text = str(text).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8) + text)
    return digest.hexdigest()


def _is_file(text):
    try:
        return len(text) < 4096 and os.path.isfile(text)
    except ValueError:  # A NUL byte.
        return False


def _read_tfds(source, split, column, errors):
    tfds = import_optional(
        "tensorflow_datasets", "tfds", f"The source {source}"
    )
    name = source.removeprefix(TFDS)
    arguments = {
        "name": name,
        "split": split,
        # TFDS itself reads it when it is imported, and never again.
        "data_dir": os.environ.get("TFDS_DATA_DIR"),
    }
    try:
        records = tfds.data_source(**arguments)
        info = records.dataset_info
    except NotImplementedError:  # It is stored without random access.
        _prepare_tensorflow(source)
        dataset, info = tfds.load(**arguments, with_info=True)
        records = None
    if column not in info.features:
        raise ValueError(
            f"{source}: expected a column {column!r}. Received the columns "
            f"{sorted(info.features)}. Name the column of the text with "
            "`column`."
        )

    def read(start):
        if records is None:
            rest = enumerate(tfds.as_numpy(dataset.skip(start)), start)
        else:
            rest = ((i, records[i]) for i in range(start, len(records)))
        for number, record in rest:
            yield f"{source}, record {number}", record[column]

    num_documents = info.splits[split].num_examples
    description = {
        "source": source,
        "split": split,
        "column": column,
        "data_set": info.full_name,
        "documents": num_documents,
    }
    return Documents(lambda: description, read, errors, num_documents)


def _prepare_tensorflow(source):
    """Makes TensorFlow ready to read, and nothing else."""
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            f"{source}: the data set is stored in a format that only "
            "TensorFlow reads. Install tensorflow, or prepare the data set "
            'once more, with file_format="array_record", in another folder, '
            "and set TFDS_DATA_DIR to that folder."
        ) from error
    with contextlib.suppress(RuntimeError):  # It is in use already.
        # Or it takes the memory of all GPUs for itself.
        tensorflow.config.set_visible_devices([], "GPU")
