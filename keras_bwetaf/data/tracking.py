"""Which data `fit` can go back to, a batch at a time."""

import sys
from typing import Any


def track(data: Any) -> Any:
    """Numbers the batches of a Grain data set by the steps of `fit`.

    `fit` does it with its data. Pass it `track(data)` to read a batch again
    that a step was trained on.

    Args:
        data: `grain.IterDataset`, such as `load_packed` returns; or anything
            else.

    Returns:
        `TrackedBatches`, which is a `grain.IterDataset`, too; or None for
        other data.

    Example:

    ```python
    batches = keras_bwetaf.data.track(train)
    lm.fit(batches, steps_per_epoch=1000)
    batch = batches.batch(999)  # The last step's.
    ```
    """
    grain = sys.modules.get("grain")
    if grain is None or not isinstance(data, grain.IterDataset):
        return None
    # Grain is optional, and slow to import.
    from keras_bwetaf.data.tracked_batches import TrackedBatches

    return data if isinstance(data, TrackedBatches) else TrackedBatches(data)
