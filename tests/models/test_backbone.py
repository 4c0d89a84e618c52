import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import BwETAFBackbone, list_presets
from keras_bwetaf.preset_files import PRESETS
from tests.keras_hub_checks import KerasHubTestCase

pytestmark = pytest.mark.fast

TINY = {
    "vocabulary_size": 20,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "max_sequence_length": 32,
}
# A value other than the default, and other than TINY's, for every argument.
OTHER = {
    "vocabulary_size": 30,
    "num_layers": 3,
    "num_query_heads": [2, 4, 8],
    "num_key_value_heads": [1, 4, 2],
    "hidden_dim": 24,
    "intermediate_dim": 40,
    "max_sequence_length": 64,
    "dropout": 0.1,
    "rope_max_wavelength": 500.0,
    "rope_dtype": None,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.05,
    "embedding_initializer_range": 0.07,
    "dtype": "bfloat16",
    "name": "other",
    "trainable": False,
}


class KerasHubChecks(KerasHubTestCase):
    @pytest.mark.slow
    def test_backbone(self):
        self.run_backbone_test(
            cls=BwETAFBackbone,
            init_kwargs=dict(TINY),
            input_data={
                "token_ids": np.ones((2, 5), "int32"),
                "padding_mask": np.ones((2, 5), "int32"),
            },
            expected_output_shape=(2, 5, 16),
        )

    def test_saved_model(self):
        self.run_model_saving_test(
            cls=BwETAFBackbone,
            init_kwargs=dict(OTHER, dtype="float32"),
            input_data={
                "token_ids": np.arange(10, dtype="int32").reshape(2, 5),
                "padding_mask": np.ones((2, 5), "int32"),
            },
        )


def test_card_has_the_published_number_of_parameters():
    card = PRESETS["97m"]["config"]
    assert BwETAFBackbone(**card).count_params() == 97_609_728
    assert list_presets()["97m"]["parameters"] == 97_609_728


def test_config_holds_every_argument():
    backbone = BwETAFBackbone(**OTHER)
    config = backbone.get_config()
    arguments = set(inspect.signature(BwETAFBackbone).parameters) - {"kwargs"}
    assert arguments <= set(OTHER)
    assert set(config) == set(OTHER)
    for name in set(OTHER) - {"dtype"}:
        assert config[name] == OTHER[name], name
    assert backbone.compute_dtype == "bfloat16"

    again = BwETAFBackbone.from_config(config)
    assert again.get_config() == config
    shapes = {v.path: (v.shape, v.dtype) for v in backbone.weights}
    assert {v.path: (v.shape, v.dtype) for v in again.weights} == shapes


def test_initial_weights():
    """The original's: normal kernels and embeddings, zero biases, scale 1."""
    config = dict(TINY, hidden_dim=256, intermediate_dim=512)
    backbone = BwETAFBackbone(**config, initializer_range=0.05)
    for variable in backbone.weights:
        values = variable.numpy()
        if variable.name == "bias":
            assert (values == 0).all()
        elif variable.name == "scale":
            assert (values == 1).all()
        else:
            stddev = 256**-0.5 if variable.name == "embeddings" else 0.05
            assert abs(values.std() / stddev - 1) < 0.05, variable.path
            assert abs(values.mean()) < stddev / 20, variable.path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "`num_layers` must be a positive int. Rec.*=0"),
        ({"hidden_dim": 16.0}, "`hidden_dim` must be a positive int"),
        ({"vocabulary_size": True}, "`vocabulary_size` must be a positive"),
        ({"num_query_heads": 3}, "must divide `hidden_dim`.*=3.*=16"),
        ({"num_query_heads": [4, 4, 4]}, "one int for each of the 2 layers"),
        ({"num_query_heads": [4, 0]}, "`num_query_heads` must be a positive"),
        ({"num_key_value_heads": 3}, "must divide `num_query_heads`.*layer 0"),
        ({"dropout": 1.0}, "`dropout` is the share.*dropout=1.0"),
        ({"rope_dtype": "int8"}, "`rope_dtype` must be one of.*'int8'"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be greater"),
        ({"initializer_range": -1}, "`initializer_range` must be greater"),
        ({"embedding_initializer_range": -1}, "must be greater than 0"),
        ({"embedding_initializer_range": 0}, "must be greater than 0"),
        ({"layer_norm_epsilon": "small"}, "`layer_norm_epsilon` must be .*'s"),
        ({"dropout": "none"}, "`dropout` is the share.*dropout='none'"),
        ({"rope_max_wavelength": 0}, "`rope_max_wavelength` must be greater"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        BwETAFBackbone(**{**TINY, **changes})


def test_numbers_of_numpy_and_jax():
    """A configuration of them is one of Python's numbers."""
    numbers = {
        name: np.int64(value) if isinstance(value, int) else value
        for name, value in TINY.items()
    }
    numbers |= {"dropout": np.float32(0.5), "hidden_dim": jnp.int32(16)}
    config = BwETAFBackbone(**numbers).get_config()
    expected = BwETAFBackbone(**{**TINY, "dropout": 0.5}).get_config()
    del config["name"], expected["name"]
    assert json.dumps(config) == json.dumps(expected)


@pytest.mark.parametrize(
    "typo, meant",
    [
        ({"layers": 2}, "num_layers"),
        ({"num_layer": 2}, "num_layers"),
        ({"hidden_size": 64}, "hidden_dim"),
        ({"droput": 0.1}, "dropout"),
    ],
)
def test_unknown_keywords(typo, meant):
    (name,) = typo
    message = rf"unknown keywords: {name} \(did you mean {meant}\?\).*Received"
    with pytest.raises(TypeError, match=rf"^BwETAFBackbone\(\) .*{message}"):
        BwETAFBackbone(**TINY, **typo)
    with pytest.raises(TypeError, match=rf"^from_preset\(\) .*{message}"):
        keras_bwetaf.from_preset("tiny", **typo)


def test_keras_keywords():
    backbone = BwETAFBackbone(
        **TINY, name="mine", trainable=False, dtype="bfloat16"
    )
    assert backbone.name == "mine" and not backbone.trainable
    assert backbone.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    "changes",
    [{"dropout": "0.1"}, {"initializer_range": "1"}, {"dropout": None}],
)
def test_numbers(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}` .*Received: {name}="):
        BwETAFBackbone(**{**TINY, **changes})


class Derived(BwETAFBackbone):
    """As users derive theirs: with an argument more."""

    def __init__(self, *args, note="none", **kwargs):
        super().__init__(*args, **kwargs)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


def test_a_derived_class_keeps_the_configuration(tmp_path):
    assert set(Derived.config_names()) == {
        *BwETAFBackbone.config_names(),
        "note",
    }
    backbone = Derived(**TINY, note="mine")
    again = Derived.from_config(backbone.get_config())
    assert again.get_config() == backbone.get_config()
    assert again.note == "mine"
    changed = Derived.from_preset("tiny", load_weights=False, dropout=0.25)
    assert changed.dropout == 0.25
