"""Results as a Markdown table.

python -m benchmarks.peers.report docs/pictures/peers.json
"""

import json
import statistics
import sys
from pathlib import Path

from benchmarks.peers.models import OURS, PEERS

__all__ = ["FLOOR", "table"]

FLOOR = "floor"
COLUMNS = [*PEERS, FLOOR]


def table(results):
    """Medians, and in brackets how many times better this package is.

    Args:
        results: dict. What `python -m benchmarks.peers --output` writes.

    Returns:
        str, Markdown. The packages that are missing stand below the table.
    """
    measures = results["measures"].items()
    present = [
        name
        for name in COLUMNS
        if any(name in measure["values"] for _, measure in measures)
    ]
    lines = [
        "| | " + " | ".join(present) + " |",
        "|---|" + "---:|" * len(present),
    ]
    for title, measure in measures:
        cells = [cell(measure, name) for name in present]
        lines.append(f"| {title}, {measure['unit']} | {' | '.join(cells)} |")
    if results["missing"]:
        names = (
            f"{name} ({', '.join(packages)})"
            for name, packages in results["missing"].items()
        )
        lines += ["", f"Not installed: {'; '.join(names)}."]
    return "\n".join(lines)


def cell(measure, name):
    values = measure["values"]
    if name not in values:
        return ""
    median = statistics.median(values[name])
    text = f"{median:.0f}" if median >= 100 else f"{median:#.3g}"
    if name == OURS or OURS not in values:
        return text
    ratio = statistics.median(values[OURS]) / median
    if not measure["unit"].endswith("/s"):
        ratio = 1 / ratio
    return f"{text} ({ratio:.2f})"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
