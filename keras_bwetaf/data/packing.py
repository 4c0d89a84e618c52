"""Documents -> shards of token ids, tokenized by several processes."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from typing import Any, Literal

import filelock
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from converters.files import local_path, new_file
from keras_bwetaf.arguments import PathLike, Tokenizer
from keras_bwetaf.checks import is_number, positive_int
from keras_bwetaf.data import listing, worker
from keras_bwetaf.data.index import (
    FILE_NAME,
    SHARD,
    VERSION,
    damage,
    read_index,
    shard_name,
    tokenizer_digest,
    write_index,
)
from keras_bwetaf.data.sources import read_documents
from keras_bwetaf.processes import in_first_process, is_first_process

BATCH_CHARACTERS = 2**18
LOCK = ".lock"
NAMES = (FILE_NAME, listing.FILE_NAME)
# What `new_file` had begun when the process was killed.
PARTIAL = re.compile(
    rf"\.({'|'.join(map(re.escape, NAMES))}|{SHARD.pattern})\.[0-9a-f]+\.tmp"
)


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What a packed folder holds, and how long the last call took.

    Attributes:
        documents: int. Documents that were packed, of all splits.
        empty_documents: int. Documents without a token, which were skipped.
        tokens: dict of split to int. End tokens are included.
        bytes: int. The UTF-8 bytes of the documents.
        seconds: float. How long this call took.
        megabytes_per_second: float. Of text, packed by this call.
        skipped: dict of a reason to names of files and folders that the
            source has and that are not read.
    """

    documents: int
    empty_documents: int
    tokens: dict
    bytes: int
    seconds: float
    megabytes_per_second: float
    skipped: dict = dataclasses.field(default_factory=dict)

    @property
    def tokens_per_byte(self):
        return sum(self.tokens.values()) / max(self.bytes, 1)

    def __str__(self):
        tokens = ", ".join(
            f"{count:,} {split}" for split, count in self.tokens.items()
        )
        skipped = "".join(
            f"\nNot read: {len(names):,} {reason}: {listing.shortened(names)}"
            for reason, names in self.skipped.items()
        )
        return (
            f"{self.documents:,} documents ({self.empty_documents:,} empty "
            f"ones skipped)\ntokens: {tokens}\n"
            f"{self.tokens_per_byte:.4f} tokens per byte; "
            f"{self.seconds:.1f} s, {self.megabytes_per_second:.2f} MB/s"
            f"{skipped}"
        )


def pack(
    source: Any,
    folder: PathLike,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    column: str = "text",
    errors: Literal["strict", "replace"] = "strict",
    num_workers: int | None = None,
    shard_size: int = 2**25,
    validation_fraction: float = 0.0,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PackingReport:
    """Tokenizes documents and writes them to a folder of token shards.

    The end token is appended to each document; documents without a token
    are skipped and counted. Shards hold the ids one after the other, in the
    order of the source, as little-endian uint16, or uint32 for more than
    65,536 tokens. `index.json` says what each holds.

    The result depends on the source and the settings alone, not on the
    number of processes. When a call was interrupted, the same call again
    goes on after the last whole shard, and ends with the same bytes. On a
    folder that is complete, it checks the shards and returns. That the source
    is the same is checked: local files by name and size, and those of the Hub,
    lists, arrays and tables by their content. Of iterators and streams, it
    can't be. `files.jsonl.gz` lists the files, to say which have changed.

    Which documents are held out for validation is a function of each
    document's letters and digits, so that copies never are on both sides. Of
    a source with a single document, such as one text file, its end is.

    Of several processes that train together, all must call this. The first
    one packs, and the others wait for it; all must see the folder.

    Args:
        source: What `read_documents` takes.
        folder: path. Where to write; it is created.
        tokenizer: `BwETAFTokenizer`.
        split: str. The split of the source. Defaults to `"train"`.
        column: str. Where records hold their text. Defaults to `"text"`.
        errors: str. What to do with invalid UTF-8: `"strict"` or
            `"replace"`. Defaults to `"strict"`.
        num_workers: int. How many processes tokenize. Defaults to one for
            each core.
        shard_size: int. After how many tokens, of all splits, a shard ends;
            a whole shard is in memory until it is written. Defaults to
            `2**25`, at most 64 MB of uint16.
        validation_fraction: float. The share of documents to hold out for
            the split `"validation"`. Defaults to `0.0`.
        max_tokens: int. Stop with the shard in which so many tokens, of all
            splits, are reached. What comes after them in the source is
            neither read nor downloaded. Defaults to all there are.
        overwrite: bool. Whether to remove the tokens in the folder and
            start anew. Defaults to `False`.
        progress: bool. Whether to show a progress bar and print the report.
            Defaults to `True`.

    Returns:
        A `PackingReport`.

    Raises:
        ValueError: If an argument is out of range, a document is no text,
            the source is empty, or the folder holds anything else.
        RuntimeError: If a tokenizing process ends, or another call is
            packing into the folder.

    Example:

    ```python
    tokenizer = keras_bwetaf.from_preset("97m").preprocessor.tokenizer
    keras_bwetaf.data.pack(
        "tinystories", "stories", tokenizer, validation_fraction=0.01
    )
    ```
    """
    start = time.perf_counter()
    folder = local_path("folder", folder)
    num_workers = os.cpu_count() if num_workers is None else num_workers
    num_workers, shard_size, max_tokens = _checked_arguments(
        tokenizer, num_workers, shard_size, validation_fraction, max_tokens
    )

    def write():
        documents = read_documents(source, split, column, errors=errors)
        fresh = _new_index(
            documents, tokenizer, shard_size, validation_fraction, max_tokens
        )
        return _write(
            folder,
            fresh,
            documents,
            tokenizer,
            num_workers=num_workers,
            overwrite=overwrite,
            progress=progress,
        )

    packed = in_first_process(write)
    if packed is None:  # Another process did it.
        index = read_index(folder)
        packed = index, _total(index, "bytes"), {}
    report = _report(*packed, time.perf_counter() - start)
    if validation_fraction and worker.VALIDATION not in report.tokens:
        warnings.warn(
            f"{folder}: nothing is held out for validation. Each document is "
            "held out by chance. Pass more documents, or shorter ones. "
            f"Received: {report.documents} documents, "
            f"validation_fraction={validation_fraction}",
            stacklevel=2,
        )
    if progress and is_first_process():
        Console().print(
            str(report), highlight=False, markup=False, soft_wrap=True
        )
    return report


def _write(
    folder, fresh, documents, tokenizer, *, num_workers, overwrite, progress
):
    """Writes the shards that are missing.

    Returns:
        Tuple of the index; the bytes of text that had been packed before; and
        what was left out, as `Documents` has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        if overwrite:
            _clear(folder)
        index = _resume(folder, fresh, documents.files)
        resumed_at = _total(index, "bytes")
        if not index["complete"]:
            if documents.files:
                listing.write(folder, documents.files)
            arguments = {
                "specification": tokenizer.specification(),
                "end_token_id": index["end_token_id"],
                "dtype": index["dtype"],
                "validation_fraction": index["validation_fraction"],
                "is_only": documents.num_documents == 1,
            }
            _write_shards(
                folder, index, documents, num_workers, arguments, progress
            )
    return index, resumed_at, documents.skipped


def _checked_arguments(
    tokenizer, num_workers, shard_size, validation_fraction, max_tokens
):
    if not hasattr(tokenizer, "specification"):
        raise ValueError(
            "`tokenizer` must be a BwETAFTokenizer, such as "
            "lm.preprocessor.tokenizer. Received: "
            f"tokenizer={tokenizer!r} of type {type(tokenizer).__name__}"
        )
    num_workers = positive_int("num_workers", num_workers)
    shard_size = positive_int("shard_size", shard_size)
    if max_tokens is not None:
        max_tokens = positive_int("max_tokens", max_tokens)
    if not is_number(validation_fraction) or not 0 <= validation_fraction < 1:
        raise ValueError(
            "`validation_fraction` must be at least 0 and below 1. Received: "
            f"validation_fraction={validation_fraction!r}"
        )
    return num_workers, shard_size, max_tokens


def _new_index(
    documents, tokenizer, shard_size, validation_fraction, max_tokens
):
    size = tokenizer.vocabulary_size()
    return {
        "version": VERSION,
        "complete": False,
        "source": documents.description,
        "shard_size": shard_size,
        "validation_fraction": float(validation_fraction),
        "max_tokens": max_tokens,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "vocabulary_size": size,
        "end_token_id": tokenizer.end_token_id,
        "dtype": "uint16" if size <= 2**16 else "uint32",
        "shards": [],
    }


@contextlib.contextmanager
def _only_one(folder):
    """Keeps other calls off the folder; a killed process lets go of it."""
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RuntimeError(
            f"{folder}: another process is packing into this folder. Wait "
            "for it, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _is_ours(path):
    name = path.name
    return (
        name in (*NAMES, LOCK)
        or SHARD.fullmatch(name)
        or PARTIAL.fullmatch(name)
    )


def clear(folder):
    """Removes what `pack` wrote to a folder, if there is one.

    Args:
        folder: Path.

    Raises:
        RuntimeError: If another call is packing into the folder.
    """
    if folder.is_dir():
        with _only_one(folder):
            _clear(folder)


def _clear(folder):
    """Removes what earlier calls wrote, the index first."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _is_ours(path) and path.name != LOCK:
            path.unlink()


def _resume(folder, fresh, files):
    """Returns the index to go on with: whole shards, in a row."""
    others = sorted(p.name for p in folder.iterdir() if not _is_ours(p))
    if others:
        raise ValueError(
            f"{folder}: expected a new folder, or one that `pack` wrote. "
            f"Received: one that holds {others[0]!r} and {len(others) - 1} "
            "other files. Choose another folder."
        )
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            path.unlink()
    if not (folder / FILE_NAME).exists():
        return fresh
    index = read_index(folder)
    _check_is_same(folder, index, fresh, files)
    for number, shard in enumerate(index["shards"]):
        for part in shard["splits"].values():
            path = folder / part["file"]
            if damage(path, part, index["dtype"], verify=True):
                shards = index["shards"][:number]
                return {**index, "shards": shards, "complete": False}
    return index


def _check_is_same(folder, index, fresh, files):
    """Checks that the source and the settings are those of an index."""
    before = {**index, "source": _identity(index["source"])}
    after = {**fresh, "source": _identity(fresh["source"])}
    for name in fresh:
        if name in ("complete", "shards") or before.get(name) == after[name]:
            continue
        packed, received, changes = before.get(name), after[name], ""
        if name == "source":
            packed, received = _differences(packed, received)
            changes = listing.changes(folder, index["source"], files)
        raise ValueError(
            f"{folder}: the folder was packed with other settings: "
            f"{name}={packed!r}. Received: {name}={received!r}. {changes}Pass "
            "overwrite=True to pack anew, or choose another folder."
        )


def _identity(source):
    """What identifies a source, but for the commit that files were found in.

    An index of an earlier version lists the files themselves.
    """
    source = {key: source[key] for key in source if key != "commit"}
    if "files" in source:
        source |= listing.summary(source.pop("files").items())
    if isinstance(source.get("source"), list):
        source["source"] = "paths"
    return source


def _differences(*sources):
    """The entries of two dicts that are not the same in both."""
    first, second = sources
    keys = [
        key for key in {**first, **second} if first.get(key) != second.get(key)
    ]
    return tuple({k: each[k] for k in keys if k in each} for each in sources)


def _write_shards(folder, index, documents, num_workers, arguments, progress):
    """Tokenizes what is missing; updates `index`, in memory and on disk."""
    start = _total(index, "documents")
    limit = min(BATCH_CHARACTERS, index["shard_size"])
    batches = _batches(documents.starting_at(start), limit)
    with (
        _Bar(documents.num_documents, index, progress) as bar,
        _Workers(num_workers, arguments) as workers,
    ):
        results = bar.watch(workers.in_order(batches))
        while not _is_enough(index) and (
            results_of_shard := _take_shard(results, index["shard_size"])
        ):
            number = len(index["shards"])
            shard = _write_shard(folder, number, results_of_shard)
            index["shards"].append(shard)
            write_index(folder, index)
    if not any(shard["splits"] for shard in index["shards"]):
        raise ValueError(
            "Expected a document with a token at least. Received: "
            f"{_total(index, 'documents')} empty documents from "
            f"{documents.description}"
        )
    index["complete"] = True
    write_index(folder, index)


def _is_enough(index):
    limit = index["max_tokens"]
    return limit is not None and sum(_tokens(index).values()) >= limit


def _batches(texts, limit):
    """Cuts texts into lists, by the texts alone.

    Args:
        texts: Iterable of str.
        limit: int. How many characters end a list.

    Yields:
        list of str.
    """
    batch, num_characters = [], 0
    for text in texts:
        batch.append(text)
        num_characters += len(text) + 1
        if num_characters >= limit:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _take_shard(results, shard_size):
    """The next results that fill a shard; none at the end."""
    taken, num_tokens = [], 0
    for result in results:
        taken.append(result)
        num_tokens += _num_tokens(result)
        if num_tokens >= shard_size:
            break
    return taken


def _num_tokens(result):
    return sum(len(ids) for split in worker.SPLITS for ids in result[split])


def _write_shard(folder, number, results):
    """Writes the files of a shard; returns its entry in the index."""
    splits = {}
    for split in worker.SPLITS:
        parts = [ids for result in results for ids in result[split]]
        if not parts:
            continue
        ids = np.concatenate(parts)
        content = ids.astype(ids.dtype.newbyteorder("<")).tobytes()
        with new_file(folder / shard_name(split, number)) as file:
            file.write(content)
        splits[split] = {
            "file": shard_name(split, number),
            "tokens": len(ids),
            "documents": len(parts),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    counts = ("documents", "empty_documents", "bytes")
    return {
        **{name: sum(result[name] for result in results) for name in counts},
        "splits": splits,
    }


def _total(index, name):
    return sum(shard[name] for shard in index["shards"])


def _tokens(index):
    """The tokens of each split."""
    tokens = collections.Counter()
    for shard in index["shards"]:
        for split, part in shard["splits"].items():
            tokens[split] += part["tokens"]
    return dict(tokens)


def _report(index, resumed_at, skipped, seconds):
    num_bytes, empty = _total(index, "bytes"), _total(index, "empty_documents")
    return PackingReport(
        documents=_total(index, "documents") - empty,
        empty_documents=empty,
        tokens=_tokens(index),
        bytes=num_bytes,
        seconds=seconds,
        megabytes_per_second=(num_bytes - resumed_at) / 1e6 / seconds,
        skipped=skipped,
    )


class _Workers:
    """Processes that run `worker.py`, and a thread that waits for each.

    They are no `multiprocessing` processes: those would import the user's
    script once more, and this package with Keras and JAX.

    Args:
        num_workers: int.
        arguments: dict. Of `worker.DocumentEncoder`.
    """

    def __init__(self, num_workers, arguments):
        self._num_workers = num_workers
        self._arguments = arguments
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers)
        self._of_thread = threading.local()
        self._processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()  # No thread waits for it any longer.
        self._threads.shutdown()
        for process in self._processes:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def in_order(self, batches):
        """Encodes batches of texts, some ahead; yields results in order."""
        pending = collections.deque()
        for batch in batches:
            pending.append(self._threads.submit(self._encode, batch))
            if len(pending) > 2 * self._num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, batch):
        requests = [batch]
        if not hasattr(self._of_thread, "process"):
            self._of_thread.process = self._start()
            requests.insert(0, self._arguments)
        process = self._of_thread.process
        try:
            for request in requests:
                pickle.dump(request, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                "A tokenizing process ended unexpectedly, with status "
                f"{process.wait(timeout=60)}. If memory ran out, pass fewer "
                "`num_workers`. Call `pack` again to go on after the last "
                "whole shard."
            ) from error

    def _start(self):
        process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # They use a core each. Only they must know: threads elsewhere
            # in the program may go on tokenizing in parallel.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._processes.append(process)
        return process


class _Bar:
    """A progress bar: documents, tokens, speed, time.

    Args:
        num_documents: int, or None if it is not known.
        index: dict. What is there already.
        visible: bool.
    """

    def __init__(self, num_documents, index, visible):
        self._bytes = 0
        self._start = time.perf_counter()
        self._documents = _total(index, "documents")
        self._tokens = sum(_tokens(index).values())
        self._progress = Progress(
            TextColumn("Packing"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            disable=not visible,
        )
        self._task = self._progress.add_task("", total=num_documents)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def watch(self, results):
        """Passes results on and shows how far they are."""
        for result in results:
            self._documents += result["documents"]
            self._tokens += _num_tokens(result)
            self._bytes += result["bytes"]
            seconds = time.perf_counter() - self._start
            self._progress.update(
                self._task,
                completed=self._documents,
                description=f"{self._documents:,} documents, "
                f"{self._tokens:,} tokens, "
                f"{self._bytes / 1e6 / seconds:.2f} MB/s",
            )
            yield result
