"""Compiled programs on disk, for the next process."""

import errno
import os
import shutil
import warnings
from pathlib import Path

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int

VARIABLE = "KERAS_BWETAF_COMPILATION_CACHE"
LEAST_FREE = 64 * 2**20  # Bytes, a few programs.


def enable_compilation_cache(
    folder: PathLike | None = None, max_size: int = 2**30
) -> None:
    """Keeps compiled programs on disk, so that the next process has them.

    It is JAX's persistent cache, with all programs kept, however small. Where
    one is set up already (`JAX_COMPILATION_CACHE_DIR`) and no folder is given,
    that one stays as it is. The command `keras-bwetaf` calls this by itself.

    The environment variable `KERAS_BWETAF_COMPILATION_CACHE` names another
    folder than the default; `0` turns this off. A folder that cannot be
    written, or a full disk, costs a warning, and programs are then compiled
    anew. Whoever can write to the folder can run code in your processes.

    Args:
        folder: str or path. Defaults to `keras-bwetaf` in the user's folder of
            caches, such as `~/.cache`.
        max_size: int. Bytes that the folder may grow to; what has not been
            used for longest goes first. Defaults to 1 GiB.

    Raises:
        ValueError: If `max_size` is no positive int.

    Example:

    ```python
    keras_bwetaf.enable_compilation_cache()
    lm = keras_bwetaf.from_preset("97m")
    lm.warm_up(prompt_lengths=[64, 512], max_new_tokens=128)
    ```
    """
    max_size = positive_int("max_size", max_size)
    wanted = os.environ.get(VARIABLE)
    if wanted == "0":
        return
    if folder is None and jax.config.jax_compilation_cache_dir:
        return
    folder = Path(
        folder
        or wanted
        or platformdirs.user_cache_path("keras-bwetaf", appauthor=False)
    )
    try:
        _check_folder(folder)
    except OSError as error:
        warnings.warn(
            f"Compiled programs are not kept: {error}. Set {VARIABLE} to "
            "another folder, or to 0 to do without.",
            stacklevel=2,
        )
        return
    # One warning is enough, if the disk fills up only later.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache"
    )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", max_size)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # One in another folder may be in use.


def _check_folder(folder):
    """Makes a folder, and raises OSError if nothing can be written to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
