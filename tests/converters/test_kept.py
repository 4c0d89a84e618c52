"""What only one format says comes home; what was edited since wins."""

import copy as copying
import json

import pytest

from converters import CheckpointError, convert, kept
from tests.converters.folders import (
    assert_same_folders,
    contents,
    edit_json,
    read_json,
    write_original,
)

SIDE = "conversion_extras.json"
FLAX = "understanding_good_stuff.json"
VALUES = [
    *(None, True, False, 1, 1.0, 0, -0.0, 0.0, "1", "", [], {}, [1], [1.0]),
    *({"a": 1}, {"a": 1.0}, {"a": 1, "b": 2}, {"b": 2, "a": 1}),
    *({"a": {"b": {"c": None}}}, {"inside": 1}, {"kept": {"generated": 2}}),
]


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("new", VALUES, ids=json.dumps)
def test_every_difference_is_restored(new):
    documents = [{}, *({"key": old} for old in VALUES)]
    documents += [{"x": 1, "key": old, "y": [2]} for old in VALUES]
    for document in [{"key": new}, {"y": 1, "key": new, "x": 1}, {}, None]:
        for generated in documents:
            before = copying.deepcopy(generated)
            change = through_json(kept.difference(document, generated))
            restored = kept.restore(generated, change, "place")
            assert json.dumps(restored) == json.dumps(document)
            assert json.dumps(generated) == json.dumps(before)


def test_edits_win():
    generated = {"same": 1, "a": 1, "b": {"c": 1, "d": 1}, "gone": 1}
    document = {"more": 5, "a": 2, "b": {"c": 2, "d": 2}, "same": 1}
    change = through_json(kept.difference(document, generated))
    edited = {"same": 3, "a": 4, "b": {"c": 4, "d": 1}, "gone": 4}
    restored = kept.restore(edited, change, "place")
    assert restored == {
        "more": 5,
        "a": 4,
        "b": {"c": 4, "d": 2},
        "same": 3,
        "gone": 4,
    }
    assert list(restored) == ["more", "a", "b", "same", "gone"]
    # A key that came in between, too, and a dict that is none any more.
    assert kept.restore({"more": 6, "b": 7}, change, "place") == {
        "more": 6,
        "b": 7,
    }


@pytest.mark.parametrize("layout", ["safetensors", "keras", "torch"])
def test_what_others_have_no_place_for_comes_home(tmp_path, layout):
    source = write_original(
        tmp_path / "flax",
        future={"a": [1, {"b": None}]},
        emb_splt=2,
        res_scale=0.5,
        num_heads=[4, 2],
    )
    # The order of the keys, 1.0 for 1, a default that is not said.
    config = read_json(source / FLAX)
    del config["param_init_rage"], config["emb_init_range"]
    config = dict(reversed(config.items())) | {"dropout_rate": 0}
    (source / FLAX).write_text(json.dumps(config, indent=2))
    convert(source, tmp_path / "there", to=layout)
    convert(tmp_path / "there", tmp_path / "back", to="flax")
    assert_same_folders(tmp_path / "back", source)


def test_all_formats_keep_what_is_theirs(copy, tiny, tmp_path):
    """Edits of each folder on the way live on in all the others."""
    folder = copy("flax")
    edit_json(folder / FLAX, future=1)
    edits = {
        "safetensors": [
            ("config.json", {"transformers_version": "5.0", "dtype": "auto"}),
            ("generation_config.json", {"temperature": 0.1, "top_k": 7}),
            ("tokenizer_config.json", {"truncation_side": "left"}),
        ],
        "keras": [
            ("metadata.json", {"keras_version": "3", "date_saved": "today"}),
            ("task.json", {"compile_config": {"loss": "mse"}}),
            ("preprocessor.json", {"build_config": None}),
        ],
        "torch": [("config.json", {"_name_or_path": "me"})],
    }
    for to, changes in edits.items():
        convert(folder, tmp_path / to, to=to)
        folder = tmp_path / to
        for name, values in changes:
            edit_json(folder / name, **values)
    for to in ("keras", "flax", "safetensors", "flax", "keras", "torch"):
        convert(folder, tmp_path / "next", to=to, overwrite=True)
        folder = tmp_path / "next"
        for layout in ("safetensors", "keras", "torch"):
            if to not in (layout, "torch" if layout == "safetensors" else ""):
                continue
            for name, values in edits[layout]:
                assert read_json(folder / name).items() >= values.items()
        if to == "flax":
            assert read_json(folder / FLAX)["future"] == 1
    found, expected = contents(folder), contents(tmp_path / "torch")
    # The canonical folder has no place for the place of auto_map.
    config = json.loads(found.pop("config.json"))
    assert config == json.loads(expected.pop("config.json"))
    assert found.keys() == expected.keys()
    found.pop(SIDE), expected.pop(SIDE)
    assert found == expected


@pytest.mark.parametrize("layout", ["safetensors", "keras", "torch"])
def test_edited_values_win(copy, tmp_path, layout):
    folder = copy(layout)
    side = read_json(folder / SIDE)
    side["flax"][FLAX]["changes"] |= {
        "dropout_rate": {"generated": 0.05, "kept": 0.75},
    }
    edit_json(folder / SIDE, **side)
    config = read_json(folder / "config.json")
    values = config["config"] if layout == "keras" else config
    names = {
        "keras": ("dropout", "max_sequence_length"),
    }.get(layout, ("hidden_dropout", "max_position_embeddings"))
    values.update(zip(names, (0.25, 32), strict=True))
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "back", to="flax")
    flax = read_json(tmp_path / "back" / FLAX)
    assert (flax["dropout_rate"], flax["max_len"]) == (0.25, 32)
    assert flax["use_fash_attention"] is False


def test_edited_end_token_wins(copy, tmp_path):
    folder = copy("torch")
    edit_json(folder / "tokenizer_config.json", eos_token="<|UK|>")
    convert(folder, tmp_path / "back", to="flax")
    settings = read_json(tmp_path / "back" / "tokenizer/understanding_yap.json")
    assert (settings["eos_token"], settings["name"]) == ("<|UK|>", "tiny")


@pytest.mark.parametrize("layout", ["safetensors", "keras", "torch"])
def test_without_the_side_file(copy, tiny, tmp_path, layout):
    folder = copy(layout)
    (folder / SIDE).unlink()
    convert(folder, tmp_path / "back", to="flax")
    found, original = contents(tmp_path / "back"), contents(tiny["source"])
    config, expected = (
        json.loads(files.pop(FLAX)) for files in (found, original)
    )
    del expected["use_fash_attention"]
    assert config == expected
    name = "tokenizer/understanding_yap.json"
    settings, expected = (
        json.loads(files.pop(name)) for files in (found, original)
    )
    assert settings == expected | {"name": "tokenizer"}
    assert found == original


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object. Received: list"),
        ('{"flax": 3}', "flax must hold an object. Received: 3. Remove the fi"),
        ('{"keras": [], "flax": {}}', "keras must hold an object"),
        ('{"flax": {}, "flax": {}}', "a key occurs twice"),
        ('{"flax": NaN}', "no JSON number"),
    ],
)
@pytest.mark.parametrize("layout", ["flax", "safetensors", "keras"])
def test_damaged_side_file(copy, tmp_path, layout, text, message):
    folder = copy(layout)
    (folder / SIDE).write_text(text)
    with pytest.raises(CheckpointError, match=f"{SIDE}: .*{message}"):
        convert(folder, tmp_path / "back", to="flax")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "change",
    [
        3,
        [],
        {},
        {"order": []},
        {"order": [1], "changes": {}},
        {"order": "a", "changes": {}},
        {"order": [], "changes": []},
        {"order": [], "changes": {"a": 1}},
        {"order": [], "changes": {"a": {"inside": 1}}},
        {"order": [], "changes": {"dropout_rate": {"inside": None}}},
    ],
)
def test_damaged_difference(copy, tmp_path, change):
    folder = copy("torch")
    edit_json(folder / SIDE, flax={FLAX: change})
    with pytest.raises(
        CheckpointError, match="must hold a list of keys, .*go on without it"
    ):
        convert(folder, tmp_path / "back", to="flax")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "to, name, generated, value, message",
    [
        ("flax", "num_blocks", 2, 1, "num_hidden_layers is 2, but the side"),
        ("flax", "gqa_repeats", 2, 4, "num_key_value_heads is 2"),
        ("flax", "dropout_rate", 0.05, 0.5, "hidden_dropout is 0.05"),
        ("flax", "num_heads", 4, "4", "num_heads must be an integer"),
        ("flax", "vocab_size", 512, ..., "vocab_size is missing"),
        ("torch", "num_hidden_layers", 2, 3, "num_hidden_layers is 2, but"),
        ("torch", "rope_dtype", None, "float32", "rope_dtype is None"),
        ("torch", "tie_word_embeddings", True, False, "must be True"),
        ("torch", "model_type", "bwetaf", "llama", "model_type 'bwetaf'"),
        ("keras", "num_layers", 2, 3, "num_hidden_layers is 2, but the side"),
        ("keras", "layer_norm_epsilon", 1e-8, 1.0, "rms_norm_eps is 1e-08"),
    ],
)
def test_side_file_cannot_change_the_model(
    copy, tmp_path, to, name, generated, value, message
):
    folder = copy("flax" if to != "flax" else "safetensors")
    sides = {"generated": generated}
    if value is not ...:
        sides["kept"] = value
    change = {"order": [], "changes": {name: sides}}
    if to == "keras":
        change = {"order": [], "changes": {"config": {"inside": change}}}
    document = FLAX if to == "flax" else "config.json"
    layout = "hugging_face" if to == "torch" else to
    (folder / SIDE).write_text(json.dumps({layout: {document: change}}))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "new", to=to)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "layout, to, key, name",
    [
        ("torch", "flax", "flax", FLAX),
        ("flax", "torch", "hugging_face", "config.json"),
        ("flax", "keras", "keras", "config.json"),
    ],
)
def test_side_file_cannot_remove_the_configuration(
    copy, tmp_path, layout, to, key, name
):
    folder = copy(layout)
    (folder / SIDE).write_text(json.dumps({key: {name: None}}))
    with pytest.raises(CheckpointError, match=f"says that there is no {name}"):
        convert(folder, tmp_path / "new", to=to)


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_side_file_cannot_name_other_code(copy, tiny, tmp_path, to):
    folder = copy("flax")
    evil = {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}
    change = {"order": [], "changes": {"auto_map": {"kept": evil}}}
    kept = {"hugging_face": {"config.json": change}}
    (folder / SIDE).write_text(json.dumps(kept))
    convert(folder, tmp_path / "new", to=to)
    config, expected = (
        read_json(each / "config.json") for each in (tmp_path / "new", tiny[to])
    )
    assert config == expected


@pytest.mark.parametrize(
    "named",
    [
        {"module": "os", "class_name": "system"},
        [{"module": "builtins", "class_name": "function"}],
        {"class_name": ["BwETAFTokenizer"]},
    ],
)
def test_side_file_cannot_name_other_classes(copy, tiny, tmp_path, named):
    """Keras imports the modules that its documents name."""
    folder = copy("safetensors")
    change = {"order": [], "changes": {"extra": {"kept": named}}}
    side_file = folder / "conversion_extras.json"
    side_file.write_text(json.dumps({"keras": {"task.json": change}}))
    with pytest.raises(CheckpointError, match="task.json: expected no class "):
        convert(folder, tmp_path / "keras", to="keras")
    assert not (tmp_path / "keras").exists()


def test_side_file_cannot_make_it_another_format(copy, tmp_path):
    folder = copy("flax")
    change = {"order": [], "changes": {"registered_name": {"kept": "x"}}}
    kept = {"hugging_face": {"config.json": change}}
    (folder / SIDE).write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match="cannot be read.*Expected conf"):
        convert(folder, tmp_path / "new", to="torch")
    assert not (tmp_path / "new").exists()


def test_side_file_cannot_write_other_files(copy, tmp_path):
    folder = copy("flax")
    change = {"order": [], "changes": {"a": {"kept": 1}}}
    edits = {"../evil.json": change, "/evil.json": change, "evil.py": change}
    (folder / SIDE).write_text(json.dumps({"hugging_face": edits}))
    convert(folder, tmp_path / "new", to="torch")
    assert not list(tmp_path.rglob("evil*"))
