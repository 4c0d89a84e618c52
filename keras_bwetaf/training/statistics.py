"""The course of a training: kept, written, read."""

import collections
import copy
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

from converters.files import new_file, read_json

FILE_NAME = "stats.json"
STEPS = ("step", "loss", "gradient_norm", "learning_rate", "tokens", "seconds")
VALIDATIONS = ("val_step", "val_loss")
SAMPLES = "samples"
SMOOTHING = 0.95  # A mean over about the last 20 steps.
WINDOW = 50  # The steps whose speed is shown.
MOST_STEPS = 20_000  # That are kept and written.


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

    def get_state(self):
        """A list that can be written as JSON."""
        return [self._sum, self._weight]

    def set_state(self, state):
        """Goes on from a state, and returns its mean, `None` at the start."""
        self._sum, self._weight = state
        return self._sum / self._weight if self._weight else None


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


@dataclasses.dataclass
class Totals:
    """Sums over steps. A step that compiles counts in no time or speed."""

    tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    gradient_norm: float = 0.0
    num_gradient_norms: int = 0

    def add(self, tokens, seconds, gradient_norm):
        """Adds a step, whose `None` are what it does not have."""
        self.tokens += tokens
        if seconds is not None:
            self.timed_tokens += tokens
            self.seconds += seconds
        if gradient_norm is not None:
            self.gradient_norm += gradient_norm
            self.num_gradient_norms += 1

    def tokens_per_second(self):
        """float, or `None` without a step that has a time."""
        return self.timed_tokens / self.seconds if self.seconds else None

    def mean_gradient_norm(self):
        """float, or `None` without a gradient that is finite."""
        number = self.num_gradient_norms
        return self.gradient_norm / number if number else None


class Statistics:
    """Values of steps and of every validation.

    However long the training, values of `MOST_STEPS` steps at most are kept:
    when there are more, of every second step, then of every fourth, and so
    on. All steps count in sums and means.

    Attributes:
        entries: dict of lists. Of steps, `"step"`, their numbers from 1;
            `"loss"`; `"gradient_norm"`, before clipping, `None` where it is
            not finite; `"learning_rate"`; `"tokens"` that count in the
            loss; and `"seconds"`, `None` for the first step of a `fit`, which
            compiles. Of validations, `"val_step"` and `"val_loss"`. And
            `"samples"`, texts that the model continued, dicts of `"step"`,
            `"prompt"` and `"text"`.
        stride: int. Values of every so many steps are kept.
        compile_seconds: float. What the first steps took.
        smoothed_loss: float or `None`.
        totals: `Totals` of all steps.
        epoch: `Totals` of the steps since `begin_epoch`.
    """

    def __init__(self):
        self.entries = {name: [] for name in (*STEPS, *VALIDATIONS, SAMPLES)}
        self.stride = 1
        self.compile_seconds = 0.0
        self.smoothed_loss = None
        self.totals, self.epoch = Totals(), Totals()
        self._mean = ExponentialMean()
        self._last = {}
        self._window = collections.deque(maxlen=WINDOW)

    def __len__(self):
        return len(self.entries["step"])

    def begin_epoch(self):
        """Has `epoch` begin anew."""
        self.epoch = Totals()

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
        self._add(
            step=step,
            loss=_short(loss),
            gradient_norm=_short(gradient_norm),
            learning_rate=_short(learning_rate),
            tokens=int(tokens),
            seconds=None if compiles else round(seconds, 6),
        )

    def _add(self, **values):
        self._last.update(values)
        self.smoothed_loss = self._mean.update(values["loss"])
        sums = [values[key] for key in ("tokens", "seconds", "gradient_norm")]
        self.totals.add(*sums)
        self.epoch.add(*sums)
        self._window.append((values["tokens"], values["seconds"]))
        if values["step"] % self.stride == 0:
            self._append(values)
        if len(self) > MOST_STEPS:
            self._thin()

    def add_sample(self, step, prompt, text):
        """Adds what the model made of a text after a step."""
        sample = {"step": step, "prompt": prompt, "text": text}
        self._append({SAMPLES: sample})

    def _append(self, values):
        for name, value in values.items():
            self.entries[name].append(value)

    def _thin(self):
        self.stride *= 2
        are_kept = [step % self.stride == 0 for step in self.entries["step"]]
        for name in STEPS:
            values = itertools.compress(self.entries[name], are_kept)
            self.entries[name] = list(values)

    def add_validation(self, step, loss):
        """Adds the loss of a validation after a step."""
        values = {"val_step": step, "val_loss": _short(loss)}
        self._last.update(values)
        self._append(values)

    def last(self, name):
        """The last value of a step or validation, or `None`."""
        return self._last.get(name)

    def tokens_per_second(self):
        """Over the last steps, without those that compiled, or `None`."""
        tokens, seconds = self._timed()
        return sum(tokens) / sum(seconds) if seconds else None

    def seconds_per_step(self):
        """Over the last steps, without those that compiled, or `None`."""
        _, seconds = self._timed()
        return sum(seconds) / len(seconds) if seconds else None

    def _timed(self):
        pairs = [pair for pair in self._window if pair[1] is not None]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def get_state(self):
        """A dict that can be written as JSON, and that nothing changes."""
        return {
            "entries": copy.deepcopy(self.entries),
            "stride": self.stride,
            "compile_seconds": self.compile_seconds,
            "totals": dataclasses.asdict(self.totals),
            "epoch": dataclasses.asdict(self.epoch),
            "mean": self._mean.get_state(),
        }

    def set_state(self, state):
        """Goes on from what `get_state` returned."""
        self.__init__()
        entries = copy.deepcopy(state["entries"])
        if "totals" in state:
            self.stride = state["stride"]
            self.totals = Totals(**state["totals"])
            self.epoch = Totals(**state["epoch"])
            self.smoothed_loss = self._mean.set_state(state["mean"])
            self.entries.update(entries)
        else:  # Of an earlier version: these are all steps.
            for values in zip(*(entries[name] for name in STEPS), strict=True):
                self._add(**dict(zip(STEPS, values, strict=True)))
            self.entries.update({name: entries[name] for name in VALIDATIONS})
        self.compile_seconds = state["compile_seconds"]
        self._last = {
            name: values[-1] for name, values in self.entries.items() if values
        }
        self._window.clear()  # Speed may be another one now.

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
        statistics = {
            "name": name,
            "num_params": num_params,
            "total tokens": self.totals.tokens,
            "total time": self.totals.seconds + self.compile_seconds,
            "loss": [entries["loss"]],
            "val_loss": [entries["val_loss"]],
            "lr": [max(entries["learning_rate"], default=0.0)],
            "compile time": self.compile_seconds,
            "tokens per second": self.totals.tokens_per_second(),
        }
        for key in (*STEPS, *VALIDATIONS, SAMPLES):
            statistics.setdefault(key, [entries[key]])
        statistics["stats"] = list(statistics)
        with new_file(Path(folder) / FILE_NAME) as file:
            file.write(json.dumps(statistics).encode())
        return statistics


def add_evaluation(folder, figures):
    """Adds what the finished model was found to be to `stats.json`.

    Args:
        folder: path.
        figures: dict, as `Perplexity.summary` returns it.
    """
    path = Path(folder) / FILE_NAME
    statistics = {**read_json(path), "evaluation": figures}
    with new_file(path) as file:
        file.write(json.dumps(statistics).encode())


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
