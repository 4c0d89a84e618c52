"""`hf://owner/repo@revision` is understood wherever `hf://owner/repo` is.

The main branch holds nothing but a note, so that whoever looks at it fails.
"""

import json
import sys

import keras
import pytest

import converters
import converters.cli
import keras_bwetaf
import keras_bwetaf.cli
from keras_bwetaf import preset_files
from keras_bwetaf.data.sources import read_documents
from tests.converters.folders import normal, write_original
from tests.original import tokenizer

MODEL = "hf://owner/tiny@v2"
DATA = "hf://datasets/owner/texts@v2/*.jsonl"
TEXT = "In the beginning was the Word."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the original with the state of its optimizer."""
    folder = tmp_path_factory.mktemp("addresses")
    trained = tokenizer.create("tiny")
    trained.train([TEXT] * 50, 300, special_tokens=["<|EOS|>", "<|UK|>"])
    trained.save(str(folder))
    return write_original(
        folder / "model",
        moments=normal("float32", seed=1),
        tokenizer=folder / "tokenizer",
    )


@pytest.fixture
def published(hub, hub_client, folder, tmp_path):
    note, texts = tmp_path / "note", tmp_path / "texts"
    note.mkdir(), texts.mkdir()
    (note / "note.md").write_text("The model is on the branch v2.")
    line = json.dumps({"text": TEXT}) + "\n"
    (texts / "a.jsonl").write_text(line * 50)
    for repo, content in (("owner/tiny", folder), ("owner/texts", texts)):
        hub.add(repo, note)
        hub.add(repo, content, branch="v2")


def from_preset(_):
    return keras_bwetaf.from_preset(MODEL).generate(TEXT, max_new_tokens=1)


def load_optimizer(_):
    lm = keras_bwetaf.from_preset(MODEL, dtype="float32")
    lm.compile(keras.optimizers.AdamW(1e-3))
    lm.load_optimizer(MODEL)
    assert int(lm.optimizer.iterations) == 7


def read_texts(_):
    assert list(read_documents(DATA)) == [TEXT] * 50


PLACES = {
    "convert": lambda path: converters.convert(MODEL, path / "new", to="keras"),
    "verify": lambda _: converters.verify(MODEL, MODEL, logits=False),
    "inspect": lambda _: converters.inspect(MODEL),
    "from_preset": from_preset,
    "load_optimizer": load_optimizer,
    "causal_lm": lambda _: keras_bwetaf.BwETAFCausalLM.from_preset(MODEL),
    "backbone": lambda _: keras_bwetaf.BwETAFBackbone.from_preset(MODEL),
    "preprocessor": lambda _: (
        keras_bwetaf.BwETAFCausalLMPreprocessor.from_preset(MODEL)
    ),
    "load_config": lambda _: preset_files.load_config(MODEL),
    "tokenizer": lambda _: keras_bwetaf.BwETAFTokenizer.from_preset(MODEL),
    "read_documents": read_texts,
    "pack": lambda path: keras_bwetaf.data.pack(
        DATA,
        path / "packed",
        keras_bwetaf.BwETAFTokenizer.from_preset(MODEL),
        num_workers=1,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_functions(published, tmp_path, place):
    PLACES[place](tmp_path)


@pytest.mark.parametrize(
    "main, arguments",
    [
        (converters.cli.main, f"convert {MODEL} new --to torch"),
        (converters.cli.main, f"verify {MODEL} {MODEL} --no-logits"),
        (converters.cli.main, f"inspect {MODEL}"),
        (
            keras_bwetaf.cli.main,
            f"generate Word --preset {MODEL} --max-new-tokens 1",
        ),
        (keras_bwetaf.cli.main, f"info {MODEL}"),
        (
            keras_bwetaf.cli.main,
            f"pack {DATA} packed --preset {MODEL} --num-workers 1",
        ),
        pytest.param(
            keras_bwetaf.cli.main,
            f"train run --data {DATA} --preset {MODEL} --steps 1 "
            "--batch-size 8 --sequence-length 16 --validation-fraction 0",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_command_lines(
    published, tmp_path, monkeypatch, capfd, main, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["command", *arguments.split()])
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), capfd.readouterr()


@pytest.mark.parametrize("place", ["inspect", "from_preset", "read_documents"])
def test_the_revision_is_asked_for(published, tmp_path, monkeypatch, place):
    """What fails without it, so that the tests above can fail."""
    for name in ("MODEL", "DATA"):
        address = globals()[name].replace("@v2", "")
        monkeypatch.setitem(globals(), name, address)
    with pytest.raises((FileNotFoundError, ValueError)):
        PLACES[place](tmp_path)
