"""What a format is: the files of a model folder, and the way in and out."""

import abc
from dataclasses import replace
from pathlib import Path

from converters import kept
from converters.checkpoint import (
    Checkpoint,
    common_dtype,
    end_token_id,
    token_ids,
)
from converters.errors import CheckpointError, all_of
from converters.files import read_bytes_or_none, read_stats, write_files


class Format(abc.ABC):
    """A format of model folders; its module has a subclass and an instance.

    `read` and `write` are the same for all formats. They call the methods
    below them, which each format defines.

    Attributes:
        name: str. What users call it.
        sign: str. What a folder is known by, for messages.
        runtime: str. The name of the framework that runs such folders; see
            `converters.runtimes`.
        options: tuple of str. Further arguments of `write`.
        entry: str. What the side file calls it; see `converters.kept`.
        config, tokenizer, tokenizer_config, stats: str. Names of files.
        required: tuple of str. The files that a whole model has besides its
            weights.
        settings: tuple of str. Patterns of all small files but `stats`.
        heads: tuple of str. Names of the file of weights, or of its index: a
            model has one of them.
        weights, optimizer: tuples of str. Patterns of files of tensors.
        indexes: tuple of str. Files that say where tensors are.
        code: tuple of str. Files of code, which is compared, but not run.
        indent: int. Spaces of a level of JSON.
    """

    name = sign = runtime = entry = config = tokenizer = tokenizer_config = ""
    stats = "stats.json"
    options = required = settings = heads = code = ()
    weights = optimizer = indexes = ()
    indent = 2

    @property
    def files(self):
        """Patterns of all files of a folder, but for the side file."""
        tensors = (*self.weights, *self.optimizer, *self.indexes)
        return (*self.settings, self.stats, *tensors, *self.code)

    def needed(self, names, weights=True):
        """The files that a whole model has, in the likeliest way.

        Args:
            names: collection of str. Files that there are.
            weights: bool. Whether the model has to have weights.

        Returns:
            tuple of str.
        """
        if not weights:
            return self.required
        found = (head for head in self.heads if head in names)
        return (*self.required, next(found, self.heads[0]))

    def read(self, folder, optimizer=True):
        """Reads and checks a folder; see `converters.read_checkpoint`.

        Args:
            folder: str or path. One that `recognizes` is true of.
            optimizer: bool. Whether to read the optimizer's state, if any.

        Returns:
            `Checkpoint`.

        Raises:
            CheckpointError: if a file is missing, damaged or does not fit
                the others; the message lists every problem of a file.
        """
        folder = Path(folder)
        documents = self.read_documents(folder)
        tokenizer = self.read_tokenizer(folder)
        special_tokens = {}
        if tokenizer is not None:
            special_tokens = self.special_tokens(folder, documents, tokenizer)
        architecture, config = self.canonical_config(
            folder,
            documents,
            eos_token_id=end_token_id(
                tokenizer,
                folder / self.tokenizer,
                special_tokens.get("eos_token"),
                folder / self.tokenizer_config,
            ),
        )
        rows = architecture.tensors(config)
        tensors, (state, more) = all_of(
            lambda: self.read_weights(folder, rows),
            lambda: (
                self.read_optimizer(folder, rows) if optimizer else (None, {})
            ),
        )
        checkpoint = Checkpoint(
            source=folder,
            config=config | {"dtype": common_dtype(tensors)},
            tensors=tensors,
            optimizer=state,
            tokenizer=tokenizer,
            special_tokens=special_tokens,
            stats=read_stats(folder / self.stats),
        )
        _check_ids(checkpoint)
        return replace(
            checkpoint,
            kept=kept.keep(
                kept.read_kept(folder),
                self.entry,
                documents | more,
                self.documents(checkpoint),
            ),
        )

    def write(self, folder, checkpoint, **options):
        """Writes a folder.

        Args:
            folder: path. It exists and is empty.
            checkpoint: `Checkpoint`.
            **options: Those that the format has.

        Raises:
            CheckpointError: if the format cannot express the checkpoint, or
                what was kept for it contradicts it.
        """
        documents = kept.apply(
            checkpoint.kept,
            self.entry,
            self.documents(checkpoint),
            checkpoint.source,
        )
        documents = self.checked(documents, checkpoint)
        self.write_documents(folder, documents)
        write_files(
            folder,
            {
                self.tokenizer: self.own_tokenizer(checkpoint),
                self.stats: checkpoint.stats,
                kept.FILE_NAME: kept.others(checkpoint.kept, self.entry),
            },
        )
        self.write_tensors(folder, checkpoint, documents, **options)

    # What a format has its own of.

    @abc.abstractmethod
    def recognizes(self, folder):
        """Whether a folder (a path) is of this format."""

    @abc.abstractmethod
    def read_documents(self, folder):
        """Reads the JSON files of a folder (a path): dict of name to dict."""

    def read_tokenizer(self, folder):
        """The bytes of a `tokenizers` JSON, or None."""
        return read_bytes_or_none(folder / self.tokenizer)

    def has_known_tokenizer(self, folder):
        """Whether a folder (a path) does without a tokenizer's file."""
        return False

    def own_tokenizer(self, checkpoint):
        """The bytes of the tokenizer that belongs into a folder, or None."""
        return checkpoint.tokenizer

    @abc.abstractmethod
    def special_tokens(self, folder, documents, tokenizer):
        """The special tokens of a folder that has a tokenizer.

        Args:
            folder: path.
            documents: dict, what `read_documents` returned.
            tokenizer: bytes.

        Returns:
            dict of `"eos_token"` and `"unk_token"` to what the settings have
            for them, or None.
        """

    @abc.abstractmethod
    def canonical_config(self, folder, documents, eos_token_id=None):
        """The configuration of the model.

        Args:
            folder: path. For messages.
            documents: dict, what `read_documents` returned.
            eos_token_id: int, or None for that of models without a tokenizer.

        Returns:
            `Architecture`, and dict: the canonical configuration.
        """

    @abc.abstractmethod
    def read_weights(self, folder, rows):
        """Indexes the weights: dict of canonical name to `View`.

        Args:
            folder: path.
            rows: list of `architecture.Tensor`.
        """

    @abc.abstractmethod
    def read_optimizer(self, folder, rows):
        """Indexes the optimizer's state, if there is one.

        Args:
            folder, rows: See `read_weights`.

        Returns:
            dict of name to `View`, or None; and a dict of documents that lie
            in the same file.
        """

    @abc.abstractmethod
    def documents(self, checkpoint):
        """The JSON files that follow from a checkpoint: dict of name to dict.

        The first has the configuration.
        """

    @abc.abstractmethod
    def checked(self, documents, checkpoint):
        """Checks, and if need be changes, what is to be written.

        Args:
            documents: dict of name to dict, or None for no file. What was
                kept may have changed them.
            checkpoint: `Checkpoint`.

        Returns:
            dict of name to dict, to bytes, or to None: the files to write.
        """

    def write_documents(self, folder, documents):
        """Writes what `checked` returned."""
        write_files(folder, documents, indent=self.indent)

    @abc.abstractmethod
    def write_tensors(self, folder, checkpoint, documents, **options):
        """Writes the weights and the optimizer's state, if there is one."""

    def check_weights(self, folder):
        """Checks a folder (a path), but not the values of its weights.

        Raises:
            CheckpointError: if a file is missing or damaged, or does not fit
                the others.
        """
        self.read(folder, optimizer=False)

    def code_problem(self, folder):
        """What is wrong with the code in a folder (a path): str, or None."""
        return None


def _check_ids(checkpoint):
    """A token of the tokenizer needs a place in the model's vocabulary."""
    if checkpoint.tokenizer is None:
        return
    ids, _ = token_ids(checkpoint.tokenizer, checkpoint.source)
    largest = max(
        (each for each in ids.values() if type(each) is int), default=0
    )
    size = checkpoint.config["vocab_size"]
    if largest >= size:
        raise CheckpointError(
            f"{checkpoint.source}: the tokenizer has ids up to {largest}, but "
            f"the model's vocabulary has {size}. Use the tokenizer that "
            "belongs to the model."
        )
