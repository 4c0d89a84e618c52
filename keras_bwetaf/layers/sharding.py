"""How rows, heads and weights are sharded in the current `keras.distribution`.

A mesh has a batch axis, over which the rows of a batch are sharded. Its other
axes, the model axes, shard layers: each device works on some of the heads.

RoPE over whole vectors turns a dimension together with the one half the width
away, so a device needs matching parts of both halves:

    heads                0 1 2 3 | 4 5 6 7     (0, 4), (1, 5), ... are pairs
    on four devices      0 4 | 1 5 | 2 6 | 3 7

`halves_to_shards` puts them in that order. Key/value heads go with their
query heads, if half their number is a multiple of the number of devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

# An axis of an array whose sharding is XLA's choice.
ANY = PartitionSpec.UNCONSTRAINED


def mesh() -> Mesh | None:
    """The mesh of the current distribution, or None without one."""
    distribution = keras.distribution.distribution()
    return distribution and distribution.device_mesh.backend_mesh


def model_axes() -> tuple[str, ...]:
    """The axes of the mesh without the batch axis."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return ()
    names = distribution.device_mesh.axis_names
    return tuple(x for x in names if x != distribution.batch_dim_name)


def num_pair_shards(num_key_value_heads: int) -> int:
    """The number of devices over which RoPE pairs of heads are sharded.

    Args:
        num_key_value_heads: int.

    Returns:
        int: the number of devices on the model axes, or 1 if half the heads
        are no multiple of it.
    """
    num_shards = size_of_axes(model_axes())
    return num_shards if num_key_value_heads % (2 * num_shards) == 0 else 1


def halves_to_shards(x: ArrayLike, axis: int, num_shards: int) -> jax.Array:
    """Reorders an axis so that a shard has the same part of both halves.

    Args:
        x: array.
        axis: int. Its size must be a multiple of `2 * num_shards`.
        num_shards: int.

    Returns:
        array of the same shape, with the axis sharded over the model axes.
    """
    if num_shards == 1:
        return x
    x = _swap(x, axis, (2, num_shards))
    return _split(x, axis)


def halves_from_shards(x: ArrayLike, axis: int, num_shards: int) -> jax.Array:
    """The inverse of `halves_to_shards`."""
    return x if num_shards == 1 else _swap(x, axis, (num_shards, 2))


def device_axes(
    batch_size: int, num_heads: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the mesh over which rows and heads are sharded.

    Returns:
        Two tuples of str. One is empty if its number is no multiple of the
        number of devices on these axes.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return (), ()
    rows, heads = (distribution.batch_dim_name,), model_axes()
    return (
        rows if batch_size % size_of_axes(rows) == 0 else (),
        heads if num_heads % size_of_axes(heads) == 0 else (),
    )


def split_heads(
    query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shards heads over the model axes.

    If the number of query heads is a multiple of the number of devices there
    and that of key/value heads is none, key/value heads are repeated, one for
    each query head.

    Args:
        query: array `(batch, length, query_heads, head_dim)`.
        key: array `(batch, length, heads, head_dim)`.
        value: array, as `key`.

    Returns:
        Tuple of the three.
    """
    num_query_heads, num_heads = query.shape[2], key.shape[2]
    num_shards = size_of_axes(model_axes())
    if num_query_heads % num_shards or num_shards == 1:
        return query, key, value
    if num_pair_shards(num_heads) == 1:
        # The projections did not reorder heads for the devices, so all heads
        # are replicated before each device takes its own.
        query, key, value = (
            _constrain(x, (ANY, ANY, None, None)) for x in (query, key, value)
        )
    if num_heads % num_shards:
        group_size = num_query_heads // num_heads
        # (batch, length, query_heads, head_dim)
        key = jnp.repeat(key, group_size, axis=2)
        value = jnp.repeat(value, group_size, axis=2)
    return tuple(_split(x, 2) for x in (query, key, value))


def shard_mapped(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the mesh: each device runs it on its own shards.

    It is for what XLA cannot shard itself: a Pallas kernel; and an axis that
    rows and heads share, which XLA shards by rows only.

    Args:
        function: function of arrays.
        in_specs: tuple of `PartitionSpec`, one for each argument.
        out_specs: `PartitionSpec` or tuple of them.

    Returns:
        A function of whole arrays; `function` itself if there is no
        distribution.
    """
    if mesh() is None:
        return function
    return jax.shard_map(
        function,
        mesh=mesh(),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # Pallas's outputs don't say how they vary.
    )


def by_row(x: np.ndarray) -> np.ndarray | jax.Array:
    """Shards an array that every process has over the batch axis.

    Args:
        x: numpy array `(batch, ...)`. The batch must be a multiple of
            `num_row_groups()`.

    Returns:
        array; `x` itself if there is no distribution.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return x
    layout = distribution.get_data_layout(x.shape).backend_layout
    return jax.make_array_from_callback(x.shape, layout, lambda i: x[i])


def replicated(x: jax.Array) -> jax.Array:
    """Replicates an array, so that every process can read all of it."""
    return x if mesh() is None else _constrain(x, ())


def num_row_groups() -> int:
    """The number of data-parallel groups: of devices with the same rows."""
    distribution = keras.distribution.distribution()
    return distribution.num_model_replicas if distribution else 1


def gathered_over_batch_axis(
    variables: Sequence[keras.Variable], values: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """Replicates weights over the batch axis, for a step (FSDP's gather).

    The gradient of a weight that was sharded over it is sharded again.

    Args:
        variables: list of `keras.Variable`.
        values: list of arrays, their values.

    Returns:
        list of arrays.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return values
    batch_axis = distribution.batch_dim_name
    results = []
    for variable, value in zip(variables, values, strict=True):
        axes = distribution.get_variable_layout(variable).axes
        if batch_axis in axes:
            kept = tuple(None if x == batch_axis else x for x in axes)
            value = _gather(value, axes, kept)
        results.append(value)
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value, split, kept):
    return _constrain(value, kept)


def _gather_forward(value, split, kept):
    return _constrain(value, kept), None


def _gather_gradient(split, kept, _, cotangent):
    # First replicated: the loop over parts of the head would otherwise sum
    # the sharded gradient of the embeddings over the devices in each part.
    return (_constrain(_constrain(cotangent, kept), split),)


_gather.defvjp(_gather_forward, _gather_gradient)


def _constrain(x, axes):
    sharding = NamedSharding(mesh(), PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, sharding)


def _split(x, axis):
    if not model_axes():
        return x
    axes = [ANY] * x.ndim
    axes[axis] = model_axes()
    return _constrain(x, axes)


def _swap(x, axis, sizes):
    """Splits an axis into two of these sizes and a rest, and swaps the two."""
    axis %= x.ndim
    parts = (*x.shape[:axis], *sizes, -1, *x.shape[axis + 1 :])
    # (..., sizes[0], sizes[1], rest, ...) to (..., sizes[1], sizes[0], ...)
    x_parts = jnp.swapaxes(jnp.reshape(x, parts), axis, axis + 1)
    return jnp.reshape(x_parts, x.shape)


def size_of_axes(axes: Sequence[str]) -> int:
    """The number of devices on axes of the mesh together."""
    return math.prod(mesh().shape[axis] for axis in axes)
