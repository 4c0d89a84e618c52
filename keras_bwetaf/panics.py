"""What the library `tokenizers` raises that is no error of Python's."""

import contextlib


@contextlib.contextmanager
def clear_panics():
    """Makes a ValueError of what the library raises over odd files.

    A panic is a BaseException, which `except Exception` would let through.

    Raises:
        ValueError: If the block ends in a panic, or a bare `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and (
            type(error).__name__ != "PanicException"
        ):
            raise
        raise ValueError(
            "The tokenizer file is one with which the library `tokenizers` "
            f"fails. Fetch or train it again. Received: {error}"
        ) from error
