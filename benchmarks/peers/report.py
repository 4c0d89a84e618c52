"""Results as a Markdown table.

    python -m benchmarks.peers.report docs/pictures/peers.json [PAGE]

It is printed, or takes the place of the table of earlier results on a page.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from benchmarks.peers.models import OURS, PEERS

__all__ = ["FLOOR", "replace_table", "table"]

FLOOR = "floor"
COLUMNS = [*PEERS, FLOOR]
START = "| 97M |"


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
        f"{START} " + " | ".join(present) + " |",
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


def replace_table(page, results):
    """A Markdown page with these results instead of earlier ones.

    Args:
        page: str.
        results: dict. See `table`.

    Raises:
        ValueError: If the page has no such table, or several.
    """
    old = re.compile(
        rf"^{re.escape(START)}.*\n(\|.*\n)*(\nNot installed: .*\n)?",
        re.MULTILINE,
    )
    page, count = old.subn(lambda _: table(results) + "\n", page)
    if count != 1:
        raise ValueError(
            f"Expected one table that starts with {START!r} on the page. "
            f"Received: {count}"
        )
    return page


def main(path, page=None):
    results = json.loads(Path(path).read_text())
    if page is None:
        print(table(results))
    else:
        text = replace_table(Path(page).read_text(), results)
        Path(page).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
