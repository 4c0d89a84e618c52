"""The host's half of generation: prompts in, new tokens out."""

import numpy as np

from keras_bwetaf.layers.sharding import num_row_groups

SMALLEST_BUCKET = 64


def bucket(size, smallest=SMALLEST_BUCKET):
    """The smallest doubling of `smallest` that holds `size`.

    Shapes come from a few buckets, so that few programs are compiled.
    """
    while smallest < size:
        smallest *= 2
    return smallest


def cache_bucket(size):
    """Like `bucket` with steps an eighth as large: decoding reads all slots."""
    step = bucket(size) // 8
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
        num_steps = min(tokens_per_dispatch, self._request.longest)
        num_shown = 0
        while True:
            num_tokens = int(state.num_tokens)
            yield self._fresh(state.tokens, num_shown, num_tokens)
            num_shown = num_tokens
            if self.finished.all():
                return
            done = np.pad(self.finished, (0, num_padding), constant_values=True)
            state = self._decoder.decode(
                state._replace(done=done), settings, num_steps
            )

    def _prefill(self, num_padding):
        """The state after the prompts, and the settings of all rows."""
        prompts, limits, longest, stop_token_ids, settings = self._request
        prompts = prompts + [[0]] * num_padding
        limits = np.array(limits + [0] * num_padding, "int32")
        if settings is not None:
            seeds = np.pad(settings.seeds, (0, num_padding))
            settings = settings._replace(seeds=seeds)

        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        token_ids = np.zeros((len(prompts), bucket(lengths.max())), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        num_unused = bucket(len(stop_token_ids), 8) - len(stop_token_ids)
        state = self._decoder.prefill(
            cache_bucket(token_ids.shape[1] + longest),
            token_ids,
            {
                "prompt_lengths": lengths,
                "limits": limits,
                "stop_token_ids": np.array(
                    stop_token_ids + [-1] * num_unused, "int32"
                ),
            },
            settings,
        )
        return state, settings

    def _fresh(self, tokens, start, stop):
        """The tokens `start` to `stop` of each row, up to its end."""
        limits = np.array(self._request.limits)
        tokens = np.asarray(tokens)[: len(self.finished), start:stop]
        fresh = []
        for i, row in enumerate(tokens.tolist()):
            row = [] if self.finished[i] else row[: limits[i] - start]
            for end, token in enumerate(row, start=1):
                if token in self._request.stop_token_ids:
                    row = row[:end]
                    self.finished[i] = True
                    break
            fresh.append(row)
        self.finished |= limits <= stop
        return fresh
