from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from keras import ops

from keras_bwetaf.layers.attention import document_attention
from keras_bwetaf.layers.dense import dense
from keras_bwetaf.layers.parts import serialized_parts, with_parts
from keras_bwetaf.layers.sharding import (
    device_axes,
    num_pair_shards,
    shard_mapped,
    size_of_axes,
)

PARTS = ("query_rotary", "key_rotary")


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class GroupedQueryAttention(keras.layers.Layer):
    """Causal self-attention in which query heads share key/value heads.

    The rotary parts, if there are any, get the whole query vector and the
    whole key vector, before these are split into heads. Query head `h` reads
    key/value head `h // (num_query_heads // num_key_value_heads)`. Only the
    output projection has a bias.

    The attribute `keep_weights` says whether the weight of each pair of
    tokens is kept for the gradient, or computed again.

    Args:
        num_query_heads: int. The width of the input must be a multiple.
        num_key_value_heads: int. `num_query_heads` must be a multiple.
        query_rotary: layer or `None`. Gives queries their positions; called
            as `RotaryEmbedding` is.
        key_rotary: layer or `None`. The same for keys.
        initializer_range: float. Standard deviation of the initial kernels.

    Call arguments:
        hidden_states: float tensor `(batch, length, hidden_dim)`.
        padding_mask: int tensor `(batch, length)`, document numbers as in
            `attention.document_mask`. Defaults to one document in each row.
        positions: int tensor `(batch, length)`. Defaults to 0, 1, 2, ...
        cache: As `make_cache` returns it. The keys and values of
            `hidden_states` are written into it before attention reads it.
        cache_index: int. The first slot to write. Needed with a cache.
        attention_mask: bool tensor `(batch, length, slots)`, the slots of the
            cache that each query sees. Without it, the tokens of
            `hidden_states` see each other, and nothing that was in the cache.

    Returns:
        float tensor `(batch, length, hidden_dim)`; with a cache, a tuple of
        it and the updated cache.

    Reference:
     - [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245)
    """

    def __init__(
        self,
        *,
        num_query_heads: int,
        num_key_value_heads: int,
        initializer_range: float,
        query_rotary: keras.layers.Layer | None = None,
        key_rotary: keras.layers.Layer | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.query_rotary = query_rotary
        self.key_rotary = key_rotary
        self.initializer_range = initializer_range
        self.keep_weights = True

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        self.head_dim = hidden_dim // self.num_query_heads
        key_value_dim = self.num_key_value_heads * self.head_dim
        self.query = self._dense("query", hidden_dim)
        self.key = self._dense("key", key_value_dim)
        self.value = self._dense("value", key_value_dim)
        self.attention_output = self._dense(
            "attention_output", hidden_dim, use_bias=True
        )
        for projection in (
            self.query,
            self.key,
            self.value,
            self.attention_output,
        ):
            projection.build(input_shape)
        if self.query_rotary is not None:
            self.query_rotary.build((*input_shape[:-1], hidden_dim))
        if self.key_rotary is not None:
            self.key_rotary.build((*input_shape[:-1], key_value_dim))
        self.built = True

    def _dense(self, name, units, use_bias=False):
        return dense(
            name,
            units,
            use_bias=use_bias,
            initializer_range=self.initializer_range,
            dtype=self.dtype_policy,
        )

    def make_cache(
        self, batch_size: int, num_slots: int
    ) -> tuple[jax.Array, jax.Array]:
        """An empty cache of keys and values.

        Rows and heads share an axis, in which those of a device are together:
        so XLA writes in place. With an axis of each, it copies every cache at
        every step. Slots are the last axis of keys, and the middle one of
        values: both products of attention then read the cache in the order
        of memory, and sum along no vector.

        Args:
            batch_size: int.
            num_slots: int. Tokens that have room in a row.

        Returns:
            `(key, value)` of the compute dtype: `(batch_size *
            num_key_value_heads, head_dim, num_slots)` and `(batch_size *
            num_key_value_heads, num_slots, head_dim)`.
        """
        num_rows = batch_size * self.num_key_value_heads
        return (
            ops.zeros((num_rows, self.head_dim, num_slots), self.compute_dtype),
            ops.zeros((num_rows, num_slots, self.head_dim), self.compute_dtype),
        )

    def cache_of_rows(
        self,
        cache: tuple[jax.Array, jax.Array],
        batch_size: int,
        rows: ArrayLike,
    ) -> tuple[jax.Array, jax.Array]:
        """The cache of some rows of a batch.

        Args:
            cache: As `make_cache` returns it.
            batch_size: int.
            rows: int array. Its size must be a multiple of the number of
                data-parallel groups.

        Returns:
            As `make_cache` does.
        """
        row_axes, head_axes = device_axes(batch_size, self.num_key_value_heads)
        num_groups, num_shards = size_of_axes(row_axes), size_of_axes(head_axes)

        def of_rows(x):
            rest = (-1, *x.shape[1:])
            # A device's rows and heads are together: see `make_cache`.
            x = jnp.reshape(
                x, (num_groups, num_shards, batch_size // num_groups, *rest)
            )
            x = jnp.swapaxes(x, 1, 2)  # (groups, rows, shards, heads, ...)
            x = jnp.reshape(x, (batch_size, num_shards, *rest))[rows]
            x = jnp.reshape(
                x, (num_groups, len(rows) // num_groups, num_shards, *rest)
            )
            return jnp.reshape(jnp.swapaxes(x, 1, 2), rest)

        return tuple(map(of_rows, cache))

    def call(
        self,
        hidden_states: ArrayLike,
        padding_mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        cache_index: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
    ) -> Any:
        # (batch, length, heads * head_dim)
        shards = num_pair_shards(self.num_key_value_heads)
        query = self.query(hidden_states, output_shards=shards)
        if self.query_rotary is not None:
            query = self.query_rotary(query, positions, num_shards=shards)
        key = self.key(hidden_states, output_shards=shards)
        if self.key_rotary is not None:
            key = self.key_rotary(key, positions, num_shards=shards)
        value = self.value(hidden_states, output_shards=shards)

        # (batch, length, heads, head_dim)
        query = self._split_heads(query, self.num_query_heads)
        key = self._split_heads(key, self.num_key_value_heads)
        value = self._split_heads(value, self.num_key_value_heads)

        if cache is not None:
            cache = _update_cache(cache, key, value, cache_index)
        if attention_mask is None:
            attended = document_attention(
                query, key, value, padding_mask, self.keep_weights
            )
        else:
            attended = _attend_to_cache(query, cache, attention_mask)

        # (batch, length, hidden_dim)
        attended = ops.reshape(attended, hidden_states.shape)
        output = self.attention_output(attended, input_shards=shards)
        return output if cache is None else (output, cache)

    def _split_heads(self, x, num_heads):
        batch_size, length, _ = x.shape
        return ops.reshape(x, (batch_size, length, num_heads, self.head_dim))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "num_query_heads": self.num_query_heads,
                "num_key_value_heads": self.num_key_value_heads,
                **serialized_parts(self, PARTS),
                "initializer_range": self.initializer_range,
            }
        )
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**with_parts(config, PARTS))


def _update_cache(cache, key, value, index):
    """Writes new keys and values into slots `index` and after."""

    def write(keys, values, key, value, index):
        key = jnp.swapaxes(_merge_heads(key), 1, 2)  # (x, h, length)
        value = _merge_heads(value)  # (x, length, h)
        update = jax.lax.dynamic_update_slice_in_dim
        return (
            update(keys, key.astype(keys.dtype), index, axis=2),
            update(values, value.astype(values.dtype), index, axis=1),
        )

    rows, heads = device_axes(key.shape[0], key.shape[2])
    slots = PartitionSpec((*rows, *heads))
    by_head = PartitionSpec(rows, None, heads)
    return shard_mapped(
        write,
        in_specs=(slots, slots, by_head, by_head, PartitionSpec()),
        out_specs=(slots, slots),
    )(*cache, key, value, index)


def _merge_heads(x):
    """`(batch, length, heads, dim)` to `(batch * heads, length, dim)`."""
    _, length, _, head_dim = x.shape
    x = jnp.swapaxes(x, 1, 2)  # (batch, heads, length, dim)
    return jnp.reshape(x, (-1, length, head_dim))


def _attend_to_cache(query, cache, mask):
    num_heads = cache[0].shape[0] // query.shape[0]
    rows, heads = device_axes(query.shape[0], num_heads)
    slots = PartitionSpec((*rows, *heads))
    by_head = PartitionSpec(rows, None, heads)
    return shard_mapped(
        _attend_to_slots,
        in_specs=(by_head, slots, slots, PartitionSpec(rows)),
        out_specs=by_head,
    )(query, *cache, mask)


# b = batch, q = query length, s = slots, n = key/value heads, g = query heads
# of each, h = head dim, x = rows and key/value heads together, b * n


def _attend_to_slots(query, key, value, mask):
    """Attention of a device's rows and heads.

    Queries are brought to the order of the cache, which is read as it is.

    Args:
        query: float array `(b, q, ng, h)`.
        key: float array `(x, h, s)`.
        value: float array `(x, s, h)`.
        mask: bool array `(b, q, s)`.

    Returns:
        float array `(b, q, n, gh)`.
    """
    batch_size, length, num_query_heads, head_dim = query.shape
    num_heads = key.shape[0] // batch_size
    group_size = num_query_heads // num_heads

    query = jnp.reshape(
        query, (batch_size, length, num_heads, group_size * head_dim)
    )  # (b, q, n, gh)
    query = jnp.reshape(
        _merge_heads(query), (len(key), length * group_size, head_dim)
    )  # (x, qg, h)
    is_one_token = batch_size == 1 and length == 1
    scores = _multiply(query, key, is_one_token)  # (x, qg, s)
    scores = jnp.reshape(
        scores, (batch_size, num_heads, length, group_size, -1)
    )  # (b, n, q, g, s)
    scores = jnp.where(
        mask[:, None, :, None], scores * head_dim**-0.5, -jnp.inf
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = jnp.reshape(
        weights, (len(key), length * group_size, -1)
    )  # (x, qg, s)
    attended = _multiply(weights, value, is_one_token)  # (x, qg, h)
    attended = jnp.reshape(
        attended.astype(value.dtype),
        (batch_size, num_heads, length, group_size * head_dim),
    )  # (b, n, q, gh)
    return jnp.swapaxes(attended, 1, 2)  # (b, q, n, gh)


def _multiply(vectors, slots, is_one_token):
    """Products of vectors with the keys or values of a cache.

    For one token alone, XLA's CPU backend reads the cache up to three times
    as fast in products of one matrix with one vector.

    Args:
        vectors: float array `(x, qg, i)`.
        slots: float array `(x, i, o)`.
        is_one_token: bool. Whether the batch is one token of one row.

    Returns:
        float32 array `(x, qg, o)`.
    """

    def multiply(equation, vectors, slots):
        return jnp.einsum(
            equation, vectors, slots, preferred_element_type="float32"
        )

    def together(vectors, slots):
        return multiply("xqi,xio->xqo", vectors, slots)

    def one_by_one(vectors, slots):
        return jnp.stack(
            [
                multiply("xi,xio->xo", vectors[:, i], slots)
                for i in range(vectors.shape[1])
            ],
            axis=1,
        )

    if is_one_token:
        return jax.lax.platform_dependent(
            vectors, slots, cpu=one_by_one, default=together
        )
    return together(vectors, slots)
