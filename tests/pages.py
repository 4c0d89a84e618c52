"""The code blocks of README and docs, and how to run them."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import keras
import pytest

import converters.cli
import keras_bwetaf.cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = {
    "keras-bwetaf": keras_bwetaf.cli.main,
    "bwetaf-convert": converters.cli.main,
}
# They set up an environment, or are run by `.ci/run`.
SET_UP = (".", "bash", "mkdocs", "pip", "pre-commit", "python3", "uv")
TESTS = ("pytest", "tests.originals")


class Block(NamedTuple):
    """Attributes:

    language: str.
    code: str.
    line: int. The page's line above the code.
    """

    language: str
    code: str
    line: int


def read(page):
    return (ROOT / page).read_text()


def blocks(page, *languages):
    """The blocks of a page in these languages, in order."""
    text = read(page)
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        for match in found
        if match[1] in languages
    ]


def run(page, monkeypatch, replace=()):
    """Runs a page's blocks one after the other, in the current folder.

    Args:
        page: str. Path from the repository's root.
        monkeypatch: The fixture.
        replace: Pairs of a text on the page and the smaller one to run
            instead. Each must occur.

    Returns:
        dict, the names that the Python blocks have defined.
    """
    names, unused = {}, {old for old, _ in replace}
    for block in blocks(page, "python", "bash"):
        code = block.code
        for old, new in replace:
            if old in code:
                unused.discard(old)
                code = code.replace(old, new)
        if block.language == "python":
            # Errors name the page and the line.
            code = "\n" * block.line + code
            exec(compile(code, str(ROOT / page), "exec"), names)
        else:
            for command in code.strip().splitlines():
                run_command(command, monkeypatch)
    assert not unused
    return names


def run_command(command, monkeypatch):
    """Runs a command of this package; checks the names in any other."""
    words = shlex.split(command, comments=True)
    if words[0] in PROGRAMS:
        # A process of its own would not have it.
        keras.distribution.set_distribution(None)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            PROGRAMS[words[0]]()
        assert not end.value.code, command
    elif benchmark := re.search(r"python -m (benchmarks\.\w+)(.*)", command):
        module = ROOT / benchmark[1].replace(".", "/")
        source = module.with_suffix(".py")
        if module.is_dir():
            source = module / "__main__.py"
        for option in re.findall(r"--[a-z-]+", benchmark[2]):
            assert f'"{option}"' in source.read_text(), command
    elif " serve " in command:
        pass  # tests/converters/test_transformers_serve.py runs it.
    else:
        is_test = words[:2] == ["python", "-m"] and words[2] in TESTS
        assert words[0] in SET_UP or is_test, command
        extras = tomllib.loads(read("pyproject.toml"))["project"][
            "optional-dependencies"
        ]
        for names in re.findall(r"\.\[([a-z,]+)\]", command):
            assert extras.keys() >= set(names.split(",")), command
