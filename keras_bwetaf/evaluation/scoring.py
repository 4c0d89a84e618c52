"""The loss of every token, of rows and of continuations, in batches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_bwetaf.checks import positive_int
from keras_bwetaf.generation.generation import bucket, prompt_bucket
from keras_bwetaf.generation.request import progress_bar
from keras_bwetaf.layers.sharding import by_row, num_row_groups, replicated
from keras_bwetaf.models import BwETAFCausalLM
from keras_bwetaf.step.train_step import (
    head_losses,
    token_batch,
    token_losses,
)

# Tokens of all continuations of a context, in few shapes.
SMALLEST_BUCKET = 16


class Scorer:
    """Computes the losses of tokens; the logits of a batch never exist.

    Losses are negative log-probabilities, in nats. Shapes are rounded up, so
    that few programs are compiled: batches all have the same number of rows.

    Args:
        lm: `BwETAFCausalLM`.
        batch_size: int. Rows that are computed together; rounded up to a
            multiple of the data-parallel groups.
        dropout: bool. Whether there is dropout, as in training.

    Example:

    ```python
    scorer = Scorer(lm)
    ((losses, is_greedy),) = scorer.rows([[5, 17, 3]])  # Of 17 and 3.
    ```
    """

    def __init__(
        self, lm: BwETAFCausalLM, batch_size: int = 16, dropout: bool = False
    ):
        groups = num_row_groups()
        size = positive_int("batch_size", batch_size)
        self.batch_size = -(-size // groups) * groups
        self._lm = lm
        self._dropout = dropout
        # Dropout changes the state of its random generators, here only.
        self._non_trainable = [v.value for v in lm.non_trainable_variables]
        self._rows = jax.jit(self._score_rows)
        self._continuations = jax.jit(self._score_continuations)

    def rows(
        self, rows: Sequence[Sequence[int]], title: str = "Scoring"
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each token of a row, given those before it.

        Args:
            rows: list of lists of int. Token ids, at least two of each row.
            title: str. Of the progress bar.

        Returns:
            list of tuples, for each row: the losses of all tokens but the
            first, a float32 array; and whether each is the likeliest token, a
            bool array.
        """
        scores: list = [None] * len(rows)
        for batch in self._batches(rows, len, title):
            length = prompt_bucket(max(len(rows[i]) - 1 for i in batch))
            token_ids = np.zeros((self.batch_size, length), "int32")
            targets = np.full((self.batch_size, length), -1, "int32")
            for j, i in enumerate(batch):
                row = np.asarray(rows[i], "int32")
                token_ids[j, : len(row) - 1] = row[:-1]
                targets[j, : len(row) - 1] = row[1:]
            inputs = {
                "token_ids": token_ids,
                "padding_mask": (targets >= 0).astype("int32"),
            }
            losses, is_greedy, _ = self.batch((inputs, targets))
            for j, i in enumerate(batch):
                end = len(rows[i]) - 1
                scores[i] = losses[j, :end], is_greedy[j, :end]
        return scores

    def batch(self, data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The losses of a batch as `fit` takes it, of token ids.

        Args:
            data: dict of `"token_ids"` and `"padding_mask"`, int arrays
                `(batch, length)`, or a tuple of it, labels and sample
                weights.

        Returns:
            Tuple of three arrays `(batch, length)`: float32 losses; bool,
            whether the target is the likeliest token; float32, how much each
            counts.
        """
        batch = jax.tree.map(by_row, jax.tree.map(np.asarray, data))
        outputs, self._non_trainable = self._rows(
            [v.value for v in self._lm.trainable_variables],
            self._non_trainable,
            batch,
        )
        return tuple(map(np.asarray, outputs))

    def continuations(
        self,
        groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        title: str = "Scoring",
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Continuations of contexts, each of which is read only once.

        Args:
            groups: list of tuples of a context, a list of int, at least one;
                and its continuations, a list of lists of int.
            title: str. Of the progress bar.

        Returns:
            list of lists of tuples: for each continuation, the losses of its
            tokens, a float32 array; and whether each is the likeliest token,
            a bool array.
        """

        def size(group):
            context, continuations = group
            return len(context) + sum(map(len, continuations))

        scores: list = [None] * len(groups)
        for rows in self._batches(groups, size, title):
            batch, places = self._pack([groups[i] for i in rows])
            values = [v.value for v in self._lm.variables]
            batch = {name: by_row(x) for name, x in batch.items()}
            outputs = self._continuations(values, batch)
            losses, is_greedy = map(np.asarray, outputs)
            for j, i in enumerate(rows):
                scores[i] = [
                    (losses[j, place], is_greedy[j, place])
                    for place in places[j]
                ]
        return scores

    def _batches(self, items, size, title):
        """Yields numbers of items of similar sizes, the largest first."""
        order = sorted(range(len(items)), key=lambda i: -size(items[i]))
        with progress_bar(title) as progress:
            task = progress.add_task("", total=len(order))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield batch
                progress.advance(task, len(batch))

    def _pack(self, groups):
        """A batch with a group in each row, and where continuations are.

        Returns:
            Tuple of a dict of int32 arrays, and a list of lists of slices.
        """
        length = prompt_bucket(max(len(context) for context, _ in groups))
        width = bucket(
            max(sum(map(len, each)) for _, each in groups), SMALLEST_BUCKET
        )
        shape = self.batch_size, width
        batch = {
            "contexts": np.zeros((self.batch_size, length), "int32"),
            # A row of padding has a context, too: a softmax needs something.
            "lengths": np.ones(self.batch_size, "int32"),
            "tokens": np.zeros(shape, "int32"),
            # The number of the continuation, 0 for padding.
            "numbers": np.zeros(shape, "int32"),
            "positions": np.zeros(shape, "int32"),
        }
        places = []
        for row, (context, continuations) in enumerate(groups):
            batch["contexts"][row, : len(context)] = context
            batch["lengths"][row] = len(context)
            places.append([])
            start = 0
            for number, tokens in enumerate(continuations, start=1):
                place = slice(start, start + len(tokens))
                batch["tokens"][row, place] = tokens
                batch["numbers"][row, place] = number
                batch["positions"][row, place] = len(context) + np.arange(
                    len(tokens)
                )
                places[-1].append(place)
                start = place.stop
        return batch, places

    # === What is compiled ===

    def _score_rows(self, trainable, non_trainable, data):
        batch = token_batch(data)
        (_, losses, is_greedy), _, non_trainable = token_losses(
            self._lm, trainable, non_trainable, batch, self._dropout
        )
        outputs = losses, is_greedy, batch["weights"]
        return jax.tree.map(replicated, outputs), non_trainable

    def _score_continuations(self, values, batch):
        """Contexts fill the cache, then all continuations read it.

        A continuation sees its context and itself, as if it were alone.
        """
        backbone = self._lm.backbone
        contexts, tokens, numbers = (
            batch[name] for name in ("contexts", "tokens", "numbers")
        )
        batch_size, length = contexts.shape
        width = tokens.shape[1]
        is_context = jnp.arange(length) < batch["lengths"][:, None]
        is_same = numbers[:, :, None] == numbers[:, None, :]
        seen = jnp.concatenate(
            [
                jnp.broadcast_to(
                    is_context[:, None], (batch_size, width, length)
                ),
                is_same & jnp.tri(width, dtype="bool"),
            ],
            axis=2,
        )  # (batch, width, length + width)
        mapping = zip(self._lm.variables, values, strict=True)
        with keras.StatelessScope(list(mapping)):
            states, cache = backbone.hidden_states(
                contexts,
                padding_mask=is_context.astype("int32"),
                positions=jnp.broadcast_to(jnp.arange(length), contexts.shape),
                cache=backbone.make_cache(batch_size, length + width),
                cache_index=0,
            )
            last = jnp.take_along_axis(
                states, batch["lengths"][:, None, None] - 1, axis=1
            )  # (batch, 1, hidden_dim)
            states, _ = backbone.hidden_states(
                tokens,
                positions=batch["positions"],
                cache=cache,
                cache_index=length,
                attention_mask=seen,
            )
            # The state before each token, which predicts it.
            before = jnp.roll(states, 1, axis=1)
            is_first = batch["positions"] == batch["lengths"][:, None]
            before = jnp.where(is_first[..., None], last, before)
            weights = (numbers > 0).astype("float32")
            _, *outputs = head_losses(self._lm, before, tokens, weights)
        return jax.tree.map(replicated, outputs)
