"""BwETAF 0.5.1. Runs in the process of `tests.originals.run` only."""

import contextlib
import io
from unittest import mock

with (
    # Importing it downloads GPT-2's tokenizer.
    mock.patch("tiktoken.get_encoding"),
    contextlib.redirect_stdout(io.StringIO()),
):
    import BwETAF


def path():
    """Where the package is, which tells its version."""
    return BwETAF.__file__
