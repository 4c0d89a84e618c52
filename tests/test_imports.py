"""Which module imports which: each can be the first, and none in a circle."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
PACKAGES = ("keras_bwetaf", "converters")
# Runs in the folder of other packages that carry PyTorch's code: it imports
# PyTorch, which not everybody has.
TRAVELS = "converters.transformers_model"
# Optional, but for JAX, Keras and KerasHub, which are slow.
WITHIN_FUNCTIONS = (
    *("converters", "grain", "jax", "keras", "keras_bwetaf", "keras_hub"),
    *("IPython", "matplotlib", "pyarrow", "tensorflow", "torch"),
)
# One process has other people's packages ready. Each of its children imports
# one of our modules, and nothing of ours before.
IMPORT_EACH = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
import h5py, huggingface_hub, jax, keras, keras_hub, rich, tokenizers, typer
assert not any(name.startswith(("keras_bwetaf", "converters"))
               for name in sys.modules)
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


def modules():
    """Name of each module and its path."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


def imported(path, names):
    """Names of our modules that a file imports, within functions, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in wanted:
            # What is no module is an object of the one before it.
            name = name if name in names else name.rpartition(".")[0]
            if name in names:
                yield name


def packages_of(node):
    """Names of the packages that a function imports."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            yield each.module.partition(".")[0]


def with_packages(name):
    """A module and the packages it is in, which Python imports before it."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def graph():
    names = modules()
    return {
        name: {
            each
            for target in imported(path, names)
            for each in with_packages(target)
            # Its own packages are there before it.
            if each not in with_packages(name)
        }
        for name, path in names.items()
    }


def circle(arrows):
    """A circle in a graph, a list of names, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for target in sorted(arrows[name]):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return None

    return next(filter(None, map(visit, sorted(arrows))), None)


def test_no_circle():
    arrows = graph()
    assert len(arrows) > 90
    assert circle(arrows) is None
    # And one would be found.
    lowest = arrows["keras_bwetaf.checks"]
    arrows["keras_bwetaf.checks"] = lowest | {"keras_bwetaf.models.trainer"}
    assert "keras_bwetaf.checks" in circle(arrows)


def test_converters_know_nothing_of_keras_bwetaf():
    for name, targets in graph().items():
        if name.startswith("converters"):
            ours = {each for each in targets if each.startswith("keras_bwetaf")}
            assert not ours, name


def test_imports_within_functions_are_of_optional_or_slow_packages():
    names = modules()
    inside = {
        (name, target)
        for name, path in names.items()
        if not name.startswith(TRAVELS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for target in packages_of(node)
    }
    assert {target for _, target in inside} <= set(WITHIN_FUNCTIONS)
    assert {name for name, target in inside if target == "keras_bwetaf"} == {
        "keras_bwetaf.data.tracking"  # Of a class that derives from Grain's.
    }


@pytest.mark.slow
def test_each_module_can_be_the_first():
    names = [name for name in modules() if not name.startswith(TRAVELS)]
    names = [name for name in names if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
