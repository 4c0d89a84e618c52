"""Which batch was handed out when, and where the data set goes on."""

import zlib

import grain
import jax
import numpy as np

# So many batches can be asked for again.
KEPT = 256
ADVICE = (
    "Pass the same data with the same arguments, such as seed and batch size"
)


class TrackedBatches(grain.IterDataset):
    """A Grain data set that numbers its batches.

    `fit` wraps its data in one, if it is none already. The number of a batch
    is that of the step that trains on it, from 0, also in a training that
    goes on from a checkpoint. Keras looks at some batches before it trains on
    them, through iterators of their own, and reads ahead; so what was read
    says nothing of what was trained on. All iterators begin at the same
    batch.

    Args:
        dataset: `grain.IterDataset`. Each time that it is read, it must give
            the same batches, as `load_packed` does.

    Example:

    ```python
    batches = keras_bwetaf.data.track(train)
    lm.fit(batches, steps_per_epoch=1000)
    batch = batches.batch(999)  # The last step's.
    ```
    """

    def __init__(self, dataset):
        super().__init__(dataset)
        self.untracked = dataset
        self._beginning = dataset.__iter__().get_state()
        self.restart()

    def restart(self):
        """Forgets what was read: the next batch is the first one, number 0."""
        self._start = 0, self._beginning
        self._states = {0: self._beginning}  # The next batch has that number.
        self._digests = {}

    @property
    def first_number(self):
        """Number of the batch with which iterators begin."""
        return self._start[0]

    def __iter__(self):
        return _TrackedIterator(self)

    def was_read(self, number):
        """Whether a batch was read, as one of the last ones."""
        return number in self._digests

    def batch(self, number):
        """Reads a batch once more.

        Args:
            number: int. Of the step that trains on it, one of the last 256
                before the last batch that was read.

        Returns:
            The batch, as the data set gave it.

        Raises:
            ValueError: If the batch was not read, or long ago.
        """
        if not self.was_read(number):
            raise ValueError(
                f"Expected the number of one of the last {KEPT} batches that "
                f"were read, {self._described()}. Received: number={number}"
            )
        return next(self._iterator(self._states[number]))

    def position(self, number):
        """Where a batch comes next, for `go_to`.

        Args:
            number: int. Of a batch that follows one that was read.

        Returns:
            dict, which JSON can hold if the data set's states are such.
        """
        last = number - 1
        return {
            "next_batch": number,
            "last_state": self._states[last],
            "last_digest": self._digests[last],
            "num_processes": jax.process_count(),
        }

    def go_to(self, position):
        """The next iterator begins there.

        Args:
            position: dict. From `position`, maybe of an earlier process.

        Raises:
            ValueError: If this data set had another batch before.
        """
        number, state = position["next_batch"], position["last_state"]
        try:
            iterator = self._iterator(state)
            found = digest(next(iterator))
        except Exception as error:  # Each data set fails in its own way.
            raise ValueError(
                "The data set can't go on at a position of another data set. "
                f"{ADVICE}. Received: position={position}"
            ) from error
        # The digest is that of the first process's part of the batch.
        is_comparable = (
            jax.process_index() == 0
            and jax.process_count() == position.get("num_processes", 1)
        )
        if is_comparable and found != position["last_digest"]:
            raise ValueError(
                f"The data set has another batch {number - 1} than the one "
                f"that was trained on. {ADVICE}. Received: a batch "
                f"with the digest {found}, expected: "
                f"{position['last_digest']}"
            )
        self._start = number, iterator.get_state()
        self._states = dict([(number - 1, state), self._start])
        self._digests = {number - 1: found}

    def _iterator(self, state):
        iterator = self._parent.__iter__()
        iterator.set_state(state)
        return iterator

    def _described(self):
        if not self._digests:
            return "and none was"
        return f"{min(self._digests)} to {max(self._digests)}"

    def _record(self, number, batch, next_state):
        self._digests[number] = digest(batch)
        self._states[number + 1] = next_state
        self._digests.pop(number - KEPT, None)
        self._states.pop(number - KEPT, None)

    def _end_at(self, number):
        """A data set that ends is begun again, and numbers go on."""
        self._start = number, self._beginning
        self._states[number] = self._beginning


class _TrackedIterator(grain.DatasetIterator):
    def __init__(self, batches):
        self._batches = batches
        self._number, state = batches._start
        super().__init__(batches._iterator(state))

    def __next__(self):
        try:
            batch = next(self._parent)
        except StopIteration:
            self._batches._end_at(self._number)
            raise
        self._batches._record(self._number, batch, self._parent.get_state())
        self._number += 1
        return batch

    def get_state(self):
        return {"number": self._number, "parent": self._parent.get_state()}

    def set_state(self, state):
        self._number = state["number"]
        self._parent.set_state(state["parent"])


def digest(batch):
    """A checksum of all that a batch holds.

    Args:
        batch: Tree of arrays.

    Returns:
        int.
    """
    checksum = 0
    for leaf in jax.tree.leaves(batch):
        array = np.asarray(leaf)
        if array.dtype == object:  # Such as strings.
            content = repr(array.tolist()).encode()
        else:
            content = array.tobytes()
        kind = f"{array.dtype} {array.shape}".encode()
        checksum = zlib.crc32(content, zlib.crc32(kind, checksum))
    return checksum
