"""BwETAF 0.7.4. Runs in the process of `tests.originals.run` only."""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    import BwETAF


def path():
    """Where the package is, which tells its version."""
    return BwETAF.__file__
