"""Where the current `keras.distribution` puts rows, heads and weights.

A mesh has an axis for the rows of a batch. Over its other axes, the model
ones, layers are split: each device works on some of the heads.

RoPE turns a dimension of all heads together with the one half the width
away, so a device needs matching parts of both halves:

    heads                0 1 2 3 | 4 5 6 7     (0, 4), (1, 5), ... are pairs
    on four devices      0 4 | 1 5 | 2 6 | 3 7

`halves_to_shards` puts them in that order. Key/value heads go with their
query heads, if each half of them divides over the devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec

ANY = PartitionSpec.UNCONSTRAINED


def mesh():
    """The `jax.sharding.Mesh` of the current distribution, or None."""
    distribution = keras.distribution.distribution()
    return distribution and distribution.device_mesh.backend_mesh


def model_axes():
    """The axes of the mesh but that of the rows, a tuple of str."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return ()
    names = distribution.device_mesh.axis_names
    return tuple(x for x in names if x != distribution.batch_dim_name)


def num_pair_shards(num_key_value_heads):
    """Among how many devices heads are split so that no RoPE pair is.

    Args:
        num_key_value_heads: int. Half of them must divide.

    Returns:
        int, 1 if the model axes are too many for these heads.
    """
    num_shards = _size(model_axes())
    return num_shards if num_key_value_heads % (2 * num_shards) == 0 else 1


def halves_to_shards(x, axis, num_shards):
    """Reorders an axis: the parts of both halves that a device needs.

    Args:
        x: array.
        axis: int. Its size is a multiple of `2 * num_shards`.
        num_shards: int.

    Returns:
        array of the same shape, split over the model axes.
    """
    if num_shards == 1:
        return x
    x = _swap(x, axis, (2, num_shards))
    return _split(x, axis)


def halves_from_shards(x, axis, num_shards):
    """The way back from `halves_to_shards`."""
    return x if num_shards == 1 else _swap(x, axis, (num_shards, 2))


def device_axes(batch_size, num_heads):
    """The axes of the mesh over which rows and heads are split.

    Returns:
        Two tuples of str, empty where the number does not divide.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return (), ()
    rows, heads = (distribution.batch_dim_name,), model_axes()
    return (
        rows if batch_size % _size(rows) == 0 else (),
        heads if num_heads % _size(heads) == 0 else (),
    )


def split_heads(query, key, value):
    """Splits heads over the devices that have the same rows.

    If query heads divide and key/value heads don't, each query head gets a
    key/value head of its own.

    Args:
        query: array `(batch, length, query_heads, head_dim)`.
        key: array `(batch, length, heads, head_dim)`.
        value: array, as `key`.

    Returns:
        Tuple of the three.
    """
    num_query_heads, num_heads = query.shape[2], key.shape[2]
    num_shards = _size(model_axes())
    if num_query_heads % num_shards or num_shards == 1:
        return query, key, value
    if num_pair_shards(num_heads) == 1:
        query, key, value = (
            _constrain(x, (ANY, ANY, None, None)) for x in (query, key, value)
        )
    if num_heads % num_shards:
        num_groups = num_query_heads // num_heads
        key = jnp.repeat(key, num_groups, axis=2)
        value = jnp.repeat(value, num_groups, axis=2)
    return tuple(_split(x, 2) for x in (query, key, value))


def shard_mapped(function, in_specs, out_specs):
    """A function that each device runs on what it has, without the others.

    XLA splits what it knows how to split. It doesn't know Pallas kernels; and
    an axis of rows and heads in one it knows to split by rows only.

    Args:
        function: function of arrays.
        in_specs: tuple of `PartitionSpec`, one for each argument.
        out_specs: `PartitionSpec` or tuple of them.

    Returns:
        A function; `function` itself if there is no distribution.
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


def by_row(x):
    """Puts an array that every process has on the devices, split by rows.

    Args:
        x: numpy array `(batch, ...)`. The batch divides over the devices.

    Returns:
        array; `x` itself if there is no distribution.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return x
    layout = distribution.get_data_layout(x.shape).backend_layout
    return jax.make_array_from_callback(x.shape, layout, lambda i: x[i])


def replicated(x):
    """The same array, whole on each device: what a process can read."""
    return x if mesh() is None else _constrain(x, ())


def num_row_groups():
    """Among how many devices, or groups of them, rows are split."""
    distribution = keras.distribution.distribution()
    return distribution.num_model_replicas if distribution else 1


def gathered_over_batch_axis(variables, values):
    """Weights as devices with different rows need them: the same for all.

    A weight that is split over the devices with different rows is put
    together, and its gradient is split again.

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
    # Whole first: split in the loop over parts of the head, the gradient of
    # the embeddings would be added up among the devices for each part.
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
    x_parts = jnp.swapaxes(jnp.reshape(x, parts), axis, axis + 1)
    return jnp.reshape(x_parts, x.shape)


def _size(axes):
    return math.prod(mesh().shape[axis] for axis in axes)
