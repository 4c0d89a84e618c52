"""Initial weights, and how to do without them when real ones follow."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
import keras

_weights_follow = contextvars.ContextVar("weights_follow", default=False)


@contextlib.contextmanager
def skip_initialization() -> Iterator[None]:
    """Layers made inside start from zeros, because weights are loaded next.

    To draw 97 million random numbers that are then overwritten would take
    seconds, and memory for a second copy of the weights.

    Example:

    ```python
    with skip_initialization():
        backbone = BwETAFBackbone(**config)
    backbone.load_weights("model.weights.h5")
    ```
    """
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def normal(stddev: float) -> keras.initializers.Initializer:
    """Normal initializer, or zeros inside `skip_initialization`."""
    if _weights_follow.get():
        return _Zeros()
    return keras.initializers.RandomNormal(stddev=stddev)


class _Zeros(keras.initializers.Zeros):
    """Zeros that each device makes for its own shard."""

    def __call__(self, shape, dtype=None, layout=None):
        return jnp.zeros(shape, dtype, out_sharding=layout)
