"""Named relayouts, each of which is a view and so can be undone.

`view(transforms, source)` shows `source` in another layout without moving a
value. Reading through the view converts one way; writing through it, into an
empty array, converts back. So each relayout is written once, and bits cannot
change.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Transpose:
    """[inputs, outputs] <-> [outputs, inputs]."""

    def view(self, array):
        return array.T


@dataclass(frozen=True)
class Squeeze:
    """[1, 1, width] <-> [width]."""

    def view(self, array):
        return array[0, 0]


@dataclass(frozen=True)
class Layer:
    """One of the layers that are stacked along the first axis.

    Args:
        index: int.
    """

    index: int

    def view(self, array):
        return array[self.index]


@dataclass(frozen=True)
class Half:
    """One of the two halves of the last axis.

    Args:
        index: int. 0 for the first half, 1 for the second.
    """

    index: int

    def view(self, array):
        half = array.shape[-1] // 2
        return array[..., self.index * half : (self.index + 1) * half]


def view(transforms, array):
    """Shows an array through transforms, first to last.

    Args:
        transforms: tuple of transforms; empty leaves the array as it is.
        array: numpy array.

    Returns:
        numpy array, a view that can be written through if `array` can.
    """
    for transform in transforms:
        array = transform.view(array)
    return array


def view_shape(transforms, shape):
    """The shape that `view` has for an array of a shape."""
    return view(transforms, np.broadcast_to(np.empty(()), shape)).shape
