import numpy as np
import pytest

from converters import (
    CheckpointError,
    check_config,
    config_from_flax,
    config_from_keras,
    config_to_flax,
    config_to_keras,
)
from converters.bwetaf_v3 import tensors
from converters.transforms import view
from tests.original import CARD, manager

KERAS_KEYS = {
    *("vocabulary_size", "num_layers", "num_query_heads"),
    *("num_key_value_heads", "hidden_dim", "intermediate_dim"),
    *("max_sequence_length", "dropout", "rope_max_wavelength", "rope_dtype"),
    *("layer_norm_epsilon", "initializer_range"),
    "embedding_initializer_range",
}
ODD = dict(
    num_heads=(3, 1, 6),
    attention_dim=18,
    num_blocks=3,
    gqa_repeats=1,
    ff_dim=5,
    vocab_size=11,
)


def test_card_has_the_published_number_of_parameters():
    rows = tensors(config_from_flax(CARD))
    assert sum(np.prod(row.shape) for row in rows) == 97_609_728
    assert len(rows) == 1 + 12 * 13


@pytest.mark.parametrize("changes", [{}, ODD], ids=["card", "odd"])
def test_views_cover_every_element_of_flax_once(changes):
    config = {**CARD, "num_blocks": 2, "vocab_size": 64, **changes}
    trees = {}
    for row in tensors(config_from_flax(config)):
        seen = trees.setdefault(row.flax, np.zeros(row.flax_shape, "int8"))
        canonical = view(row.kind.from_flax, seen)
        assert canonical.shape == row.shape
        canonical += 1
    assert all((seen == 1).all() for seen in trees.values())


@pytest.mark.slow
def test_flax_shapes_are_the_originals():
    config = {**CARD, **ODD, "max_len": 64}
    params = manager(**config).params["params"]
    rows = tensors(config_from_flax(config))

    def flatten(tree, parents=("params",)):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, (*parents, key))
            else:
                yield (*parents, key), value.shape

    assert dict(flatten(params)) == {row.flax: row.flax_shape for row in rows}


def test_names_are_unique_and_as_designed():
    rows = {row.name: row for row in tensors(config_from_flax(CARD))}
    assert len({row.keras for row in rows.values()}) == len(rows) == 157
    gate = rows["model.layers.7.mlp.gate_proj.weight"]
    assert gate.flax == ("params", "blocks_7", "d1", "w")
    assert gate.keras == "transformer_layer_7/feedforward/gate/kernel"
    assert gate.flax_shape == (768, 4608)
    assert gate.shape == (2304, 768)
    key = rows["model.layers.0.self_attn.k_proj.weight"]
    assert key.shape == (384, 768)
    assert rows["model.embed_tokens.weight"].keras == (
        "token_embedding/embeddings"
    )


def test_each_layer_has_its_own_key_value_width():
    config = config_from_flax(CARD) | {
        "num_attention_heads": [8, 4] * 6,
        "num_key_value_heads": [2, 4] * 6,
    }
    rows = {row.name: row for row in tensors(config)}
    for layer, width in enumerate([192, 768] * 6):
        for part in ("k_proj", "v_proj"):
            row = rows[f"model.layers.{layer}.self_attn.{part}.weight"]
            assert row.shape == (width, 768)


def test_canonical_config_of_the_card():
    assert config_from_flax(CARD, dtype="bfloat16", eos_token_id=3) == {
        "architectures": ["BwETAFForCausalLM"],
        "model_type": "bwetaf",
        "vocab_size": 16384,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2304,
        "max_position_embeddings": 2048,
        "hidden_dropout": 0.05,
        "rms_norm_eps": 1e-8,
        "rope_theta": 10000.0,
        "rope_dtype": None,
        "initializer_range": 0.002,
        "embedding_initializer_range": 0.02,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 3,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_heads": [2, 4] * 6, "gqa_repeats": 2},
        {"emb_init_range": None, "param_init_rage": 0.1, "dropout_rate": 0},
    ],
)
def test_configs_convert_in_pairs(changes):
    flax = {**CARD, "param_init_rage": 0.002, **changes}
    canonical = config_from_flax(flax)
    check_config(canonical)
    assert config_to_flax(canonical) == flax
    keras = config_to_keras(canonical)
    assert keras.keys() == KERAS_KEYS
    assert config_from_keras({**keras, "name": "backbone"}) == canonical


def test_defaults_of_the_original_are_known():
    bare = {
        key: value
        for key, value in CARD.items()
        if key not in ("gqa_repeats", "emb_init_range")
    }
    canonical = config_from_flax(bare)
    assert canonical["num_key_value_heads"] == 8
    assert canonical["initializer_range"] == 0.002
    assert canonical["embedding_initializer_range"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 0}, "num_heads must be an integer from 1"),
        ({"num_heads": "8"}, "num_heads must be .* Received: '8'"),
        (
            {"num_heads": [8, 8]},
            "num_heads must have one number for each of 12",
        ),
        ({"num_heads": True}, "num_heads must be"),
        ({"gqa_repeats": 3}, "gqa_repeats must be an integer that divides"),
        ({"gqa_repeats": 0}, "gqa_repeats must .* Received: gqa_repeats=0"),
        (
            {"attention_dim": 770},
            "attention_dim must be divisible by every num_heads. Received: "
            "attention_dim=770, num_heads=8",
        ),
        ({"num_blocks": 10**9}, "num_blocks must be an integer from 1 to 1024"),
        ({"ff_dim": 2.5}, "ff_dim must be an integer"),
        ({"dropout_rate": 10**400}, "dropout_rate must be a number"),
        ({"dropout_rate": 1}, "dropout_rate must be a number from 0 to below"),
        ({"emb_init_range": -1}, "emb_init_range must be .* or null"),
        ({"param_init_rage": float("nan")}, "param_init_rage must be a number"),
    ],
)
def test_wrong_flax_config(changes, message):
    with pytest.raises(CheckpointError, match=f"^place: {message}"):
        config_from_flax({**CARD, **changes}, source="place")


def test_all_missing_values_are_listed():
    with pytest.raises(CheckpointError, match="2 problems") as error:
        config_from_flax(
            {**CARD, "ff_dim": -1, "num_heads": []} | {"max_len": 0}
        )
    assert "ff_dim must be" in str(error.value)
    with pytest.raises(CheckpointError, match="7 problems") as error:
        config_from_flax({})
    for name in ("num_heads", "max_len", "dropout_rate"):
        assert f"{name} is missing" in str(error.value)
    with pytest.raises(CheckpointError, match="13 problems"):
        config_from_keras({})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'. Received: 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_att"),
        ({"num_key_value_heads": [4]}, "num_key_value_heads must have one num"),
        ({"rope_dtype": "float8"}, "rope_dtype must be null, 'float32'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    ],
)
def test_wrong_canonical_config(changes, message):
    config = config_from_flax(CARD) | changes
    for convert in (check_config, config_to_flax, config_to_keras):
        with pytest.raises(CheckpointError, match=f"^place: {message}"):
            convert(config, source="place")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_dtype": "float32"}, "rope_dtype must be None"),
        ({"rope_theta": 5e5}, "rope_theta must be 10000.0"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps must be 1e-08"),
        (
            {"num_key_value_heads": [4, 8] * 6},
            "must be the same in every layer",
        ),
    ],
)
def test_what_the_original_cannot_express(changes, message):
    config = config_from_flax(CARD) | changes
    check_config(config)
    with pytest.raises(CheckpointError, match=message):
        config_to_flax(config)
