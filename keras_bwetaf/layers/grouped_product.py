"""Products of rows with the kernel of their group: experts and their tokens."""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

# Rows that XLA's CPU backend multiplies at full speed.
MOST_ROWS_IN_TILE = 128
# Outputs of the forward pass times kernels, and inputs times outputs.
OVER_OUTPUTS = RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
OVER_ROWS = RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


@jax.custom_vjp
def grouped_product(
    rows: jax.Array, kernels: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Multiplies every row by the kernel of its group.

    `jax.lax.ragged_dot`, but for two points: rows beyond all groups give
    zeros on every device; and on CPU, where XLA multiplies all rows by all
    kernels, a loop multiplies tiles of rows by one kernel each.

    Args:
        rows: float array `(rows, inputs)`, those of a group together.
        kernels: float array `(groups, inputs, outputs)`.
        sizes: int32 array `(groups,)`. The number of rows in each group.

    Returns:
        float array `(rows, outputs)`.
    """

    def tiled(rows, kernels, sizes):
        return _tiled(rows, kernels, sizes, "ri,io->ro")

    product = jax.lax.platform_dependent(
        rows, kernels, sizes, cpu=tiled, default=jax.lax.ragged_dot
    )
    return _in_groups(product, sizes)


def _forward(rows, kernels, sizes):
    return grouped_product(rows, kernels, sizes), (rows, kernels, sizes)


def _gradients(residuals, cotangent):
    def tiled(rows, kernels, sizes, cotangent):
        return (
            _tiled(cotangent, kernels, sizes, "ro,io->ri"),
            _tiled_kernels(rows, cotangent, sizes).astype(kernels.dtype),
        )

    def ragged(rows, kernels, sizes, cotangent):
        dot = jax.lax.ragged_dot_general
        return (
            dot(cotangent, kernels, sizes, OVER_OUTPUTS),
            dot(rows, cotangent, sizes, OVER_ROWS),
        )

    of_rows, of_kernels = jax.lax.platform_dependent(
        *residuals, cotangent, cpu=tiled, default=ragged
    )
    return _in_groups(of_rows, residuals[2]), of_kernels, None


grouped_product.defvjp(_forward, _gradients)


def _in_groups(rows, sizes):
    is_in_group = jnp.arange(len(rows)) < jnp.sum(sizes)
    return jnp.where(is_in_group[:, None], rows, 0)


def _tiled(rows, kernels, sizes, equation):
    """Tiles of rows, each times the kernel of its first row's group.

    The last tile of a group reaches into the next, whose first tile writes
    over what it has there.
    """
    length, num_tiles, tile = _tiles(len(rows), sizes)
    padded = jnp.pad(rows, ((0, length), (0, 0)))

    def step(i, results):
        group, start, _ = tile(i)
        x = jax.lax.dynamic_slice_in_dim(padded, start, length)
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        result = jnp.einsum(equation, x, kernel)
        return jax.lax.dynamic_update_slice_in_dim(results, result, start, 0)

    width = kernels.shape[2 if equation.endswith("o") else 1]
    results = jnp.zeros((len(padded), width), rows.dtype)
    return jax.lax.fori_loop(0, num_tiles, step, results)[: len(rows)]


def _tiled_kernels(rows, cotangent, sizes):
    """The kernels' gradient, float32, a tile of rows at a time."""
    length, num_tiles, tile = _tiles(len(rows), sizes)
    padding = ((0, length), (0, 0))
    rows, cotangent = jnp.pad(rows, padding), jnp.pad(cotangent, padding)

    def step(i, results):
        group, start, end = tile(i)
        x = jax.lax.dynamic_slice_in_dim(rows, start, length)
        is_in_group = start + jnp.arange(length) < end
        x = jnp.where(is_in_group[:, None], x, 0)
        y = jax.lax.dynamic_slice_in_dim(cotangent, start, length)
        gradient = jnp.einsum("ri,ro->io", x, y)
        return results.at[group].add(gradient.astype("float32"))

    shape = (len(sizes), rows.shape[1], cotangent.shape[1])
    return jax.lax.fori_loop(0, num_tiles, step, jnp.zeros(shape, "float32"))


def _tiles(num_rows, sizes):
    """The length of a tile, their number, and what tile `i` is.

    Returns:
        Tuple of int, int array, and a function from the tile's number to its
        group, its first row and the end of its group.
    """
    length = 1
    while 2 * length * len(sizes) <= num_rows and length < MOST_ROWS_IN_TILE:
        length *= 2
    group_ends = jnp.cumsum(sizes)
    counts = -(-sizes // length)  # Of each group, rounded up.
    tile_ends = jnp.cumsum(counts)

    def tile(i):
        group = jnp.sum(i >= tile_ends)
        first = tile_ends[group] - counts[group]
        start = group_ends[group] - sizes[group] + (i - first) * length
        return group, start, group_ends[group]

    return length, tile_ends[-1], tile
