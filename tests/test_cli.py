import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import converters
from converters.formats import FORMATS
from keras_bwetaf import cli
from keras_bwetaf.evaluation import perplexity
from keras_bwetaf.presets import from_preset
from tests.original import manager, tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "the night sky"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that the original saved."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    model = manager(
        num_heads=4,
        attention_dim=32,
        vocab_size=512,
        num_blocks=2,
        ff_dim=48,
        max_len=64,
    )
    model.save_model(str(folder), opt_state=False)
    trained = tokenizer.create("tiny")
    trained.train([PROMPT] * 50, 300, special_tokens=["<|EOS|>", "<|UK|>"])
    trained.save(str(folder))
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command line; returns `(status, output, complaints)`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["keras-bwetaf", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output, complaints = capfd.readouterr()
        if isinstance(end.value.code, str):  # The interpreter prints it.
            return 1, output, complaints + end.value.code
        return end.value.code, output, complaints

    return run


def test_version(run):
    assert run("--version") == (0, version("keras-bwetaf") + "\n", "")


# The installed script does the same, and has the same name.
ANSWERS = """
import sys
status = 0
sys.argv[0] = "bin/keras-bwetaf"
from keras_bwetaf.cli import main
for arguments in [
    ["--version"], ["--help"], ["generate", "--help"], ["train", "--help"],
    ["info", "tiny"], ["info", "97m"], ["generate", "--top-p", "2", "a"],
    ["generate", "--preset", "98m", "a"], ["generate", ""], ["continue"],
    ["train", "run"], ["train", FINISHED],
]:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit:
        pass
    heavy = {"jax", "keras", "keras_hub", "tensorflow"} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""


@pytest.mark.fast
def test_what_needs_no_model_loads_neither_keras_nor_jax(tmp_path):
    finished = tmp_path / "finished"
    (finished / "model").mkdir(parents=True)
    (finished / "config.yaml").write_text("data: a.txt\nsteps: 20\n")
    models = {"model": {"step": 20, "val_loss": 1.5}}
    result = json.dumps({"steps": 20, "models": models})
    (finished / "result.json").write_text(result)
    done = subprocess.run(
        [sys.executable, "-c", f"FINISHED = {str(finished)!r}\n{ANSWERS}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "Finished: 20 steps." in done.stdout
    assert "97,609,728" in done.stdout and "2,629,632" in done.stdout


def test_generate_prints_the_prompt_and_what_follows(run, folder):
    settings = dict(temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, seed=3)
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
    ]
    expected = from_preset(folder, dtype="bfloat16").generate(
        PROMPT, max_new_tokens=12, repetition_penalty=1.1, **settings
    )

    received = run(
        *("generate", PROMPT, "--preset", folder, "--max-new-tokens", 12),
        *("--repetition-penalty", 1.1, "--dtype", "bfloat16", *options),
    )

    assert received == (0, expected + "\n", "")
    assert len(expected) > len(PROMPT)


def test_generate_reads_standard_input(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, output, _ = run(
        *("generate", "-", "--preset", folder, "--max-new-tokens", 1)
    )
    assert status == 0
    assert output.startswith("two\nlines") and output.endswith("\n")
    assert not output.startswith("two\nlines\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "either PROMPT or --input"),
        (["generate", "a", "--input", "b.txt"], "either PROMPT or --input"),
        (["generate", "--input", "b.txt"], "--input and --output"),
        (["generate", "a", "--output", "b.jsonl"], "--input and --output"),
        (["generate", "a", "--num-samples", 0], "--num-samples"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "a", "--max-new-tokens", 0], "--max-new-tokens"),
        (["generate", "a", "--temperature", -1], "--temperature"),
        (["generate", "a", "--top-p", 1.5], "--top-p"),
        (["generate", "a", "--top-p", 0], "`top_p` must be above 0"),
        (["generate", "a", "--min-p", 2], "--min-p"),
        (["generate", "a", "--repetition-penalty", 0], "must be above 0"),
        (["generate", "a", "--seed", -1], "--seed"),
        (["generate", "a", "--seed", 2**32], "--seed"),
        (["generate", "a", "--top-k", -1], "--top-k"),
        (["generate", "a", "--dtype", "int8"], "--dtype"),
        (["generate", "a", "--sampler", "greedy"], "--sampler"),
        (["continue", "a"], "continue"),
        (["info"], "Missing argument"),
    ],
)
def test_bad_usage(run, arguments, message):
    status, output, complaints = run(*arguments)
    assert (status, output) == (2, "")
    assert message in complaints.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "a", "--preset", "98m"], "Unknown preset"),
        (["info", "98m"], "Unknown preset"),
        (["info", "."], "not a model folder"),
        (["info", "hf://owner/tiny"], "does not exist"),
    ],
)
def test_failures_are_one_line(
    run,
    hub,
    hub_client,
    arguments,
    message,
):
    status, output, complaints = run(*arguments)
    assert (status, output) == (1, "")
    assert complaints.startswith("keras-bwetaf: ")
    assert message in complaints
    assert len(complaints.splitlines()) == 1


def test_prompt_that_does_not_fit(run, folder):
    status, output, complaints = run(
        *("generate", PROMPT * 40, "--preset", folder, "--max-new-tokens", 1)
    )
    assert (status, output) == (1, "")
    assert complaints.startswith("keras-bwetaf: ")
    assert "`truncation='left'`" in complaints
    status, output, _ = run(
        *("generate", PROMPT * 40, "--preset", folder, "--max-new-tokens", 1),
        *("--truncation", "left"),
    )
    assert status == 0 and output.startswith(PROMPT * 40)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_everything(
    run, folder, monkeypatch, encoding
):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    prompt = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN}"
    status, _, complaints = run(
        *("generate", prompt, "--preset", folder, "--max-new-tokens", 1)
    )
    assert (status, complaints) == (0, "")
    shown = terminal.buffer.getvalue()
    assert shown.startswith(prompt.encode(encoding, "replace"))


@pytest.mark.parametrize("layout", ["flax", "safetensors", "keras"])
def test_info(run, folder, layout, tmp_path):
    target = tmp_path / "model"
    if layout == "flax":
        shutil.copytree(folder, target)
    elif layout == "safetensors":
        converters.convert(folder, target, to="safetensors")
    else:
        from_preset(folder).save_to_preset(str(target))

    status, output, complaints = run("info", target)

    assert (status, complaints) == (0, "")
    lines = [
        line.split("│")[1:3] for line in output.splitlines() if "│" in line
    ]
    table = {name.strip(): value.strip() for name, value in lines}
    assert table["hidden_dim"] == "32"
    assert table["max_sequence_length"] == "64"
    count = from_preset(folder).backbone.count_params()
    assert table["parameters"] == f"{count:,}"
    weights = FORMATS[layout].heads[0]
    size = (target / weights).stat().st_size
    assert table[weights] == f"{size / 1000:.1f} kB"
    assert str(target) in output


def test_info_shows_names_as_they_are(run, folder, tmp_path):
    target = tmp_path / "[red]:smile:\x1b[2J"
    shutil.copytree(folder, target)
    (target / "[b]\x1b]0;title\x07").touch()

    status, output, _ = run("info", target)

    assert status == 0
    assert "\x1b" not in output and "\x07" not in output
    assert r"[red]:smile:\x1b[2J" in output.splitlines()[-1]
    assert r"[b]\x1b]0;title\x07" in output


def test_errors_carry_no_escape_codes(run, tmp_path):
    status, output, complaints = run("info", "\x1b[2J\x07")
    assert (status, output) == (1, "")
    assert r"\x1b[2J" in complaints and "\x1b" not in complaints


def test_info_downloads_no_weights(
    run,
    folder,
    hub,
    hub_client,
):
    status, output, _ = run("info", "97m")
    assert status == 0
    assert "97,609,728" in output and "not downloaded" in output
    assert hub.requests == []
    hub.add("owner/tiny", folder)

    status, output, _ = run("info", "hf://owner/tiny")

    assert status == 0
    assert "hidden_dim" in output
    assert "good_stuff.pkl" not in hub.downloads()


def start(folder):
    return subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import keras_bwetaf.cli; keras_bwetaf.cli.main()",
            *("generate", PROMPT, "--preset", str(folder)),
            *("--max-new-tokens", "60"),
        ],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_interrupt_is_quiet(folder):
    with start(folder) as process:
        assert process.stdout.read(len(PROMPT)) == PROMPT
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (130, "")


@pytest.mark.slow
def test_closed_pipe_is_quiet(folder):
    with start(folder) as process:
        process.stdout.close()
        complaints = process.stderr.read()
    assert (process.returncode, complaints) == (1, "")


# === pack, train, plot ===


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{PROMPT} {number} " * 9)
    return folder


def test_pack(folder, corpus, tmp_path, run):
    status, output, _ = run(
        *("pack", corpus, tmp_path / "tokens", "--preset", folder),
        *("--validation-fraction", 0.3, "--num-workers", 1),
    )
    assert status == 0 and "40 documents" in output
    assert {path.name for path in (tmp_path / "tokens").glob("*.bin")} == {
        "train-00000.bin",
        "validation-00000.bin",
    }
    status, _, complaints = run("pack", "nowhere", tmp_path, "--preset", folder)
    assert status == 1 and "Expected a file" in complaints


def test_advice_on_invalid_text_is_an_option(folder, tmp_path, run):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 40)
    command = ["pack", tmp_path / "a.txt", tmp_path / "tokens"]
    command += ["--preset", folder, "--num-workers", 1]
    status, _, complaints = run(*command)
    assert status == 1 and "(--errors replace)" in complaints
    assert run(*command, "--errors", "replace")[0] == 0
    train = ["train", tmp_path / "run", "--data", tmp_path / "a.txt"]
    train += ["--preset", folder, "--from-scratch", "--steps", 1]
    status, _, complaints = run(*train)
    assert status == 1 and "(--errors replace)" in complaints
    complaints = run(*train, "--errors", "replace", "--batch-size", 1)[2]
    assert "a multiple of 8" in complaints  # Of devices; it is known.


@pytest.mark.slow
def test_train_and_plot(folder, corpus, tmp_path, run, monkeypatch):
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'data = "{corpus}"\nsteps = 100\nbatch_size = 2\n'
        "[recipe]\nwarmup = 0.5\ndecay = 'linear'\n"
    )
    run_folder = tmp_path / "run"
    status, output, _ = run(
        *("train", run_folder, "--config", settings, "--preset", folder),
        *("--steps", 2, "--recipe", "warmup=0.25", "--from-scratch"),
        *("--model", "num_layers=1", "--validation-fraction", 0.3),
        *("--batch-size", 8),  # One row for each device.
    )
    assert status == 0 and "step 2/2" in output
    config = (run_folder / "config.yaml").read_text()
    for line in (
        "steps: 2\n",
        "  warmup: 0.25\n  decay: linear\n",
        "  num_layers: 1\n",
        "from_scratch: true\n",
    ):
        assert line in config
    assert from_preset(run_folder / "model").backbone.num_layers == 1

    with monkeypatch.context() as patched:
        patched.setattr("keras_bwetaf.train", pytest.fail)
        status, output, _ = run("train", run_folder)
        assert status == 0 and output.startswith("Finished: 2 steps.\n")
        for line in output.splitlines():
            assert len(line) <= 80 or str(run_folder) in line
    words = output.partition("Try it:\n  keras-bwetaf ")[2].splitlines()[0]
    status, output, _ = run(*shlex.split(words), "--max-new-tokens", 2)
    assert status == 0 and output.startswith("Once upon a time")
    assert run("info", run_folder)[0] == 0

    (run_folder / "losses.png").unlink()
    assert run("plot", run_folder)[:2] == (0, f"{run_folder / 'losses.png'}\n")
    assert (run_folder / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--recipe", "warmup"], 2, "expected KEY=VALUE. Received: 'warmup'"),
        (["--steps", "many"], 2, "--steps"),
        (["--config", "nothing.toml"], 1, "nothing.toml"),
        ([], 1, "needs the settings `data` and `steps`"),
        (
            ["--data", "a.npy", "--steps", 1, "--model", "layers=1"],
            1,
            "unknown keywords: layers",
        ),
    ],
)
def test_train_refuses(tmp_path, run, arguments, status, message):
    result, _, complaints = run("train", tmp_path / "run", *arguments)
    assert result == status and message in complaints


def test_options_of_train(tmp_path, run, monkeypatch):
    """Lists and tables are put together from several options."""
    received = {}
    monkeypatch.setattr(
        "keras_bwetaf.train",
        lambda folder, **settings: received.update(settings),
    )
    status, *_ = run(
        *("train", tmp_path, "--data", "a.txt", "--steps", 40),
        *("--sample", "Once upon a time", "--sample", "One day"),
        *("--recipe", "warmup=1e-1", "--recipe", "decay=linear"),
        *("--tensorboard", "--validation-fraction", 0.5),
    )
    assert status == 0
    assert received == {
        "data": "a.txt",
        "steps": 40,
        "sample": ["Once upon a time", "One day"],
        "recipe": {"warmup": 0.1, "decay": "linear"},
        "tensorboard": True,
        "validation_fraction": 0.5,
    }


@pytest.mark.slow
def test_a_second_interrupt_ends_what_never_looks():
    """As when XLA compiles: the main thread runs no Python meanwhile."""
    code = (
        "import hashlib, signal, threading\n"
        "from keras_bwetaf import cli\n"
        # It may be ignored where the tests run, as in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with cli._second_interrupt_exits():\n"
        # Once the main thread is in there.
        "    tell = lambda: print('busy', flush=True)\n"
        "    threading.Timer(1.0, tell).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"busy\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_warnings_are_lines(capsys):
    cli._print_warning(UserWarning("It is late."), UserWarning, "a.py", 3)
    assert capsys.readouterr().err == "keras-bwetaf: It is late.\n"


@pytest.mark.parametrize("kind", [FloatingPointError, RuntimeError])
def test_a_training_that_fails(tmp_path, run, monkeypatch, kind):
    def fail(*_, **__):
        raise kind("the loss is not finite")

    monkeypatch.setattr("keras_bwetaf.train", fail)
    command = ["train", tmp_path, "--data", "a.txt", "--steps", 20]
    status, _, complaints = run(*command)
    assert status == 1
    assert complaints == "keras-bwetaf: the loss is not finite"


def test_plot_refuses(tmp_path, run):
    status, _, complaints = run("plot", tmp_path)
    assert status == 1 and "stats.json" in complaints


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantize(run, folder, tmp_path, bits):
    target = tmp_path / "small"
    status, output, complaints = run("quantize", folder, target, "--to", bits)
    assert (status, complaints) == (0, "") and "before" in output
    expected = from_preset(folder)
    expected.quantize(bits)
    loaded = from_preset(target)
    assert loaded.generate(PROMPT, max_new_tokens=8, temperature=0) == (
        expected.generate(PROMPT, max_new_tokens=8, temperature=0)
    )
    assert perplexity(loaded, PROMPT).loss > 0
    status, _, complaints = run("quantize", folder, target)
    assert status == 2 and "--overwrite replaces it" in complaints
    assert run("quantize", folder, target, "--overwrite")[0] == 0
