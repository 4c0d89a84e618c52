"""What the modules of converters import, and when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import converters

ROOT = Path(converters.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in FILES
    if path.name not in ("__init__.py", "__main__.py")
]
# Slow, and not installed with this package.
OPTIONAL = {"torch"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports(path):
    tree = ast.parse(path.read_text())
    packages = {name.partition(".")[0] for name in imports(tree)}
    assert "keras_bwetaf" not in packages
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    inside = {name for node in functions for name in imports(node)}
    assert inside <= OPTIONAL


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported_first(module):
    subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {module}"],
        check=True,
        cwd=ROOT.parent,
    )
