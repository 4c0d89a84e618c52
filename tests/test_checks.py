"""Numbers of Python, NumPy and JAX are one kind; bools are none of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from keras_bwetaf.checks import (
    checked_int,
    checked_number,
    is_int,
    is_number,
    positive_int,
    strings,
)

pytestmark = pytest.mark.fast

INTS = [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)]
FLOATS = [0.5, np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5)]
NEITHER = [True, np.True_, jnp.array(True), "3", b"3", None, [3], np.ones(1)]


@pytest.mark.parametrize("value", INTS, ids=repr)
def test_ints(value):
    assert is_int(value) and is_number(value)
    for received in (
        positive_int("x", value),
        checked_int("x", value, 3),
        checked_int("x", value, 0, 3),
    ):
        assert received == 3 and type(received) is int


@pytest.mark.parametrize("value", FLOATS, ids=repr)
def test_floats(value):
    assert is_number(value) and not is_int(value)
    received = checked_number("x", value, lambda x: x < 1, "below 1")
    assert received == 0.5 and type(received) is float


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_what_is_no_number(value):
    assert not is_int(value) and not is_number(value)
    with pytest.raises(ValueError, match="`x` must be a positive int"):
        positive_int("x", value)
    with pytest.raises(ValueError, match="`x` must be below 1. Received: x="):
        checked_number("x", value, lambda x: x < 1, "below 1")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: positive_int("x", 0), "a positive int. Received: x=0"),
        (lambda: positive_int("x", 1.0), "a positive int. Received: x=1.0"),
        (lambda: checked_int("x", -1, 0), "an int of at least 0. .*x=-1"),
        (lambda: checked_int("x", 4, 0, 3), "an int from 0 to 3. .*x=4"),
        (lambda: checked_int("x", 10**400, 0, 3), "an int from 0 to 3"),
        (
            lambda: checked_number("x", float("nan"), lambda x: x > 0, "more"),
            "must be more. Received: x=nan",
        ),
        (
            lambda: checked_number("x", 10**400, lambda x: x > 0, "a float"),
            "must be a float. Received: x=1000",
        ),
        (lambda: strings("x", "ab"), "a list or tuple of str. .*x='ab'"),
        (lambda: strings("x", ["a", 1]), "a list or tuple of str"),
        (lambda: strings("x", None), "a list or tuple of str"),
    ],
)
def test_out_of_range(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_strings():
    assert strings("x", ("a", "b")) == ["a", "b"]
