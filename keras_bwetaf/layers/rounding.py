"""Rounding to a narrower float that no compiler may optimize away."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def round_to(x: ArrayLike, dtype: str) -> jax.Array:
    """Rounds every value to the nearest one that `dtype` can hold.

    A cast to `dtype` and back would not do: under `jit`, XLA drops it, and
    compiled and eager results differ.

    Args:
        x: float array of any shape.
        dtype: str. A float dtype, such as `"bfloat16"`.

    Returns:
        Array of the shape and dtype of `x`.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
