"""Data whose batches can be read again after `fit` has trained on them."""

import sys
from typing import Any


def track(data: Any) -> Any:
    """Numbers the batches of a Grain data set by the steps of `fit`.

    `fit` does so by itself. Pass it `track(data)` to read a batch again that
    a step was trained on. Each `fit` begins to count, and to read, anew.

    Args:
        data: `grain.IterDataset`, such as `load_packed` returns.

    Returns:
        `TrackedBatches`, which is a `grain.IterDataset`, too.

    Raises:
        ValueError: If the data are something else.

    Example:

    ```python
    batches = keras_bwetaf.data.track(train)
    lm.fit(batches, steps_per_epoch=1000)
    batch = batches.batch(999)  # The last step's.
    ```
    """
    batches = tracked(data)
    if batches is None:
        raise ValueError(
            "Only batches of a `grain.IterDataset` can be read again, such as "
            "`load_packed` returns. Received: data of type "
            f"{type(data).__name__}"
        )
    return batches


def tracked(data):
    """`TrackedBatches` of the data, or None if they can't be numbered."""
    grain = sys.modules.get("grain")
    if grain is None or not isinstance(data, grain.IterDataset):
        return None
    # Grain is optional, and slow to import.
    from keras_bwetaf.data.tracked_batches import TrackedBatches

    return data if isinstance(data, TrackedBatches) else TrackedBatches(data)


def untracked(data):
    """The data without numbers, for those who do not train on them."""
    return getattr(data, "untracked", data)
