"""Checks of arguments: numbers of Python, NumPy and JAX are one kind."""

import operator

import jax.numpy as jnp
import numpy as np


def is_int(value):
    """Whether a value is an int, of Python, NumPy or JAX, and no bool."""
    if isinstance(value, bool | np.bool_):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def is_number(value):
    """Whether a value is a real number, of any library, and no bool."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", np.dtype(object))
    is_real = any(jnp.issubdtype(dtype, k) for k in (np.integer, np.floating))
    return is_real and np.ndim(value) == 0


def checked_int(name, value, smallest, largest=None):
    """Checks an argument that is an int in a range.

    Args:
        name: str. The argument's.
        value: Anything.
        smallest: int.
        largest: int, or None for no limit.

    Returns:
        int, of Python.

    Raises:
        ValueError: If it is no int, or out of the range.
    """
    expected = f"an int of at least {smallest}"
    if largest is not None:
        expected = f"an int from {smallest} to {largest}"
    return _checked_int(name, value, smallest, largest, expected)


def checked_seed(seed):
    """Checks a `seed`, of which JAX's generators take 32 bits.

    Args:
        seed: Anything.

    Returns:
        int, of Python.

    Raises:
        ValueError: If it is no int, or out of the range.
    """
    return _checked_int(
        "seed", seed, 0, 2**32 - 1, "an int from 0 to 2**32 - 1"
    )


def positive_int(name, value):
    """Checks an argument that is an int of at least 1.

    Args:
        name: str. The argument's.
        value: Anything.

    Returns:
        int, of Python.

    Raises:
        ValueError: If it is none.
    """
    return _checked_int(name, value, 1, None, "a positive int")


def checked_number(name, value, is_valid, expected):
    """Checks an argument that is a real number.

    Args:
        name: str. The argument's.
        value: Anything.
        is_valid: function of a float. Whether it is in range.
        expected: str. What it should be, such as `"at least 0"`.

    Returns:
        int or float, of Python.

    Raises:
        ValueError: If it is no number, or out of the range.
    """
    if is_number(value):
        try:
            number = float(value)
        except OverflowError as error:  # An int that no float can hold.
            raise _error(name, value, expected) from error
        if is_valid(number):
            return operator.index(value) if is_int(value) else number
    raise _error(name, value, expected)


def strings(name, values):
    """Checks an argument that is several strings.

    Args:
        name: str. The argument's.
        values: Anything.

    Returns:
        list of str.

    Raises:
        ValueError: If it is one string, or something else.
    """
    is_several = isinstance(values, (list, tuple))
    if is_several and all(isinstance(value, str) for value in values):
        return list(values)
    raise _error(name, values, "a list or tuple of str")


def _checked_int(name, value, smallest, largest, expected):
    if is_int(value):
        number = operator.index(value)
        if number >= smallest and (largest is None or number <= largest):
            return number
    raise _error(name, value, expected)


def _error(name, value, expected):
    return ValueError(
        f"`{name}` must be {expected}. Received: {name}={value!r}"
    )
