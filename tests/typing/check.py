"""Runs pyright on the right and the wrong uses: `python -m tests.typing.check`.

Fails unless the wrong uses have an error on each line that is marked, and on
no other, and the right ones have none.
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
MARK = "# error"


def expected(path):
    """Numbers of the marked lines."""
    lines = path.read_text().splitlines()
    return {
        number for number, line in enumerate(lines, 1) if line.endswith(MARK)
    }


def errors(paths):
    """What pyright says, a dict of path to dict of line to message."""
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable]
    made = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True
    )
    if made.returncode not in (0, 1):  # 1: it found errors.
        raise RuntimeError(f"pyright failed: {made.stdout}{made.stderr}")
    found = {path: {} for path in paths}
    for each in json.loads(made.stdout)["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            found[Path(each["file"])][line] = each["message"]
    return found


def main():
    problems = []
    paths = [FOLDER / "right.py", FOLDER / "wrong.py"]
    for path, found in errors(paths).items():
        lines = expected(path)
        problems += [
            f"{path.name}:{line}: no error is found"
            for line in sorted(lines - set(found))
        ]
        problems += [
            f"{path.name}:{line}: {found[line]}"
            for line in sorted(set(found) - lines)
        ]
        print(f"{path.name}: {len(found)} errors, {len(lines)} expected")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
