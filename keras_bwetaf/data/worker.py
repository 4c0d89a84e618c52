"""The process that tokenizes for `pack`.

`pack` runs this file as a script, several times at once. It stands alone, so
that a worker starts in a fraction of a second: importing `keras_bwetaf`
would load Keras and JAX. Requests and answers are pickled, on the standard
input and output; the end of the input ends the process.
"""

import contextlib
import hashlib
import json
import pickle
import re
import signal
import sys
import unicodedata

import numpy as np
import tokenizers

TRAIN, VALIDATION = SPLITS = ("train", "validation")
PIECE_CHARACTERS = 2**18
SAFE_BOUNDARY = re.compile("(?<=[A-Za-z0-9])[ \n]")
NO_LETTERS = re.compile(r"[\W_]+")


def can_split(specification):
    """Whether `safe_pieces` of a text give the ids of the whole text.

    They do for the settings of BwETAFv3. Its pattern for words matches no
    whitespace after anything else, and looks ahead only from whitespace: a
    word ends before each space that follows a letter or digit, whatever is
    on either side. Nor does its normalization, which leaves these letters
    and the space alone, reach across them.

    Args:
        specification: dict. A tokenizer file.

    Returns:
        bool.
    """
    normalizer = specification["normalizer"] or {"type": "Sequence"}
    if normalizer["type"] == "Sequence":
        steps = normalizer.get("normalizers", [])
    else:
        steps = [normalizer]
    words = specification["pre_tokenizer"] or {}
    return (
        all(step["type"] in ("NFD", "StripAccents") for step in steps)
        and words.get("type") == "ByteLevel"
        and words.get("use_regex") is True
        and words.get("add_prefix_space") is False
        and specification["model"].get("type") == "BPE"
        and not specification["added_tokens"]
        and specification["post_processor"] is None
    )


def safe_pieces(text, length=PIECE_CHARACTERS):
    """Cuts a long text between words.

    Args:
        text: str.
        length: int. How many characters a piece has at least, but the last.

    Yields:
        str. Joined, they are the text.
    """
    start = 0
    while boundary := SAFE_BOUNDARY.search(text, start + length):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def is_held_out(text, fraction):
    """Whether a document belongs to the validation split.

    It is decided by the document's letters and digits alone, so that copies
    stay on one side, even if they differ in case, accents or whitespace.

    Args:
        text: str.
        fraction: float. The share of documents to hold out.

    Returns:
        bool.
    """
    letters = unicodedata.normalize("NFKD", text).casefold()
    letters = NO_LETTERS.sub("", letters)
    digest = hashlib.blake2b(letters.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def without_end(text, fraction):
    """Cuts the end of a text off, at a space, if there is one in it.

    Args:
        text: str.
        fraction: float. The share of characters to cut off, about.

    Returns:
        Tuple of two str. Joined, they are the text.
    """
    space = re.compile(r"\s").search(text, round(len(text) * (1 - fraction)))
    place = space.start() if space else len(text)
    return text[:place], text[place:]


class DocumentEncoder:
    """Turns documents into the tokens of each split.

    Args:
        specification: str. A tokenizer file.
        end_token_id: int. What each document ends with.
        dtype: str. Of the tokens.
        validation_fraction: float. The share of documents to hold out.
        is_only: bool. Whether there is only one document, whose end is held
            out.
    """

    def __init__(
        self,
        specification,
        end_token_id,
        dtype,
        validation_fraction,
        is_only=False,
    ):
        self.tokenizer = tokenizers.Tokenizer.from_str(specification)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.can_split = can_split(json.loads(specification))
        self.end = np.array([end_token_id], dtype)
        self.dtype = dtype
        self.validation_fraction = validation_fraction
        self.is_only = is_only

    def token_ids(self, text):
        """Returns an array of ids, without the end token."""
        pieces = safe_pieces(text) if self.can_split else [text]
        return np.concatenate(
            [
                np.array(encoding.ids, self.dtype)
                for piece in pieces
                for encoding in self.tokenizer.encode_batch_fast([piece])
            ]
        )

    def parts(self, text):
        """Pairs of a split and what of a document belongs to it."""
        fraction = self.validation_fraction
        if not fraction:
            return [(TRAIN, text)]
        if self.is_only:
            return zip(SPLITS, without_end(text, fraction), strict=True)
        return [(VALIDATION if is_held_out(text, fraction) else TRAIN, text)]

    def encode(self, texts):
        """Encodes documents.

        Args:
            texts: list of str.

        Returns:
            dict: how many `"documents"` were read, how many of them were
            `"empty_documents"`, without a token, their UTF-8 `"bytes"`, and
            for each split a list of arrays, one a document.
        """
        result = {
            "documents": len(texts),
            "empty_documents": 0,
            "bytes": sum(len(text.encode()) for text in texts),
            **{split: [] for split in SPLITS},
        }
        for text in texts:
            parts = [
                (split, self.token_ids(part))
                for split, part in self.parts(text)
            ]
            parts = [(split, ids) for split, ids in parts if ids.size]
            result["empty_documents"] += not parts
            for split, ids in parts:
                result[split] += [np.append(ids, self.end)]
        return result


def main():
    # Ctrl-C is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    encoder = DocumentEncoder(**pickle.load(requests))
    # The pipes close when the parent ends, in whatever way.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            result = encoder.encode(pickle.load(requests))
            pickle.dump(result, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


if __name__ == "__main__":
    main()
