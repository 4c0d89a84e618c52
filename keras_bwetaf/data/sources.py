"""Where documents come from: files, data sets, iterables."""

import collections.abc
import contextlib
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants

from converters.hub import check_digest, clear_errors
from keras_bwetaf.data.optional import import_optional

TFDS = "tfds:"
HUB = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>[^/\s]+))?/(?P<pattern>\S+)"
)
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


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of a source, numbered from 0.

    Attributes:
        description: dict. What identifies the source, for an index.
        read: function of a number. Yields the documents from that number
            on, as pairs of where the document is and what it is: str, bytes
            or None.
        errors: str. What to do with invalid UTF-8.
        num_documents: int, or None if it is not known beforehand.
    """

    description: dict
    read: Callable
    errors: str = "strict"
    num_documents: int | None = None

    def __iter__(self):
        return self.starting_at(0)

    def starting_at(self, number):
        """Yields the documents from a number on.

        Args:
            number: int.

        Yields:
            str.

        Raises:
            ValueError: If a document is not text, or there is none at all.
        """
        is_empty = number == 0
        for where, content in self.read(number):
            is_empty = False
            yield _text(content, where, self.errors)
        if is_empty:
            raise ValueError(
                "Expected at least one document. Received: a source without "
                f"any: {self.description}"
            )


def _text(content, where, errors):
    """Returns a document as a str of valid Unicode."""
    if content is None:
        return ""
    if isinstance(content, str):
        if content.isascii():
            return content
        # A lone surrogate, from a JSON escape, is invalid in UTF-8, too.
        content = content.encode("utf-8", "surrogatepass")
    if not isinstance(content, bytes):
        raise ValueError(
            f"{where}: expected text. Received: {content!r} of type "
            f"{type(content).__name__}. Name the column of the text with "
            "`column`."
        )
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8. Received: {error.reason} at byte "
            f"{error.start}. Repair the document, or pass "
            'errors="replace" for replacement characters.'
        ) from error


def read_documents(source, split="train", column="text", *, errors="strict"):
    """Opens a source of documents.

    | source | |
    |---|---|
    | `"tfds:NAME"`, `"tfds:NAME/CONFIG"` | a TensorFlow data set; only one that is stored in a format without random access, such as `tfrecord`, needs TensorFlow |
    | a path, glob or folder | `.parquet`, `.jsonl` with a document a row, `.txt` with a document a file |
    | a list of `pathlib.Path` | such files, in this order |
    | `"hf://datasets/owner/name/PATH"` | such files of a repository; `PATH` may be a glob; `@revision` may follow the name |
    | `"tinystories"`, `"fineweb"` | the data sets of the model card: roneneldan/TinyStories, and the 10-billion-token sample of HuggingFaceFW/fineweb |
    | an iterable of str | documents |

    Files are in the order of their paths. Null is an empty document.

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
    if isinstance(source, str) and source.startswith("hf://"):
        description = {"source": source, "column": column}
        return _read_hub(source, description, column, errors)
    if isinstance(source, str | os.PathLike):
        description = {"source": os.fspath(source), "column": column}
        paths = _expand(os.fspath(source))
        return _read_paths(paths, description, column, errors)
    if isinstance(source, collections.abc.Iterable):
        return _read_iterable(source, column, errors)
    raise ValueError(
        "`source` must be a name, a path, or an iterable of paths or str. "
        f"Received: source={source!r} of type {type(source).__name__}"
    )


def _read_named(name, split, column, errors):
    pattern, splits = NAMES[name]
    if split not in splits:
        raise ValueError(
            f"The source {name!r} has the splits {splits}. Received: "
            f"split={split!r}"
        )
    description = {"source": name, "split": split, "column": column}
    source = pattern.replace("{split}", split)
    return _read_hub(source, description, column, errors)


# Iterables and TensorFlow data sets.


def _read_iterable(source, column, errors):
    if isinstance(source, collections.abc.Sized):
        first = next(iter(source), None)
        num_documents = len(source)
    else:  # Reading from an iterator would use it up.
        first = num_documents = None
    if isinstance(first, os.PathLike):
        paths = [os.fspath(path) for path in source]
        description = {"source": paths, "column": column}
        return _read_paths(paths, description, column, errors)
    if isinstance(first, str) and _is_file(first):
        raise ValueError(
            "An iterable of str holds documents, but the first is the name "
            "of a file. Pass `pathlib.Path` objects for files. Received: "
            f"{first!r}"
        )

    def read(start):
        documents = itertools.islice(source, start, None)
        for number, content in enumerate(documents, start):
            where = f"document {number}"
            if content is None:
                raise ValueError(f"{where}: expected text. Received: None")
            if isinstance(content, os.PathLike):
                raise ValueError(
                    f"{where}: expected text. Received: the path "
                    f"{os.fspath(content)!r} from an iterator. Pass a list of "
                    "paths."
                )
            yield where, content

    description = {"source": "iterable", "documents": num_documents}
    if isinstance(source, list | tuple):
        description["sha256"] = _digest(source)
    return Documents(description, read, errors, num_documents)


def _digest(texts):
    """A SHA-256 that tells lists of texts from each other."""
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
    return Documents(description, read, errors, num_documents)


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


# Files.


def _expand(source):
    """Returns the files of a path, a folder or a glob, sorted."""
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        folder = Path(source)
        paths = [path for path in folder.rglob("*") if path.suffix in FORMATS]
    else:
        paths = map(Path, glob.glob(source, recursive=True))
    paths = sorted(path.as_posix() for path in paths if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"Expected a file, a folder with files in {sorted(FORMATS)}, a "
            "glob that matches some, or one of the names "
            f"{sorted(NAMES)}. Received: {source!r}"
        )
    return paths


def _read_paths(paths, description, column, errors):
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Expected a file. Received: {path!r}")
    files = [(path, functools.partial(Path, path)) for path in paths]
    sizes = {path: os.path.getsize(path) for path in paths}
    description = {**description, "files": sizes}
    return _read_files(files, description, column, errors)


def _read_hub(source, description, column, errors):
    match = HUB.fullmatch(source)
    if not match:
        raise ValueError(
            "A data set of the Hub is written hf://datasets/owner/name/path "
            "or hf://datasets/owner/name@revision/path, where the path may "
            f"be a glob. Received: {source!r}"
        )
    repo = match["repo"]
    revision = unquote(match["revision"] or constants.DEFAULT_REVISION)
    with clear_errors(repo, revision):
        info = huggingface_hub.HfApi().dataset_info(
            repo, revision=revision, files_metadata=True
        )
    siblings = {
        file.rfilename: file
        for file in sorted(info.siblings, key=lambda file: file.rfilename)
        if fnmatch.fnmatchcase(file.rfilename, match["pattern"])
    }
    if not siblings:
        raise FileNotFoundError(
            f"{source}: no file of the repository matches. It holds, for "
            f"example, {[file.rfilename for file in info.siblings[:5]]}."
        )

    def download(name):
        with clear_errors(repo, revision):
            path = huggingface_hub.hf_hub_download(
                repo, name, repo_type="dataset", revision=info.sha
            )
            check_digest(Path(path), siblings[name])
        return Path(path)

    files = [(name, functools.partial(download, name)) for name in siblings]
    blobs = {name: file.blob_id for name, file in siblings.items()}
    description = {**description, "commit": info.sha, "files": blobs}
    return _read_files(files, description, column, errors)


def _read_files(files, description, column, errors):
    """Documents of files, one file after the other.

    Args:
        files: list of pairs of a name and a function without arguments that
            returns the path, called when the file is needed.
        description: dict.
        column: str.
        errors: str.

    Returns:
        `Documents`.
    """
    for name, _ in files:
        if Path(name).suffix not in FORMATS:
            raise ValueError(
                f"{name}: expected a file in one of the formats "
                f"{sorted(FORMATS)}. Received: one with the suffix "
                f"{Path(name).suffix!r}"
            )

    def read(start):
        for name, locate in files:
            count, rows = FORMATS[Path(name).suffix]
            path = locate()
            num_rows = count(path) if start else None
            if num_rows is not None and start >= num_rows:
                start -= num_rows
                continue
            yield from rows(path, name, column, start, errors)
            start = 0

    return Documents(description, read, errors)


def _missing_column(where, column, columns):
    return ValueError(
        f"{where}: expected a column {column!r}. Received the columns "
        f"{columns}. Name the column of the text with `column`."
    )


def _open_parquet(path):
    import_optional("pyarrow", "data", "Reading Parquet files")
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(
            f"{path}: expected a Parquet file. Received: {error}. Fetch or "
            "write the file again."
        ) from error


def _count_parquet(path):
    with _open_parquet(path) as file:
        return file.metadata.num_rows


def _read_parquet(path, name, column, start, errors):
    with _open_parquet(path) as file:
        import pyarrow

        if column not in file.schema_arrow.names:
            raise _missing_column(name, column, file.schema_arrow.names)
        kind = file.schema_arrow.field(column).type
        row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row + num_rows <= start:
                row += num_rows
                continue
            for batch in file.iter_batches(
                1024, row_groups=[group], columns=[column]
            ):
                try:  # As bytes, since only we name an invalid row.
                    texts = batch.column(0).cast(pyarrow.large_binary())
                except (pyarrow.ArrowInvalid, NotImplementedError) as error:
                    raise ValueError(
                        f"{name}: expected text in the column {column!r}. "
                        f"Received: a column of type {kind}."
                    ) from error
                for text in texts.to_pylist():
                    if row >= start:
                        yield f"{name}, row {row}", text
                    row += 1


def _lines(path):
    """Yields the number and content of lines that are not blank, from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _count_json_lines(path):
    return sum(1 for _ in _lines(path))


def json_records(path, name, start=0, errors="strict"):
    """Reads a file with a JSON object in each line.

    Args:
        path: str or path.
        name: str. The file's, for messages.
        start: int. How many objects to skip.
        errors: str. What to do with invalid UTF-8.

    Yields:
        Pairs of where the object is and what it is, a dict.

    Raises:
        ValueError: If a line is no JSON object.
    """
    for number, line in itertools.islice(_lines(path), start, None):
        where = f"{name}, line {number}"
        try:
            record = json.loads(_text(line, where, errors))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: expected a JSON object. Received: {error}. Repair "
                "the line, or write the file again."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: expected a JSON object. Received: {record!r:.80} "
                f"of type {type(record).__name__}"
            )
        yield where, record


def _read_json_lines(path, name, column, start, errors):
    for where, record in json_records(path, name, start, errors):
        if column not in record:
            raise _missing_column(where, column, list(record))
        yield where, record[column]


def _read_text(path, name, column, start, errors):
    yield name, Path(path).read_bytes()


# How to count and to read the documents of a file.
FORMATS = {
    ".parquet": (_count_parquet, _read_parquet),
    ".jsonl": (_count_json_lines, _read_json_lines),
    ".txt": (lambda path: 1, _read_text),
}
