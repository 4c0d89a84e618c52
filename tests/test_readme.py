"""What the README says is there and works."""

import re
from pathlib import Path

import pytest

import keras_bwetaf

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_first_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(example, names)
    told = capsys.readouterr().out
    printed = re.search(
        r"```python\n.*?```\n\n```\n(.*?)\n```", README, re.DOTALL
    )
    assert told.startswith("Once upon a time") and len(told) > 400
    assert told.rstrip() == printed[1]
    assert [text[:3] for text in names["texts"]] == ["Onc", "Mia"]
    assert {"tiny", "97m"} <= keras_bwetaf.list_presets().keys()


def test_stories_are_those_of_the_command():
    command, stories = re.search(
        r"<!-- main-job -->\n```bash\n(.*?)\n```\n.*?```\n(.*?)\n```",
        README,
        re.DOTALL,
    ).groups()
    seeds = re.search(r"for seed in ([\d ]+);", command)[1].split()
    new_tokens = int(re.search(r"--max-new-tokens (\d+)", command)[1])
    prompt = re.search(r'"([^"]+)"; done', command)[1]
    told = keras_bwetaf.from_preset("tiny").generate(
        [prompt] * len(seeds),
        max_new_tokens=new_tokens,
        seed=[int(seed) for seed in seeds],
    )
    assert len(told) == 3 and "\n".join(told) == stories


def test_the_tree_has_the_files_there_are():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", page, re.DOTALL)
    folders, named = [], set()
    for line in tree.splitlines():
        if line.startswith(" " * 20):
            continue  # a description that goes on
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"  +", line.strip())[0].split(", "):
            path = ROOT.joinpath(*folders[:depth], name)
            assert path.exists(), name
            named.add(path)
        folders = [*folders[:depth], name]
    inner = {parent for path in named for parent in path.parents}
    whole = {path for path in named if path.is_dir()} - inner
    for package in ("keras_bwetaf", "converters"):
        for path in (ROOT / package).rglob("*.py"):
            is_named = path in named or not whole.isdisjoint(path.parents)
            assert is_named or path.stem.startswith("__"), path


@pytest.mark.parametrize("name", ["main-job", "tests"])
def test_commands_are_where_ci_looks_for_them(name):
    pattern = rf"<!-- {name} -->\n```bash\n(.+)\n```"
    (command,) = re.findall(pattern, README)
    assert "pip" in command
