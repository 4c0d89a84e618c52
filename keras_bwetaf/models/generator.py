"""How a causal LM continues prompts: batches, streaming, stop strings."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import jax
import keras_hub
import numpy as np

from keras_bwetaf.arguments import Sampling, Seed, TextDataset
from keras_bwetaf.checks import positive_int
from keras_bwetaf.generation.decoding import Decoder
from keras_bwetaf.generation.generation import (
    COMPACTION,
    Generation,
    bucket,
)
from keras_bwetaf.generation.request import (
    as_prompts,
    as_stop_strings,
    as_texts,
    batches_of,
    make_request,
    seeds_of_batches,
)
from keras_bwetaf.generation.sampling import BwETAFSampler
from keras_bwetaf.generation.streaming import TextStream
from keras_bwetaf.layers.sharding import num_row_groups

# Often enough that a keyboard interrupt is answered within a second or two,
# seldom enough to cost nothing.
TOKENS_PER_DISPATCH = 64
StopTokens = Sequence[int] | Literal["auto"] | None


class Generator(keras_hub.models.CausalLM):
    """Generation of a causal LM, with a key/value cache written in place.

    A subclass has the attributes `backbone`, `preprocessor` and `sampler`,
    and the methods that `Decoder` calls.
    """

    def make_generate_function(self):
        """The `Decoder`, whose compiled functions are made on first use."""
        if self.generate_function is None:
            self.generate_function = Decoder(self)
        return self.generate_function

    @overload
    def generate(
        self,
        inputs: str,
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        batch_size: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> str: ...

    @overload
    def generate(
        self,
        inputs: Sequence[str] | np.ndarray,
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        batch_size: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        inputs: dict[str, Any],
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        batch_size: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> dict[str, np.ndarray]: ...

    @overload
    def generate(
        self,
        inputs: TextDataset,
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        batch_size: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[str] | dict[str, np.ndarray]: ...

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        strip_prompt: bool = False,
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        batch_size: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Any:
        """Continues prompts.

        Args:
            inputs: str, or list of str of any lengths. Without a
                preprocessor, a dict of `token_ids` and `padding_mask`, int
                arrays `(batch, length)` with padding on the right. Or a
                `tf.data.Dataset` of batches of either.
            max_length: int. Most tokens of a prompt and its continuation
                together. Defaults to the preprocessor's `sequence_length`.
            stop_token_ids: `"auto"`, the tokenizer's end token; a list of
                int; or `None` to go on until the length is reached. Only new
                tokens are looked at.
            strip_prompt: bool. Return the continuation only.
            max_new_tokens: int. Most tokens of a continuation; instead of
                `max_length`.
            stop_strings: str or list of str. A continuation ends before the
                first of them.
            truncation: `"left"` drops the oldest tokens of prompts that are
                too long for the model to see (a returned text still starts
                with its whole prompt); `None` raises an error.
            seed: int, or list with one int for each prompt. A prompt with
                the same seed continues in the same way, alone or in a batch.
                Defaults to the sampler's.
            batch_size: int. The most prompts that are continued at a time.
                More go through in several batches, sorted by length, with a
                progress bar. Defaults to 32 on CPUs, and to 256 on
                accelerators.
            **sampling: Arguments of `BwETAFSampler` that replace those of
                the compiled one: `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`.

        Returns:
            str or list of str, as `inputs`; or a dict of int arrays
            `(batch, length)`, as `inputs`, whose `padding_mask` covers the
            stop token.

        A preprocessor that overrides `generate_preprocess` or
        `generate_postprocess` is asked for the token ids of the prompts, and
        for the text of what was generated.

        Raises:
            ValueError: If a prompt is empty, not a string or too long, an
                argument is out of range, or there are `stop_strings` or
                `truncation` beside such a preprocessor.

        Example:

        ```python
        lm.generate(["The night sky", "Once"], max_new_tokens=32, seed=[1, 2])
        lm.generate("The night sky", max_new_tokens=32, temperature=0)
        ```
        """
        options = dict(
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            truncation=truncation,
            seed=seed,
            sampling=sampling,
        )
        if batch_size is None:
            batch_size = 32 if jax.default_backend() == "cpu" else 256
        batch_size = positive_int("batch_size", batch_size)
        stop_strings = as_stop_strings(stop_strings)
        if hasattr(inputs, "as_numpy_iterator"):  # A tf.data.Dataset.
            batches = list(inputs.as_numpy_iterator())
            return _concatenate(
                self._generate(
                    batch,
                    strip_prompt,
                    stop_strings,
                    batch_size,
                    {**options, "seed": seed},
                )
                for batch, seed in zip(
                    batches, seeds_of_batches(seed, batches), strict=True
                )
            )
        return self._generate(
            inputs, strip_prompt, stop_strings, batch_size, options
        )

    def _generate(
        self, inputs, strip_prompt, stop_strings, batch_size, options
    ):
        """`generate` for what is no data set."""
        if self.preprocessor is None:
            if stop_strings:
                raise ValueError(
                    "`stop_strings` needs a tokenizer, and this model has "
                    "`preprocessor=None`. Attach a preprocessor or use "
                    "`stop_token_ids`."
                )
            return self._generate_ids(inputs, strip_prompt, batch_size, options)
        is_single = isinstance(inputs, str)
        texts = as_texts([inputs] if is_single else inputs)
        if _has_own_processing(self.preprocessor):
            outputs = self._generate_processed(
                texts, strip_prompt, stop_strings, batch_size, options
            )
            return outputs[0] if is_single else outputs
        prompts = self.preprocessor.tokenizer.tokenize(texts)
        request = make_request(self, prompts, **options)
        outputs = ["" if strip_prompt else text for text in texts]
        for rows, batch in batches_of(request, batch_size):
            for pieces in self._generate_text(
                batch, stop_strings, TOKENS_PER_DISPATCH
            ):
                for i, piece in zip(rows, pieces, strict=True):
                    outputs[i] += piece
        return outputs[0] if is_single else outputs

    def _generate_processed(
        self, texts, strip_prompt, stop_strings, batch_size, options
    ):
        """`generate` with a preprocessor that has methods of its own for it."""
        if stop_strings or options["truncation"]:
            raise ValueError(
                "`stop_strings` and `truncation` can't be used with a "
                "preprocessor that overrides `generate_preprocess` or "
                "`generate_postprocess`, which cuts prompts itself, and makes "
                "the text at the end. Received: "
                f"stop_strings={stop_strings}, "
                f"truncation={options['truncation']!r}"
            )
        context = self.backbone.max_sequence_length
        length = options["max_length"]
        if options["max_new_tokens"] is not None:
            length = context
        elif length is None:
            length = min(self.preprocessor.sequence_length, context)
        inputs = self.preprocessor.generate_preprocess(
            texts, sequence_length=length
        )
        inputs = {
            name: np.asarray(inputs[name])
            for name in ("token_ids", "padding_mask")
        }
        outputs = self._generate_ids(inputs, strip_prompt, batch_size, options)
        outputs["padding_mask"] = outputs["padding_mask"].astype("bool")
        return self.preprocessor.generate_postprocess(outputs)

    def stream(
        self,
        prompt: str,
        max_length: int | None = None,
        stop_token_ids: StopTokens = "auto",
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        truncation: Literal["left"] | None = None,
        seed: Seed | None = None,
        tokens_per_dispatch: int = 8,
        **sampling: Unpack[Sampling],
    ) -> Iterator[str]:
        """Continues a prompt and yields the text as it is made.

        The pieces put together are what `generate` returns with
        `strip_prompt=True` and the same seed.

        Args:
            prompt: str.
            tokens_per_dispatch: int. How many tokens are made between two
                pieces of text. Fewer come sooner, more come faster.
            **sampling: See `generate`, also for all other arguments.

        Yields:
            str, never empty. A character is never split.

        Raises:
            ValueError: As `generate` does, at once and not at the first
                piece.
        """
        if self.preprocessor is None:
            raise ValueError(
                "`stream` needs a tokenizer, and this model has "
                "`preprocessor=None`. Attach a preprocessor, or pass token "
                "ids to `generate`."
            )
        if _has_own_processing(self.preprocessor):
            raise ValueError(
                "`stream` can't use a preprocessor that overrides "
                "`generate_preprocess` or `generate_postprocess`: its text is "
                "made at the end. Use `generate`. Received: a preprocessor of "
                f"class {type(self.preprocessor).__name__}"
            )
        if not isinstance(prompt, str):
            raise ValueError(
                "`stream` takes one prompt, a str. Use `generate` for a "
                f"batch. Received: prompt={prompt!r}"
            )
        tokens_per_dispatch = positive_int(
            "tokens_per_dispatch", tokens_per_dispatch
        )
        request = make_request(
            self,
            self.preprocessor.tokenizer.tokenize([prompt]),
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            truncation=truncation,
            seed=seed,
            sampling=sampling,
        )
        pieces = self._generate_text(
            request, as_stop_strings(stop_strings), tokens_per_dispatch
        )
        return (piece for (piece,) in pieces if piece)

    def warm_up(
        self,
        prompt_lengths: Sequence[int] = (1,),
        batch_sizes: Sequence[int] = (1,),
        *,
        max_new_tokens: int = 128,
    ) -> None:
        """Compiles what `generate` and `stream` run, before the first prompt.

        That is the prompt pass and the decode loop, for each length together
        with each batch size. Shapes are rounded up, so one program serves
        many calls: prompts of 1 to 32 tokens, to 48, 64, 96, 128, 192, and so
        on; batches in powers of two; caches in steps of an eighth of their
        size. The smaller batches that remain when rows have ended are
        compiled, too. What comes later with the same rounded shapes compiles
        nothing: other prompts, seeds, settings of the sampler, and up to eight
        stop tokens. With `keras_bwetaf.enable_compilation_cache()`, the next
        process compiles nothing, either.

        Args:
            prompt_lengths: list of int. Tokens of the longest prompt of a
                batch.
            batch_sizes: list of int. Prompts that are continued together.
            max_new_tokens: int. As `generate` will be called with it.

        Raises:
            ValueError: If a length or size is no positive int, or more than
                the model can see.

        Example:

        ```python
        lm.warm_up([32, 512], batch_sizes=[1, 8], max_new_tokens=256)
        ```
        """
        decoder = self.make_generate_function()
        for length, size in itertools.product(prompt_lengths, batch_sizes):
            length = positive_int("prompt_lengths", length)
            size = positive_int("batch_sizes", size)
            request = make_request(
                self,
                [[0] * length] * size,
                max_length=None,
                stop_token_ids=None,
                max_new_tokens=max_new_tokens,
                truncation=None,
                seed=0 if isinstance(self.sampler, BwETAFSampler) else None,
                sampling={},
            )
            # Rows end one after the other, for the batch to shrink.
            padded = bucket(size, num_row_groups())
            sizes = [padded // COMPACTION**i for i in range(size.bit_length())]
            limits = [1 + sum(i < n for n in sizes) for i in range(size)]
            limits = [min(limit, max_new_tokens) for limit in limits]
            request = request._replace(limits=limits)
            state = [variable.value for variable in self.sampler.variables]
            for _ in Generation(decoder, request).run(tokens_per_dispatch=1):
                pass
            for variable, value in zip(
                self.sampler.variables, state, strict=True
            ):
                variable.assign(value)

    def _generate_text(self, request, stop_strings, tokens_per_dispatch):
        """Yields the next piece of text of every row."""
        streams = [
            TextStream(
                self.preprocessor.tokenizer,
                stop_strings,
                request.stop_token_ids,
            )
            for _ in request.prompts
        ]
        generation = Generation(self.make_generate_function(), request)
        for fresh in generation.run(tokens_per_dispatch):
            yield [
                stream.push(tokens, final)
                for stream, tokens, final in zip(
                    streams, fresh, generation.finished.tolist(), strict=True
                )
            ]
            generation.end([stream.stopped for stream in streams])

    def _generate_ids(self, inputs, strip_prompt, batch_size, options):
        """`generate` from token ids to token ids."""
        prompts, width = as_prompts(inputs)
        if options["max_new_tokens"] is None and options["max_length"] is None:
            options = {**options, "max_length": width}
        request = make_request(self, prompts, **options)
        rows = [
            [] if strip_prompt else list(prompt) for prompt in request.prompts
        ]
        for indices, batch in batches_of(request, batch_size):
            generation = Generation(self.make_generate_function(), batch)
            for fresh in generation.run(TOKENS_PER_DISPATCH):
                for i, tokens in zip(indices, fresh, strict=True):
                    rows[i].extend(tokens)
        width = max([width, *map(len, rows)])
        token_ids = np.zeros((len(rows), width), "int32")
        padding_mask = np.zeros((len(rows), width), "int32")
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
        return {"token_ids": token_ids, "padding_mask": padding_mask}


def _has_own_processing(preprocessor):
    """Whether a preprocessor overrides what KerasHub's does in `generate`."""
    theirs = keras_hub.models.CausalLMPreprocessor
    return any(
        getattr(type(preprocessor), name) is not getattr(theirs, name)
        for name in ("generate_preprocess", "generate_postprocess")
    )


def _concatenate(batches):
    """Joins the outputs of several batches, lists of str or dicts."""
    batches = list(batches)
    if not batches or isinstance(batches[0], list):
        return [text for batch in batches for text in batch]
    width = max(batch["token_ids"].shape[1] for batch in batches)
    return {
        name: np.concatenate(
            [
                np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1])))
                for batch in batches
            ]
        )
        for name in batches[0]
    }
