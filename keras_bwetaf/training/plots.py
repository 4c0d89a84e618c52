"""Pictures of a training, in files."""

from pathlib import Path
from typing import Any

import numpy as np

from converters.files import local_path, new_file
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.optional import import_optional
from keras_bwetaf.training.statistics import read_statistics, smooth

LOSSES = "losses.png"
RAW, SMOOTHED, VALIDATION = "tab:blue", "tab:blue", "tab:red"


class Picture(type(Path())):
    """The path of a picture. As the value of a notebook's cell, it is shown."""

    def _repr_png_(self):
        return self._content(".png")

    def _repr_jpeg_(self):
        return self._content(".jpg")

    def _repr_svg_(self):
        content = self._content(".svg")
        return content and content.decode()

    def _content(self, ending):
        is_shown = self.suffix == ending and self.is_file()
        return self.read_bytes() if is_shown else None


def plot_losses(source: Any, path: PathLike | None = None) -> Any:
    """Draws the losses of a training, and its learning rate.

    The loss of every step is light, its exponential mean strong. The files
    of the original package don't say when losses were validated; there, they
    are spread evenly from the first step to the last.

    Args:
        source: str or path, a folder with `stats.json` or the file; or what
            is in such a file, a dict.
        path: str or path of the picture, whose ending says its format.
            Defaults to `losses.png` in the folder.

    Returns:
        Path of the picture, which is shown as the value of a notebook's cell.

    Raises:
        ValueError: If there are no losses, or no path for a dict.
        FileNotFoundError: If there is no such file.
        ImportError: If matplotlib is not installed.

    Example:

    ```python
    lm.fit(train, verbose=0, callbacks=[Monitor("run")])
    plot_losses("run", "losses.svg")
    ```
    """
    import_optional("matplotlib", "train", "`plot_losses`")
    if isinstance(source, dict):
        statistics = source
        if path is None:
            raise ValueError(
                "Expected the path of the picture along with a dict. "
                "Received: path=None"
            )
    else:
        statistics = read_statistics(source)
        if path is None:
            folder = Path(source)
            folder = folder if folder.is_dir() else folder.parent
            path = folder / LOSSES
    losses = _joined(statistics, "loss")
    steps = _joined(statistics, "step", np.arange(1, len(losses) + 1))
    validations = _joined(statistics, "val_loss")
    validation_steps = _joined(
        statistics,
        "val_step",
        np.linspace(steps[0], steps[-1], len(validations)),
    )
    rates = _joined(statistics, "learning_rate")

    figure, axes = _figure(
        (9, 6), num_rows=2 if len(rates) else 1, heights=(4, 1)
    )
    axes[0].plot(steps, losses, color=RAW, alpha=0.25, lw=0.7, label="loss")
    axes[0].plot(
        steps, smooth(losses), color=SMOOTHED, lw=1.8, label="loss, smoothed"
    )
    if len(validations):
        axes[0].plot(
            validation_steps,
            validations,
            color=VALIDATION,
            marker="o",
            markersize=4,
            lw=1,
            label="validation loss",
        )
    axes[0].set_title(_title(statistics))
    axes[0].set_ylabel("loss")
    axes[0].legend()
    if len(rates):
        axes[1].plot(steps, rates, color="tab:gray")
        axes[1].set_ylabel("learning rate")
    axes[-1].set_xlabel("step")
    return _save(figure, path)


def plot_statistics(
    statistics: Any, path: PathLike, quantity: str = "norm"
) -> Any:
    """Draws a quantity of every tensor as a bar.

    Args:
        statistics: `TensorStatistics`, as `gradient_statistics` and
            `parameter_statistics` return them.
        path: str or path of the picture, whose ending says its format.
        quantity: str. A column of the table. Defaults to `"norm"`.

    Returns:
        Path of the picture, which is shown as the value of a notebook's cell.

    Raises:
        ValueError: If there is no such quantity.
        ImportError: If matplotlib is not installed.
    """
    import_optional("matplotlib", "train", "`plot_statistics`")
    quantities = [name for name in statistics[0] if name != "name"]
    if quantity not in quantities:
        raise ValueError(
            f"`quantity` must be one of {quantities}. Received: "
            f"quantity={quantity!r}"
        )
    names = [each["name"] for each in statistics]
    heights = [each[quantity] for each in statistics]
    figure, (axes,) = _figure((max(6, 0.17 * len(names)), 7))
    axes.bar(range(len(names)), heights, color=RAW)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_xlim(-1, len(names))
    axes.set_ylabel(quantity)
    axes.set_title(statistics.title)
    return _save(figure, path)


def _figure(size, num_rows=1, heights=(1,)):
    """A figure by itself: pyplot, and what others draw, stay as they are."""
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=120, layout="constrained")
    axes = figure.subplots(
        num_rows,
        squeeze=False,
        sharex=True,
        height_ratios=heights[:num_rows],
    )[:, 0]
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    path = Picture(local_path("path", path))
    with new_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    return path


def _joined(statistics, key, default=()):
    """The values of all trainings, one after the other.

    Args:
        statistics: dict.
        key: str. Of a list of lists of numbers, in which `None` is none.
        default: array, for files without the key.
    """
    if key not in statistics:
        return np.asarray(default, "float64")
    return np.array([x for part in statistics[key] for x in part], "float64")


def _title(statistics):
    parts = [str(statistics.get("name", "training"))]
    for key, unit in (("num_params", "parameters"), ("total tokens", "tokens")):
        if key in statistics:
            parts.append(f"{statistics[key]:,} {unit}")
    return ", ".join(parts)
