"""`benchmarks.peers` measures what is installed, and names what is not."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import models, report
from benchmarks.peers.measures import Shape
from tests import pages

CONFIG = {
    "vocabulary_size": 256,
    "num_layers": 1,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 64,
    "intermediate_dim": 64,
    "max_sequence_length": 64,
    "dropout": 0.0,
    "rope_dtype": None,
    "initializer_range": 0.02,
    "embedding_initializer_range": 0.02,
}
DECODE, SAMPLED = "batch 1, 8 + 4, greedy", "batch 1, 8 + 4, sampled"
PREFILL, MEMORY = "first token after 8", "peak memory, batch 1, 8 + 4, greedy"


def run(path, *options):
    (path / "config.json").write_text(json.dumps(CONFIG))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *options]
        + ["--rounds", "1", "--config", str(path / "config.json")]
        + ["--output", str(path / "peers.json")],
        capture_output=True,
        text=True,
        cwd=pages.ROOT,
    )
    assert not result.returncode, result.stderr
    return result.stdout, json.loads((path / "peers.json").read_text())


@pytest.mark.slow
def test_all_that_is_installed_is_measured(tmp_path):
    printed, results = run(
        tmp_path,
        *("--only", "decode", "prefill", "memory"),
        *("--decode", "1x8+4", "1x8+4,sampled"),
        *("--prefill", "8", "--memory", "1x8+4"),
    )
    optional = {name for name in models.PEERS if name.startswith("llama.cpp")}
    missing = set()
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            missing = optional
    assert results["missing"].keys() == missing
    present = models.PEERS.keys() - missing
    measures = results["measures"]
    assert list(measures) == [DECODE, SAMPLED, PREFILL, MEMORY]
    columns = {title: set(measures[title]["values"]) for title in measures}
    assert columns[SAMPLED] == present | {"floor"}
    assert columns[DECODE] == columns[PREFILL] == columns[SAMPLED] - {"BwETAF"}
    assert columns[MEMORY] == columns[DECODE] - {"floor"}
    for measure in measures.values():
        for values in measure["values"].values():
            (value,) = values
            assert value > 0
    assert printed.strip() == report.table(results)
    assert all(name in printed for name in missing)


@pytest.mark.slow
def test_measures_of_an_earlier_run_stay(tmp_path):
    options = ("--peers", "transformers", "--only", "decode", "--decode")
    run(tmp_path, *options, "1x8+2")
    _, results = run(tmp_path, *options, "2x8+2")
    assert list(results["measures"]) == [
        "batch 1, 8 + 2, greedy",
        "batch 2, 8 + 2, greedy",
    ]


def test_a_process_imports_nothing_that_its_model_does_not_need():
    """Else its memory would be that of all packages."""
    code = "import sys, benchmarks.peers.worker; print(*sys.modules)"
    modules = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=pages.ROOT
    ).split()
    assert "numpy" in modules
    assert not {"jax", "keras", "keras_bwetaf", "torch"} & set(modules)


def test_results_of_another_dtype_do_not_mix(tmp_path):
    results = {"config": {}, "dtype": "float32", "threads": 2, "measures": {}}
    path = tmp_path / "peers.json"
    peers.save(path, results)
    with pytest.raises(ValueError, match="dtype=float32.*bfloat16.*--output"):
        peers.save(path, {**results, "dtype": "bfloat16"})
    assert json.loads(path.read_text()) == results


def test_shapes():
    assert Shape.parse("8x32+128") == Shape(8, 32, 128, sampled=False)
    assert Shape.parse("1x32+256,sampled") == Shape(1, 32, 256, sampled=True)
    with pytest.raises(Exception, match="'32' is no shape like 8x32"):
        Shape.parse("32")


def test_table():
    measures = {
        "decode": {
            "unit": "tokens/s",
            "values": {
                "keras_bwetaf": [90, 100, 500],
                "KerasHub": [50],
                "floor": [200],
            },
        },
        "memory": {
            "unit": "MiB",
            "values": {"keras_bwetaf": [800], "KerasHub": [1000]},
        },
    }
    missing = {"llama.cpp f32": ["llama_cpp", "gguf"]}
    lines = report.table({"measures": measures, "missing": missing})
    assert lines.splitlines() == [
        "| 97M | keras_bwetaf | KerasHub | floor |",
        "|---|---:|---:|---:|",
        "| decode, tokens/s | 100 | 50.0 (2.00) | 200 (0.50) |",
        "| memory, MiB | 800 | 1000 (1.25) |  |",
        "",
        "Not installed: llama.cpp f32 (llama_cpp, gguf).",
    ]


def test_the_table_of_a_page_is_replaced():
    old, new = (
        {
            "measures": {"m": {"unit": "s", "values": {"KerasHub": [value]}}},
            "missing": missing,
        }
        for value, missing in ((1, {"BwETAF": ["BwETAF"]}), (2, {}))
    )
    page = "Before.\n\n{}\n\n| another | table |\n"
    text = report.replace_table(page.format(report.table(old)), new)
    assert text == page.format(report.table(new))
    with pytest.raises(
        ValueError, match=r"'\| 97M \|' on the page. Received: 0"
    ):
        report.replace_table("No table.", new)


def test_what_is_not_installed_has_a_name(monkeypatch):
    monkeypatch.setattr(
        models.LlamaCpp, "requires", ("json", "no_such_package")
    )
    assert models.LlamaCpp.missing() == ["no_such_package"]


def test_floors_count_what_the_readme_says():
    """97M, of which the norms and biases are in no product."""
    from benchmarks.peers import floors
    from keras_bwetaf.preset_files import PRESETS

    card = PRESETS["97m"]
    count = floors.num_weights(card["config"])
    assert count == pytest.approx(card["parameters"], rel=2e-3)
    args = (card["config"], "float32")
    assert floors.decode_seconds(*args, 1, 1e9, 1e15) == 4 * count / 1e9
    assert floors.decode_seconds(*args, 8, 1e15, 1e9) == 16 * count / 1e9
    # Scores and sums of causal attention: (1 + ... + n) * 4 * 768, 12 blocks.
    head = 16384 * 768
    blocks = 2 * 100 * (count - head)
    attention = 12 * 4 * 768 * 100 * 100 / 2
    assert floors.prefill_seconds(card["config"], 100, 1.0) == (
        blocks + 2 * head + attention
    )
