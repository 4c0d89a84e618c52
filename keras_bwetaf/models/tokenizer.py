"""The byte-level BPE tokenizer of BwETAFv3, and its training."""

import collections.abc
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import keras
import keras_hub
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from converters.files import new_file, read_bytes
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import checked_int, is_int, strings
from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.loading import load_tokenizer
from keras_bwetaf.models.registry import class_for
from keras_bwetaf.panics import clear_panics
from keras_bwetaf.preset_files import open_preset

# The others put in text of their own, and can make very much of little.
NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"),
    *("BertNormalizer", "ByteLevel", "Nmt", "Sequence"),
}
TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = "<|EOS|>", "<|UK|>"  # The end, and what stands for unknowns.
LONGEST_PIECE = 4096  # Bytes without a break that training sees together.


def _byte_alphabet():
    """Maps each character of the byte-level alphabet to its byte.

    A printable Latin-1 character stands for its own byte; the other bytes
    are numbered from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(other)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def _normalizer_types(normalizer):
    """The types of a normalizer, in a tokenizer file, and of its parts."""
    if normalizer is None:
        return set()
    parts = normalizer.get("normalizers", ())
    return {normalizer["type"]}.union(*map(_normalizer_types, parts))


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFTokenizer(keras_hub.models.Tokenizer):
    """A byte-level BPE tokenizer that reads a Hugging Face tokenizer file.

    Text is decomposed (NFD), stripped of accents, cut into words and encoded
    as bytes, so every text can be tokenized; nothing is added to it. What is
    written inside a text stays text: the characters `<|EOS|>` in a prompt do
    not become the end token, unless `allowed_special` asks for it.

    A single string gives a 1-D array, a batch a list of lists. Inside a
    `tf.data` pipeline the results are a dense and a ragged tensor. One
    tokenizer can serve several threads.

    Args:
        tokenizer: A path to a `tokenizer.json`, its content as bytes, a
            `tokenizers.Tokenizer`, or `None` to load the file later, with
            `load_assets()`. Defaults to `None`.
        end_token: str. The special token that ends a document; it is the
            padding token, too. Defaults to `"<|EOS|>"`.
        unk_token: str. The special token for unknown bytes, which a complete
            byte alphabet never needs. Defaults to `"<|UK|>"`.
        dtype: str. The integer type of token ids. Defaults to `"int32"`.
        **kwargs: Keywords of `keras_hub.models.Tokenizer`.

    Call arguments:
        inputs: str, list of str, or a string array or tensor of rank 0 or 1.
            Bytes are read as UTF-8.
        allowed_special: `"all"` or a collection of str. The special tokens
            that are recognised in the text. Defaults to none of them.

    Raises:
        ValueError: If the file is not a byte-level tokenizer, or lacks a
            special token.
        FileNotFoundError: If there is no such file.

    Example:

    ```python
    texts = ["In the beginning was the Word.", "And there was light."]
    tokenizer = keras_bwetaf.train_tokenizer(texts, vocabulary_size=300)
    tokenizer("the light")  # A 1-D array of token ids.
    tokenizer.detokenize(tokenizer(["the light", "the Word"]))
    tokenizer("light<|EOS|>", allowed_special="all")  # Ends with id 0.
    ```

    Reference:
        - [Byte-level BPE, Radford et al., 2019](
            https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
    """

    backbone_cls = BwETAFBackbone

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | PathLike | bytes | None = None,
        end_token: str = "<|EOS|>",
        unk_token: str = "<|UK|>",
        dtype: str = "int32",
        **kwargs: Any,
    ):
        super().__init__(dtype=dtype, **kwargs)
        if "int" not in self.compute_dtype:
            raise ValueError(
                "Token ids are integers: pass an integer `dtype`, such as "
                f'"int32". Received: dtype={dtype}'
            )
        self.built = True
        self.file_assets = [TOKENIZER_FILE]
        self.start_token = None
        self.start_token_id = None
        self._content = None
        self._tokenizer = None
        self._encoders = {}
        self._special_ids = {}
        self._add_special_token(end_token, "end_token")
        self._add_special_token(end_token, "pad_token")
        self._add_special_token(unk_token, "unk_token")
        if isinstance(tokenizer, tokenizers.Tokenizer):
            self._set_content(tokenizer.to_str(pretty=True).encode())
        elif isinstance(tokenizer, bytes):
            self._set_content(tokenizer)
        elif isinstance(tokenizer, (str, os.PathLike)):
            self._load_file(tokenizer)
        elif tokenizer is not None:
            raise ValueError(
                "`tokenizer` must be a path to a tokenizer file, a "
                "`tokenizers.Tokenizer` or None. Received: "
                f"tokenizer={tokenizer!r} of type {type(tokenizer).__name__}"
            )

    @classmethod
    def from_preset(
        cls, preset: PathLike, revision: str | None = None, **kwargs: Any
    ) -> Self:
        """Loads the tokenizer of a preset; no weights are downloaded.

        Args:
            preset: str or path. As for `keras_bwetaf.from_preset`.
            revision: str. As for `keras_bwetaf.from_preset`.
            **kwargs: Arguments of the tokenizer.

        Returns:
            A `BwETAFTokenizer`.

        Raises:
            ValueError: If the preset is unknown or has no tokenizer, or its
                files are damaged.
            Others: As `keras_bwetaf.from_preset`.

        Example:

        ```python
        tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset("97m")
        ```
        """
        files = open_preset(preset, revision, weights=False)
        found = class_for(cls, files.architecture)
        return load_tokenizer(found, files, **kwargs)

    def _load_file(self, path):
        if not os.path.isfile(path):
            raise FileNotFoundError(
                "The tokenizer file does not exist. Pass the path of a "
                f"Hugging Face tokenizer file. Received: {os.fspath(path)!r}"
            )
        content = read_bytes(path)
        try:
            self._set_content(content)
        except ValueError as error:
            raise ValueError(
                f"Cannot use the tokenizer file {os.fspath(path)!r}. {error}"
            ) from error

    def _set_content(self, content):
        """Takes over the bytes of a tokenizer file if they are sound."""
        try:
            with clear_panics():
                tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(
                "Expected the JSON of a Hugging Face tokenizer. Received "
                f"{len(content)} bytes that are not: {error}"
            ) from error
        # What a transformers tokenizer was last called with is no part of it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(
                "Expected a byte-level tokenizer. Received a tokenizer with "
                f"the decoder {tokenizer.decoder}"
            )
        normalizer = json.loads(tokenizer.to_str())["normalizer"]
        others = _normalizer_types(normalizer) - NORMALIZERS
        if others:
            raise ValueError(
                "Expected a tokenizer with no normalizers but "
                f"{', '.join(sorted(NORMALIZERS))}. Received: "
                f"{', '.join(sorted(others))}"
            )
        ids = sorted(tokenizer.get_vocab().values())
        if ids != list(range(len(ids))):
            raise ValueError(
                "Expected token ids without gaps, from 0 to "
                f"{len(ids) - 1} for {len(ids)} tokens. Received ids up to "
                f"{ids[-1]}"
            )
        special = {
            token.content: id
            for id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        for name in ("end_token", "unk_token"):
            if getattr(self, name) not in special:
                raise ValueError(
                    f"The tokenizer lacks the special token {name}="
                    f"{getattr(self, name)!r}. Name one that it has with "
                    f"the argument `{name}`. Received a tokenizer with the "
                    f"special tokens {list(special)}"
                )
        self._content = content
        self._tokenizer = tokenizer
        self._special_ids = special
        self._encoders = {frozenset(special): tokenizer}
        self._update_special_token_ids()

    def _check_loaded(self):
        if self._tokenizer is None:
            raise ValueError(
                "This tokenizer has no vocabulary yet. Pass `tokenizer` to "
                "the constructor, or call `load_assets(folder)`."
            )

    def _encoder(self, allowed_special):
        """Returns the tokenizer that recognises just these special tokens.

        The library's own switch is for all special tokens at once, and is
        shared by threads. So each choice gets a tokenizer of its own, in
        which the other special tokens are no added tokens: they are text.
        """
        special = self._special_ids
        if allowed_special == "all":
            allowed_special = special
        known = list(special)
        if (
            isinstance(allowed_special, str)
            or not isinstance(allowed_special, collections.abc.Collection)
            or any(token not in known for token in allowed_special)
        ):
            raise ValueError(
                '`allowed_special` must be "all" or a collection of special '
                f"tokens, out of {known}. Received: "
                f"allowed_special={allowed_special!r}"
            )
        key = frozenset(allowed_special)
        if key not in self._encoders:
            specification = json.loads(self._content)
            specification["added_tokens"] = [
                token
                for token in specification["added_tokens"]
                if not token["special"] or token["content"] in key
            ]
            specification |= {"truncation": None, "padding": None}
            self._encoders[key] = tokenizers.Tokenizer.from_str(
                json.dumps(specification)
            )
        return self._encoders[key]

    def _encode(self, texts, allowed_special):
        texts = [_as_str(text) for text in texts]
        encoder = self._encoder(allowed_special)
        try:
            with clear_panics():
                return [row.ids for row in encoder.encode_batch_fast(texts)]
        except TypeError as error:
            surrogate = re.search("[\ud800-\udfff]", "".join(texts))
            raise ValueError(
                "Texts must be valid Unicode, without lone surrogates. "
                f"Received: {surrogate.group()!r} in a text"
            ) from error

    def _decode(self, rows, skip_special_tokens):
        return [
            self._tokenizer.decode(
                self._checked_ids(row), skip_special_tokens=skip_special_tokens
            )
            for row in rows
        ]

    def _checked_ids(self, ids):
        """Returns an id or a sequence of ids as a list of valid int."""
        self._check_loaded()
        array = np.atleast_1d(np.asarray(ids))
        if array.size == 0:
            return []
        if array.ndim > 1 or array.dtype.kind not in "iu":
            raise ValueError(
                "Token ids must be integers in sequences of rank 1 or 2. "
                f"Received: a sequence of dtype {array.dtype} and shape "
                f"{array.shape}"
            )
        size = self.vocabulary_size()
        outside = array[(array < 0) | (array >= size)]
        if outside.size:
            raise ValueError(
                f"Token ids must be from 0 to {size - 1}. Received: "
                f"{outside[0]}"
            )
        return array.tolist()

    def tokenize(self, inputs, allowed_special=()):
        """Turns text into token ids.

        Args:
            inputs: str, list of str, or a string array or tensor of rank 0
                or 1.
            allowed_special: `"all"` or a collection of str. The special
                tokens that are recognised in the text. Defaults to none.

        Returns:
            A 1-D integer array for a single string, a list of lists of int
            for a batch. In a `tf.function`, a dense and a ragged tensor.

        Raises:
            ValueError: If an input is not a string, or a token to allow is
                not a special token.
        """
        self._check_loaded()
        if self._use_tf_workflow():
            return self._tokenize_tf(inputs, allowed_special)
        if not isinstance(inputs, str) and hasattr(inputs, "__array__"):
            inputs = np.asarray(inputs).tolist()
        if isinstance(inputs, (list, tuple)):
            return self._encode(inputs, allowed_special)
        (ids,) = self._encode([inputs], allowed_special)
        return np.array(ids, dtype=self.compute_dtype)

    def detokenize(self, inputs, skip_special_tokens=False):
        """Turns token ids into text.

        Bytes that are no valid UTF-8 become replacement characters; see
        `token_bytes()` for decoding a text in pieces.

        Args:
            inputs: An int, or ints as a list, array or tensor of rank 1, or
                a list of lists, array, or tensor of rank 2.
            skip_special_tokens: bool. Whether to leave out special tokens.
                Defaults to `False`.

        Returns:
            A str for one sequence (as which an empty list counts), a list of
            str for a batch. In a `tf.function`, a string tensor.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        self._check_loaded()
        if self._use_tf_workflow():
            return self._detokenize_tf(inputs, skip_special_tokens)
        if hasattr(inputs, "to_list"):  # A ragged tensor.
            inputs = inputs.to_list()
        if isinstance(inputs, (list, tuple)):
            batched = len(inputs) > 0 and np.ndim(inputs[0]) > 0
        else:
            inputs = np.asarray(inputs)
            batched = inputs.ndim > 1
        if batched:
            return self._decode(inputs, skip_special_tokens)
        return self._decode([inputs], skip_special_tokens)[0]

    def token_bytes(self, inputs):
        """Returns the exact bytes behind token ids.

        A character may be spread over several tokens: join bytes, then
        decode. Special tokens contribute nothing.

        Args:
            inputs: An int, or a list, array or tensor of ints of rank 1.

        Returns:
            bytes. UTF-8, possibly cut inside a character.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        pieces = []
        for id in self._checked_ids(inputs):
            token = self._tokenizer.id_to_token(id)
            if token in self._special_ids:
                continue
            try:
                pieces.append(bytes(BYTE_ALPHABET[c] for c in token))
            except KeyError:  # An added token is stored as plain text.
                pieces.append(token.encode())
        return b"".join(pieces)

    def _tokenize_tf(self, inputs, allowed_special):
        import tensorflow as tf

        inputs = tf.convert_to_tensor(inputs)
        if inputs.dtype != tf.string or inputs.shape.rank not in (0, 1):
            raise ValueError(
                "Texts must be a string tensor of rank 0 or 1. Received: "
                f"{inputs}"
            )
        self._encoder(allowed_special)  # Errors should come while tracing.
        texts = tf.reshape(inputs, [-1])

        def encode(texts):
            rows = self._encode(texts, allowed_special)
            ids = list(itertools.chain.from_iterable(rows))
            return (
                np.array(ids, dtype=self.compute_dtype),
                np.array([len(row) for row in rows], dtype="int64"),
            )

        ids, lengths = tf.numpy_function(
            encode, [texts], [self.compute_dtype, "int64"]
        )
        ids.set_shape([None])
        lengths.set_shape(texts.shape)
        if inputs.shape.rank == 0:
            return ids
        return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)

    def _detokenize_tf(self, inputs, skip_special_tokens):
        import tensorflow as tf

        single = inputs.shape.rank == 1
        if single:
            inputs = inputs[tf.newaxis]
        if isinstance(inputs, tf.Tensor):
            inputs = tf.RaggedTensor.from_tensor(inputs)

        def decode(ids, row_splits):
            rows = np.split(ids, row_splits[1:-1])
            return np.array(self._decode(rows, skip_special_tokens), object)

        texts = tf.numpy_function(
            decode, [inputs.values, inputs.row_splits], tf.string
        )
        texts.set_shape(inputs.shape[:1])
        return texts[0] if single else texts

    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs, *args, **kwargs)

    def vocabulary_size(self) -> int:
        """Returns the number of tokens, special ones included."""
        self._check_loaded()
        return self._tokenizer.get_vocab_size()

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens as a list of str, in the order of their ids."""
        return [self.id_to_token(id) for id in range(self.vocabulary_size())]

    def id_to_token(self, id: int) -> str:
        """Returns the token of an id as it is in the vocabulary."""
        (id,) = self._checked_ids(id)
        return self._tokenizer.id_to_token(id)

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token of the vocabulary."""
        self._check_loaded()
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise ValueError(
                "The token is not in the vocabulary. Its tokens are listed "
                f"by `get_vocabulary()`. Received: token={token!r}"
            )
        return id

    @property
    def content(self):
        """bytes. The tokenizer file, as it was read."""
        self._check_loaded()
        return self._content

    def specification(self) -> str:
        """The JSON of a `tokenizers.Tokenizer` to which all text is plain.

        Special tokens in a text are text to it, as to `tokenize`.

        Returns:
            str.
        """
        return self._encoder(()).to_str()

    def save_assets(self, dir_path):
        """Writes the tokenizer file, the same bytes that were read.

        Args:
            dir_path: str. An existing folder.
        """
        content = self.content
        with new_file(Path(dir_path, TOKENIZER_FILE)) as file:
            file.write(content)

    def load_assets(self, dir_path):
        """Reads the tokenizer file in a folder.

        Args:
            dir_path: str. A folder that `save_assets()` wrote to.
        """
        self._load_file(os.path.join(dir_path, TOKENIZER_FILE))

    def get_config(self):
        """Returns the arguments, without the vocabulary: that is an asset."""
        config = super().get_config()
        config.update(
            {"end_token": self.end_token, "unk_token": self.unk_token}
        )
        return config

    @classmethod
    def from_config(cls, config):
        # A configuration may come from anywhere, so it opens no file.
        if "tokenizer" in config:
            raise ValueError(
                "A configuration must not name a tokenizer file: pass it to "
                "the constructor, or call `load_assets(folder)`. Received: "
                f"tokenizer={config['tokenizer']!r}"
            )
        return super().from_config(config)


def _as_str(text):
    try:
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(
            "Texts must be strings, or bytes that are UTF-8. Received: "
            f"{text[:40]!r}, whose byte {error.start} is no UTF-8"
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            "Texts must be strings: pass one string, or a list or 1-D array "
            f"of them. Received: {text!r} of type {type(text).__name__}"
        )
    return text


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    *,
    min_frequency: int = 6,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    show_progress: bool = False,
) -> BwETAFTokenizer:
    """Trains a tokenizer with the settings of BwETAFv3.

    The same texts and settings give the same tokenizer file as the original
    package. The vocabulary comes out smaller than asked for when the texts
    offer too few pairs that are frequent enough. Pieces that nothing breaks,
    no space, digit or mark, are cut after 4096 bytes: the time that one takes
    grows with the square of its length.

    Args:
        texts: Iterable of str. It is read once and not kept.
        vocabulary_size: int. The number of tokens at most, special tokens
            and the 256 bytes included.
        min_frequency: int. How often a pair of tokens must occur to become
            a token. Defaults to `6`.
        special_tokens: tuple of str, which get the first ids. The first ends
            a document, the second stands for unknown bytes. Defaults to
            `("<|EOS|>", "<|UK|>")`.
        show_progress: bool. Whether to draw progress bars. Defaults to
            `False`.

    Returns:
        A `BwETAFTokenizer`.

    Raises:
        ValueError: If the vocabulary cannot hold the bytes and the special
            tokens, fewer than two special tokens are named, `min_frequency`
            is negative, or the texts are empty or no strings.

    Example:

    ```python
    with open("corpus.txt", encoding="utf-8") as lines:
        tokenizer = keras_bwetaf.train_tokenizer(lines, 16384)
    ```
    """
    special_tokens = _checked_special_tokens(special_tokens)
    min_frequency = checked_int("min_frequency", min_frequency, 0)
    smallest = len(BYTE_ALPHABET) + len(special_tokens)
    if not is_int(vocabulary_size) or vocabulary_size < smallest:
        raise ValueError(
            f"`vocabulary_size` must be at least {smallest}, to hold "
            f"{len(BYTE_ALPHABET)} bytes and {len(special_tokens)} special "
            f"tokens. Received: vocabulary_size={vocabulary_size!r}"
        )
    if isinstance(texts, (str, bytes)):
        raise ValueError(
            "`texts` must be an iterable of strings, not one string: pass "
            f"[text]. Received: texts={texts[:40]!r}"
        )
    end_token, unk_token = special_tokens[:2]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unk_token))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The cut is for training alone; a text is tokenized without it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.FixedLength(LONGEST_PIECE)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(vocabulary_size),
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_checked_texts(texts), trainer=trainer)
    tokenizer.pre_tokenizer = pieces
    return BwETAFTokenizer(tokenizer, end_token=end_token, unk_token=unk_token)


def _checked_special_tokens(special_tokens):
    special_tokens = strings("special_tokens", special_tokens)
    if (
        len(set(special_tokens)) != len(special_tokens)
        or len(special_tokens) < 2
        or "" in special_tokens
    ):
        raise ValueError(
            "`special_tokens` must be different strings: the end token, the "
            "token for unknown bytes, then any more. Received: "
            f"special_tokens={special_tokens}"
        )
    return special_tokens


def _checked_texts(texts):
    """Yields the texts to train on, of which there must be some."""
    num_characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                "`texts` must be strings. Received: "
                f"texts[{index}]={text!r} of type {type(text).__name__}"
            )
        num_characters += len(text)
        yield text
    if num_characters == 0:
        raise ValueError(
            "`texts` must contain text to train on. Received: no texts, or "
            "only empty ones"
        )
