"""Documents out of files, repositories, data sets and iterables."""

import hashlib
import json
import sys
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from keras_bwetaf.data import hub_files, pack, read_documents
from tests import hub_server

TEXTS = ["one", "", "two\nlines", "\0 null byte", "été", "last"]


def write_parquet(path, texts, column="text", kind=None, **arguments):
    table = pyarrow.table(
        {"id": range(len(texts)), column: pyarrow.array(texts, kind)}
    )
    parquet.write_table(table, path, **arguments)


def write_json_lines(path, texts, column="text"):
    lines = [json.dumps({"id": 1, column: text}) + "\n" for text in texts]
    path.write_text("\n".join(lines))  # with blank lines


@pytest.fixture(params=[".parquet", ".jsonl", ".txt"])
def folder(request, tmp_path):
    """`TEXTS` in two files, or in one each."""
    if request.param == ".parquet":
        write_parquet(tmp_path / "a.parquet", TEXTS[:4], row_group_size=2)
        write_parquet(tmp_path / "b.parquet", TEXTS[4:])
    elif request.param == ".jsonl":
        write_json_lines(tmp_path / "a.jsonl", TEXTS[:4])
        write_json_lines(tmp_path / "b.jsonl", TEXTS[4:])
    else:
        for number, text in enumerate(TEXTS):
            path = tmp_path / f"{number}.txt"
            path.write_bytes(text.encode())
    return tmp_path


def test_files(folder):
    paths = sorted(folder.iterdir())
    (folder / "ignored.csv").touch()
    documents = read_documents(folder)
    assert list(documents) == TEXTS == list(documents)
    for number in range(len(TEXTS) + 1):
        assert list(documents.starting_at(number)) == TEXTS[number:]
    assert list(read_documents(f"{folder}/*{paths[0].suffix}")) == TEXTS
    assert list(read_documents(paths)) == TEXTS
    assert list(read_documents(paths[::-1])) != TEXTS
    single = list(read_documents(str(paths[0])))
    assert single == TEXTS[: len(single)] and single


def test_other_columns_and_null(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", None, "y"], "story")
    write_json_lines(tmp_path / "b.jsonl", ["z", None], "story")
    documents = read_documents(tmp_path, column="story")
    assert list(documents) == ["x", "", "y", "z", ""]


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()]
)
def test_parquet_types_of_text(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", TEXTS, kind=kind)
    assert list(read_documents(tmp_path)) == TEXTS


def test_iterables():
    assert list(read_documents(TEXTS)) == TEXTS
    assert list(read_documents(TEXTS).starting_at(2)) == TEXTS[2:]
    assert list(read_documents(iter(TEXTS)).starting_at(2)) == TEXTS[2:]
    assert read_documents(TEXTS).num_documents == len(TEXTS)
    assert read_documents(iter(TEXTS)).num_documents is None
    with pytest.raises(ValueError, match="the path 'a.txt'.*list of paths"):
        list(read_documents(iter([Path("a.txt")])))


INVALID = b"good \xff bad"


def write_invalid(path):
    """Invalid UTF-8 as the third document of a file."""
    if path.suffix == ".parquet":
        texts = [b"a", b"b", INVALID]
        column = pyarrow.array(texts, pyarrow.binary())
        # As other programs write it: Arrow checks nothing here.
        column = pyarrow.Array.from_buffers(
            pyarrow.string(), 3, column.buffers()
        )
        parquet.write_table(pyarrow.table({"text": column}), path)
    elif path.suffix == ".jsonl":
        lines = [b'{"text": "%s"}\n' % text for text in (b"a", b"b", INVALID)]
        path.write_bytes(b"".join(lines))
    else:
        path.write_bytes(INVALID)


@pytest.mark.parametrize(
    "name, where",
    [("a.parquet", ", row 2"), ("a.jsonl", ", line 3"), ("a.txt", "")],
)
def test_invalid_utf8(tmp_path, name, where):
    write_invalid(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}{where}: expected UTF-8"):
        list(read_documents(tmp_path))
    texts = list(read_documents(tmp_path, errors="replace"))
    assert texts[-1] == "good \ufffd bad"


def test_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    with pytest.raises(ValueError, match="a.jsonl, line 1: expected UTF-8"):
        list(read_documents(tmp_path))
    (text,) = read_documents(tmp_path, errors="replace")
    assert "\ufffd" in text and text.encode()
    with pytest.raises(ValueError, match="document 1: expected UTF-8"):
        list(read_documents(["a", "\udc80"]))


def test_missing_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], "story")
    with pytest.raises(ValueError, match=r"'text'.*\['id', 'story'\]"):
        list(read_documents(tmp_path))
    write_json_lines(tmp_path / "b.jsonl", ["x"], "story")
    with pytest.raises(ValueError, match=r"line 1.*'text'.*\['id', 'story'\]"):
        list(read_documents(tmp_path / "b.jsonl"))


def test_columns_that_are_no_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", [[1], [2]])
    with pytest.raises(ValueError, match="a.parquet: expected text.*list"):
        list(read_documents(tmp_path / "a.parquet"))
    write_json_lines(tmp_path / "a.jsonl", [5])
    with pytest.raises(ValueError, match="line 1: expected text.*5 of type"):
        list(read_documents(tmp_path / "a.jsonl"))
    for texts in ([3], [None]):
        with pytest.raises(ValueError, match="document 0: expected text"):
            list(read_documents(texts))


@pytest.mark.parametrize("line", ["{broken", "[1]", '"text"'])
def test_lines_that_are_no_objects(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        list(read_documents(tmp_path))


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="a.parquet: expected a Parquet file"):
        list(read_documents(tmp_path))


def test_nothing_to_read(tmp_path):
    for source in (tmp_path, tmp_path / "*.txt", tmp_path / "no.txt", "fine"):
        with pytest.raises(FileNotFoundError, match="fineweb.*Received"):
            read_documents(str(source))
    with pytest.raises(FileNotFoundError, match="no.txt"):
        read_documents([tmp_path / "no.txt"])
    write_parquet(tmp_path / "a.parquet", pyarrow.array([], "string"))
    for source in (tmp_path, [], iter([])):
        with pytest.raises(ValueError, match="at least one document"):
            list(read_documents(source))


def test_arguments(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a.csv: expected.*'.csv'"):
        read_documents(tmp_path / "a.csv")
    with pytest.raises(ValueError, match='"strict" or "replace"'):
        read_documents(["a"], errors="ignore")
    with pytest.raises(ValueError, match="must be a name, a path"):
        read_documents(5)
    with pytest.raises(ValueError, match="`pathlib.Path` objects"):
        read_documents([str(tmp_path / "a.csv")])


# The Hub.


@pytest.fixture
def repository(hub, hub_client, tmp_path):
    """A function that publishes files as a data set."""

    def add(repo, files):
        folder = tmp_path / repo
        for name, texts in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                write_parquet(path, texts)
            else:
                write_json_lines(path, texts)
        return hub.add(repo, folder)

    return add


def downloads(hub):
    return [
        Path(path).name
        for method, path, _ in hub.requests
        if method == "GET" and "/resolve/" in path
    ]


def test_hub_files(hub, repository):
    commit = repository(
        "owner/name",
        {
            "data/a.jsonl": ["1", "2"],
            "data/b.parquet": ["3"],
            "other.jsonl": ["x"],
        },
    )
    for revision in ("", "@main", f"@{commit}"):
        source = f"hf://datasets/owner/name{revision}/data/*"
        documents = read_documents(source)
        assert list(documents) == ["1", "2", "3"]
        assert documents.description["commit"] == commit
    assert downloads(hub) == ["a.jsonl", "b.parquet"]  # and never again
    single = "hf://datasets/owner/name/other.jsonl"
    assert list(read_documents(single)) == ["x"]


def test_hub_files_are_fetched_when_needed(hub, repository):
    repository("owner/name", {"a.jsonl": ["1"], "b.jsonl": ["2"]})
    documents = iter(read_documents("hf://datasets/owner/name/*.jsonl"))
    assert next(documents) == "1"
    assert downloads(hub) == ["a.jsonl"]


def test_hub_files_of_another_commit(repository, tokenizer, tmp_path):
    source, folder = "hf://datasets/owner/name/a.jsonl", tmp_path / "packed"
    first = repository("owner/name", {"a.jsonl": ["old"]})
    pack(source, folder, tokenizer)
    second = repository("owner/name", {"a.jsonl": ["old"], "b.jsonl": ["b"]})
    assert first != second
    pack(source, folder, tokenizer)
    repository("owner/name", {"a.jsonl": ["new"]})
    with pytest.raises(ValueError, match="packed with other settings: source"):
        pack(source, folder, tokenizer)


def test_hub_keeps_to_one_commit(repository):
    repository("owner/name", {"a.jsonl": ["old"]})
    documents = read_documents("hf://datasets/owner/name/a.jsonl")
    repository("owner/name", {"a.jsonl": ["new"]})
    assert list(documents) == ["old"]


def test_names(repository):
    repository(
        "roneneldan/TinyStories",
        {
            "data/train-00000-of-00001.parquet": ["a story"],
            "data/validation-00000-of-00001.parquet": ["another"],
        },
    )
    repository(
        "HuggingFaceFW/fineweb",
        {
            "sample/10BT/000_00000.parquet": ["web"],
            "sample/100BT/000_00000.parquet": ["too much"],
        },
    )
    assert list(read_documents("tinystories")) == ["a story"]
    assert list(read_documents("tinystories", "validation")) == ["another"]
    assert list(read_documents("fineweb")) == ["web"]
    with pytest.raises(ValueError, match="'fineweb' has the splits"):
        read_documents("fineweb", "validation")


def test_hub_errors(hub, repository):
    repository("owner/name", {"a.jsonl": ["1"]})
    with pytest.raises(ValueError, match="is written hf://datasets/"):
        read_documents("hf://owner/name")
    with pytest.raises(FileNotFoundError, match="owner/none.*does not exist"):
        read_documents("hf://datasets/owner/none/*")
    with pytest.raises(FileNotFoundError, match="no such revision"):
        read_documents("hf://datasets/owner/name@v9/*")
    with pytest.raises(FileNotFoundError, match="matches.*a.jsonl"):
        read_documents("hf://datasets/owner/name/b.jsonl")
    hub.corrupt.add("a.jsonl")
    with pytest.raises(ValueError, match="corrupt"):
        list(read_documents("hf://datasets/owner/name/a.jsonl"))


def break_off(hub, monkeypatch, how):
    """The Hub can't be reached any longer."""
    hub.stop()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "how", ["offline", pytest.param("gone", marks=pytest.mark.slow)]
)
def test_hub_files_are_read_from_the_cache(
    hub, repository, tokenizer, tmp_path, monkeypatch, how
):
    commit = repository(
        "owner/name", {"a.jsonl": ["1"], "b.parquet": ["2"], "c.jsonl": ["3"]}
    )
    source, folder = "hf://datasets/owner/name/[ab].*", tmp_path / "packed"
    online = read_documents(source)
    assert list(online) == ["1", "2"]
    pack(source, folder, tokenizer, num_workers=1, progress=False)
    break_off(hub, monkeypatch, how)
    for revision in ("", "@main", f"@{commit}"):
        cached = read_documents(source.replace("name/", f"name{revision}/"))
        assert list(cached) == ["1", "2"]
        assert cached.files == online.files
    report = pack(source, folder, tokenizer, num_workers=1, progress=False)
    assert report.documents == 2
    # A file that the repository has, and the cache has not, is not left out.
    with pytest.raises(ConnectionError, match="name/c.jsonl .*data set"):
        list(read_documents("hf://datasets/owner/name/*"))
    with pytest.raises(ConnectionError, match="data set") as error:
        read_documents("hf://datasets/owner/other/*")
    assert "model" not in str(error.value)


def test_hub_files_of_another_programs_cache(hub, repository, monkeypatch):
    repository("owner/name", {"d/a.jsonl": ["1"], "d/b.parquet": ["2"]})
    source = "hf://datasets/owner/name/d/*"
    online = read_documents(source)
    for path in Path(constants.HF_ASSETS_CACHE).rglob("*.json"):
        path.unlink()
    huggingface_hub.snapshot_download("owner/name", repo_type="dataset")
    break_off(hub, monkeypatch, "gone")
    with pytest.warns(UserWarning, match="taken for all. Received: 2 files"):
        cached = read_documents(source)
    assert list(cached) == ["1", "2"] and cached.files == online.files


def test_a_large_file_in_the_cache_is_known_by_its_pointer(tmp_path):
    content = b"large"
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (tmp_path / "a.parquet").symlink_to(blob)
    pointer = tmp_path / "pointer"
    pointer.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{blob.name}\nsize 5\n"
    )
    expected = hub_server.File("a.parquet", pointer.read_bytes()).git
    assert hub_files._blob_id(tmp_path / "a.parquet") == expected


def test_a_cache_that_cannot_be_written_is_no_hindrance(
    repository, tmp_path, monkeypatch
):
    repository("owner/name", {"a.jsonl": ["1"]})
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    assert list(read_documents("hf://datasets/owner/name/*")) == ["1"]


def test_globs_and_folders_of_the_hub_are_those_of_this_machine(
    repository, tmp_path, monkeypatch
):
    names = ["root", "data/a", "data/old/a", "data/sub/b", "data/.h/c", "[a]"]
    repository("owner/name", {f"{name}.jsonl": [name] for name in names})
    monkeypatch.chdir(tmp_path / "owner" / "name")
    for path in (
        "*.jsonl", "data/*.jsonl", "**/*.jsonl", "**", "data", "data/",
        "data/**", "*/*/b.jsonl", "data/[a].jsonl", "[a].jsonl", "data/.h/*",
    ):  # fmt: skip
        local = read_documents(path)
        remote = read_documents(f"hf://datasets/owner/name/{path}")
        assert list(remote) == list(local)
    assert read_documents("data").skipped == {"hidden": ["data/.h"]}
    remote = read_documents("hf://datasets/owner/name/data")
    assert remote.skipped == {"hidden": ["data/.h/c.jsonl"]}
    assert list(read_documents("data/*.jsonl")) == ["data/a"]
    for path in ("data/{a,b}.jsonl", "*.txt", "dat"):
        for source in (path, f"hf://datasets/owner/name/{path}"):
            with pytest.raises(FileNotFoundError):
                read_documents(source)


# TensorFlow data sets.


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Two data sets: with random access, and without."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"story": tfds.features.Text()}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {
                "train": self._texts(TEXTS + [b"\xff"]),
                "test": self._texts(["test"]),
            }

        def _texts(self, texts):
            yield from ((i, {"story": text}) for i, text in enumerate(texts))

        def _generate_examples(self, _):
            raise NotImplementedError

    class Tales(Builder):
        pass

    class Stream(Builder):
        pass

    folder = tmp_path_factory.mktemp("tfds")
    for builder, file_format in ((Tales, "array_record"), (Stream, "tfrecord")):
        builder(data_dir=folder, file_format=file_format).download_and_prepare()
    return folder


def test_tfds(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    with pytest.raises(ValueError, match="tfds:tales, record .: expected UTF"):
        list(read_documents("tfds:tales", column="story"))
    documents = read_documents("tfds:tales", column="story", errors="replace")
    assert documents.num_documents == len(TEXTS) + 1
    read = list(documents)
    assert sorted(read) == sorted(TEXTS + ["\ufffd"])
    assert list(documents.starting_at(3)) == read[3:]
    test = read_documents("tfds:tales", "test", "story")
    assert list(test) == ["test"]
    with pytest.raises(ValueError, match=r"'text'.*\['story'\]"):
        read_documents("tfds:tales")


def test_tfds_without_random_access(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    documents = read_documents("tfds:stream", column="story", errors="replace")
    assert documents.num_documents == len(TEXTS) + 1
    read = list(documents)
    assert sorted(read) == sorted(TEXTS + ["\ufffd"])
    assert list(documents.starting_at(3)) == read[3:]
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="only TensorFlow.*array_record"):
        read_documents("tfds:stream", column="story")


@pytest.mark.parametrize(
    "source, module, extra",
    [
        ("tfds:tales", "tensorflow_datasets", "tfds"),
        ("a.parquet", "pyarrow", "data"),
    ],
)
def test_missing_packages(monkeypatch, tmp_path, source, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    if source == "a.parquet":
        source = tmp_path / source
        source.touch()
    with pytest.raises(ImportError, match=rf"keras-bwetaf\[{extra}\]"):
        list(read_documents(source))
