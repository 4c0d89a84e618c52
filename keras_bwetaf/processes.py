"""Several processes that train one model: who they are, and who writes."""

import contextlib
import os
import re
import sys

import jax
import keras
from jax.experimental import multihost_utils
from keras.src.backend import distribution_lib

from keras_bwetaf.checks import checked_int, is_int

# What the transports say when they lose another process.
LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|heartbeat|coordination service",
    re.IGNORECASE,
)
ADVICE = (
    "Another process has ended or can't be reached: its own messages tell "
    "why. Run the script again on all hosts; with a `TrainingCheckpoint`, it "
    "goes on from the last checkpoint."
)


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = 30,
    initialization_timeout_seconds: int = 300,
) -> None:
    """Makes this process one of several that train one model together.

    Each process runs the same script, and calls this before anything that
    computes. On TPU pods, and under SLURM or Open MPI, JAX finds the others by
    itself, so no arguments are needed. The devices of all processes are then
    those of `jax.devices()` and `keras.distribution`.

    All processes have the same random seed: that of
    `keras.utils.set_random_seed`, or else one that is drawn for all of them.
    Keras's progress is shown by the first process only, and files are
    written by it alone.

    A process that ends on an error does so at once. The others find that out
    when they next wait for it, or after `heartbeat_timeout_seconds`, and end
    with an error. SIGTERM to one process is for all, and no longer ends any by
    itself: `keras_bwetaf.training.TrainingCheckpoint` saves and exits.

    Args:
        coordinator_address: str. `"host:port"` of the first process, which
            all can reach, with a free port.
        num_processes: int.
        process_id: int. From 0 to `num_processes - 1`; 0 is the first.
        heartbeat_timeout_seconds: int. For how long a process may be silent
            until it counts as dead. Long work in Python keeps none silent.
        initialization_timeout_seconds: int. For how long to wait for the
            others to begin. Then JAX ends the process.

    Raises:
        ValueError: If an argument is out of range, some of the first three
            are missing, or JAX finds no cluster and they are all missing.
        RuntimeError: If it was called before, something was computed before,
            or the port is in use.

    Example:

    ```python
    keras_bwetaf.initialize("10.0.0.1:8476", num_processes=2, process_id=0)
    keras.distribution.set_distribution(
        keras_bwetaf.distribution.data_parallel()
    )
    ```
    """
    address = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _check_address(**address)
    _check_seconds(
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        initialization_timeout_seconds=initialization_timeout_seconds,
    )
    if jax.distributed.is_initialized():
        raise RuntimeError(
            "This process is one of several already. Call `initialize` once. "
            f"Received: {address}"
        )
    try:
        jax.distributed.initialize(
            **address,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            initialization_timeout=initialization_timeout_seconds,
        )
    except ValueError as error:
        raise ValueError(
            "JAX found no TPU pod and no cluster of SLURM or Open MPI. Pass "
            "`coordinator_address`, `num_processes` and `process_id`. "
            f"Received: {address}"
        ) from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            problem = (
                "`initialize` must be called before anything that computes: "
                "before models are made, and before `jax.devices()`."
            )
        else:
            problem = (
                "The processes can't meet. Is the port of "
                "`coordinator_address` free on the first one's host?"
            )
        raise RuntimeError(f"{problem} Received: {address}") from error
    # What `keras.distribution.initialize` does, which has no timeouts.
    distribution_lib.initialize_rng()
    _end_on_errors()
    if not is_first_process():
        keras.config.disable_interactive_logging()


def is_first_process() -> bool:
    """Whether this process is the one that prints, and writes files.

    Example:

    ```python
    if keras_bwetaf.is_first_process():
        print("Once, however many processes there are.")
    ```
    """
    return not are_several() or jax.process_index() == 0


def are_several():
    """Whether there are other processes; needs no device if there are not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def in_first_process(function, *args, **kwargs):
    """Calls a function in the first process, while the others wait for it.

    All processes must do so.

    Args:
        function: function, which waits for no other process.
        *args, **kwargs: Its arguments.

    Returns:
        What the function returns; `None` in the other processes.

    Raises:
        RuntimeError: In the other processes, if the function raises.
    """
    if not are_several():
        return function(*args, **kwargs)
    result = error = None
    if is_first_process():
        try:
            result = function(*args, **kwargs)
        except Exception as caught:
            error = caught
    has_failed = multihost_utils.broadcast_one_to_all(error is not None)
    if error is not None:
        raise error
    if has_failed:
        raise RuntimeError(
            "The first process failed; its own messages tell why. Received: "
            f"{function.__name__}"
        )
    return result


@contextlib.contextmanager
def gathered(variables):
    """Within it, variables that are spread over processes are whole in each.

    All processes must enter it. Only reading makes sense there.

    Args:
        variables: list of `keras.Variable`.
    """
    spread = [
        (variable, variable.value)
        for variable in variables
        if are_several() and not variable.value.is_fully_replicated
    ]
    try:
        for variable, value in spread:
            variable._value = multihost_utils.process_allgather(
                value, tiled=True
            )
        yield
    finally:
        for variable, value in spread:
            variable._value = value


def is_of_lost_process(error):
    """Whether an error, or what led to it, tells of another process's end.

    Args:
        error: Exception, or `None`.
    """
    while are_several() and error is not None:
        if LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_address(coordinator_address, num_processes, process_id):
    values = (coordinator_address, num_processes, process_id)
    received = (
        f"Received: coordinator_address={coordinator_address!r}, "
        f"num_processes={num_processes!r}, process_id={process_id!r}"
    )
    if values == (None, None, None):
        return  # JAX finds them.
    if None in values:
        raise ValueError(
            "Pass all of `coordinator_address`, `num_processes` and "
            "`process_id`; or, on a TPU pod or under SLURM or Open MPI, none. "
            f"{received}"
        )
    host, _, port = str(coordinator_address).rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            "`coordinator_address` must be 'host:port' with a port from 1 to "
            f"65535. {received}"
        )
    if not is_int(num_processes) or num_processes < 1:
        raise ValueError(
            f"`num_processes` must be an int of at least 1. {received}"
        )
    if not is_int(process_id) or not 0 <= process_id < num_processes:
        raise ValueError(
            "`process_id` must be an int from 0 to num_processes - 1. "
            f"{received}"
        )


def _check_seconds(**seconds):
    for name, value in seconds.items():
        checked_int(name, value, 1)


def _end_on_errors():
    """Has an uncaught error end the process at once.

    When Python ends, JAX waits for minutes for the other processes, which in
    turn wait for what this one was to compute.
    """
    show = sys.excepthook

    def hook(kind, error, traceback):
        if is_of_lost_process(error):
            error.add_note(ADVICE)
        show(kind, error, traceback)
        if not hasattr(sys, "ps1"):  # Nobody is typing.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    sys.excepthook = hook
