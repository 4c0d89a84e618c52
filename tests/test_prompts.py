import json
import sys

import pytest

import keras_bwetaf
from keras_bwetaf import cli, prompts
from tests import trained


@pytest.fixture(scope="module")
def lm():
    return keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_line(lm, tmp_path, monkeypatch):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    records = [{"prompt": "Once upon", "id": 7}, {"prompt": "The sun was"}]
    source.write_text("".join(json.dumps(each) + "\n" for each in records))
    command = ["keras-bwetaf", "generate", "--preset", str(trained.FOLDER)]
    command += ["--input", str(source), "--output", str(output)]
    command += ["--num-samples", "2", "--seed", "4", "--max-new-tokens", "20"]
    command += ["--stop", ".", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    made = lines(output)
    assert [each["prompt"] for each in made] == ["Once upon"] * 2 + [
        "The sun was"
    ] * 2
    assert [each.get("id") for each in made] == [7, 7, None, None]
    assert [each["sample"] for each in made] == [0, 1, 0, 1]
    for each in made:
        assert each["text"] == lm.generate(
            each["prompt"],
            max_new_tokens=20,
            seed=4 + each["sample"],
            stop_strings=".",
            strip_prompt=True,
        )
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_what_is_made_before_an_error_stays(lm, tmp_path, monkeypatch):
    source, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    source.write_text("Once upon\n\nThe sun was\nLily\n")
    output.write_text("of an earlier call")
    monkeypatch.setattr(prompts, "TEXTS_AT_ONCE", 2)
    records = prompts.read_prompts(source)
    assert [each["prompt"] for each in records] == [
        "Once upon",
        "The sun was",
        "Lily",
    ]
    generate, calls = lm.generate, []

    def interrupted(texts, **options):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(texts, **options)

    monkeypatch.setattr(lm, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prompts.continue_prompts(lm, records, output, max_new_tokens=3)
    assert output.read_text() == "of an earlier call"
    kept = lines(tmp_path / "texts.jsonl.partial")
    assert [each["prompt"] for each in kept] == ["Once upon", "The sun was"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "\n\n", "expected prompts. Received: none"),
        ("a.jsonl", "", "expected prompts. Received: none"),
        ("a.jsonl", '{"text": "a"}', "line 1: expected a text under 'prompt'"),
        ("a.jsonl", '{"prompt": 3}', "line 1: expected a text under 'prompt'"),
        ("a.jsonl", '{"prompt": "a"}\n[]', "line 2: expected a JSON object"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(tmp_path / name)
