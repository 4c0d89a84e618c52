"""The course of a training: kept, written, read."""

import copy
import json
from pathlib import Path

import numpy as np

from converters.files import new_file, read_json

FILE_NAME = "stats.json"
STEPS = ("step", "loss", "gradient_norm", "learning_rate", "tokens", "seconds")
VALIDATIONS = ("val_step", "val_loss")
SMOOTHING = 0.95  # A mean over about the last 20 steps.
WINDOW = 50  # The steps whose speed is shown.


class ExponentialMean:
    """A mean in which older values count less, unbiased from the first on.

    Args:
        decay: float. How much less a value counts at each new one.
    """

    def __init__(self, decay=SMOOTHING):
        self._decay = decay
        self._sum = self._weight = 0.0

    def update(self, value):
        """Takes a value in and returns the mean."""
        self._sum += (1 - self._decay) * (value - self._sum)
        self._weight += (1 - self._decay) * (1 - self._weight)
        return self._sum / self._weight


def smooth(values, decay=SMOOTHING):
    """The exponential mean up to each value.

    Args:
        values: list of float.
        decay: float.

    Returns:
        list of float, of the same length.
    """
    mean = ExponentialMean(decay)
    return [mean.update(value) for value in values]


class Statistics:
    """Values of every step and of every validation.

    Attributes:
        entries: dict of lists. Of steps, `"step"`, their numbers from 1;
            `"loss"`; `"gradient_norm"`, before clipping, `None` where it is
            not finite; `"learning_rate"`; `"tokens"` that count in the
            loss; and `"seconds"`, `None` for the first step of a `fit`, which
            compiles. Of validations, `"val_step"` and `"val_loss"`.
        compile_seconds: float. What these first steps took.
        total_tokens: int.
        smoothed_loss: float or `None`.
    """

    def __init__(self):
        self.entries = {name: [] for name in STEPS + VALIDATIONS}
        self.compile_seconds = 0.0
        self.total_tokens = 0
        self.smoothed_loss = None
        self._mean = ExponentialMean()

    def __len__(self):
        return len(self.entries["step"])

    def add_step(
        self,
        step,
        loss,
        gradient_norm,
        learning_rate,
        tokens,
        seconds,
        compiles,
    ):
        """Adds a step.

        Args:
            step: int.
            loss: float.
            gradient_norm: float.
            learning_rate: float.
            tokens: int.
            seconds: float.
            compiles: bool. Whether it is the first step of a `fit`.
        """
        if compiles:
            self.compile_seconds += seconds
        self.total_tokens += int(tokens)
        self.smoothed_loss = self._mean.update(float(loss))
        self._append(
            step=step,
            loss=_short(loss),
            gradient_norm=_short(gradient_norm),
            learning_rate=_short(learning_rate),
            tokens=int(tokens),
            seconds=None if compiles else round(seconds, 6),
        )

    def add_validation(self, step, loss):
        """Adds the loss of a validation after a step."""
        self._append(val_step=step, val_loss=_short(loss))

    def _append(self, **values):
        for name, value in values.items():
            self.entries[name].append(value)

    def last(self, name):
        """The last value of a list, or `None`."""
        return self.entries[name][-1] if self.entries[name] else None

    def tokens_per_second(self, num_steps=WINDOW):
        """Over the last steps, without those that compiled, or `None`."""
        tokens, seconds = self._timed(num_steps)
        return sum(tokens) / sum(seconds) if seconds else None

    def seconds_per_step(self, num_steps=WINDOW):
        """Over the last steps, without those that compiled, or `None`."""
        _, seconds = self._timed(num_steps)
        return sum(seconds) / len(seconds) if seconds else None

    def _timed(self, num_steps):
        first = max(len(self) - num_steps, 0)
        tokens = self.entries["tokens"][first:]
        seconds = self.entries["seconds"][first:]
        pairs = zip(tokens, seconds, strict=True)
        pairs = [pair for pair in pairs if pair[1] is not None]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def get_state(self):
        """A dict that can be written as JSON, and that nothing changes."""
        return {
            "entries": copy.deepcopy(self.entries),
            "compile_seconds": self.compile_seconds,
        }

    def set_state(self, state):
        """Goes on from what `get_state` returned."""
        self.__init__()
        self.entries.update(copy.deepcopy(state["entries"]))
        self.compile_seconds = state["compile_seconds"]
        self.total_tokens = sum(self.entries["tokens"])
        for loss in self.entries["loss"]:
            self.smoothed_loss = self._mean.update(loss)

    def write(self, folder, name, num_params):
        """Writes `stats.json`, at once.

        It has the original's keys, in which losses are lists with a list for
        each training, and `"lr"` the peaks of the learning rate; and further
        ones of the same kind.

        Args:
            folder: path.
            name: str. The model's.
            num_params: int.

        Returns:
            dict, as `read_statistics` reads it.
        """
        entries = self.entries
        seconds = sum(s for s in entries["seconds"] if s is not None)
        statistics = {
            "name": name,
            "num_params": num_params,
            "total tokens": self.total_tokens,
            "total time": seconds + self.compile_seconds,
            "loss": [entries["loss"]],
            "val_loss": [entries["val_loss"]],
            "lr": [max(entries["learning_rate"], default=0.0)],
            "compile time": self.compile_seconds,
            "tokens per second": self.tokens_per_second(len(self)),
        }
        for key in (*STEPS, *VALIDATIONS):
            statistics.setdefault(key, [entries[key]])
        statistics["stats"] = list(statistics)
        with new_file(Path(folder) / FILE_NAME) as file:
            file.write(json.dumps(statistics).encode())
        return statistics


def read_statistics(source):
    """Reads `stats.json`, ours or the original's.

    Args:
        source: str or path. The file, or the folder that it is in.

    Returns:
        dict.

    Raises:
        ValueError: If it holds no losses.
        FileNotFoundError: If there is no such file.
    """
    path = Path(source)
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a folder with {FILE_NAME}, which `Monitor` writes at "
            f"the end of every epoch. Received: {str(source)!r}"
        )
    statistics = read_json(path)
    losses = statistics.get("loss")
    if not isinstance(losses, list) or not any(
        isinstance(each, list) and each for each in losses
    ):
        raise ValueError(
            f"{path}: expected 'loss', a list with a list of numbers for each "
            f"training. Received: loss={str(losses)[:80]}"
        )
    return statistics


def _short(value):
    """The shortest decimal that is this float32, or `None` for no number."""
    return float(str(np.float32(value))) if np.isfinite(value) else None
