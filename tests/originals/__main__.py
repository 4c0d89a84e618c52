"""Installs the original packages of versions 2 and 4."""

import subprocess
import sys

from tests.originals import FOLDER, PACKAGES

for version, package in PACKAGES.items():
    # What they need is installed: `tests.original` needs the same.
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps"),
            *("--upgrade", "--target", str(FOLDER / version), package),
        ],
        check=True,
    )
