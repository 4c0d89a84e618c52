"""The compiled half of generation: prompt pass, then one token at a time.

Rows of a batch may have prompts of different lengths. All rows share the
cache slots all the same: prompts fill the first `prompt_slots`, each from the
left, and the new tokens of all rows follow from there, so that one contiguous
write serves the whole batch. Positions are counted per row, and the slots
between a short prompt and `prompt_slots` are never attended to.

    slots      0 1 2 3 4 5 6 7 8 ...
    row 0      T h e   s k y|_ i s     prompt "The sky", position = slot
    row 1      H i . . . . .|_ t h     prompt "Hi", position = slot - 5
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_bwetaf.generation import sampling
from keras_bwetaf.layers.sharding import by_row, replicated


class GenerationState(NamedTuple):
    """Everything that changes from token to token."""

    cache: tuple  # (key, value) per layer, see `DecoderBackbone.make_cache`
    prompt_slots: jax.Array  # int32 ()
    prompt_lengths: jax.Array  # int32 (batch,)
    limits: jax.Array  # int32 (batch,), how many new tokens at most
    stop_token_ids: jax.Array  # int32 (n,), -1 stands for none
    tokens: jax.Array  # int32 (batch, slots), the new tokens
    num_tokens: jax.Array  # int32 (), how many of them are made
    done: jax.Array  # bool (batch,)
    seen: jax.Array  # bool (batch, vocabulary)
    num_known: jax.Array | None = None  # int32 (), ids to choose from; or all


class Decoder:
    """The compiled prompt pass and decode loop of a `BwETAFCausalLM`.

    Weights are arguments of the compiled functions, never constants in them.

    Args:
        lm: `BwETAFCausalLM`, compiled with the sampler to use.
    """

    def __init__(self, lm):
        self._lm = lm
        self._sampler = lm.sampler
        self._prefill = jax.jit(self._prefill_step, static_argnums=1)
        self._decode = jax.jit(self._decode_steps, donate_argnums=1)
        self._keep_rows = jax.jit(self._of_rows)

    def prefill(self, num_slots, token_ids, state, settings):
        """Reads all prompts in one pass and chooses the first new token.

        Args:
            num_slots: int. Size of the caches.
            token_ids: int32 array `(batch, prompt_slots)`, prompts padded on
                the right.
            state: `dict` with the fields of `GenerationState` that the caller
                decides: `prompt_lengths`, `limits`, `stop_token_ids` and
                `num_known`.
            settings: `SamplingSettings`, or `None` for a sampler of the
                user's own.

        Returns:
            `GenerationState`.
        """
        state, random_state = self._prefill(
            self._values(),
            num_slots,
            by_row(token_ids),
            state,
            settings,
            self._random_state(),
        )
        self._keep(random_state)
        return state

    def decode(self, state, settings, num_steps, fewest):
        """Makes up to `num_steps` more tokens in one dispatch.

        Args:
            state: `GenerationState`. Its memory is reused: don't read it
                afterwards.
            settings: As for `prefill`.
            num_steps: int.
            fewest: int. Stops when no more rows than these are unfinished.

        Returns:
            `GenerationState`.
        """
        state, random_state = self._decode(
            self._values(),
            state,
            settings,
            np.int32(num_steps),
            np.int32(fewest),
            self._random_state(),
        )
        self._keep(random_state)
        return state

    def keep_rows(self, state, rows):
        """The state of some rows of a batch.

        Args:
            state: `GenerationState`.
            rows: int32 numpy array. The batch must be a multiple of
                `num_row_groups()`.

        Returns:
            `GenerationState`.
        """
        return self._keep_rows(state, by_row(rows))

    def _random_state(self):
        """Values of the variables of a sampler of the user's own."""
        return [variable.value for variable in self._sampler.variables]

    def _keep(self, random_state):
        for variable, value in zip(
            self._sampler.variables, random_state, strict=True
        ):
            variable.assign(value)

    def _values(self):
        return [variable.value for variable in self._lm.variables]

    def _weights(self, values):
        return keras.StatelessScope(
            zip(self._lm.variables, values, strict=True)
        )

    def _prefill_step(
        self, values, num_slots, token_ids, state, settings, random_state
    ):
        backbone = self._lm.backbone
        batch_size, prompt_slots = token_ids.shape
        lengths = state["prompt_lengths"]
        is_prompt = jnp.arange(prompt_slots) < lengths[:, None]

        with self._weights(values):
            hidden_states, cache = backbone.hidden_states(
                token_ids,
                cache=backbone.make_cache(batch_size, num_slots),
                cache_index=0,
                positions=jnp.broadcast_to(
                    jnp.arange(prompt_slots), token_ids.shape
                ),
                padding_mask=is_prompt.astype("int32"),
            )
            last = jnp.take_along_axis(
                hidden_states, lengths[:, None, None] - 1, axis=1
            )  # (batch, 1, hidden_dim)
            logits = backbone.head(last)[:, 0]  # (batch, vocabulary)

        seen = jnp.zeros((batch_size, backbone.vocabulary_size), "bool")
        rows = jnp.arange(batch_size)[:, None]
        state = GenerationState(
            cache=cache,
            prompt_slots=jnp.int32(prompt_slots),
            tokens=jnp.zeros((batch_size, num_slots), "int32"),
            num_tokens=jnp.int32(0),
            done=state["limits"] < 1,
            seen=seen.at[rows, token_ids].max(is_prompt),
            **state,
        )
        return _readable(self._add_token(state, logits, settings, random_state))

    def _decode_steps(
        self, values, state, settings, num_steps, fewest, random_state
    ):
        backbone = self._lm.backbone
        last = state.num_tokens + num_steps

        def more(loop):
            state, _ = loop
            num_unfinished = jnp.sum(~state.done)
            return (state.num_tokens < last) & (num_unfinished > fewest)

        def step(loop):
            state, random_state = loop
            newest = state.num_tokens - 1
            slot = state.prompt_slots + newest
            slots = jnp.arange(state.tokens.shape[1])
            is_prompt = slots < state.prompt_lengths[:, None]
            is_new = (slots >= state.prompt_slots) & (slots <= slot)
            token_ids = jax.lax.dynamic_index_in_dim(
                state.tokens, newest, axis=1
            )  # (batch, 1)
            with self._weights(values):
                hidden_states, cache = backbone.hidden_states(
                    token_ids,
                    cache=state.cache,
                    cache_index=slot,
                    positions=state.prompt_lengths[:, None] + newest,
                    attention_mask=(is_prompt | is_new)[:, None],
                )
                logits = backbone.head(hidden_states)[:, 0]
            state = state._replace(cache=cache)
            return self._add_token(state, logits, settings, random_state)

        return _readable(jax.lax.while_loop(more, step, (state, random_state)))

    def _of_rows(self, state, rows):
        return state._replace(
            cache=self._lm.backbone.cache_of_rows(
                state.cache, len(state.done), rows
            ),
            prompt_lengths=state.prompt_lengths[rows],
            limits=state.limits[rows],
            tokens=replicated(state.tokens[rows]),
            done=state.done[rows],
            seen=state.seen[rows],
        )

    def _add_token(self, state, logits, settings, random_state):
        """Chooses a token for every row and appends it."""
        if state.num_known is not None:
            is_known = jnp.arange(logits.shape[1]) < state.num_known
            logits = jnp.where(is_known, logits, -jnp.inf)
        if settings is not None:
            positions = state.prompt_lengths + state.num_tokens
            token = sampling.next_token(logits, state.seen, positions, settings)
        else:
            token, random_state = self._ask_sampler(logits, random_state)
        num_tokens = state.num_tokens + 1
        is_stop = jnp.any(token[:, None] == state.stop_token_ids, axis=1)
        rows = jnp.arange(len(token))
        state = state._replace(
            tokens=jax.lax.dynamic_update_index_in_dim(
                state.tokens, token, state.num_tokens, axis=1
            ),
            num_tokens=num_tokens,
            done=state.done | is_stop | (num_tokens >= state.limits),
            seen=state.seen.at[rows, token].set(True),
        )
        return state, random_state

    def _ask_sampler(self, logits, random_state):
        """The next tokens that a sampler of the user's own chooses."""
        sampler = self._sampler
        scope = keras.StatelessScope(
            zip(sampler.variables, random_state, strict=True)
        )
        with scope:
            probabilities = sampler.compute_probabilities(logits)
            token = sampler.get_next_token(probabilities)
        random_state = [scope.get_current_value(v) for v in sampler.variables]
        return token.astype("int32"), random_state


def _readable(state_and_random_state):
    """With the tokens where the host can read them."""
    state, random_state = state_and_random_state
    return state._replace(tokens=replicated(state.tokens)), random_state
