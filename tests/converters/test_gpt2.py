"""GPT-2's tokenizer beside tiktoken, which makes it of OpenAI's two files."""

import hashlib
import json
import random

import numpy as np
import pytest
import tiktoken
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from converters import CheckpointError, gpt2
from keras_bwetaf import BwETAFV2Tokenizer
from tests.converters.test_transformers_model import TEXTS

# Those that tiktoken asks for.
ENCODER_SHA256 = (
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
)
MERGES_SHA256 = (
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
)
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$"
    r"|\s+(?!\S)|\s"
)
ALPHABETS = (
    "abc ABC, .!?'s 't 'll\n",
    " \t\n\r\u00a0\u2003\u200b",
    "0123456789.,-+ $€",
    "áéíóú ñ ü ß œ æ İ ı e\u0301 ",
    "אבגד हिन्दी ไทย 한국어 漢字かな ",
    "😀👩‍👩‍👧‍👦🇫🇷✨\ufeff\0\x1b",
    "{}[]()<>|_`~#*\\/=;:\"' <|endoftext|>",
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    # OpenAI's file follows from the other one, byte for byte.
    encoder = json.dumps(gpt2.vocabulary()).encode()
    assert hashlib.sha256(encoder).hexdigest() == ENCODER_SHA256
    (folder / "encoder.json").write_bytes(encoder)
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(gpt2.MERGES),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash=MERGES_SHA256,
        encoder_json_hash=ENCODER_SHA256,
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={gpt2.END: gpt2.END_ID},
        explicit_n_vocab=gpt2.NUM_TOKENS,
    )


def texts(count):
    rng = random.Random(0)
    for number in range(count):
        alphabet = rng.choice(ALPHABETS)
        if number % 3 == 0:
            alphabet = "".join(ALPHABETS)
        if number % 7 == 0:  # Any character but surrogates.
            alphabet = [
                chr(each)
                for each in rng.choices(range(0x110000), k=20)
                if not 0xD800 <= each < 0xE000
            ]
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        yield text.replace("a", gpt2.END) if number % 5 == 0 else text


def test_ids_are_tiktokens(theirs):
    """On 10,000 strings; the end token in a text is text, or the token."""
    ours = BwETAFV2Tokenizer("gpt2")
    batch = [*TEXTS, *texts(10_000 - len(TEXTS))]
    assert len(batch) == 10_000
    plain, parsed = ours(batch), ours(batch, allowed_special="all")
    for text, ids, others in zip(batch, plain, parsed, strict=True):
        assert ids == theirs.encode_ordinary(text), text
        assert others == theirs.encode(text, allowed_special="all"), text
        assert ours.detokenize(ids) == text
    assert max(map(max, filter(None, parsed))) == gpt2.END_ID


def test_every_id(theirs):
    ours = BwETAFV2Tokenizer("gpt2")
    assert ours.vocabulary_size() == theirs.n_vocab == gpt2.NUM_TOKENS
    for id in np.random.default_rng(0).integers(0, gpt2.END_ID, 2000):
        assert ours.token_bytes([id]) == theirs.decode_bytes([int(id)])


@pytest.mark.fast
def test_the_file_of_the_library():
    """What `tokenizers` reads and writes again makes the same tokens."""
    known = gpt2.gpt2_tokenizer()
    tokenizer = tokenizers.Tokenizer.from_buffer(known.content)
    assert tokenizer.encode("Hello world<|endoftext|>").ids == [
        *(15496, 995, gpt2.END_ID)
    ]
    assert set(known.special_tokens.values()) == {gpt2.END}


@pytest.mark.fast
def test_another_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(gpt2.MERGES.read_bytes()[:-1])
    monkeypatch.setattr(gpt2, "MERGES", path)
    with pytest.raises(CheckpointError, match="expected OpenAI's file"):
        gpt2.merges()
