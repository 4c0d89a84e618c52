"""The host's half of generation: prompts in, new tokens out."""

import numpy as np

from keras_bwetaf.layers.sharding import num_row_groups

SMALLEST_BUCKET = 32
# Rows that have ended leave a batch when so many times fewer remain: each
# size of batch is a program of its own, which takes seconds to compile.
COMPACTION = 4


def bucket(size, smallest=SMALLEST_BUCKET):
    """The smallest doubling of `smallest` that holds `size`.

    Shapes come from a few buckets, so that few programs are compiled.
    """
    while smallest < size:
        smallest *= 2
    return smallest


def prompt_bucket(size):
    """Like `bucket`, with one step more between two doublings: 32, 48, 64."""
    doubled = bucket(size)
    between = doubled * 3 // 4
    return between if SMALLEST_BUCKET < doubled and size <= between else doubled


def shorter_prompts(size):
    """The longest prompt of the next smaller `prompt_bucket`, or 0."""
    size = prompt_bucket(size)
    if size == SMALLEST_BUCKET:
        return 0
    return size * 3 // 4 if bucket(size) == size else size * 2 // 3


def cache_bucket(size):
    """Like `bucket` with steps an eighth as large: decoding reads all slots."""
    step = max(bucket(size) // 8, SMALLEST_BUCKET)
    return -(-size // step) * step


class Generation:
    """A batch of prompts that a `Decoder` continues.

    Args:
        decoder: `Decoder`.
        request: `Request`.

    Attributes:
        finished: bool numpy array `(batch,)`. Rows that get no more tokens.

    Example:

    ```python
    generation = Generation(decoder, request)
    for fresh in generation.run(tokens_per_dispatch=8):
        show(fresh)
    ```
    """

    def __init__(self, decoder, request):
        self._decoder = decoder
        self._request = request
        self.finished = np.zeros(len(request.prompts), "bool")

    def end(self, rows):
        """Gives rows no more tokens.

        Args:
            rows: list of bool, one for each row.
        """
        self.finished |= np.asarray(rows)

    def run(self, tokens_per_dispatch):
        """Generates until all rows are finished.

        Args:
            tokens_per_dispatch: int. How many tokens the device makes before
                the host sees them.

        Yields:
            list of lists of int, the tokens that each row has got since the
            last time, up to and including its stop token.
        """
        num_rows = len(self.finished)
        # The batch is padded to a bucket with rows that make no tokens.
        num_padding = bucket(num_rows, num_row_groups()) - num_rows
        state, settings = self._prefill(num_padding)
        rows = np.pad(np.arange(num_rows), (0, num_padding), constant_values=-1)
        num_steps = min(tokens_per_dispatch, self._request.longest)
        num_shown = 0
        while True:
            num_tokens = int(state.num_tokens)
            yield self._fresh(rows, state.tokens, num_shown, num_tokens)
            num_shown = num_tokens
            if self.finished.all():
                return
            rows, state, settings = self._compacted(rows, state, settings)
            done = (rows < 0) | self.finished[rows]
            state = self._decoder.decode(
                state._replace(done=done),
                settings,
                num_steps,
                self._fewest(len(rows)),
            )

    def _fewest(self, num_rows):
        """A batch of as many unfinished rows, or fewer, is to be compacted."""
        if self._request.settings is None:
            # A sampler of the user's own may draw for the batch as a whole.
            return 0
        smaller = num_rows // COMPACTION
        return smaller if smaller >= num_row_groups() else 0

    def _compacted(self, rows, state, settings):
        """Without the rows that have ended, if few enough remain.

        Args:
            rows: int numpy array `(batch,)`. The request's row that each row
                of the batch is, -1 for padding.
            state: `GenerationState`.
            settings: `SamplingSettings` or `None`.

        Returns:
            Tuple of the three, for a batch that may be smaller.
        """
        (kept,) = np.nonzero((rows >= 0) & ~self.finished[rows])
        if len(kept) > self._fewest(len(rows)):
            return rows, state, settings
        num_padding = bucket(len(kept), num_row_groups()) - len(kept)
        rows = np.pad(rows[kept], (0, num_padding), constant_values=-1)
        kept = np.pad(kept, (0, num_padding), mode="edge").astype("int32")
        settings = settings._replace(seeds=settings.seeds[kept])
        return rows, self._decoder.keep_rows(state, kept), settings

    def _prefill(self, num_padding):
        """The state after the prompts, and the settings of all rows."""
        prompts, limits, longest, stop_token_ids, settings, num_known = (
            self._request
        )
        prompts = prompts + [[0]] * num_padding
        limits = np.array(limits + [0] * num_padding, "int32")
        if settings is not None:
            seeds = np.pad(settings.seeds, (0, num_padding))
            settings = settings._replace(seeds=seeds)

        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        num_slots = prompt_bucket(lengths.max())
        token_ids = np.zeros((len(prompts), num_slots), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        num_unused = bucket(len(stop_token_ids), 8) - len(stop_token_ids)
        state = self._decoder.prefill(
            cache_bucket(num_slots + longest),
            token_ids,
            {
                "prompt_lengths": lengths,
                "limits": limits,
                "stop_token_ids": np.array(
                    stop_token_ids + [-1] * num_unused, "int32"
                ),
                "num_known": None if num_known is None else np.int32(num_known),
            },
            settings,
        )
        return state, settings

    def _fresh(self, rows, tokens, start, stop):
        """The tokens `start` to `stop` of each row, up to its end."""
        limits = self._request.limits
        fresh = [[] for _ in limits]
        tokens = np.asarray(tokens)[:, start:stop].tolist()
        for i, row in zip(rows.tolist(), tokens, strict=True):
            if i < 0 or self.finished[i]:
                continue
            row = row[: limits[i] - start]
            for end, token in enumerate(row, start=1):
                if token in self._request.stop_token_ids:
                    row = row[:end]
                    self.finished[i] = True
                    break
            fresh[i] = row
        self.finished |= np.array(limits) <= stop
        return fresh
