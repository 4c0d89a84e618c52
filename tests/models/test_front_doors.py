"""`from_preset` of each class, and KerasHub's own."""

import shutil

import keras_hub
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    BwETAFTokenizer,
)
from tests import trained

REPO = "owner/stories"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that `save_to_preset` wrote."""
    folder = tmp_path_factory.mktemp("saved") / "stories"
    keras_bwetaf.from_preset("tiny").save_to_preset(folder)
    return folder


@pytest.fixture(params=["name", "folder", "hub", "hub with a revision"])
def preset(request, saved, hub, hub_client):
    """The same model in each way to say it."""
    if request.param == "name":
        return "tiny"
    if request.param == "folder":
        return saved
    hub.add(REPO, saved, branch="v1")
    hub.add(REPO, saved)
    revision = "@v1" if "revision" in request.param else ""
    return f"hf://{REPO}{revision}"


def test_every_class_takes_every_preset(preset):
    lm = BwETAFCausalLM.from_preset(preset)
    expected = keras_bwetaf.from_preset("tiny")
    assert type(lm) is BwETAFCausalLM
    assert lm.preprocessor.sequence_length == 256
    backbone = BwETAFBackbone.from_preset(preset, dropout=0.2)
    assert backbone.dropout == 0.2
    for theirs, ours, alone in zip(
        expected.weights, lm.weights, backbone.weights, strict=True
    ):
        np.testing.assert_array_equal(theirs, ours)
        np.testing.assert_array_equal(theirs, alone)
    preprocessor = BwETAFCausalLMPreprocessor.from_preset(
        preset, sequence_length=16
    )
    assert preprocessor.sequence_length == 16
    for tokenizer in (
        preprocessor.tokenizer,
        BwETAFTokenizer.from_preset(preset),
    ):
        assert tokenizer.content == expected.preprocessor.tokenizer.content


def test_keras_hub_finds_the_classes(saved):
    models = keras_hub.models
    assert type(models.CausalLM.from_preset(str(saved))) is BwETAFCausalLM
    assert type(models.Backbone.from_preset(str(saved))) is BwETAFBackbone
    preprocessor = models.CausalLMPreprocessor.from_preset(str(saved))
    assert type(preprocessor) is BwETAFCausalLMPreprocessor


def test_parts_of_ones_own():
    assert BwETAFCausalLM.from_preset(
        "tiny", preprocessor=None
    ).preprocessor is (None)
    own = BwETAFCausalLMPreprocessor.from_preset("tiny", sequence_length=8)
    lm = BwETAFCausalLM.from_preset(
        "tiny", load_weights=False, preprocessor=own
    )
    assert lm.preprocessor is own


def test_without_a_tokenizer(saved, hub, hub_client, tmp_path):
    bare = shutil.copytree(saved, tmp_path / "bare")
    (bare / "assets/tokenizer/tokenizer.json").unlink()
    hub.stop()
    for cls in (BwETAFTokenizer, BwETAFCausalLMPreprocessor):
        with pytest.raises(ValueError, match="bare: the model has no tokeniz"):
            cls.from_preset(bare)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            cls.from_preset("97m")


def test_unknown_keywords():
    with pytest.raises(TypeError, match="layers=2.*"):
        BwETAFBackbone.from_preset("tiny", layers=2)


# === A preprocessor with methods of its own ===


class Shouting(BwETAFCausalLMPreprocessor):
    def generate_preprocess(self, x, sequence_length=None):
        x = [f"{text}, there was a" for text in x]
        return super().generate_preprocess(x, sequence_length=sequence_length)

    def generate_postprocess(self, x):
        return [text.upper() for text in super().generate_postprocess(x)]


@pytest.fixture(scope="module")
def shouting():
    preprocessor = Shouting.from_preset("tiny", sequence_length=64)
    return BwETAFCausalLM.from_preset("tiny", preprocessor=preprocessor)


def test_its_methods_are_used(shouting):
    plain = keras_bwetaf.from_preset("tiny")
    options = dict(max_new_tokens=8, seed=1)
    expected = plain.generate("Once upon a time, there was a", **options)
    assert shouting.generate("Once upon a time", **options) == expected.upper()
    assert shouting.generate(["Once upon a time"], **options) == [
        expected.upper()
    ]
    continued = expected.removeprefix("Once upon a time, there was a").upper()
    assert continued.strip() and continued != expected
    assert (
        shouting.generate("Once upon a time", strip_prompt=True, **options)
        == continued
    )
    longer = shouting.generate("Once upon a time", max_length=32, seed=1)
    assert longer.startswith("ONCE UPON A TIME, THERE WAS A")


def test_what_cannot_be_with_them(shouting):
    with pytest.raises(
        ValueError, match="`stop_strings` and `truncation` can't"
    ):
        shouting.generate("Once", stop_strings=".")
    with pytest.raises(ValueError, match="Received: .*truncation='left'"):
        shouting.generate("Once", truncation="left")
    with pytest.raises(ValueError, match="`stream` can't use.*Shouting"):
        shouting.stream("Once")


@pytest.mark.parametrize(
    "load", [keras_bwetaf.from_preset, BwETAFCausalLM.from_preset]
)
def test_a_warning_names_who_called(load, tmp_path):
    shutil.copytree(trained.FOLDER, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.warns(UserWarning, match="no preprocessor") as warned:
        load(tmp_path / "model")
    assert [each.filename for each in warned] == [__file__]
