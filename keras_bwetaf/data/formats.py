"""Files -> documents: Parquet, JSON Lines and text, compressed or not."""

import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import os
import zlib

from keras_bwetaf.data.documents import missing_column, to_text
from keras_bwetaf.optional import import_optional

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What reading a file that is compressed, and cut off or damaged, raises.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


def reader(name):
    """How to count and to read the documents of a file.

    Args:
        name: str. The file's.

    Returns:
        Pair of functions, or None if the format is unknown: `count(path,
        name)`, and `read(path, name, column, start, errors)`, which yields
        pairs of where a document is and what it is.
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix not in OPENERS:
        return FORMATS.get(suffix)
    inner = os.path.splitext(stem)[1]
    return None if inner == ".parquet" else FORMATS.get(inner)


@contextlib.contextmanager
def _naming_damage(where, expected="a whole file", kinds=DAMAGE):
    """Raises one kind of error for a damaged file, with its name.

    Args:
        where: function that returns where the damage is, a str.
        expected: str. What should be there.
        kinds: tuple of the exceptions that tell of damage.
    """
    try:
        yield
    except kinds as error:
        if getattr(error, "errno", None) is not None:
            raise  # The system's own, such as that there is no such file.
        received = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{where()}: expected {expected}. Received: {received}. Fetch or "
            "write the file again."
        ) from error


# Parquet.


@contextlib.contextmanager
def _parquet_file(path, name):
    import_optional("pyarrow", "data", "Reading Parquet files")
    from pyarrow import parquet

    # Arrow itself opens no path that is not UTF-8.
    with open(path, "rb") as file:
        with _naming_parquet_damage(name):
            opened = parquet.ParquetFile(file, page_checksum_verification=True)
        yield opened


def _naming_parquet_damage(where, expected="a Parquet file"):
    # Arrow raises a dozen kinds of errors, some of which are Python's own.
    return _naming_damage(lambda: where, expected, Exception)


def _count_parquet(path, name):
    with _parquet_file(path, name) as file:
        return file.metadata.num_rows


def _read_parquet(path, name, column, start, errors):
    with _parquet_file(path, name) as file:
        with _naming_parquet_damage(name):
            schema = file.schema_arrow
            groups = [
                file.metadata.row_group(group).num_rows
                for group in range(file.num_row_groups)
            ]
        if schema.names.count(column) != 1:
            raise missing_column(name, column, schema.names)
        _check_holds_text(name, column, schema.field(column).type)
        row = 0
        for group, num_rows in enumerate(groups):
            if row + num_rows <= start:
                row += num_rows
                continue
            for text in _read_row_group(file, name, group, column):
                if row >= start:
                    yield f"{name}, row {row}", text
                row += 1


def _check_holds_text(name, column, kind):
    import pyarrow

    try:
        pyarrow.array([], kind).cast(pyarrow.large_binary())
    except (pyarrow.ArrowInvalid, NotImplementedError) as error:
        raise ValueError(
            f"{name}: expected text in the column {column!r}. Received: a "
            f"column of type {kind}."
        ) from error


def _read_row_group(file, name, group, column):
    """Yields texts as bytes, since only we name an invalid row."""
    import pyarrow

    where = f"{name}, row group {group}"
    with _naming_parquet_damage(where, "a whole row group"):
        for batch in file.iter_batches(
            1024, row_groups=[group], columns=[column]
        ):
            yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()


# JSON Lines and text.


def _open(path):
    opener = OPENERS.get(os.path.splitext(path)[1].lower(), open)
    return opener(path, "rb")


def _without_mark(content, where):
    """Content without the mark (BOM) with which Windows begins UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{where}: expected UTF-8. Received: UTF-16, as its first two "
            "bytes say. Save the file as UTF-8, for example with: iconv -f "
            "UTF-16 -t UTF-8"
        )
    return content.removeprefix(codecs.BOM_UTF8)


def _lines(path, name):
    """Yields the number and content of lines that are not blank, from 1."""
    number = 0
    with _naming_damage(lambda: f"{name}, after line {number}"):
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = _without_mark(line, name)
                if line.strip():
                    yield number, line


def _count_json_lines(path, name):
    return sum(1 for _ in _lines(path, name))


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
        ValueError: If a line is no JSON object, or the file is damaged.
    """
    for number, line in itertools.islice(_lines(path, name), start, None):
        where = f"{name}, line {number}"
        text = to_text(line, where, errors)
        try:
            record = json.loads(text)
        # Numbers of very many digits, and very deep nesting.
        except (ValueError, RecursionError) as error:
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
            raise missing_column(where, column, list(record))
        yield where, record[column]


def _read_text(path, name, column, start, errors):
    with _naming_damage(lambda: name), _open(path) as file:
        content = file.read()
    yield name, _without_mark(content, name)


ONE_DOCUMENT = (lambda path, name: 1, _read_text)
FORMATS = {
    ".parquet": (_count_parquet, _read_parquet),
    ".jsonl": (_count_json_lines, _read_json_lines),
    ".txt": ONE_DOCUMENT,
    ".md": ONE_DOCUMENT,
}
