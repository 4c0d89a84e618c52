"""The tokenizer against the original's, character by character."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from keras_bwetaf.models.tokenizer import (
    BYTE_ALPHABET,
    BwETAFTokenizer,
    train_tokenizer,
)
from tests.keras_hub_checks import KerasHubTestCase
from tests.original import tokenizer as original_tokenizer
from tests.trained import NAMES, checkpoint

pytestmark = pytest.mark.fast

NUM_STRINGS = 10_000
EOS, UNK = SPECIAL_TOKENS = ["<|EOS|>", "<|UK|>"]
CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void;\n\n  the deep, 1,234.",
    "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν",
    "В начале сотворил Бог небо и землю. 太初有道 😀😀",
    "Élève, où êtes-vous? Naïve café, <|EOS|> is text.",
] * 20 + ["Quixotic zebras, rarer than six, must not be learned."] * 5
HARD_STRINGS = ["", "\n", "\n\n", "\r\n", "\0", " \t ", "\x1b[0m", "e\u0301"]
HARD_STRINGS += ["\u0301", "ﬁ", "각", "🇫🇷", "👩‍👩‍👧‍👦", "\ufeff", "x" * 20_000]
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def train_original(vocabulary_size=400):
    """A tokenizer that the original trains on `CORPUS`."""
    original = original_tokenizer.create("test")
    original.train(CORPUS, vocabulary_size, special_tokens=SPECIAL_TOKENS)
    return original


@pytest.fixture(scope="module")
def original():
    return train_original()


@pytest.fixture(scope="module")
def tokenizer(original):
    return BwETAFTokenizer(original.tokenizer)


@pytest.fixture(scope="module", params=["in-process", *NAMES])
def pair(request):
    """The original's tokenizer and ours, of one file."""
    if request.param == "in-process":
        original = request.getfixturevalue("original")
        return original, BwETAFTokenizer(original.tokenizer)
    folder = checkpoint(request.param)
    return (
        original_tokenizer.load(folder),
        BwETAFTokenizer(folder / "tokenizer" / "yap.json"),
    )


def between(first, last):
    return st.text(st.characters(min_codepoint=first, max_codepoint=last))


def texts():
    """Texts of pieces that are each hard in their own way."""
    anything = st.text(st.characters(exclude_categories=["Cs"]))
    scripts = [
        between(0x20, 0x7E),  # ASCII
        between(0xC0, 0x24F),  # Latin with accents
        between(0x300, 0x36F),  # combining marks
        between(0x370, 0x52F),  # Greek, Cyrillic
        between(0x590, 0x6FF),  # Hebrew, Arabic
        between(0x900, 0xE7F),  # Indic scripts, Thai
        between(0x2000, 0x206F),  # spaces, joiners, directions
        between(0x4E00, 0x9FFF),  # Chinese
        between(0xAC00, 0xD7A3),  # Hangul, which NFD takes apart
        between(0x1F300, 0x1FAFF),  # emoji
    ]
    control = st.text(st.characters(categories=["Cc"]))
    words = st.lists(st.sampled_from(" ".join(CORPUS[:5]).split())).map(
        " ".join
    )
    special = st.sampled_from(
        [EOS, UNK, "<|E", "OS|>", "<|", "\n", "\r\n", "\0", "\t ", "  \n "]
        + [
            "e\u0301",
            "👩‍👩‍👧‍👦",
            "🇫🇷",
            "'s",
            "'LL",
            "\ufeff",
            "\ufffd",
            "\u0130",
        ]
    )
    long_word = st.builds(
        lambda word, times: word * times,
        st.sampled_from(["a", "the", "é", "😀", "0", "-", " ", "\n"]),
        st.integers(1, 400),
    )
    pieces = st.one_of(
        anything, *scripts, control, words, special, special, long_word
    )
    return st.lists(pieces, max_size=6).map("".join)


@pytest.fixture(scope="module")
def strings():
    """Different strings, short ones first, so that a failure is readable."""
    found = dict.fromkeys(HARD_STRINGS)

    # In lists, Hypothesis repeats itself: one string an example.
    @settings(PROPERTY, max_examples=13_000)
    @given(texts())
    def collect(text):
        found[text] = None

    collect()
    return sorted(list(found)[:NUM_STRINGS], key=len)


@pytest.mark.slow
def test_ten_thousand_strings_equal_the_original(pair, strings):
    original, tokenizer = pair
    num_compared = 0
    for text in strings:
        expected = original.encode(text)
        ids = tokenizer.tokenize(text, allowed_special="all").tolist()
        assert ids == expected
        assert tokenizer.detokenize(ids) == original.decode(expected)
        num_compared += 1
    assert num_compared == len(set(strings)) == NUM_STRINGS

    batch = tokenizer.tokenize(strings, allowed_special="all")
    assert batch == [original.encode(text) for text in strings]
    assert tokenizer.detokenize(batch) == [original.decode(r) for r in batch]


@pytest.mark.slow
def test_special_tokens_are_off_in_ten_thousand_strings(pair, strings):
    original, tokenizer = pair
    num_with_special = 0
    for text in strings:
        expected = original.encode(text)
        ids = tokenizer.tokenize(text).tolist()
        assert 0 not in ids and 1 not in ids
        assert tokenizer.detokenize(ids) == original.decode(expected)
        assert tokenizer.token_bytes(ids) == original.decode(expected).encode()
        if EOS in text or UNK in text:
            num_with_special += 1
        else:
            assert ids == expected
    assert num_with_special > 100


@pytest.mark.parametrize("vocabulary_size", [400, 10_000])
def test_training_writes_the_file_of_the_original(vocabulary_size, tmp_path):
    original = train_original(vocabulary_size)
    original.save(tmp_path)
    trained = train_tokenizer(iter(CORPUS), vocabulary_size)
    trained.save_assets(tmp_path)
    expected = (tmp_path / "tokenizer" / "yap.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == expected
    # The second size is never reached: pairs become too rare before.
    assert 400 <= trained.vocabulary_size() < 10_000
    assert trained("the beginning").shape[0] < len("the beginning")


def test_training_on_real_text_gives_the_checkpoint_file(
    trained_checkpoint, trained_documents, tmp_path
):
    folder = trained_checkpoint / "tokenizer"
    settings = json.loads((folder / "understanding_yap.json").read_text())
    trained = train_tokenizer(
        trained_documents["train"], settings["vocab_size"]
    )
    trained.save_assets(tmp_path)
    expected = (folder / "yap.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == expected


def test_training_names_its_special_tokens():
    trained = train_tokenizer(
        CORPUS, 400, min_frequency=50, special_tokens=["<e>", "<u>", "<x>"]
    )
    assert (trained.end_token_id, trained.unk_token_id) == (0, 1)
    assert trained.tokenize("<x>", allowed_special={"<x>"}).tolist() == [2]
    assert BwETAFTokenizer.from_config(trained.get_config()).end_token == "<e>"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 300), "no texts, or only empty ones"),
        ((["", ""], 300), "no texts, or only empty ones"),
        (("text", 300), r"texts='text'"),
        ((["text", 5], 300), r"texts\[1\]=5 of type int"),
        ((["text"], 257), "at least 258.*vocabulary_size=257"),
        ((["text"], "300"), "at least 258.*vocabulary_size='300'"),
        ((["text"], 300.0), "at least 258.*vocabulary_size=300.0"),
        ((b"text", 300), "texts=b'text'"),
    ],
)
def test_training_explains_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"min_frequency": -1}, "`min_frequency` must be an int of.*=-1"),
        ({"min_frequency": 1.5}, "`min_frequency` must be an int of"),
        ({"special_tokens": "ab"}, "must be a list or tuple of str.*'ab'"),
        ({"special_tokens": ["<e>", 1]}, "must be a list or tuple of str"),
        ({"special_tokens": None}, "must be a list or tuple of str"),
    ],
)
def test_training_checks_first(arguments, message):
    """Before it reads the texts."""
    with pytest.raises(ValueError, match=message):
        train_tokenizer(iter(lambda: 1 / 0, None), 300, **arguments)


def test_training_cuts_what_nothing_breaks():
    """Or it takes minutes. The tokenizer itself cuts nothing."""
    text = "ab" * 2**14
    trained = train_tokenizer([text], np.int64(300), min_frequency=2)
    lengths = [len(token) for token in trained.get_vocabulary()]
    assert max(lengths) == 4096
    assert trained.detokenize(trained(text)) == text
    plain = train_tokenizer(CORPUS, 300)
    for specification in map(json.loads, (trained.content, plain.content)):
        assert specification["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    "special_tokens", [["<e>"], ["<e>", "<e>"], ["<e>", ""]]
)
def test_training_needs_two_special_tokens(special_tokens):
    with pytest.raises(ValueError, match="must be different strings"):
        train_tokenizer(CORPUS, 400, special_tokens=special_tokens)


def test_special_tokens_in_text_are_text(tokenizer):
    text = f"one{EOS}two{UNK}{EOS}"
    ids = tokenizer.tokenize(text)
    assert 0 not in ids and 1 not in ids
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.token_bytes(ids) == text.encode()


@pytest.mark.parametrize(
    "allowed, expected",
    [
        ("all", ["one", 0, "two", 1, 0]),
        ({EOS}, ["one", 0, f"two{UNK}", 0]),
        ([UNK], [f"one{EOS}two", 1, EOS]),
        ([EOS, UNK], ["one", 0, "two", 1, 0]),
    ],
)
def test_special_tokens_are_recognised_when_allowed(
    tokenizer, allowed, expected
):
    ids = []
    for piece in expected:
        ids += [piece] if isinstance(piece, int) else list(tokenizer(piece))
    text = f"one{EOS}two{UNK}{EOS}"
    assert tokenizer(text, allowed_special=allowed).tolist() == ids
    assert tokenizer([text], allowed_special=allowed) == [ids]


def test_accents_cannot_smuggle_a_special_token(original, tokenizer):
    text = "<|E\u0301OS|>"
    assert tokenizer.detokenize(tokenizer(text)) == EOS
    ids = tokenizer(text, allowed_special="all")
    assert ids.tolist() == original.encode(text)
    assert 0 not in ids


@pytest.mark.parametrize(
    "allowed", [EOS, {"<s>"}, [EOS, "<s>"], 5, None, [[EOS]], b"all"]
)
def test_allowed_special_is_checked(tokenizer, allowed):
    with pytest.raises(ValueError, match="`allowed_special` must be"):
        tokenizer.tokenize("text", allowed_special=allowed)


def test_special_tokens_are_kept_or_skipped_in_decoding(tokenizer):
    ids = tokenizer.tokenize(f"one{EOS}", allowed_special="all")
    assert tokenizer.detokenize(ids) == f"one{EOS}"
    assert tokenizer.detokenize(ids, skip_special_tokens=True) == "one"


def test_inputs_of_any_kind_give_the_same_ids(tokenizer):
    expected = tokenizer.tokenize("the earth")
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == "int32" and expected.ndim == 1
    for text in [np.array("the earth"), tf.constant("the earth"), b"the earth"]:
        np.testing.assert_array_equal(tokenizer(text), expected)

    rows = [expected.tolist(), []]
    batch = ["the earth", ""]
    for texts in [batch, tuple(batch), np.array(batch), tf.constant(batch)]:
        assert tokenizer(texts) == rows
    assert tokenizer(np.array(batch, dtype=object)) == rows
    assert tokenizer([]) == []
    assert tokenizer("").tolist() == []


def test_ids_of_any_kind_give_the_same_text(tokenizer):
    ids = tokenizer.tokenize("the earth")
    for kind in [list, tuple, jnp.asarray, tf.constant, np.uint16]:
        assert tokenizer.detokenize(kind(ids)) == "the earth"
    grid = np.stack([ids, ids])
    for kind in [np.asarray, jnp.asarray, tf.constant, list, np.ndarray.tolist]:
        assert tokenizer.detokenize(kind(grid)) == ["the earth"] * 2
    ragged = [ids.tolist(), []]
    assert tokenizer.detokenize(ragged) == ["the earth", ""]
    assert tokenizer.detokenize(tf.ragged.constant(ragged)) == ["the earth", ""]
    assert tokenizer.detokenize([]) == ""
    assert tokenizer.detokenize(np.zeros((0, 3), "int32")) == []
    assert tokenizer.detokenize(int(tokenizer("t")[0])) == "t"


@pytest.mark.parametrize(
    "text, message",
    [
        (5, "Received: 5 of type int"),
        (None, "of type NoneType"),
        (["text", None], "of type NoneType"),
        ([["text"]], "of type list"),
        (np.ones(2), "of type float"),
        (b"\xff", r"that are UTF-8. Received: b'\\xff', whose byte 0 is"),
        (["fine", b"a\xc3"], r"Received: b'a\\xc3', whose byte 1 is no UTF"),
        (["fine", "\ud800"], r"without lone surrogates.*'\\ud800'"),
    ],
)
def test_texts_are_checked(tokenizer, text, message):
    for function in (tokenizer.tokenize, tokenizer):
        with pytest.raises(ValueError, match=message):
            function(text)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 400], "from 0 to 399. Received: 400"),
        ([[1], [-1]], "from 0 to 399. Received: -1"),
        (400, "from 0 to 399. Received: 400"),
        ([1.5], "must be integers.*float64"),
        ("text", "must be integers"),
        ([[[1]]], "rank 1 or 2"),
    ],
)
def test_ids_are_checked(tokenizer, ids, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.detokenize(ids)


@settings(PROPERTY, max_examples=300)
@given(st.data())
def test_token_bytes_are_what_detokenize_decodes(pair, data):
    _, tokenizer = pair
    id = st.integers(2, tokenizer.vocabulary_size() - 1)
    ids = data.draw(st.lists(st.one_of(id, st.integers(2, 257))))
    pieces = [tokenizer.token_bytes(id) for id in ids]
    assert b"".join(pieces) == tokenizer.token_bytes(ids)
    streamed = b"".join(pieces).decode("utf-8", errors="replace")
    assert streamed == tokenizer.detokenize(ids)


def test_token_bytes_leave_special_tokens_out(tokenizer):
    ids = tokenizer.tokenize(f"{EOS}the{UNK}", allowed_special="all")
    assert tokenizer.token_bytes(ids) == b"the"
    assert tokenizer.token_bytes([]) == b""
    with pytest.raises(ValueError, match="from 0 to 399. Received: 400"):
        tokenizer.token_bytes(400)


def test_token_bytes_of_added_words_are_their_text(original):
    extended = tokenizers.Tokenizer.from_str(original.tokenizer.to_str())
    extended.add_tokens(["日本"])
    tokenizer = BwETAFTokenizer(extended)
    ids = tokenizer.tokenize("日本")
    assert ids.tolist() == [400]
    assert tokenizer.token_bytes(ids) == "日本".encode()


def test_byte_alphabet_is_that_of_the_library():
    assert set(BYTE_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))


def test_vocabulary(original, tokenizer):
    vocabulary = tokenizer.get_vocabulary()
    assert tokenizer.vocabulary_size() == len(vocabulary) == 400
    expected = original.tokenizer.get_vocab()
    assert {token: id for id, token in enumerate(vocabulary)} == expected
    assert tokenizer.id_to_token(np.int32(300)) == vocabulary[300]
    assert tokenizer.token_to_id(vocabulary[300]) == 300
    with pytest.raises(ValueError, match="Received: token='missing'"):
        tokenizer.token_to_id("missing")
    with pytest.raises(ValueError, match="from 0 to 399. Received: 400"):
        tokenizer.id_to_token(400)


def test_special_tokens(tokenizer):
    assert (tokenizer.end_token, tokenizer.end_token_id) == (EOS, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (EOS, 0)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == (UNK, 1)
    assert (tokenizer.start_token, tokenizer.start_token_id) == (None, None)
    assert sorted(tokenizer.special_tokens) == SPECIAL_TOKENS
    assert sorted(tokenizer.special_token_ids) == [0, 1]


def test_what_transformers_was_called_with_is_no_part_of_it(original):
    """It writes its last truncation and padding into the file."""
    used = tokenizers.Tokenizer.from_str(original.tokenizer.to_str())
    used.enable_truncation(4)
    used.enable_padding(length=300)
    text = "In the beginning God created the heaven and the earth."
    expected = BwETAFTokenizer(original.tokenizer)(text)
    np.testing.assert_array_equal(BwETAFTokenizer(used)(text), expected)
    assert len(expected) > 4


def test_assets_are_written_byte_for_byte(original, tmp_path):
    # Not the library's own layout, so that rewriting would show.
    content = json.dumps(json.loads(original.tokenizer.to_str()), indent=7)
    path = tmp_path / "odd name.json"
    path.write_text(content)
    tokenizer = BwETAFTokenizer(str(path))
    tokenizer.save_assets(tmp_path)
    saved = tmp_path / "tokenizer.json"
    assert saved.read_bytes() == path.read_bytes()

    restored = BwETAFTokenizer()
    restored.load_assets(tmp_path)
    assert restored(CORPUS) == tokenizer(CORPUS)
    assert restored.end_token_id == 0


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save_assets(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"


def test_keras_serialization(tokenizer, tmp_path):
    config = keras.saving.serialize_keras_object(tokenizer)
    revived = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(config))
    )
    assert type(revived) is BwETAFTokenizer
    assert revived.get_config() == tokenizer.get_config()
    tokenizer.save_assets(tmp_path)
    revived.load_assets(tmp_path)
    assert revived(CORPUS) == tokenizer(CORPUS)

    # Keras pickles a layer as a saved file, assets included.
    unpickled = pickle.loads(pickle.dumps(tokenizer))
    assert unpickled(CORPUS) == tokenizer(CORPUS)


def test_a_configuration_opens_no_file(tokenizer):
    config = {**tokenizer.get_config(), "tokenizer": "/etc/hostname"}
    with pytest.raises(ValueError, match="must not name a tokenizer file"):
        BwETAFTokenizer.from_config(config)


def test_dtype_is_respected_and_checked(original):
    wide = BwETAFTokenizer(original.tokenizer, dtype="int64")
    assert wide("the earth").dtype == "int64"
    with pytest.raises(ValueError, match="Received: dtype=float32"):
        BwETAFTokenizer(dtype="float32")


def test_a_tokenizer_without_a_file_says_so(tmp_path):
    tokenizer = BwETAFTokenizer()
    for use in [
        lambda: tokenizer.tokenize("text"),
        lambda: tokenizer.detokenize([1]),
        lambda: tokenizer.token_bytes([1]),
        lambda: tokenizer.vocabulary_size(),
        lambda: tokenizer.token_to_id("a"),
        lambda: tokenizer.id_to_token(1),
        lambda: tokenizer.save_assets(tmp_path),
    ]:
        with pytest.raises(ValueError, match="has no vocabulary yet"):
            use()


def test_files_are_checked(original, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BwETAFTokenizer().load_assets(tmp_path)
    with pytest.raises(ValueError, match="Received: tokenizer=5 of type int"):
        BwETAFTokenizer(5)
    path = tmp_path / "tokenizer.json"
    for content in ["", "{}", "\x93NUMPY", original.tokenizer.to_str()[:-9]]:
        path.write_text(content)
        with pytest.raises(
            ValueError, match="Cannot use.*tokenizer.json.*JSON"
        ):
            BwETAFTokenizer(path)


WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaa"}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": REPLACE},
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}},
        {"normalizer": {"type": "Prepend", "prepend": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": None}},
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(((("}}},
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(x+x+)+y"}}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [CLS, WHOLE],
                "pair": [],
                "special_tokens": {},
            }
        },
        {"model": {"type": "BPE", "vocab": {EOS: 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": []}},
        {"added_tokens": None},
    ],
    ids=str,
)
def test_odd_files_are_refused(changes, original, tmp_path, capfd):
    """With an error that says so, whatever the library does."""
    content = json.loads(original.tokenizer.to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer = BwETAFTokenizer(tmp_path / "tokenizer.json")
        tokenizer.tokenize("Once upon a time " + "x" * 40)
    capfd.readouterr()  # A panic prints where it was.


def test_bare_errors_of_the_library_are_refused(original, tmp_path):
    content = json.loads(original.tokenizer.to_str())
    content["model"] |= {"vocab": {EOS: 0}, "merges": []}
    content["added_tokens"] = [
        token | {"content": UNK, "id": 1} if token["id"] else token
        for token in content["added_tokens"][:2]
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = BwETAFTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="fails. Fetch or train it again"):
        tokenizer.tokenize("abc")


def test_pointers_of_git_lfs_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="tokenizer.json.*`git lfs pull`"):
        BwETAFTokenizer(path)


def test_unsuitable_tokenizers_are_refused(original):
    words = tokenizers.Tokenizer(models.WordLevel({EOS: 0}))
    with pytest.raises(ValueError, match="Expected a byte-level tokenizer"):
        BwETAFTokenizer(words)
    with pytest.raises(ValueError, match="special token end_token='<end>'"):
        BwETAFTokenizer(original.tokenizer, end_token="<end>")

    specification = json.loads(original.tokenizer.to_str())
    specification["added_tokens"] = []
    plain = tokenizers.Tokenizer.from_str(json.dumps(specification))
    with pytest.raises(ValueError, match="special token end_token="):
        BwETAFTokenizer(plain)

    specification = json.loads(original.tokenizer.to_str())
    specification["model"]["vocab"]["t"] = 900
    gap = tokenizers.Tokenizer.from_str(json.dumps(specification))
    with pytest.raises(ValueError, match="without gaps.*ids up to 900"):
        BwETAFTokenizer(gap)


def test_threads_share_a_tokenizer(original):
    tokenizer = BwETAFTokenizer(original.tokenizer)
    text = f"the earth{EOS}and the heaven{UNK}"
    allowed = [(), "all", {EOS}, {UNK}] * 2
    expected = [
        BwETAFTokenizer(original.tokenizer).tokenize([text], allowed_special=a)
        for a in allowed
    ]
    assert len({str(rows) for rows in expected}) == 4
    barrier = Barrier(len(allowed))

    def work(allowed_special):
        barrier.wait()
        return [
            tokenizer.tokenize([text], allowed_special=allowed_special)
            for _ in range(200)
        ]

    with ThreadPoolExecutor(len(allowed)) as pool:
        for rows, right in zip(pool.map(work, allowed), expected, strict=True):
            assert rows == [right] * 200


def test_tf_data(tokenizer):
    texts = ["the earth", "", f"naïve\0{EOS}\0", "😀"]
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    expected = tokenizer(texts)
    single = [
        row.tolist() for row in dataset.map(tokenizer).as_numpy_iterator()
    ]
    assert single == expected

    batched = dataset.batch(3).map(tokenizer)
    assert isinstance(batched.element_spec, tf.RaggedTensorSpec)
    assert batched.element_spec.shape.as_list() == [None, None]
    full = dataset.batch(2, drop_remainder=True).map(tokenizer)
    assert full.element_spec.shape.as_list() == [2, None]
    rows = [row for batch in batched for row in batch.to_list()]
    assert rows == expected

    parsed = dataset.batch(4).map(lambda x: tokenizer(x, allowed_special="all"))
    assert next(iter(parsed)).to_list() == tokenizer(
        texts, allowed_special="all"
    )


def test_tf_data_back_to_text(tokenizer):
    texts = ["the earth", "", f"naive\0{EOS}\0", "😀"]
    ids = tf.data.Dataset.from_tensor_slices(texts).map(tokenizer)
    decoded = [
        text.decode()
        for text in ids.map(tokenizer.detokenize).as_numpy_iterator()
    ]
    assert decoded == texts
    batches = ids.ragged_batch(2).map(tokenizer.detokenize)
    assert batches.element_spec.shape.as_list() == [None]
    decoded = [
        text.decode() for batch in batches.as_numpy_iterator() for text in batch
    ]
    assert decoded == texts


def test_tf_data_explains_errors(tokenizer):
    dataset = tf.data.Dataset.from_tensor_slices(["text"])
    with pytest.raises(ValueError, match="`allowed_special` must be"):
        dataset.map(lambda x: tokenizer.tokenize(x, allowed_special=["<s>"]))
    with pytest.raises(ValueError, match="string tensor of rank 0 or 1"):
        dataset.batch(1).batch(1).map(tokenizer.tokenize)


class KerasHubChecks(KerasHubTestCase):
    def test_tokenizer_basics(self):
        original = train_original()
        texts = ["the earth", f"And {EOS}, 😀"]
        self.run_preprocessing_layer_test(
            BwETAFTokenizer,
            {"tokenizer": original.tokenizer},
            input_data=texts,
            expected_output=BwETAFTokenizer(original.tokenizer)(texts),
        )
