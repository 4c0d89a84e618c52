"""Nothing writes to an address, of which pathlib would make folders."""

import os
from pathlib import Path

import pytest

import keras_bwetaf
from keras_bwetaf import BwETAFBackbone, BwETAFCausalLM, BwETAFTokenizer
from keras_bwetaf.data import pack
from keras_bwetaf.training import Monitor, TrainingCheckpoint, plot_losses


@pytest.fixture(scope="module")
def lm():
    backbone = BwETAFBackbone(
        vocabulary_size=8,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=8,
    )
    backbone.enable_lora(2)
    return BwETAFCausalLM(backbone, preprocessor=None)


def pack_texts(lm, folder):
    tokenizer = BwETAFTokenizer.from_preset("tiny")
    pack(["A text."], folder, tokenizer, num_workers=1, progress=False)


WRITERS = {
    "TrainingCheckpoint": (
        "folder",
        lambda lm, path: TrainingCheckpoint(path, save_every=1),
    ),
    "Monitor": ("folder", lambda lm, path: Monitor(path)),
    "pack": ("folder", pack_texts),
    "train": (
        "folder",
        lambda lm, path: keras_bwetaf.train(path, data="x.txt", steps=1),
    ),
    "plot_losses": (
        "path",
        lambda lm, path: plot_losses({"loss": [[1.0, 2.0]]}, path),
    ),
    "save_to_preset": ("preset_dir", lambda lm, path: lm.save_to_preset(path)),
    "export_to_transformers": (
        "target",
        lambda lm, path: lm.export_to_transformers(path),
    ),
    "save_lora_weights": (
        "filepath",
        lambda lm, path: lm.backbone.save_lora_weights(
            f"{path}.lora.safetensors"
        ),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "address", ["gs://bucket/name", "s3://b/n", "hf://me/model", "C2://x/y"]
)
def test_addresses_are_refused(writer, address, lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, write = WRITERS[writer]
    for path in (address, Path(address)):
        with pytest.raises(ValueError, match="must be a path of this machine"):
            write(lm, path)
    with pytest.raises(ValueError, match=f"Received: {name}='{address}"):
        write(lm, address)
    assert os.listdir(tmp_path) == []
