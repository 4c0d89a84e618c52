"""GPT-2's tokenizer, of OpenAI's file of merges.

`vocab.bpe` is under the licence in `LICENSE`. OpenAI's other file,
`encoder.json`, follows from it: ids are those of the bytes, then those of the
merges, in order, and the end token.
"""

import functools
import hashlib
import json
from pathlib import Path

from converters.architecture import KnownTokenizer
from converters.errors import CheckpointError
from converters.files import read_bytes

MERGES = Path(__file__).parent / "vocab.bpe"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END = "<|endoftext|>"
NUM_TOKENS = 50257
END_ID = NUM_TOKENS - 1


def _byte_characters():
    """The characters that stand for bytes, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    num_others = 256 - len(printable)
    return [chr(each) for each in (*printable, *range(256, 256 + num_others))]


def merges():
    """The pairs of tokens that are merged, in order: list of lists of str.

    Raises:
        CheckpointError: if the file is not OpenAI's.
    """
    content = read_bytes(MERGES)
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"{MERGES}: expected OpenAI's file, with the SHA-256 {SHA256}. "
            f"Received: {digest}. Install the package again."
        )
    _, *lines = content.decode().splitlines()  # The first has the version.
    return [line.split(" ") for line in lines]


def vocabulary():
    """The id of every token: dict of str to int, in the order of ids."""
    tokens = [*_byte_characters(), *map("".join, merges()), END]
    return {token: id for id, token in enumerate(tokens)}


@functools.cache
def gpt2_tokenizer() -> KnownTokenizer:
    """GPT-2's tokenizer.

    Returns:
        `KnownTokenizer`. The end token stands for unknown bytes, too, of
        which there are none.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    specification = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_ID,
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary(),
            "merges": merges(),
        },
    }
    content = json.dumps(specification, ensure_ascii=False, indent=1)
    return KnownTokenizer(
        content.encode(), {"eos_token": END, "unk_token": END}
    )
