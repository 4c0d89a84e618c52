"""The original packages of versions 2 and 4, each in a process of its own.

They have the import name of version 3's, which `tests.original` imports, so
`python -m tests.originals` installs them into folders of their own.
"""

import functools
import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

PACKAGES = {"v2": "BwETAF==0.5.1", "v4": "BwETAF==0.7.4"}
FOLDER = Path(sys.prefix) / "share" / "originals"


def run(version, function, *args, **kwargs):
    """Calls a function of `tests.originals.<version>` beside its original.

    Args:
        version: str, one of `PACKAGES`.
        function: str. Its name.
        *args, **kwargs: What can be pickled: arrays of NumPy, not of JAX.

    Returns:
        What the function returns, which can be pickled, too.
    """
    if not (FOLDER / version).is_dir():
        pytest.skip(
            f"{PACKAGES[version]} is not installed: python -m tests.originals"
        )
    return (
        _process(version)
        .submit(_call, version, function, args, kwargs)
        .result()
    )


@functools.cache
def _process(version):
    """One process, which goes on: importing JAX takes seconds."""
    return ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(version,),
    )


def _start(version):
    sys.path.insert(0, str(FOLDER / version))
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
    os.environ["MPLBACKEND"] = "Agg"


def _call(version, function, args, kwargs):
    module = importlib.import_module(f"tests.originals.{version}")
    return getattr(module, function)(*args, **kwargs)
