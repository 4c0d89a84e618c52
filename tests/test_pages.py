"""README and docs: code blocks run, links lead somewhere, nothing is lost."""

import ast
import importlib.util
import json
import re
import shutil
import statistics
import sys
from unittest import mock

import keras
import pytest
import yaml

import converters
import keras_bwetaf
from benchmarks.peers import report
from tests import pages, trained
from tests.data.conftest import make_documents
from tests.evaluation import tasks

HUB = "hf://WICKED4950/BwETAFv3-97M"
FEW_STEPS = (
    "--steps 2 --batch-size 8 --sequence-length 16 --validation-batches 1 "
    "--validation-fraction 0.1"
)
SHORT_RUN = (
    ("--vocabulary-size 4096", "--vocabulary-size 300"),
    ("--steps 2000", FEW_STEPS),
)
# Texts on a page, and the smaller ones that are run instead.
REPLACE = {
    "README.md": [
        *SHORT_RUN,
        ('"tiny"', '"small"'),
        ('"97m"', '"small"'),
        ("--preset tiny --voc", "--preset small --voc"),
        ("max_new_tokens=240", "max_new_tokens=8"),
        ("steps_per_epoch=20", "steps_per_epoch=2"),
        (HUB, "flax-folder"),
    ],
    "CONTRIBUTING.md": [],
    "benchmarks/README.md": [],
    "docs/benchmarks.md": [],
    "docs/compatibility.md": [],
    "docs/distributed.md": [('"97m"', '"small"')],
    "docs/dtypes.md": [
        ('"97m"', '"small"'),
        ("quantize tiny", "quantize small"),
    ],
    "docs/evaluation.md": [
        ("eval tiny", "eval small"),
        (
            "97m --tasks piqa,arc_easy",
            "small --tasks stories_choice --include-path .",
        ),
        ('"tiny"', '"small"'),
    ],
    "docs/family.md": [
        ('"v2-53m"', '"small"'),
        ('"v4-preview"', '"small-v4"'),
    ],
    "docs/finetuning.md": [
        ('"tiny"', '"small"'),
        ("--preset tiny", "--preset small"),
        ("steps_per_epoch=20", "steps_per_epoch=2"),
        ("--steps 200", FEW_STEPS),
    ],
    "docs/index.md": [
        ('"tiny"', '"small"'),
        ("--preset tiny", "--preset small"),
        ("info tiny", "info small"),
        ("max_new_tokens=240", "max_new_tokens=8"),
    ],
    "docs/training.md": [
        *SHORT_RUN,
        ("--preset tiny", "--preset small"),
        ("vocabulary_size=4096", "vocabulary_size=300"),
        ('"97m", dtype', '"small", dtype'),
        ('"tinystories"', '"corpus/*.txt"'),
        ("validation_fraction=0.01", "validation_fraction=0.2"),
        ("sequence_length=2048", "sequence_length=16"),
        ("batch_size=32", "batch_size=8"),
        ("10_000", "4"),
        ("steps_per_epoch=500", "steps_per_epoch=2"),
        ("epochs=20", "epochs=2"),
        ("save_every=500", "save_every=2"),
    ],
}
SLOW = {
    "docs/dtypes.md",
    *("README.md", "docs/index.md"),
    *("docs/training.md", "docs/finetuning.md", "docs/evaluation.md"),
}
# Run by tests/converters/test_readme.py, where the small folders are.
ELSEWHERE = {"docs/converting.md"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the pages take for granted."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "corpus").mkdir()
    for number, text in enumerate(make_documents(200)):
        (folder / "corpus" / f"{number}.txt").write_text(text)
    tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset("tiny")
    texts = ["The web is wide. "] * 50
    keras_bwetaf.data.pack(texts, folder / "web", tokenizer, progress=False)
    backbone = keras_bwetaf.BwETAFBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=256,
    )
    preprocessor = keras_bwetaf.BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=256
    )
    lm = keras_bwetaf.BwETAFCausalLM(backbone, preprocessor)
    lm.save_to_preset(folder / "small")
    backbone = keras_bwetaf.models.BwETAFV4Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        num_experts=4,
        num_experts_per_token=2,
        max_sequence_length=256,
    )
    preprocessor = keras_bwetaf.BwETAFV4CausalLMPreprocessor(
        tokenizer, sequence_length=256
    )
    lm = keras_bwetaf.BwETAFV4CausalLM(backbone, preprocessor)
    lm.save_to_preset(folder / "small-v4")
    shutil.copytree(trained.FOLDER, folder / "flax-folder")
    tasks.write(folder, 4)
    (folder / "prompts.txt").write_text("Once\nOne day\n")
    return folder


@pytest.fixture
def workplace(files, tmp_path, monkeypatch):
    """The current folder, with those files."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "0"])
    yield
    keras.distribution.set_distribution(None)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in REPLACE
    ],
)
def test_blocks_run(page, workplace, monkeypatch):
    # More than this process can be part of.
    with mock.patch.object(keras_bwetaf, "initialize") as initialize:
        pages.run(page, monkeypatch, REPLACE[page])
    assert initialize.called == (page == "docs/distributed.md")


@pytest.mark.fast
def test_every_page_with_code_is_run():
    with_code = {
        page for page in pages.PAGES if pages.blocks(page, "python", "bash")
    }
    assert with_code == REPLACE.keys() | ELSEWHERE


@pytest.mark.parametrize("page", [*REPLACE, *ELSEWHERE])
def test_keras_is_imported_after_the_package(page):
    """Which chooses the backend."""
    code = "".join(block.code for block in pages.blocks(page, "python"))
    before = code.partition("import keras_bwetaf")[0]
    assert not re.search(r"import keras\b", before)


def test_every_block_has_a_known_language():
    for page in pages.PAGES:
        fences = re.findall(r"^ *```.*$", pages.read(page), re.MULTILINE)
        known = pages.blocks(page, "python", "bash", "")
        assert len(fences) == 2 * len(known), page


@pytest.mark.fast
def test_readme_is_a_front_page():
    assert len(pages.read("README.md").encode()) <= 9_000


def anchors(page):
    """What a link to a heading of a page may end with."""
    headings = re.findall(r"^#+ (.+)$", pages.read(page), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in headings
    }


def relative_links(page):
    """Paths from the page's folder, without a heading, and headings."""
    text = re.sub(r"^```.*?^```$", "", pages.read(page), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            path, _, heading = link.partition("#")
            yield path, heading


@pytest.mark.fast
@pytest.mark.parametrize("page", pages.PAGES)
def test_links(page):
    for path, heading in relative_links(page):
        target = (pages.ROOT / page).parent / path
        if path == "":
            target = pages.ROOT / page
        assert target.is_file(), path
        target = target.resolve().relative_to(pages.ROOT).as_posix()
        if page.startswith("docs/"):  # MkDocs sees no others.
            assert target.startswith("docs/")
        if heading:
            assert heading in anchors(target), (path, heading)


def test_readme_has_links():
    assert len(list(relative_links("README.md"))) > 10


def nav_pages(entries):
    for entry in entries:
        (value,) = entry.values()
        yield from nav_pages(value) if isinstance(value, list) else [value]


@pytest.mark.fast
def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load(pages.read("mkdocs.yml"))["nav"]
    docs = (page for page in pages.PAGES if page.startswith("docs/"))
    expected = sorted(page.removeprefix("docs/") for page in docs)
    assert sorted(nav_pages(nav)) == expected


REFERENCE = [page for page in pages.PAGES if page.startswith("docs/api/")]


def test_reference_has_every_public_name():
    """Under the module that exports it, or the top one."""
    described = re.findall(
        r"^::: (\S+)$", "\n".join(map(pages.read, REFERENCE)), re.MULTILINE
    )
    assert len(described) == len(set(described))
    objects = [resolve(name) for name in described]
    for module in ("", ".data", ".layers", ".models", ".training"):
        module = importlib.import_module("keras_bwetaf" + module)
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, type(importlib)):
                assert value in objects, name
    for name in converters.__all__:
        assert getattr(converters, name) in objects, name


def resolve(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_pictures_show_the_committed_numbers(tmp_path):
    path = pages.ROOT / "docs" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in ("losses.svg", "peers.svg"):
        made, committed = (
            re.findall(r"<text.*?>(.*?)</text>", (folder / name).read_text())
            for folder in (tmp_path, module.PICTURES)
        )
        assert made == committed and len(made) > 5, name
        assert (module.PICTURES / name).stat().st_size < 100_000
    results = json.loads((module.PICTURES / "peers.json").read_text())
    speeds = results["measures"]["batch 1, 32 + 256, greedy"]["values"]
    ours = statistics.median(speeds["keras_bwetaf"])
    assert f"{ours:.0f}" in [text.strip() for text in committed]
    assert report.table(results) in pages.read("docs/benchmarks.md")


def imported(path):
    """Names of modules that a file imports, and what it imports from them."""
    for node in ast.walk(ast.parse((pages.ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_walks_go_downwards():
    """Files of a walk exist and occur once; one above imports each."""
    walks = pages.read("docs/architecture.md").split("\n### ")[1:]
    assert len(walks) == 3
    for walk in walks:
        files = re.findall(r"^\d+\. `(\S+\.py)`:", walk, re.MULTILINE)
        assert len(files) == len(set(files)) > 10
        above = set(imported(files[0]))
        for path in files[1:]:
            module = path.removesuffix(".py").replace("/", ".")
            package = module.rpartition(".")[0]
            assert module in above or package in above - {"converters"}, path
            above |= set(imported(path))
