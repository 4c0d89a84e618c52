import json
import sys

import pytest

import keras_bwetaf
from keras_bwetaf import cli
from keras_bwetaf.evaluation import perplexity
from tests import trained
from tests.evaluation import tasks


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `keras-bwetaf eval`; returns its status and all that it says."""

    def run(*arguments):
        command = ["keras-bwetaf", "eval", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = "".join(capfd.readouterr())
        if isinstance(end.value.code, str):
            return 1, said + end.value.code
        return end.value.code, said

    return run


def test_perplexity_of_files(run, tmp_path):
    texts = trained.documents(trained.FOLDER)["val"][:3]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    output = tmp_path / "result.json"
    status, said = run(
        trained.FOLDER, "--data", tmp_path / "*.txt", "--output", output
    )
    assert status == 0
    lm = keras_bwetaf.from_preset(trained.FOLDER)
    expected = perplexity(lm, texts).summary()
    result = json.loads(output.read_text())
    assert result == pytest.approx(expected, rel=1e-5)
    assert f"{result['bits_per_byte']:.4f}" in said


@pytest.mark.slow
def test_tasks(run, tmp_path):
    tasks.write(tmp_path, 3)
    output = tmp_path / "result.json"
    status, said = run(
        *(trained.FOLDER, "--tasks", ",".join(tasks.NAMES)),
        *("--include-path", tmp_path, "--limit", 2, "--output", output),
    )
    assert status == 0
    assert all(name in said for name in tasks.NAMES)
    assert json.loads(output.read_text())["results"].keys() == set(tasks.NAMES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "either --data or --tasks"),
        (("--data", "x", "--tasks", "y"), "either --data or --tasks"),
        (("--data", "x", "--output", "no/such.json"), "no folder no"),
        (("--data", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    status, said = run(trained.FOLDER, *arguments)
    assert status != 0 and message in said
