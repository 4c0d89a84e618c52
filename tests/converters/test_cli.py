import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import typer

import converters
from converters import cli
from tests.converters.folders import (
    FORMATS,
    assert_same_folders,
    change_msgpack,
    contents,
    edit_json,
)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command line; returns its status, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["bwetaf-convert", *map(str, arguments)]
        )
        previous = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            sys.exit(0)
        signal.signal(signal.SIGTERM, previous)
        out, error = capfd.readouterr()
        if isinstance(stopped.value.code, str):  # Python prints it, status 1.
            return 1, out, error + stopped.value.code
        return stopped.value.code or 0, out, error

    return run


@pytest.mark.parametrize("to", FORMATS)
def test_convert(run, tiny, tmp_path, to):
    status, out, _ = run(
        "convert", tiny["source"], tmp_path / "new", "--to", to
    )
    assert status == 0
    assert out == f"flax -> {to}: 82 tensors, 386.3 kB, in {tmp_path}/new\n"
    assert_same_folders(tmp_path / "new", tiny[to])


def test_names_are_shown_as_they_are(run, tiny, tmp_path):
    """Not as markup or emoji of rich, and not as codes of the terminal."""
    names = ["layer[bias]", "net[red].w", "w[/b]", ":smile:", "\x1b[2Ja\nb"]
    path = tmp_path / "a.safetensors"
    array = np.zeros(2, "float32")
    safetensors.numpy.save_file(dict.fromkeys(names, array), path)
    status, out, _ = run("inspect", path)
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert set(listed) == {*names[:-1], r"\x1b[2Ja\nb"}

    folder = tmp_path / "a[b]"
    shutil.copytree(tiny["safetensors"], folder)
    (folder / "\x1b]0;title\x07[i].txt").touch()
    status, out, _ = run("convert", folder, tmp_path / "[c]", "--to", "keras")
    assert status == 0
    assert f"in {tmp_path}/[c]\n" in out
    assert out.endswith("left behind: \\x1b]0;title\\x07[i].txt\n")
    status, _, error = run("inspect", tmp_path / "\x1b[31m.safetensors")
    assert (status, "\x1b" in error) == (1, False)
    assert r"\x1b[31m.safetensors" in error


def test_options_of_convert(run, tiny, tmp_path):
    source = tmp_path / "source"
    converters.convert(tiny["flax"], source, to="keras")
    (source / "README.md").write_text("Hello.")
    target = tmp_path / "new"
    command = ("convert", source, target, "--to", "torch", "--json")
    options = ("--dtype", "float16", "--max-shard-size", "50KB")
    options += ("--duplicate-head", "--no-optimizer")
    status, out, _ = run(*command, *options)
    assert status == 0
    assert json.loads(out) == {
        "source": str(source),
        "from": "keras",
        "target": str(target),
        "to": "torch",
        "tensors": 27,
        "bytes": 64_384,
        "optimizer": False,
        "non_finite": {},
        "left_behind": ["README.md"],
    }
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]
    before = contents(target)
    status, _, error = run(*command)
    assert status == 1
    assert "the target exists already" in error and "--overwrite" in error
    assert contents(target) == before
    status, out, _ = run(*command[:-1], "--overwrite")
    assert status == 0
    assert "left behind: README.md\n" in out
    assert_same_folders(target, tiny["torch"])


def test_non_finite_values_are_announced(run, tiny, tmp_path, copy):
    folder = copy("flax")

    def poison(tree):
        tree["params"]["emb"]["embedding"][0, :3] = float("nan")

    change_msgpack(folder / "good_stuff.pkl", poison)
    _, out, _ = run("convert", folder, tmp_path / "new", "--to", "keras")
    warning = "warning: 3 values of model.embed_tokens.weight are NaN or inf"
    assert warning in out


def test_inspect(run, tiny):
    status, out, _ = run("inspect", tiny["safetensors"])
    assert status == 0
    *_, last = out.splitlines()
    assert last == "safetensors: 32,192 parameters, 82 tensors, 386.3 kB"
    (line,) = (
        line
        for line in out.splitlines()
        if line.split()[0] == "model.layers.1.self_attn.k_proj.weight"
    )
    assert line.split()[1:7] == ["float32", "16", "x", "32", "2.0", "kB"]
    status, out, _ = run("inspect", tiny["safetensors"], "--json")
    assert status == 0
    assert json.loads(out) == converters.inspect(tiny["safetensors"])


def test_inspect_tells_problems(run, copy):
    folder = copy("safetensors")
    edit_json(folder / "config.json", vocab_size=511)
    status, out, _ = run("inspect", folder)
    assert status == 0
    assert "problem: " in out and "the configuration gives (511, 32)" in out


def test_verify(run, tiny, copy):
    status, out, _ = run("verify", tiny["flax"], tiny["keras"], "--no-logits")
    assert status == 0
    assert json.loads(out)["same"]
    folder = copy("safetensors")
    edit_json(folder / "config.json", hidden_dropout=0.5)
    status, out, _ = run("verify", tiny["flax"], folder)
    assert status == 1
    assert json.loads(out)["config"] == {"hidden_dropout": [0.05, 0.5]}
    # Without the state that one of them lacks, they are the same.
    folder = copy("flax", "stateless")
    (folder / "make_stuff_better.pkl").unlink()
    options = (tiny["flax"], folder, "--no-logits")
    assert run("verify", *options)[0] == 1
    assert run("verify", *options, "--no-optimizer")[0] == 0


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ((), 2, "convert"),
        (("convert", "a", "b"), 2, "--to"),
        (("convert", "a", "b", "--to", "onnx"), 2, "onnx"),
        (
            ("convert", "a", "b", "--to", "torch", "--max-shard-size", "5XB"),
            2,
            "expected a size such as 5GB",
        ),
        (
            ("convert", "a", "b", "--to", "flax", "--duplicate-head"),
            1,
            "are for safetensors and torch only",
        ),
        (("convert", "a", "b", "--to", "flax"), 1, "a: expected a folder. Rec"),
        (("inspect", "nowhere"), 1, "Received: nothing there"),
        (("verify", "a", "b"), 2, "a: expected a folder. Received: nothing"),
        (("convert", "hf://x", "b", "--to", "flax"), 1, "hf://owner/repo"),
    ],
)
def test_failures(run, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    received, out, error = run(*arguments)
    assert received == status
    assert message in out + error
    assert "Traceback" not in out + error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, size",
    [("1000", 1000), ("5gb", 5 * 10**9), ("1.5 MiB", 1536 << 10), ("2K", 2000)],
)
def test_sizes(text, size):
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["0.5", "0", "-1", "9" * 400, "5XB", "1e9"])
def test_wrong_sizes(text):
    with pytest.raises(typer.BadParameter, match="expected a size such as"):
        cli.parse_size(text)


def test_module_and_script_are_the_same(tiny, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "converters", "inspect", tiny["flax"]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "flax: 32,192 parameters" in result.stdout


def test_sigterm_removes_what_was_begun(tiny, tmp_path):
    code = (
        "import sys, time, converters.formats as formats\n"
        "from converters import cli\n"
        "def write(folder, *arguments, **options):\n"
        "    (folder / 'half').write_text('')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "formats.FORMATS['keras'].write = write\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code, "convert", tiny["flax"]]
    command += [tmp_path / "new", "--to", "keras"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 1
    time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.stdout.close()
    assert os.listdir(tmp_path) == []
