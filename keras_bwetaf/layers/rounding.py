"""Rounding to a narrower float that no compiler may optimize away."""

import jax
import jax.numpy as jnp


def round_to(x, dtype):
    """Rounds every value to the nearest one that `dtype` can hold.

    A cast there and back does not do: XLA is free to drop it, and does so
    under `jit`, which makes compiled and eager results differ.

    Args:
        x: float array of any shape.
        dtype: str. A float dtype, such as `"bfloat16"`.

    Returns:
        Array of the shape and dtype of `x`.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
