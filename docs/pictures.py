"""Draws the pictures of README and docs from committed numbers.

    python docs/pictures.py [FOLDER]

`decode.svg` shows the table "Generation" of docs/benchmarks.md. `losses.svg`
shows pictures/stories.json, the statistics of this run on about 20,000 stories
that examples/tiny/grammar.py makes up:

    keras-bwetaf train runs/stories --data stories.jsonl --preset tiny
        --vocabulary-size 1024 --steps 400 --batch-size 8 --recipe name=small
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from keras_bwetaf.training import plot_losses

DOCS = Path(__file__).resolve().parent
PICTURES = DOCS / "pictures"
OURS, PEER = "tab:cyan", "lightgray"


def main(folder=PICTURES):
    # Text stays text, and the same numbers give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "keras_bwetaf"}
    with matplotlib.rc_context(style):
        statistics = json.loads((PICTURES / "stories.json").read_text())
        plot_losses(statistics, Path(folder) / "losses.svg")
        draw_decode(*decode_speeds(), Path(folder) / "decode.svg")


def decode_speeds():
    """Rows of the table: a dict of name to tokens per second; the floor's."""
    page = (DOCS / "benchmarks.md").read_text()
    table = page.split("## Generation")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \|", table, re.MULTILINE)
    speeds = {name: float(speed) for name, speed in rows}
    (floor,) = (name for name in speeds if name.startswith("floor"))
    return speeds, speeds.pop(floor)


def draw_decode(speeds, floor, path):
    """A bar for each row, and a line at the floor."""
    figure = Figure((8, 3.4), layout="constrained")
    axes = figure.subplots()
    names = list(speeds)[::-1]
    colors = [OURS if name.startswith("keras") else PEER for name in names]
    values = [speeds[name] for name in names]
    lines = [name.replace(", ", "\n", 1) for name in names]
    axes.barh(lines, values, color=colors)
    for line, value in zip(lines, values, strict=True):
        label = f"{value} ({value / floor:.0%})  "
        axes.text(value, line, label, ha="right", va="center")
    axes.axvline(floor, color="black", lw=1, ls="--")
    axes.annotate(
        f"floor: {floor}",
        (floor, len(names) - 0.45),
        ha="center",
        va="bottom",
        annotation_clip=False,
    )
    axes.set_xlabel("tokens per second (share of the floor)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
