"""Documents of a source, and what a document must be: valid text."""

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of a source, numbered from 0.

    Attributes:
        describe: function without arguments. Returns the `description`.
        read: function of a number. Yields the documents from that number
            on, as pairs of where the document is and what it is: str, bytes
            or None.
        errors: str. What to do with invalid UTF-8.
        num_documents: int, or None if it is not known beforehand.
        files: list of the files' names and sizes, or their digests, in
            pairs. Empty if the source is no files.
        skipped: dict of a reason to a list of names: what is in a folder
            and is not read.
    """

    describe: Callable
    read: Callable
    errors: str = "strict"
    num_documents: int | None = None
    files: list = dataclasses.field(default_factory=list)
    skipped: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def description(self):
        """What identifies the source, a dict, for an index."""
        return self.describe()

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
            yield to_text(content, where, self.errors)
        if is_empty:
            raise ValueError(
                "Expected at least one document. Received: a source without "
                f"any: {self.description}"
            )


def to_text(content, where, errors):
    """Returns a document as a str of valid Unicode.

    Args:
        content: str or bytes; `None` is an empty document.
        where: str. Where it is, for messages.
        errors: str. What to do with invalid UTF-8.

    Returns:
        str.

    Raises:
        ValueError: If it is anything else, or invalid.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        if content.isascii():
            return str(content)  # NumPy has a str of its own.
        # A lone surrogate, from a JSON escape, is invalid in UTF-8, too.
        content = content.encode("utf-8", "surrogatepass")
    if not isinstance(content, bytes):
        raise ValueError(
            f"{where}: expected text. Received: {content!r:.80} of type "
            f"{type(content).__name__}. Fill or leave out what is missing, "
            "or name the column of the text with `column`."
        )
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8. Received: {error.reason} at byte "
            f"{error.start}. Repair the document, or pass "
            'errors="replace" (--errors replace) for replacement characters.'
        ) from error


def missing_column(where, column, columns):
    """The error for records without the column of the text."""
    return ValueError(
        f"{where}: expected one column {column!r}. Received the columns "
        f"{columns}. Name the column of the text with `column`."
    )
