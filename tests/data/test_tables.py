"""Documents of tables, data sets and records: a column of them."""

import itertools

import numpy as np
import pyarrow
import pytest

from keras_bwetaf.data import pack, read_documents

TEXTS = ["one", "", "été"]
COLUMNS = {"url": ["a", "b", "c"], "text": TEXTS}


class Frame:
    """What pandas and polars have in common."""

    def __init__(self, columns):
        self._columns = columns
        self.columns = columns.keys()

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __iter__(self):
        return iter(self._columns)

    def __getitem__(self, name):
        return self._columns[name]


class Streaming:
    """An iterable of records, as `datasets` has, in an old version."""

    column_names = None

    def __iter__(self):
        return (
            dict(zip(COLUMNS, row, strict=True))
            for row in zip(*COLUMNS.values(), strict=True)
        )


class Tensors:
    """A data set of `tf.data`."""

    def __len__(self):
        raise TypeError("The dataset is infinite.")

    def __iter__(self):
        return iter([object()])

    def as_numpy_iterator(self):
        return ({"text": text.encode()} for text in TEXTS)


def of_package(package, make):
    return pytest.param(lambda: make(pytest.importorskip(package)), id=package)


TABLES = [
    pytest.param(lambda: Frame(COLUMNS), id="frame"),
    pytest.param(lambda: COLUMNS, id="dict"),
    pytest.param(lambda: {"train": COLUMNS, "test": None}, id="splits"),
    pytest.param(lambda: {"train": Streaming()}, id="streaming splits"),
    pytest.param(Streaming, id="streaming"),
    pytest.param(Tensors, id="tensors"),
    pytest.param(lambda: list(Streaming()), id="records"),
    pytest.param(lambda: pyarrow.table(COLUMNS), id="arrow"),
    pytest.param(lambda: pyarrow.record_batch(COLUMNS), id="arrow batch"),
    pytest.param(lambda: pyarrow.chunked_array([TEXTS]), id="arrow array"),
    pytest.param(lambda: np.array(TEXTS), id="numpy"),
    pytest.param(lambda: np.array(TEXTS, object), id="numpy objects"),
    of_package("pandas", lambda pandas: pandas.DataFrame(COLUMNS)),
    of_package("pandas", lambda pandas: pandas.DataFrame(COLUMNS)["text"]),
    of_package("polars", lambda polars: polars.DataFrame(COLUMNS)),
    of_package("polars", lambda polars: polars.Series(TEXTS)),
    of_package("datasets", lambda d: d.Dataset.from_dict(COLUMNS)),
    of_package(
        "datasets",
        lambda d: d.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
    ),
    of_package(
        "datasets",
        lambda d: d.DatasetDict({"train": d.Dataset.from_dict(COLUMNS)}),
    ),
]


@pytest.mark.parametrize("make", TABLES)
def test_the_column_is_read(make):
    documents = read_documents(make())
    assert list(documents) == TEXTS == list(documents)
    assert all(type(text) is str for text in documents)
    assert list(documents.starting_at(2)) == TEXTS[2:]


def test_another_column_and_split():
    tables = {"train": COLUMNS, "test": pyarrow.table({"text": ["t"]})}
    assert list(read_documents(tables, "test")) == ["t"]
    assert list(read_documents(tables, column="url")) == COLUMNS["url"]
    assert list(read_documents(Frame(COLUMNS), column="url")) == ["a", "b", "c"]


def test_a_column_that_is_not_there():
    for source in (Frame(COLUMNS), pyarrow.table(COLUMNS), list(Streaming())):
        with pytest.raises(
            ValueError, match=r"'story'.*\['url', 'text'\].*`co"
        ):
            list(read_documents(source, column="story"))
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    with pytest.raises(ValueError, match="one column 'text'"):
        read_documents(twice)
    with pytest.raises(ValueError, match=r"'text' or a split 'train'.*\['a'\]"):
        read_documents({"a": COLUMNS})
    for source in ({"text": "a single record"}, b"bytes"):
        with pytest.raises(ValueError, match="must be a name, a path, a table"):
            read_documents(source)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_values_are_named(missing):
    texts = ["a", "b", missing]
    for source, place in (
        ({"text": texts}, "column 'text', row 2"),
        (texts, "document 2"),
        ([{"text": text} for text in texts], "document 2"),
    ):
        expected = f"^{place}: expected text.*{missing}.*Fill or leave out"
        with pytest.raises(ValueError, match=expected):
            list(read_documents(source))


def test_missing_values_of_tables():
    with pytest.raises(ValueError, match="row 1: expected text"):
        list(read_documents(pyarrow.table({"text": ["a", None]})))
    pandas = pytest.importorskip("pandas")
    for missing in (None, pandas.NA, float("nan")):
        frame = pandas.DataFrame({"text": ["a", missing]})
        with pytest.raises(ValueError, match="row 1: expected text"):
            list(read_documents(frame))


def test_a_list_of_str_is_documents():
    assert list(read_documents(["url", "text"])) == ["url", "text"]


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError) as error:
        list(read_documents([np.zeros((10_000, 2))]))
    assert len(str(error.value)) < 400


def test_an_endless_source_is_not_read_beforehand():
    class Endless:
        def __len__(self):
            return 2**62

        def __iter__(self):
            return itertools.repeat("a")

    assert read_documents(Endless()).description["documents"] == 2**62


def test_tables_are_packed_by_their_content(tokenizer, tmp_path):
    def pack_into(folder, table, **arguments):
        return pack(
            table,
            tmp_path / folder,
            tokenizer,
            num_workers=1,
            progress=False,
            **arguments,
        )

    assert pack_into("packed", pyarrow.table(COLUMNS)).documents == 2
    pack_into("packed", pyarrow.table(COLUMNS))
    changed = {**COLUMNS, "text": ["one", "", "other"]}
    for table, column in ((changed, "text"), (COLUMNS, "url")):
        with pytest.raises(ValueError, match="other settings: source="):
            pack_into("packed", pyarrow.table(table), column=column)
