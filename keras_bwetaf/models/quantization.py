"""Quantization without a warning for each layer that has no weights."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def only_what_can_be() -> Iterator[None]:
    """Inside, `quantize` skips layers without weights, and does not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Layer .* does not have a `quantize` method"
        )
        yield
