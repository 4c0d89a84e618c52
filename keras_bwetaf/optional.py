"""Packages that not everybody needs."""

import importlib


def import_optional(module, extra, purpose):
    """Imports a package that an extra of ours installs.

    Args:
        module: str. What to import.
        extra: str. The extra that brings it.
        purpose: str. What it is needed for, the start of a sentence.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{purpose} needs the package {error.name}. Install it with: "
            f'pip install "keras-bwetaf[{extra}]"'
        ) from error
