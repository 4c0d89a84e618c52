"""What a model writes while it is trained."""

from types import SimpleNamespace

import pytest

from keras_bwetaf.training import Samples
from keras_bwetaf.training.samples import wrapped
from keras_bwetaf.training.statistics import Statistics


class Model:
    """Writes what it was asked for."""

    backbone = SimpleNamespace(max_sequence_length=64)
    optimizer = SimpleNamespace(iterations=1200)

    def generate(self, prompts, **options):
        self.options = options
        return [f"{prompt} and {'so on ' * 30}" for prompt in prompts]


def test_samples_are_shown_and_kept(tmp_path, capsys):
    monitor = SimpleNamespace(statistics=Statistics())
    samples = Samples(["Once", "Twice"], monitor=monitor, log_dir=tmp_path)
    model = Model()
    samples.set_model(model)
    samples.on_epoch_end(0)
    assert capsys.readouterr().out == ""  # The line of the epoch comes first.
    samples.on_train_end()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sample after step 1,200:"
    assert lines[1].startswith("  Once and so on") and max(map(len, lines)) < 81
    samples.on_train_end()
    assert capsys.readouterr().out == ""

    assert model.options["max_new_tokens"] == 32  # Half of the context.
    assert model.options["seed"] == [0, 1]
    kept = monitor.statistics.entries["samples"]
    assert [(each["step"], each["prompt"]) for each in kept] == [
        (1200, "Once"),
        (1200, "Twice"),
    ]
    state = monitor.statistics.get_state()
    again = Statistics()
    again.set_state(state)
    assert again.write(tmp_path, "run", 1)["samples"] == [kept]
    (events,) = tmp_path.glob("events.*")
    assert kept[0]["text"].encode() in events.read_bytes()


def test_control_characters_do_not_reach_the_terminal():
    text = "a\x1b[2Jb\r\x07\u202e\n\n" + "word " * 40
    lines = wrapped(text).split("\n")
    assert lines[:2] == ["  a\ufffd[2Jb\ufffd\ufffd\ufffd", ""]
    assert max(map(len, lines)) <= 80 and all(map(str.isprintable, lines))


@pytest.mark.parametrize("prompts", ["Once", [], [""], [3]])
def test_wrong_prompts(prompts):
    with pytest.raises(ValueError, match="`prompts` must be a list of str"):
        Samples(prompts)
