"""Pictures of a training: what is drawn where, and that it is a picture."""

import json

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest

from keras_bwetaf.training import (
    TensorStatistics,
    plot_losses,
    plot_statistics,
    plots,
)
from keras_bwetaf.training.statistics import read_statistics, smooth

STATISTICS = {
    "name": "run",
    "num_params": 1000,
    "total tokens": 600,
    "loss": [[3.0, 2.0, 1.5], [1.0]],
    "val_loss": [[2.5], [1.25]],
    "step": [[11, 12, 13], [14]],
    "val_step": [[12], [14]],
    "learning_rate": [[0.1, 0.2, 0.3], [0.4]],
}
TENSORS = TensorStatistics(
    "Gradients",
    [
        {"name": "all", "size": 3, "norm": 5.0, "max_abs": 4.0},
        {"name": "query/kernel", "size": 2, "norm": 3.0, "max_abs": 2.0},
        {"name": "query/bias", "size": 1, "norm": 4.0, "max_abs": 4.0},
    ],
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], plots._save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def lines(axes):
    return {line.get_label(): line.get_xydata().T for line in axes.lines}


def test_losses(drawn, tmp_path):
    """Trainings follow each other; pyplot and its backend are not touched."""
    backend = matplotlib.get_backend()
    path = tmp_path / "losses.png"
    assert plot_losses(STATISTICS, path) == path
    assert path.read_bytes().startswith(PNG)
    assert matplotlib.get_backend() == backend
    assert not matplotlib.pyplot.get_fignums()
    (figure,) = drawn
    losses, rates = figure.axes
    curves = lines(losses)
    np.testing.assert_array_equal(
        curves["loss"], [[11, 12, 13, 14], [3, 2, 1.5, 1]]
    )
    np.testing.assert_array_equal(
        curves["loss, smoothed"],
        [[11, 12, 13, 14], smooth([3.0, 2.0, 1.5, 1.0])],
    )
    np.testing.assert_array_equal(
        curves["validation loss"], [[12, 14], [2.5, 1.25]]
    )
    (rate,) = rates.lines
    np.testing.assert_array_equal(rate.get_ydata(), [0.1, 0.2, 0.3, 0.4])
    assert losses.get_title() == "run, 1,000 parameters, 600 tokens"
    by_label = {line.get_label(): line for line in losses.lines}
    assert by_label["loss"].get_alpha() < 0.5
    assert by_label["loss, smoothed"].get_alpha() is None


@pytest.mark.parametrize("ending", [".png", ".svg", ".jpg", ".pdf"])
def test_a_notebook_shows_the_picture(tmp_path, ending):
    """What is returned is the path, and shows itself where it can be shown."""
    path = tmp_path / f"losses{ending}"
    picture = plot_losses(STATISTICS, path)
    assert picture == path and str(picture) == str(path)
    content = path.read_bytes()
    shown = {
        ".png": picture._repr_png_(),
        ".jpg": picture._repr_jpeg_(),
        ".svg": picture._repr_svg_(),
    }
    expected = content.decode() if ending == ".svg" else content
    assert {name: each for name, each in shown.items() if each} == (
        {} if ending == ".pdf" else {ending: expected}
    )
    path.unlink()
    assert picture._repr_png_() is picture._repr_svg_() is None


def test_the_originals_file(drawn, tmp_path, trained_checkpoint):
    """It says nothing of steps. Its first validation was before training."""
    path = plot_losses(trained_checkpoint, tmp_path / "losses.svg")
    assert b"<svg" in path.read_bytes()
    (axes,) = drawn[0].axes
    curves = lines(axes)
    assert curves["loss"].shape == (2, 700)
    (validations,) = read_statistics(trained_checkpoint)["val_loss"]
    np.testing.assert_allclose(
        curves["validation loss"],
        [np.linspace(1, 700, len(validations)), validations],
    )


def test_what_is_missing(drawn, tmp_path):
    """No validations; a gap where a number is none; a file by its name."""
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"loss": [[3.0, 2.0]], "val_loss": [[]]}))
    assert plot_losses(file) == tmp_path / "losses.png"
    assert plot_losses(tmp_path) == tmp_path / "losses.png"
    assert set(lines(drawn[0].axes[0])) == {"loss", "loss, smoothed"}


def test_no_path_for_a_dict():
    with pytest.raises(ValueError, match="Received: path=None"):
        plot_losses(STATISTICS)


def test_statistics(drawn, tmp_path):
    path = plot_statistics(TENSORS, tmp_path / "bars.png", "max_abs")
    assert path.read_bytes().startswith(PNG)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [4.0, 2.0, 4.0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["all", "query/kernel", "query/bias"]
    plot_statistics(TENSORS, path)
    (axes,) = drawn[1].axes
    assert [bar.get_height() for bar in axes.patches] == [5.0, 3.0, 4.0]
    assert not matplotlib.pyplot.get_fignums()


def test_no_such_quantity(tmp_path):
    with pytest.raises(ValueError, match="Received: quantity='median'"):
        plot_statistics(TENSORS, tmp_path / "bars.png", "median")
