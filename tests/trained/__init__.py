"""Small checkpoints that the original package trained on real text.

"stories" is part of the repository (`make.py` made it). "kjv" is larger and
only at hand where the repository is developed: the slow tests use it, too.
"""

import json
from pathlib import Path

import numpy as np
import pytest

NAMES = ["stories", pytest.param("kjv", marks=pytest.mark.slow)]
FOLDER = Path(__file__).parent / "stories-0.4m"
ROWS = FOLDER.with_name("validation.npy")  # uint16 (rows, 512), EOS is 0.
KJV = Path(__file__).resolve().parents[3] / "shared" / "checkpoints" / "kjv-6m"


def checkpoint(name):
    """The model folder of the original with this name."""
    if name == "kjv" and not KJV.is_dir():
        pytest.skip(f"the larger trained checkpoint is not at {KJV}")
    return {"stories": FOLDER, "kjv": KJV}[name]


def documents(folder):
    """Texts, `{"train": list of str, "val": list of str}`."""
    if folder == FOLDER:
        from tests.trained.make import stories

        return stories()
    return json.loads(folder.with_name("kjv-docs.json").read_text())


def validation_rows(folder):
    """Tokens of `documents(folder)["val"]`: uint16 (rows, 512), EOS is 0."""
    return np.load(
        ROWS if folder == FOLDER else folder.with_name("kjv-val.npy")
    )
