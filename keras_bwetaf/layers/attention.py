"""Causal attention within documents, and which kernel computes it where.

| kernel | where | why |
|---|---|---|
| `"splash"` | TPU v4 and later | JAX's Pallas kernel: no array of scores |
| `"cudnn"` | NVIDIA GPUs from Ampere on, 16 bits | no scores of each head |
| `"plain"` | everywhere else | XLA; a chunk of queries reads no later keys |

TPU v2 and v3 have the plain kernel because Pallas's compiler has no bfloat16
products for them. cuDNN's kernel is what Keras's own attention takes on such
GPUs; it reads documents as an array of biases, `(batch, 1, length, length)`.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from keras_bwetaf.layers.sharding import (
    device_axes,
    mesh,
    shard_mapped,
    split_heads,
)

KERNELS = ("plain", "splash", "cudnn")
SMALLEST_CHUNK = 128
MOST_CHUNKS = 8
# XLA recomputes chunks side by side, and holds the weights of all in memory.
# So there are fewer chunks where weights are recomputed.
MOST_RECOMPUTED_CHUNKS = 4
SPLASH_BLOCKS = (512, 256, 128)
SPLASH_DTYPES = ("bfloat16", "float32")
CUDNN_DTYPES = ("bfloat16", "float16")
# Ampere, the first with the tensor cores that cuDNN's kernel is made for.
CUDNN_COMPUTE_CAPABILITY = 8.0
CUDNN_LARGEST_HEAD = 128

_override = contextvars.ContextVar("attention_kernel", default=None)


def document_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    padding_mask: ArrayLike | None,
    keep_weights: bool = True,
) -> jax.Array:
    """Attention to earlier tokens of the same document.

    Query head `h` reads key/value head `h // (query_heads // heads)`.

    Args:
        query: float array `(batch, length, query_heads, head_dim)`.
        key: float array `(batch, length, heads, head_dim)`.
        value: float array, as `key`.
        padding_mask: int array `(batch, length)`, document numbers as in
            `document_mask`. `None` for one document in each row.
        keep_weights: bool. Whether to keep the weight of each pair of tokens
            for the gradient, or to compute it a second time. Only the plain
            kernel can keep weights.

    Returns:
        float array of the shape and dtype of `query`. Where `padding_mask` is
        0 it is finite, and has no meaning.
    """
    batch_size, length, _, head_dim = query.shape
    name = chosen_attention(length, query.dtype, head_dim)
    query, key, value = split_heads(query, key, value)
    if padding_mask is None:
        padding_mask = jnp.ones((batch_size, length), "int32")
    padding_mask = jnp.asarray(padding_mask)
    if not isinstance(length, int):
        # A program that is exported for rows of any length may not know that
        # the mask is as long as they are. This gives it their length.
        padding_mask = jnp.take(
            padding_mask, jnp.arange(length), axis=1, mode="clip"
        )
    with jax.named_scope(f"{name}_attention"):
        if name == "splash":
            return splash_attention(query, key, value, padding_mask)
        if name == "cudnn":
            return cudnn_attention(query, key, value, padding_mask)
        return plain_attention(query, key, value, padding_mask, keep_weights)


def chosen_attention(length: int, dtype: str, head_dim: int = 64) -> str:
    """Name of the kernel that computes attention here.

    It depends on the devices that a program is made for: those of the current
    `keras.distribution`, or else JAX's default device. `attention_kernel` and
    `keras.config.disable_flash_attention()` overrule it. A program that is
    exported for rows of any length has the plain kernel. A compiled program
    has the name in the scope of its operations.

    Args:
        length: int, or a symbolic dimension of `jax.export`. Of the rows.
        dtype: str. Of queries, keys and values.
        head_dim: int.

    Returns:
        `"plain"`, `"splash"` or `"cudnn"`.

    Example:

    ```python
    keras_bwetaf.layers.chosen_attention(2048, "bfloat16")
    ```
    """
    if not isinstance(length, int):
        return "plain"
    override = _override.get()
    if override is not None:
        return override
    if keras.config.is_flash_attention_enabled() is False:
        return "plain"
    device, dtype = _device(), jnp.dtype(dtype).name
    if length < SMALLEST_CHUNK:
        return "plain"  # There is little to save.
    if device.platform == "tpu":
        is_old = device.device_kind.startswith(("TPU v2", "TPU v3"))
        return "splash" if dtype in SPLASH_DTYPES and not is_old else "plain"
    if (
        device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= CUDNN_COMPUTE_CAPABILITY
        and dtype in CUDNN_DTYPES
        and head_dim <= CUDNN_LARGEST_HEAD
        and head_dim % 8 == 0
    ):
        return "cudnn"
    return "plain"


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Programs that are traced inside compute attention by this kernel.

    A program is traced in the first call of `fit`, `predict` or `generate`
    after `compile`. Without a TPU, `"splash"` runs in Pallas's interpreter;
    without a GPU, XLA computes what `"cudnn"` is on one. Both are slow then,
    and meant for tests.

    Args:
        name: str. `"plain"`, `"splash"` or `"cudnn"`.

    Raises:
        ValueError: If there is no such kernel.

    Example:

    ```python
    with keras_bwetaf.layers.attention_kernel("plain"):
        lm.fit(dataset)
    ```
    """
    if name not in KERNELS:
        raise ValueError(
            f"`name` must be one of {KERNELS}. Received: name={name!r}"
        )
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def document_mask(padding_mask: jax.Array, start: int = 0) -> jax.Array:
    """Which tokens each query sees: earlier ones of its own document.

    Args:
        padding_mask: int array `(batch, length)`. 0 for padding, otherwise
            the number of the document that the token belongs to.
        start: int. The position of the first query.

    Returns:
        bool array `(batch, length - start, length)`; rows are queries,
        columns keys.
    """
    same_document = padding_mask[:, start:, None] == padding_mask[:, None]
    # Padding sees padding, so that no row is empty and turns into NaN.
    return same_document & jnp.tri(*same_document.shape[1:], start, "bool")


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    padding_mask: jax.Array,
    keep_weights: bool = True,
) -> jax.Array:
    """See `document_attention`. A chunk of queries reads no later keys."""
    batch_size, length, num_query_heads, head_dim = query.shape
    num_heads = key.shape[2]
    query = jnp.reshape(
        query, (batch_size, length, num_heads, -1, head_dim)
    )  # (b, q, n, g, h), see below
    query = jnp.transpose(query, (0, 2, 3, 1, 4))  # (b, n, g, q, h)
    # (b, n, k, h)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    attended = [
        _attend(
            query[:, :, :, start:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            padding_mask[:, :stop],
            keep_weights,
        )
        for start, stop in _chunks(length, keep_weights)
    ]
    attended = jnp.concatenate(attended, axis=3)  # (b, n, g, q, h)
    attended = jnp.transpose(attended, (0, 3, 1, 2, 4))  # (b, q, n, g, h)
    return jnp.reshape(
        attended, (batch_size, length, num_query_heads, head_dim)
    )


def _chunks(length, keep_weights):
    """Where the plain kernel's chunks of queries begin and end."""
    if not isinstance(length, int):
        return [(0, length)]  # The number of chunks would not be known.
    num_chunks = MOST_CHUNKS if keep_weights else MOST_RECOMPUTED_CHUNKS
    chunk_length = SMALLEST_CHUNK * math.ceil(
        length / (num_chunks * SMALLEST_CHUNK)
    )
    return [
        (start, min(start + chunk_length, length))
        for start in range(0, length, chunk_length)
    ]


# === A chunk of the plain kernel ===
# b = batch, n = key/value heads, g = query heads of each, q = queries,
# k = keys, h = head dim


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, padding_mask, keep_weights):
    """Attention of a chunk of queries.

    Its gradient is written out. XLA's would keep several float32 arrays with
    a number for each pair of tokens; this one keeps the weights in the dtype
    of `value`, or computes them again.

    Args:
        query: float array `(b, n, g, q, h)`.
        key: float array `(b, n, k, h)`.
        value: float array `(b, n, k, h)`.
        padding_mask: int array `(b, k)`. The queries are the last tokens.
        keep_weights: bool.

    Returns:
        float array `(b, n, g, q, h)`.
    """
    outputs, _ = _attend_and_keep(query, key, value, padding_mask, keep_weights)
    return outputs


def _attend_and_keep(query, key, value, padding_mask, keep_weights):
    scores = _scores(query, key, padding_mask)  # (b, n, g, q, k)
    highest = jnp.max(scores, axis=-1, keepdims=True)  # (b, n, g, q, 1)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    outputs = jnp.einsum(
        "bngqk,bnkh->bngqh",
        weights,
        value,
        preferred_element_type=scores.dtype,
    )
    # Divided after the product: `(q, h)` numbers are fewer than `(q, k)`.
    outputs = (outputs / total).astype(query.dtype)
    kept = (weights, total) if keep_weights else highest + jnp.log(total)
    return outputs, (query, key, value, padding_mask, outputs, kept)


def _attend_gradient(keep_weights, residuals, cotangent):
    if keep_weights:
        query, key, value, _, outputs, (weights, total) = residuals
        weights = weights / total
    else:
        # Without the barrier, XLA finds that the forward pass computed the
        # same weights, and keeps these after all.
        residuals = jax.lax.optimization_barrier(residuals)
        query, key, value, padding_mask, outputs, log_total = residuals
        weights = jnp.exp(_scores(query, key, padding_mask) - log_total)

    value_gradient = jnp.einsum(
        "bngqk,bngqh->bnkh", weights.astype(value.dtype), cotangent
    )
    weights_gradient = jnp.einsum(
        "bngqh,bnkh->bngqk",
        cotangent,
        value,
        preferred_element_type=weights.dtype,
    )
    # Softmax's gradient is `weights * (gradient - mean)`. This mean over keys,
    # weighted, is also the product of the cotangent and the outputs.
    mean = jnp.sum(
        cotangent.astype(weights.dtype) * outputs, axis=-1, keepdims=True
    )
    scores_gradient = weights * (weights_gradient - mean)
    scores_gradient *= query.shape[-1] ** -0.5
    scores_gradient = scores_gradient.astype(query.dtype)
    query_gradient = jnp.einsum("bngqk,bnkh->bngqh", scores_gradient, key)
    key_gradient = jnp.einsum("bngqk,bngqh->bnkh", scores_gradient, query)
    return query_gradient, key_gradient, value_gradient, None


_attend.defvjp(_attend_and_keep, _attend_gradient)


def _scores(query, key, padding_mask):
    """Scores `(b, n, g, q, k)`, at least in float32; masked: the lowest."""
    dtype = jnp.promote_types(query.dtype, "float32")
    scores = jnp.einsum(
        "bngqh,bnkh->bngqk", query, key, preferred_element_type=dtype
    )
    scores *= query.shape[-1] ** -0.5
    num_queries, num_keys = scores.shape[-2:]
    mask = document_mask(padding_mask, start=num_keys - num_queries)
    return jnp.where(mask[:, None, None], scores, jnp.finfo("float32").min)


# === Splash attention ===


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, padding_mask: jax.Array
) -> jax.Array:
    """See `document_attention`. Scores stay inside the kernel."""
    length, head_dim = query.shape[1], query.shape[3]
    # The kernel takes whole blocks. Document 0 is padding.
    missing = -length % min(SPLASH_BLOCKS)

    def heads_first(x):
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)  # (batch, heads, length, head_dim)

    documents = jnp.pad(padding_mask.astype("int32"), ((0, 0), (0, missing)))
    rows, heads = device_axes(key.shape[0], key.shape[2])
    by_head = PartitionSpec(rows, heads)
    attended = shard_mapped(
        _splash_kernel,
        in_specs=(by_head, by_head, by_head, PartitionSpec(rows)),
        out_specs=by_head,
    )(
        heads_first(query * head_dim**-0.5),
        heads_first(key),
        heads_first(value),
        documents,
    )
    # (batch, length, heads, head_dim)
    return jnp.swapaxes(attended, 1, 2)[:, :length]


def _splash_kernel(query, key, value, documents):
    # Imported here: it takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, num_heads, length, _ = query.shape
    block = next(block for block in SPLASH_BLOCKS if length % block == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=_device().platform != "tpu",
    )
    segments = splash.SegmentIds(documents, documents)
    return jax.vmap(kernel)(query, key, value, segments)


# === cuDNN ===


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, padding_mask: jax.Array
) -> jax.Array:
    """See `document_attention`. Scores stay inside of cuDNN's kernel."""
    length = query.shape[1]
    missing = length % 2  # cuDNN has gradients for even lengths only.
    documents = jnp.pad(padding_mask, ((0, 0), (0, missing)))
    attended = jax.nn.dot_product_attention(
        *(
            jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
            for x in (query, key, value)
        ),
        mask=documents[:, None, :, None] == documents[:, None, None, :],
        is_causal=True,
        implementation="cudnn" if _device().platform == "gpu" else "xla",
    )
    return attended[:, :length]


def _device():
    """One of the devices that the current program is made for."""
    if mesh() is not None:
        return mesh().devices.flat[0]
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0]
