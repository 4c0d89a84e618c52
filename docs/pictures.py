"""Draws the pictures of README and docs from committed numbers.

    python docs/pictures.py [FOLDER]

`peers.svg` shows pictures/peers.json, what `python -m benchmarks.peers` writes.
`losses.svg` shows pictures/stories.json, the statistics of this run on about
20,000 stories that examples/tiny/grammar.py makes up:

    keras-bwetaf train runs/stories --data stories.jsonl --preset tiny
        --vocabulary-size 1024 --steps 400 --batch-size 8 --recipe name=small
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from keras_bwetaf.training import plot_losses

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "pictures"
OURS, PEER = "tab:cyan", "lightgray"
# Of peers.json, by the titles of the panels.
PANELS = {
    "batch 1, tokens per second": "batch 1, 32 + 256, greedy",
    "batch 8, tokens per second": "batch 8, 32 + 128, greedy",
    "prompt of 1900 tokens, seconds": "first token after 1900",
    "1900 + 148 tokens, peak memory, MiB": (
        "peak memory, batch 1, 1900 + 148, greedy"
    ),
}


def main(folder=PICTURES):
    # Text stays text, and the same numbers give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "keras_bwetaf"}
    with matplotlib.rc_context(style):
        statistics = json.loads((PICTURES / "stories.json").read_text())
        plot_losses(statistics, Path(folder) / "losses.svg")
        results = json.loads((PICTURES / "peers.json").read_text())
        draw_peers(results["measures"], Path(folder) / "peers.svg")


def draw_peers(measures, path):
    """A panel for each of `PANELS` that has been measured."""
    panels = {title: name for title, name in PANELS.items() if name in measures}
    num_rows = -(-len(panels) // 2)
    figure = Figure((9, 2.8 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, 2, squeeze=False).flat
    for (title, name), axes in zip(panels.items(), grid, strict=False):
        axes.set_title(title, loc="left", fontsize="medium", pad=16)
        draw_bars(axes, measures[name]["values"])
    for axes in grid:  # What is left of it.
        axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None})


def draw_bars(axes, values):
    """A bar for each peer's median, and a line at the floor, if there is one.

    Args:
        axes: of Matplotlib.
        values: dict of name to list of float.
    """
    medians = {name: statistics.median(each) for name, each in values.items()}
    floor = medians.pop("floor", None)
    for name, median in reversed(medians.items()):
        color = OURS if name.startswith("keras") else PEER
        axes.barh(name, median, color=color)
        label = f" {median:.0f}" if median >= 10 else f" {median:.2f}"
        axes.text(0, name, label, va="center")
    if floor is not None:
        axes.axvline(floor, color="black", lw=1, ls="--")
        label = f"floor {floor:.0f}" if floor >= 10 else f"floor {floor:.2f}"
        axes.text(floor, len(medians) - 0.5, label, ha="center", va="bottom")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
