import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec
from keras import ops

from keras_bwetaf.layers.attention import document_attention
from keras_bwetaf.layers.dense import dense
from keras_bwetaf.layers.rotary_embedding import RotaryEmbedding
from keras_bwetaf.layers.sharding import (
    device_axes,
    num_pair_shards,
    on_each_device,
)


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class GroupedQueryAttention(keras.layers.Layer):
    """Causal self-attention in which query heads share key/value heads.

    The rotary embedding turns the whole query vector and the whole key
    vector before they are split into heads. Query head `h` reads key/value
    head `h // (num_query_heads // num_key_value_heads)`. Only the output
    projection has a bias.

    The attribute `keep_weights` says whether the gradient finds the weight of
    each pair of tokens, or computes it again.

    Args:
        num_query_heads: int. Divides the width of the input.
        num_key_value_heads: int. Divides `num_query_heads`.
        rope_max_wavelength: float. See `RotaryEmbedding`.
        rope_dtype: str or `None`. See `RotaryEmbedding`.
        initializer_range: float. Standard deviation of the initial kernels.

    Call arguments:
        hidden_states: float tensor `(batch, length, hidden_dim)`.
        padding_mask: int tensor `(batch, length)`, document numbers as in
            `attention.document_mask`. Defaults to one document in each row.
        positions: int tensor `(batch, length)`. Defaults to 0, 1, 2, ...
        cache: `(key, value)`, each `(batch * num_key_value_heads, slots,
            head_dim)`, in which a device's rows and heads are together. The
            keys and values of `hidden_states` are written into it before
            attention reads it. With batch and heads in one axis, XLA writes
            in place; in two, it copies every cache at every step.
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
        num_query_heads,
        num_key_value_heads,
        rope_max_wavelength,
        rope_dtype,
        initializer_range,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.rope_max_wavelength = rope_max_wavelength
        self.rope_dtype = rope_dtype
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
        self.query_rotary = self._rotary("query_rotary", hidden_dim)
        self.key_rotary = self._rotary("key_rotary", key_value_dim)
        self.built = True

    def _dense(self, name, units, use_bias=False):
        return dense(
            name,
            units,
            use_bias=use_bias,
            initializer_range=self.initializer_range,
            dtype=self.dtype_policy,
        )

    def _rotary(self, name, width):
        rotary = RotaryEmbedding(
            max_wavelength=self.rope_max_wavelength,
            rope_dtype=self.rope_dtype,
            dtype=self.dtype_policy,
            name=name,
        )
        rotary.build((None, None, width))
        return rotary

    def call(
        self,
        hidden_states,
        padding_mask=None,
        positions=None,
        cache=None,
        cache_index=None,
        attention_mask=None,
    ):
        shards = num_pair_shards(self.num_key_value_heads)
        query = self.query(hidden_states, output_shards=shards)
        query = self.query_rotary(query, positions, num_shards=shards)
        key = self.key(hidden_states, output_shards=shards)
        key = self.key_rotary(key, positions, num_shards=shards)
        value = self.value(hidden_states, output_shards=shards)

        query = self._split_heads(query, self.num_query_heads)
        key = self._split_heads(key, self.num_key_value_heads)
        value = self._split_heads(value, self.num_key_value_heads)
        # (batch, length, heads, head_dim)

        if cache is not None:
            cache = _update_cache(cache, key, value, cache_index)
        if attention_mask is None:
            attended = document_attention(
                query, key, value, padding_mask, self.keep_weights
            )
        else:
            attended = _attend_to_cache(query, cache, attention_mask)

        output = self.attention_output(
            ops.reshape(attended, hidden_states.shape), input_shards=shards
        )
        return output if cache is None else (output, cache)

    def _split_heads(self, x, num_heads):
        batch_size, length, _ = x.shape
        return ops.reshape(x, (batch_size, length, num_heads, self.head_dim))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_query_heads": self.num_query_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "rope_max_wavelength": self.rope_max_wavelength,
                "rope_dtype": self.rope_dtype,
                "initializer_range": self.initializer_range,
            }
        )
        return config


def _update_cache(cache, key, value, index):
    """Writes new keys and values into slots `index` and after."""

    def write(slots, new, index):
        new = _merge_heads(new).astype(slots.dtype)
        return jax.lax.dynamic_update_slice_in_dim(slots, new, index, axis=1)

    rows, heads = device_axes(key.shape[0], key.shape[2])
    slots = PartitionSpec((*rows, *heads))
    write = on_each_device(
        write,
        in_specs=(slots, PartitionSpec(rows, None, heads), PartitionSpec()),
        out_specs=slots,
    )
    return tuple(
        write(slots, new, index)
        for slots, new in zip(cache, (key, value), strict=True)
    )


def _merge_heads(x):
    """`(batch, length, heads, dim)` to `(batch * heads, length, dim)`."""
    _, length, _, head_dim = x.shape
    return jnp.reshape(jnp.swapaxes(x, 1, 2), (-1, length, head_dim))


def _attend_to_cache(query, cache, mask):
    num_heads = cache[0].shape[0] // query.shape[0]
    rows, heads = device_axes(query.shape[0], num_heads)
    slots = PartitionSpec((*rows, *heads))
    by_head = PartitionSpec(rows, None, heads)
    return on_each_device(
        _attend_to_slots,
        in_specs=(by_head, slots, slots, PartitionSpec(rows)),
        out_specs=by_head,
    )(query, *cache, mask)


def _attend_to_slots(query, key, value, mask):
    # b = batch, q = query length, s = slots, k = key/value heads,
    # g = query heads of a group, h = head dim
    # query (b, q, kg, h), key and value (bk, s, h), mask (b, q, s)
    batch_size, length, num_query_heads, head_dim = query.shape
    num_heads = key.shape[0] // batch_size
    num_groups = num_query_heads // num_heads

    query = jnp.reshape(
        query, (batch_size, length, num_heads, num_groups * head_dim)
    )
    query = jnp.reshape(
        _merge_heads(query), (len(key), length * num_groups, head_dim)
    )  # (bk, qg, h)
    scores = jnp.einsum(
        "ngh,nsh->ngs", query, key, preferred_element_type="float32"
    )
    scores = jnp.reshape(
        scores, (batch_size, num_heads, length, num_groups, -1)
    )
    scores = jnp.where(
        mask[:, None, :, None], scores * head_dim**-0.5, -jnp.inf
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = jnp.reshape(weights, (len(key), length * num_groups, -1))
    attended = jnp.einsum("ngs,nsh->ngh", weights, value)  # (bk, qg, h)
    attended = jnp.reshape(
        attended, (batch_size, num_heads, length, num_groups * head_dim)
    )
    return jnp.swapaxes(attended, 1, 2)  # (b, q, k, gh)
