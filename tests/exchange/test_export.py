import json

import keras
import numpy as np
import pytest

import converters
import keras_bwetaf
from tests.converters.folders import assert_same_folders

TEXTS = ["In the beginning was the Word.", "And there was light, and night."]


@pytest.fixture(scope="module")
def tokenizer():
    return keras_bwetaf.train_tokenizer(TEXTS * 20, vocabulary_size=300)


@pytest.fixture
def make_lm(tokenizer):
    """Makes a small model; its norms and biases are random, too."""

    def make(dtype="float32", num_layers=2, preprocessor=True, **changes):
        keras.utils.set_random_seed(0)
        backbone = keras_bwetaf.BwETAFBackbone(
            **{
                "vocabulary_size": 300,
                "num_layers": num_layers,
                "num_query_heads": 4,
                "num_key_value_heads": 2,
                "hidden_dim": 32,
                "intermediate_dim": 48,
                "max_sequence_length": 64,
                "rope_dtype": None,
                **changes,
            },
            dtype=dtype,
        )
        rng = np.random.default_rng(0)
        for variable in backbone.weights:
            variable.assign(rng.standard_normal(variable.shape) / 4)
        if preprocessor:
            preprocessor = keras_bwetaf.BwETAFCausalLMPreprocessor(
                tokenizer, sequence_length=64
            )
        return keras_bwetaf.BwETAFCausalLM(backbone, preprocessor or None)

    return make


@pytest.mark.parametrize(
    "dtype, changes",
    [
        ("float32", {}),
        ("bfloat16", {"rope_dtype": "float32"}),
        ("mixed_bfloat16", {"num_query_heads": [2, 4]}),
    ],
)
def test_transformers_folder_is_what_converters_write(
    make_lm, tmp_path, dtype, changes
):
    lm = make_lm(dtype, **changes)
    lm.export_to_transformers(tmp_path / "exported")
    lm.save_to_preset(str(tmp_path / "preset"))
    converters.convert(tmp_path / "preset", tmp_path / "torch", to="torch")
    # But for what is only Keras's, such as names of objects.
    (tmp_path / "torch" / "conversion_extras.json").unlink()
    assert_same_folders(tmp_path / "exported", tmp_path / "torch")
    assert converters.detect_format(tmp_path / "exported") == "torch"


def test_no_tokenizer(make_lm, tmp_path):
    lm = make_lm(preprocessor=False)
    lm.export_to_transformers(tmp_path / "exported")
    assert not (tmp_path / "exported" / "tokenizer.json").exists()
    checkpoint = converters.read_checkpoint(tmp_path / "exported")
    assert checkpoint.tokenizer is None


def test_existing_folder(make_lm, tmp_path):
    lm = make_lm(num_layers=1)
    lm.export_to_transformers(tmp_path / "exported")
    lm.backbone.token_embedding.embeddings.assign_add(keras.ops.ones((300, 32)))
    with pytest.raises(ValueError, match="exported: the target exists alread"):
        lm.export_to_transformers(tmp_path / "exported")
    lm.export_to_transformers(tmp_path / "exported", overwrite=True)
    checkpoint = converters.read_checkpoint(tmp_path / "exported")
    np.testing.assert_array_equal(
        checkpoint["model.embed_tokens.weight"].array(),
        lm.backbone.token_embedding.embeddings.numpy(),
    )


def test_lora_is_merged_in_the_dtype_of_the_weights(make_lm, tmp_path):
    lm = make_lm("mixed_bfloat16", num_layers=1)
    base = {each.path: each.numpy() for each in lm.backbone.weights}
    lm.backbone.enable_lora(2)
    rng = np.random.default_rng(1)
    added = {}
    for layer in lm.backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            a, b = layer.lora_kernel_a, layer.lora_kernel_b
            a.assign(rng.standard_normal(a.shape))
            b.assign(rng.standard_normal(b.shape))
            added[f"{layer.path}/kernel"] = a.numpy() @ b.numpy()
    assert added.keys() == {
        f"transformer_layer_0/self_attention/{name}/kernel"
        for name in ("query", "value")
    }
    lm.export_to_transformers(tmp_path / "exported")
    checkpoint = converters.read_checkpoint(tmp_path / "exported")
    for row in checkpoint.rows:
        expected = base[row.keras] + added.get(row.keras, 0)
        received = checkpoint[row.name].array()
        np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-6)


def test_quantized_models_are_refused(make_lm, tmp_path):
    lm = make_lm(num_layers=1)
    lm.backbone.transformer_layers[0].feedforward.gate.quantize("int8")
    with pytest.raises(ValueError, match="no place in a checkpoint.*int8"):
        lm.export_to_transformers(tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["flax", "safetensors", "keras", "torch"])
def test_optimizer_survives_every_format(make_lm, tmp_path, to):
    lm = make_lm()
    lm.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    lm.fit(TEXTS, batch_size=2, epochs=3, shuffle=False, verbose=0)
    lm.save_to_preset(str(tmp_path / "preset"), include_optimizer=True)
    folder = tmp_path / to
    converters.convert(tmp_path / "preset", folder, to=to)

    again = keras_bwetaf.from_preset(folder)
    again.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    again.load_optimizer(folder)
    assert int(again.optimizer.iterations) == 3
    for model in (lm, again):
        model.fit(TEXTS, batch_size=2, epochs=2, shuffle=False, verbose=0)
    for one, two in zip(
        lm.backbone.weights, again.backbone.weights, strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), two.numpy(), one.path)


@pytest.mark.parametrize("first, second", [(10, 7e-5), (7e-5, 10)])
def test_saving_again_leaves_nothing_of_the_first_time(
    make_lm, tmp_path, first, second
):
    folder = tmp_path / "preset"
    lm = make_lm()
    lm.compile(keras.optimizers.AdamW(1e-2))
    lm.save_to_preset(folder, max_shard_size=first, include_optimizer=True)
    lm.backbone.token_embedding.embeddings.assign(keras.ops.ones((300, 32)))
    lm.save_to_preset(folder, max_shard_size=second)
    again = keras_bwetaf.from_preset(folder)
    for one, two in zip(
        lm.backbone.weights, again.backbone.weights, strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), two.numpy(), one.path)
    assert converters.read_checkpoint(folder).optimizer is None
    shards = list(folder.glob("model_*.weights.h5"))
    assert bool(shards) != (folder / "model.weights.h5").exists()


def test_presets_without_state(make_lm, tmp_path):
    lm = make_lm(num_layers=1)
    lm.save_to_preset(str(tmp_path / "preset"))
    assert not (tmp_path / "preset" / "optimizer.weights.h5").exists()
    with pytest.raises(ValueError, match="has no optimizer's state.*preset'"):
        lm.load_optimizer(tmp_path / "preset")
    lm.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="Only the state of Adam can be mov"):
        lm.save_to_preset(str(tmp_path / "other"), include_optimizer=True)
    assert not (tmp_path / "other").exists()


def test_config_of_the_folder(make_lm, tmp_path):
    lm = make_lm("bfloat16", num_layers=1)
    lm.export_to_transformers(tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["BwETAFForCausalLM"]
    assert config["eos_token_id"] == 0
