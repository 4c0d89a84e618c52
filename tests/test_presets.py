import copy
import errno
import functools
import hashlib
import json
import operator
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import h5py
import huggingface_hub
import keras
import numpy as np
import pytest
from huggingface_hub import constants

import converters
from converters import hugging_face_folder
from keras_bwetaf import BwETAFTokenizer, preset_files
from keras_bwetaf import hub as hub_module
from keras_bwetaf.preset_files import list_presets
from keras_bwetaf.presets import from_preset
from tests.hub_server import environment
from tests.original import manager, tokenizer
from tests.parity import weights_by_path
from tests.read_only import read_only

ROOT = Path(__file__).resolve().parents[1]
REPO = "owner/tiny"
HUB = "hf://" + REPO
TINY = dict(
    num_heads=4,
    attention_dim=32,
    vocab_size=512,
    num_blocks=2,
    ff_dim=48,
    max_len=64,
    gqa_repeats=2,
)
TEXTS = ["In the beginning was the Word, and the night sky was bright."] * 50
WEIGHTS = "good_stuff.pkl"


def save_original(folder, dtype, **config):
    """Saves a model and a tokenizer as the original does."""
    model = manager(dtype, **config)
    model.save_model(str(folder), opt_state=False)
    # What a training run leaves and nobody should have to download.
    (folder / "make_stuff_better.pkl").write_bytes(b"optimizer")
    trained = tokenizer.create("tiny")
    trained.train(TEXTS, 400, special_tokens=["<|EOS|>", "<|UK|>"])
    trained.save(str(folder))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model of the original, and its folder."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    return save_original(folder, "float32", **TINY), folder


@pytest.fixture
def flax_folder(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "tiny")


@pytest.fixture
def canonical_folder(saved, tmp_path):
    converters.convert(
        saved[1], tmp_path / "canonical", to="safetensors", optimizer=False
    )
    return tmp_path / "canonical"


@pytest.fixture
def torch_folder(saved, tmp_path):
    folder = tmp_path / "torch"
    converters.convert(saved[1], folder, to="torch", optimizer=False)
    return folder


@pytest.fixture
def sharded_folder(saved, tmp_path):
    folder = tmp_path / "sharded"
    converters.convert(
        saved[1], folder, to="torch", max_shard_size=20_000, optimizer=False
    )
    assert not (folder / "model.safetensors").exists()
    return folder


@pytest.fixture
def keras_folder(saved, tmp_path):
    lm = from_preset(saved[1])
    lm.save_to_preset(str(tmp_path / "keras"))
    return tmp_path / "keras"


@pytest.fixture
def sharded_keras_folder(saved, tmp_path):
    folder = tmp_path / "sharded_keras"
    from_preset(saved[1]).save_to_preset(folder, max_shard_size=8e-5)
    assert len(list(folder.glob("model_*.weights.h5"))) > 1
    assert not (folder / "model.weights.h5").exists()
    return folder


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("A socket was opened.")

    def block():
        monkeypatch.setattr(socket, "socket", refuse)
        monkeypatch.setattr(socket, "create_connection", refuse)

    return block


def values(lm):
    return [np.asarray(weight.value) for weight in lm.backbone.weights]


def assert_same_weights(a, b):
    for x, y in zip(values(a), values(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_original(lm, saved):
    """The weights are the original's, and so is the text they came with."""
    model, folder = saved
    expected = weights_by_path(model.params)
    received = {weight.path: weight.value for weight in lm.backbone.weights}
    assert received.keys() == expected.keys()
    for path, weight in expected.items():
        np.testing.assert_array_equal(received[path], weight, path)
    assert lm.preprocessor.tokenizer("the night sky").tolist() == (
        tokenizer.load(str(folder)).encode("the night sky")
    )
    assert lm.preprocessor.sequence_length == lm.backbone.max_sequence_length


def assert_nothing_left(home):
    """What remains is locks and what the Hub says about commits."""
    for path in home.rglob("*"):
        if path.is_file():
            assert path.parent.name in ("hub", "refs", "trees") or (
                path.suffix == ".lock"
            ), path
    assert not (home / "assets").exists()


def listing(folder):
    return sorted(
        (path, path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
    )


# === Names ===


def test_presets_describe_themselves():
    for name in preset_files.PRESETS:
        architecture, config = preset_files.load_architecture(name)
        backbone = {
            "rope_max_wavelength": 10000.0,
            "layer_norm_epsilon": 1e-8,
            **config,
        }
        canonical = architecture.config_from_keras(backbone)
        shapes = [tensor.shape for tensor in architecture.tensors(canonical)]
        count = sum(int(np.prod(shape)) for shape in shapes)
        assert list_presets()[name]["parameters"] == count
    assert list_presets()["97m"]["parameters"] == 97_609_728


@pytest.mark.parametrize(
    "preset, revision, message",
    [
        ("98m", None, r"Unknown preset.*'97m'.*Received: preset='98m'"),
        (Path("nowhere"), None, "Unknown preset.*'nowhere'"),
        ("hf://tiny", None, "hf://owner/repo. Received: preset='hf://tiny'"),
        (None, None, "is a str or a path.*Received: preset=None of type None"),
        (3, None, "is a str or a path.*Received: preset=3 of type int"),
        (".", "main", "a folder has none. Received: preset='.', revision='m"),
        ("owner/name", None, "or hf://owner/name. Received: preset='owner/n"),
        ("hf://a/b@1", "2", "Two revisions.*preset='hf://a/b@1', revision='2"),
        ("kaggle://a/b", None, "hf://owner/repo@.*preset='kaggle://a/b'"),
        ("s3://a/b", None, "downloaded first.*Received: preset='s3://a/b'"),
        ("https://hf.co/a/b", None, "Expected hf://a/b. Received: preset="),
    ],
)
def test_bad_names(preset, revision, message):
    with pytest.raises(ValueError, match=message):
        from_preset(preset, revision=revision)


# === Folders ===


@pytest.mark.parametrize(
    "layout", ["flax", "canonical", "keras", "torch", "sharded"]
)
def test_folders_load_and_stay_as_they_are(
    layout, saved, tmp_path, monkeypatch, request
):
    folder = request.getfixturevalue(f"{layout}_folder")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = listing(folder)

    lm = from_preset(folder)

    assert_original(lm, saved)
    assert lm.backbone.dtype == "float32"
    assert listing(folder) == before
    assert listing(tmp_path / "temporary") == []


@pytest.mark.parametrize("layout", ["flax", "canonical", "keras"])
def test_dtype_and_overrides(layout, request):
    folder = request.getfixturevalue(f"{layout}_folder")

    lm = from_preset(
        str(folder), dtype="bfloat16", rope_dtype="float32", dropout=0.5
    )

    assert {weight.dtype for weight in lm.backbone.weights} == {"bfloat16"}
    assert lm.backbone.rope_dtype == "float32"
    assert lm.backbone.dropout == 0.5
    assert lm.backbone.num_key_value_heads == 2
    exact = from_preset(folder)
    for rounded, value in zip(values(lm), values(exact), strict=True):
        np.testing.assert_array_equal(rounded, value.astype("bfloat16"))


@pytest.mark.parametrize("layout", ["flax", "canonical", "keras"])
def test_overrides_that_do_not_fit(layout, request):
    folder = request.getfixturevalue(f"{layout}_folder")
    with pytest.raises(TypeError, match="ropedtype.*it takes vocab.*rope_dt"):
        from_preset(folder, ropedtype="float32")
    with pytest.raises(ValueError, match="does not fit the weights"):
        from_preset(folder, vocabulary_size=600)

    lm = from_preset(folder, load_weights=False, vocabulary_size=600)

    assert lm.backbone.vocabulary_size == 600
    assert lm.preprocessor is not None


def test_shape_errors_name_every_tensor(canonical_folder):
    with pytest.raises(ValueError) as error:
        from_preset(canonical_folder, vocabulary_size=600, num_layers=1)
    message = str(error.value)
    assert "differ: 14" in message
    assert (
        "token_embedding/embeddings: (512, 32) in the checkpoint, (600, 32) "
        "in the model"
    ) in message
    assert "(32,) in the checkpoint, nothing in the model" in message


def test_random_weights(canonical_folder):
    (canonical_folder / "model.safetensors").unlink()
    keras.utils.set_random_seed(0)

    lm = from_preset(canonical_folder, load_weights=False)

    embeddings = np.asarray(lm.backbone.token_embedding.embeddings)
    assert 0.015 < embeddings.std() < 0.025


def test_weights_are_copies(canonical_folder):
    path = canonical_folder / "model.safetensors"
    data = path.read_bytes()
    # Aligned to 64 bytes, arrays could be used where they are.
    length = int.from_bytes(data[:8], "little")
    padding = -(8 + length) % 64
    size = (length + padding).to_bytes(8, "little")
    header = data[8 : 8 + length] + b" " * padding
    path.write_bytes(size + header + data[8 + length :])
    lm = from_preset(canonical_folder)
    before = [np.array(value) for value in values(lm)]
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    for value, old in zip(values(lm), before, strict=True):
        np.testing.assert_array_equal(value, old)


def test_folder_without_tokenizer(flax_folder):
    shutil.rmtree(flax_folder / "tokenizer")
    with pytest.warns(UserWarning, match="no prep.*no tokenizer/yap.json"):
        lm = from_preset(flax_folder)
    assert lm.preprocessor is None


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
KERAS_WEIGHTS = "model.weights.h5"
KERAS_TOKENIZER = "assets/tokenizer/tokenizer.json"


def flipped(data):
    """The data with a byte flipped in each part that says what it holds."""
    return bytes(
        byte ^ 255 if at % 97 == 8 else byte for at, byte in enumerate(data)
    )


@pytest.mark.parametrize(
    "name",
    [
        *(KERAS_WEIGHTS, KERAS_TOKENIZER, "config.json", "task.json"),
        *("tokenizer.json", "preprocessor.json", "metadata.json"),
    ],
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: LFS,
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        flipped,
        lambda data: b"[" * 100_000,
        lambda data: b"[]",
    ],
    ids=["pointer", "half", "empty", "flipped", "deep", "list"],
)
def test_damaged_keras_folder(name, damage, keras_folder):
    path = keras_folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        from_preset(keras_folder)
    assert str(path) in str(error.value)


def test_missing_keras_weights(keras_folder):
    (keras_folder / KERAS_WEIGHTS).unlink()
    with pytest.raises(ValueError, match="weights.h5: the file is missing"):
        from_preset(keras_folder)


def test_missing_tensors_of_a_keras_folder(keras_folder):
    with h5py.File(keras_folder / KERAS_WEIGHTS, "a") as file:
        del file["layers/transformer_block/attention/query/vars/0"]
    with pytest.raises(ValueError, match="keras: missing tensor .*query"):
        from_preset(keras_folder)


def test_shards_of_a_keras_folder_in_a_bad_index(sharded_keras_folder):
    path = sharded_keras_folder / "model.weights.json"
    for text in (LFS, b"{}", b'{"weight_map": {"a": "../model_00000.h5"}}'):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="model.weights.json"):
            from_preset(sharded_keras_folder)


def test_a_size_that_the_weights_do_not_have_takes_no_memory(canonical_folder):
    path = canonical_folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("vocab_size", "intermediate_size"):
        config[name] = 2**24
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has shape .*, but the config"):
        from_preset(canonical_folder)


def nested(value, path=()):
    """Paths of all entries of a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from nested(item, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "preprocessor.json"])
@pytest.mark.parametrize("odd", [None, -1, [{}], {"class_name": "x"}], ids=str)
def test_odd_values_in_keras_folders(name, odd, keras_folder):
    path = keras_folder / name
    document = json.loads(path.read_text())
    refused = 0
    for place in nested(document):
        changed = copy.deepcopy(document)
        parent = functools.reduce(operator.getitem, place[:-1], changed)
        parent[place[-1]] = odd
        path.write_text(json.dumps(changed))
        try:
            with warnings.catch_warnings(action="ignore"):
                from_preset(keras_folder)
        except ValueError:  # and no other kind of error
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("overrides", [{}, {"dropout": 0.25}])
@pytest.mark.parametrize("part", ["backbone", "model"])
def test_keras_preset_without_tokenizer(part, overrides, saved, tmp_path):
    lm = from_preset(saved[1])
    lm.preprocessor = None
    whole = lm if part == "model" else lm.backbone
    whole.save_to_preset(str(tmp_path / "keras"))

    with pytest.warns(UserWarning, match="no assets/tokenizer/tokenizer.json"):
        loaded = from_preset(tmp_path / "keras", **overrides)

    assert loaded.preprocessor is None
    assert loaded.backbone.dropout == overrides.get("dropout", 0.05)
    assert_same_weights(loaded, lm)


@pytest.mark.parametrize("overrides", [{}, {"dropout": 0.25}])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"registered_name": "keras_hub>LlamaBackbone"},
            "expected.*'keras_bwetaf>BwETAFBackbone'.*'keras_hub>LlamaBackb",
        ),
        ({"config": None}, "and a config.*config of type NoneType"),
    ],
)
def test_keras_preset_of_another_class(
    changes, message, overrides, keras_folder
):
    path = keras_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        from_preset(keras_folder, **overrides)


@pytest.mark.slow
def test_quantized_preset(saved, tmp_path):
    lm = from_preset(saved[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`quantize` method")
        lm.backbone.quantize("int8")
    lm.save_to_preset(str(tmp_path / "keras"))

    loaded = from_preset(tmp_path / "keras", dropout=0.25)

    assert loaded.backbone.dropout == 0.25
    assert "int8" in {weight.dtype for weight in loaded.backbone.weights}
    assert_same_weights(loaded, lm)
    with pytest.raises(ValueError, match="quantized.*dtype='bfloat16'"):
        from_preset(tmp_path / "keras", dtype="bfloat16")


@pytest.mark.parametrize("load_weights", [True, False])
@pytest.mark.parametrize("layout", ["flax", "canonical"])
def test_special_tokens_of_the_settings(layout, load_weights, request):
    folder = request.getfixturevalue(f"{layout}_folder")
    for path in folder.rglob("*.json"):
        text = path.read_text()
        text = text.replace("<|EOS|>", "</s>").replace("<|UK|>", "<unk>")
        path.write_text(text)

    lm = from_preset(folder, load_weights=load_weights)

    assert lm.preprocessor.tokenizer.end_token == "</s>"
    assert lm.preprocessor.tokenizer.unk_token == "<unk>"


# === The Hub ===


def test_flax_repository(
    hub,
    hub_client,
    saved,
    no_sockets,
):
    commit = hub.add(REPO, saved[1])

    first = from_preset(HUB)

    assert_original(first, saved)
    assert dict(hub.downloads()) == {
        "understanding_good_stuff.json": 1,
        WEIGHTS: 1,
        "tokenizer/yap.json": 1,
        "tokenizer/understanding_yap.json": 1,
    }
    assert preset_files.cached_folder(HUB) == (
        hub_client / "assets" / "keras-bwetaf" / "owner--tiny" / commit
    )
    hub.stop()
    no_sockets()
    shutil.rmtree(hub_client / "hub")
    for revision in (None, "main", commit):
        assert_same_weights(first, from_preset(HUB, revision=revision))


@pytest.mark.parametrize("layout", ["canonical", "keras", "sharded_keras"])
def test_other_repositories_load_from_the_hub_cache(
    layout,
    hub,
    hub_client,
    saved,
    no_sockets,
    request,
):
    folder = request.getfixturevalue(f"{layout}_folder")
    (folder / "training_log.json").write_text("{}")
    commit = hub.add(REPO, folder)

    first = from_preset(HUB)

    assert_original(first, saved)
    assert "training_log.json" not in hub.downloads()
    assert set(hub.downloads().values()) == {1}
    snapshot = hub_client / "hub" / "models--owner--tiny/snapshots" / commit
    assert preset_files.cached_folder(HUB) == snapshot
    hub.stop()
    no_sockets()
    assert_same_weights(first, from_preset(HUB))


def test_a_branch_stays_pinned(hub, hub_client, flax_folder):
    hub.add(REPO, flax_folder)
    first = from_preset(HUB)
    manager("float32", seed=1, **TINY).save_model(
        str(flax_folder), opt_state=False
    )
    commit = hub.add(REPO, flax_folder)

    assert_same_weights(first, from_preset(HUB))
    with pytest.raises(AssertionError):
        assert_same_weights(first, from_preset(HUB, revision=commit))
    # The pin outlives the files that it points to.
    shutil.rmtree(preset_files.cached_folder(HUB))
    shutil.rmtree(hub_client / "hub")
    assert_same_weights(first, from_preset(HUB))


def test_a_pinned_snapshot_without_weights(hub, hub_client, canonical_folder):
    hub.add(REPO, canonical_folder)
    first = from_preset(HUB)
    shutil.rmtree(hub_client / "hub")

    folder = preset_files.preset_folder(HUB, weights=False)

    assert (folder / "config.json").is_file()
    assert preset_files.cached_folder(HUB) is None
    assert_same_weights(first, from_preset(HUB))


def test_a_pinned_snapshot_is_converted_again(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    from_preset(HUB)
    converted = preset_files.cached_folder(HUB)
    shutil.rmtree(converted)

    assert preset_files.cached_folder(HUB) is None
    assert_original(from_preset(HUB), saved)
    assert preset_files.cached_folder(HUB) == converted
    assert hub.downloads()[WEIGHTS] == 1


def test_offline(hub, hub_client, saved, monkeypatch):
    hub.add(REPO, saved[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="not in the cache.*OFFLINE"):
        from_preset(HUB)
    assert_nothing_left(hub_client)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert_original(from_preset(HUB), saved)


@pytest.mark.parametrize("layout", ["torch", "sharded"])
def test_repositories_for_transformers(layout, hub, hub_client, saved, request):
    hub.add(REPO, request.getfixturevalue(f"{layout}_folder"))

    assert_original(from_preset(HUB), saved)

    assert "modeling_bwetaf.py" not in hub.downloads()
    hub.stop()
    assert_original(from_preset(HUB), saved)


@pytest.mark.parametrize(
    "layout, shard, message",
    [
        ("sharded", "model-00002-of-*", "the shard {} is missing"),
        ("sharded_keras", "model_00001.*", "{}: the file is missing"),
    ],
)
def test_missing_shard(layout, shard, message, hub, hub_client, request):
    folder = request.getfixturevalue(f"{layout}_folder")
    (shard,) = folder.glob(shard)
    shard.unlink()
    hub.add(REPO, folder)
    with pytest.raises(ValueError, match=message.format(shard.name)):
        from_preset(HUB)
    assert_nothing_left(hub_client)


def test_revision_in_the_address(hub, hub_client, canonical_folder):
    hub.add(REPO, canonical_folder, branch="v1")
    lm = from_preset(f"{HUB}@v1")
    assert_same_weights(lm, from_preset(HUB.upper()[:2] + HUB[2:] + "@v1"))
    assert_same_weights(lm, from_preset(f"{HUB}@v1", revision="v1"))
    with pytest.raises(FileNotFoundError, match="revision main"):
        from_preset(HUB)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("layout", ["flax", "canonical", "sharded_keras"])
def test_read_only_cache(
    layout, offline, hub, hub_client, saved, request, monkeypatch
):
    hub.add(REPO, request.getfixturevalue(f"{layout}_folder"))
    huggingface_hub.snapshot_download(REPO)
    downloads = hub.downloads()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    before = listing(hub_client)

    with read_only(hub_client):
        assert_original(from_preset(HUB), saved)
        assert len(BwETAFTokenizer.from_preset(HUB)("the night sky")) > 0
        assert converters.verify(HUB, saved[1], optimizer=False, logits=False)[
            "same"
        ]

    assert listing(hub_client) == before
    assert hub.downloads() == downloads


def test_read_only_assets(hub, hub_client, saved, monkeypatch):
    hub.add(REPO, saved[1])
    (hub_client / "assets").mkdir(parents=True)
    with read_only(hub_client / "assets"):
        assert_original(from_preset(HUB), saved)
    assert preset_files.cached_folder(HUB) is None
    assert_original(from_preset(HUB), saved)
    assert preset_files.cached_folder(HUB) is not None


def test_read_only_cache_that_lacks_a_file(hub, hub_client, saved):
    commit = hub.add(REPO, saved[1])
    snapshot = Path(huggingface_hub.snapshot_download(REPO))
    assert snapshot.name == commit
    (snapshot / WEIGHTS).resolve().unlink()
    (snapshot / WEIGHTS).unlink()
    with read_only(hub_client):
        with pytest.raises(OSError, match="Read-only.*Cannot write the cache"):
            from_preset(HUB)


def test_a_partial_cache_is_not_enough(
    hub, hub_client, canonical_folder, monkeypatch
):
    hub.add(REPO, canonical_folder)
    BwETAFTokenizer.from_preset(HUB)  # without weights
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    BwETAFTokenizer.from_preset(HUB)
    with pytest.raises(ConnectionError, match="not all of it.*HF_HUB_OFFLINE"):
        from_preset(HUB)


@pytest.mark.parametrize("layout", ["torch", "keras", "sharded_keras"])
def test_both_packages_share_the_cache(layout, hub, hub_client, request):
    folder = request.getfixturevalue(f"{layout}_folder")
    # `from_preset` leaves them out, and a conversion must not lose them.
    for name in ("stats.json", "conversion_extras.json"):
        (folder / name).unlink(missing_ok=True)
    hub.add(REPO, folder)
    from_preset(HUB)
    hub.stop()
    report = converters.inspect(HUB)
    assert report["problem"] is None and report["parameters"] > 0


def test_token(hub, hub_client, saved, monkeypatch):
    hub.add(REPO, saved[1])
    hub.token = "hf_right"
    with pytest.raises(FileNotFoundError, match="private, log in with `hf au"):
        from_preset(HUB)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match="status 401.*set HF_TOKEN"):
        from_preset(HUB)
    assert_nothing_left(hub_client)
    monkeypatch.setenv("HF_TOKEN", "hf_right")

    assert_original(from_preset(HUB), saved)


def test_gated(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    hub.gated.add(REPO)
    with pytest.raises(PermissionError, match="gated.*`hf auth login` or set"):
        from_preset(HUB)
    assert_nothing_left(hub_client)


def test_unknown_repository_and_revision(
    hub,
    hub_client,
    saved,
):
    hub.add(REPO, saved[1])
    with pytest.raises(FileNotFoundError, match="owner/other.*not exist"):
        from_preset("hf://owner/other")
    with pytest.raises(FileNotFoundError, match="v2.*no such revision"):
        from_preset(HUB, revision="v2")
    assert_nothing_left(hub_client)


def test_no_network(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    hub.stop()
    with pytest.raises(ConnectionError, match="cannot be reached.*a folder"):
        from_preset(HUB)
    assert_nothing_left(hub_client)


@pytest.mark.parametrize(
    "name", ["understanding_good_stuff.json", WEIGHTS, "tokenizer/yap.json"]
)
def test_missing_file(name, hub, hub_client, flax_folder):
    (flax_folder / name).unlink()
    hub.add(REPO, flax_folder)
    with pytest.raises(FileNotFoundError, match=f"Missing: {name}"):
        from_preset(HUB)
    assert_nothing_left(hub_client)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/yap.json"])
def test_corrupt_download(name, hub, hub_client, saved):
    hub.add(REPO, saved[1])
    hub.corrupt.add(name)
    with pytest.raises(ValueError, match=f"{name}: the download is corrupt"):
        from_preset(HUB)
    assert_nothing_left(hub_client)
    hub.corrupt.clear()

    assert_original(from_preset(HUB), saved)


def test_truncated_download(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    hub.truncated[WEIGHTS] = 1000
    with pytest.raises(ConnectionError, match="incomplete.*but has size 1000"):
        from_preset(HUB)
    assert preset_files.cached_folder(HUB) is None
    assert not (hub_client / "assets").exists()
    assert not list(hub_client.rglob("*.incomplete"))
    hub.truncated.clear()

    assert_original(from_preset(HUB), saved)


def test_truncated_in_the_repository(
    hub,
    hub_client,
    flax_folder,
):
    weights = flax_folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    hub.add(REPO, flax_folder)
    with pytest.raises(ValueError, match="truncated"):
        from_preset(HUB)
    assert_nothing_left(hub_client)


@pytest.mark.parametrize("layout", ["flax", "canonical"])
def test_wrong_shape(
    layout,
    hub,
    hub_client,
    request,
):
    folder = request.getfixturevalue(f"{layout}_folder")
    name, key = {
        "flax": ("understanding_good_stuff.json", "ff_dim"),
        "canonical": ("config.json", "intermediate_size"),
    }[layout]
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, key: 50}))
    hub.add(REPO, folder)
    with pytest.raises(ValueError, match=r"\(?50\D"):
        from_preset(HUB)
    assert_nothing_left(hub_client)


def test_another_architecture_costs_no_download(
    hub,
    hub_client,
    canonical_folder,
):
    path = canonical_folder / "config.json"
    path.write_text(path.read_text().replace('"bwetaf"', '"llama"'))
    hub.add(REPO, canonical_folder)
    with pytest.raises(ValueError, match="model_type='llama'"):
        from_preset(HUB)
    assert "model.safetensors" not in hub.downloads()
    assert_nothing_left(hub_client)


def test_what_was_in_the_cache_stays(hub, hub_client, canonical_folder):
    path = canonical_folder / "config.json"
    path.write_text(path.read_text().replace('"bwetaf"', '"llama"'))
    hub.add(REPO, canonical_folder)
    snapshot = Path(huggingface_hub.snapshot_download(REPO))
    before = listing(snapshot)

    with pytest.raises(ValueError, match="model_type='llama'"):
        from_preset(HUB)

    assert listing(snapshot) == before


def test_corrupt_file_in_the_cache(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    hub.corrupt.add(WEIGHTS)
    snapshot = Path(huggingface_hub.snapshot_download(REPO))
    hub.corrupt.clear()

    with pytest.raises(ValueError, match="corrupt and was removed"):
        from_preset(HUB)

    assert (snapshot / "make_stuff_better.pkl").is_file()
    assert not (snapshot / WEIGHTS).exists()
    assert_original(from_preset(HUB), saved)


@pytest.mark.parametrize(
    "layout, name, kind",
    [
        ("keras", "model.weights.h5", "HDF5"),
        ("keras", "assets/tokenizer/tokenizer.json", "tokenizer"),
        ("canonical", "tokenizer.json", "tokenizer"),
        ("flax", "tokenizer/yap.json", "tokenizer"),
    ],
)
def test_damaged_in_the_repository(
    layout, name, kind, hub, hub_client, request
):
    folder = request.getfixturevalue(f"{layout}_folder")
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(b"{}" if kind == "tokenizer" else content[:-1000])
    hub.add(REPO, folder)
    with pytest.raises(ValueError, match=f"{name}: expected a {kind} file"):
        from_preset(HUB)
    assert preset_files.cached_folder(HUB) is None
    assert_nothing_left(hub_client)


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError(errno.ENOSPC, "No space"), OSError, "No space. Cannot write"),
        (OSError(errno.EROFS, "Read-only"), OSError, "only. Cannot write"),
        (ConnectionResetError(errno.ECONNRESET, "x"), ConnectionError, "incom"),
        (OSError(errno.ENETUNREACH, "x"), ConnectionError, "incomplete"),
        (OSError(), ConnectionError, "incomplete. OSError. Try again"),
    ],
)
def test_errors_on_the_way(error, kind, message):
    with pytest.raises(OSError, match=message) as caught:
        with hub_module.clear_errors(REPO, "main"):
            raise error
    assert isinstance(caught.value, ConnectionError) == (
        kind is ConnectionError
    )


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "HF_ASSETS_CACHE"])
def test_cache_that_cannot_be_written(
    name,
    hub,
    hub_client,
    saved,
    tmp_path,
    monkeypatch,
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, name, str(tmp_path / "file" / "cache"))
    hub.add(REPO, saved[1])
    with pytest.raises(OSError, match="Cannot write the cache.*HF_HOME"):
        from_preset(HUB)


def test_interrupted_conversion_leaves_nothing(
    hub,
    hub_client,
    saved,
    monkeypatch,
):
    hub.add(REPO, saved[1])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            hugging_face_folder, "write_safetensors_folder", interrupt
        )
        with pytest.raises(KeyboardInterrupt):
            from_preset(HUB)
    assert not [
        path for path in (hub_client / "assets").rglob("*") if path.is_file()
    ]
    assert preset_files.cached_folder(HUB) is None

    assert_original(from_preset(HUB), saved)
    assert hub.downloads()[WEIGHTS] == 1


# === Without weights ===


@pytest.fixture
def tiny_preset(monkeypatch):
    config = {
        "vocabulary_size": 512,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 32,
        "intermediate_dim": 48,
        "max_sequence_length": 32,
    }
    preset = {"repo": REPO, "revision": "main", "config": config}
    monkeypatch.setitem(preset_files.PRESETS, "tiny", preset)


def test_name_without_weights(hub, hub_client, saved, tiny_preset):
    hub.add(REPO, saved[1])

    lm = from_preset("tiny", load_weights=False, dropout=0.25)

    assert WEIGHTS not in hub.downloads()
    assert lm.backbone.max_sequence_length == 32  # the preset's
    assert lm.backbone.dropout == 0.25
    assert len(lm.preprocessor.tokenizer("the night sky")) > 0
    assert preset_files.cached_folder("tiny") is None


def test_tokenizer_alone(hub, hub_client, saved, tmp_path):
    hub.add(REPO, saved[1])
    alone = BwETAFTokenizer.from_preset(HUB)
    assert WEIGHTS not in hub.downloads()
    lm = from_preset(HUB)
    lm.save_to_preset(tmp_path)
    of_keras = BwETAFTokenizer.from_preset(tmp_path)
    for each in (alone, of_keras):
        assert each.content == lm.preprocessor.tokenizer.content
        assert each.end_token == lm.preprocessor.tokenizer.end_token
    with pytest.raises(ValueError, match="Unknown preset"):
        BwETAFTokenizer.from_preset("98m")


def test_name_without_weights_or_network(hub, hub_client):
    hub.stop()
    with pytest.warns(UserWarning, match="cannot be reached") as caught:
        lm = from_preset("97m", load_weights=False)
    assert caught[0].filename == __file__
    assert lm.preprocessor is None
    assert lm.backbone.count_params() == 97_609_728
    assert_nothing_left(hub_client)


def test_only_the_network_may_be_missing(hub, hub_client, saved, tiny_preset):
    hub.add(REPO, saved[1])
    with pytest.raises(FileNotFoundError, match="no such revision"):
        from_preset("tiny", load_weights=False, revision="nope")
    hub.corrupt.add("tokenizer/yap.json")
    with pytest.raises(ValueError, match="corrupt"):
        from_preset("tiny", load_weights=False)
    hub.gated.add(REPO)
    with pytest.raises(PermissionError, match="gated"):
        from_preset("tiny", load_weights=False)


# === Processes ===

LOAD = """
import hashlib, re, sys
from pathlib import Path

def resident(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])

import keras_bwetaf
preset, dtype, warm_up, *blocked = sys.argv[1:]
# What the libraries allocate on first use is no part of the weights' cost.
keras_bwetaf.from_preset(warm_up, dtype=dtype)
if blocked:
    import socket
    socket.socket = socket.create_connection = None
before = resident("VmRSS")
lm = keras_bwetaf.from_preset(preset, dtype=dtype)
peak = resident("VmHWM") - before
digest = hashlib.sha256()
size = 0
for weight in lm.backbone.weights:
    size += weight.value.nbytes
    digest.update(weight.value.tobytes())
print(lm.backbone.count_params(), digest.hexdigest(), peak / size)
"""


def start(script, *arguments, hub, home):
    variables = {**os.environ, **environment(hub, home)}
    del variables["JAX_COMPILATION_CACHE_DIR"]  # It takes memory of its own.
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    return output.split()


@pytest.mark.slow
def test_two_processes_convert_once(hub, hub_client, saved):
    hub.add(REPO, saved[1])
    processes = [
        start(LOAD, HUB, "float32", saved[1], hub=hub, home=hub_client)
        for _ in range(2)
    ]

    (_, first, _), (_, second, _) = map(finish, processes)

    assert first == second
    assert set(hub.downloads().values()) == {1}
    assert_original(from_preset(HUB), saved)


KILLED = """
import os, signal, sys
from converters import safetensors_format
from keras_bwetaf import preset_files

def kill(path, *_):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

safetensors_format.write_safetensors = kill
preset_files.preset_folder(sys.argv[1])
"""


@pytest.mark.slow
def test_killed_conversion_leaves_no_half_cache(
    hub,
    hub_client,
    saved,
):
    hub.add(REPO, saved[1])
    process = start(KILLED, HUB, hub=hub, home=hub_client)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert list(hub_client.rglob("*.safetensors"))  # it was under way
    assert preset_files.cached_folder(HUB) is None

    lm = from_preset(HUB)

    assert_original(lm, saved)
    assert list(hub_client.rglob("*.safetensors")) == [
        preset_files.cached_folder(HUB) / "model.safetensors"
    ]


@pytest.mark.slow
def test_the_published_model_end_to_end(
    hub,
    hub_client,
    saved,
    tmp_path,
):
    folder = tmp_path / "97m"
    model = save_original(folder, "bfloat16")
    hub.add(REPO, saved[1])
    hub.add("WICKED4950/BwETAFv3-97M", folder)
    hub.dropped[WEIGHTS] = 65_000_000

    count, _, peak = finish(
        start(LOAD, "97m", "float32", HUB, hub=hub, home=hub_client)
    )

    assert int(count) == 97_609_728
    assert float(peak) <= 1.3
    assert "make_stuff_better.pkl" not in hub.downloads()
    ranges = [
        headers["Range"] for _, _, headers in hub.requests if "Range" in headers
    ]
    assert ranges == ["bytes=62914560-"]  # whole chunks of 10 MiB were kept

    hub.stop()
    count, digest, peak = finish(
        start(LOAD, "97m", "bfloat16", HUB, 1, hub=hub, home=hub_client)
    )

    assert int(count) == 97_609_728
    assert float(peak) <= 1.3
    lm = from_preset("97m", dtype="bfloat16")
    assert_original(lm, (model, folder))
    received = hashlib.sha256(b"".join(map(np.ndarray.tobytes, values(lm))))
    assert received.hexdigest() == digest
