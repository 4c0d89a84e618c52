import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

import converters
from converters import runtimes
from converters.transformers_model import modeling_bwetaf
from tests.converters.folders import FORMATS, assert_same_folders, edit_json

NAME = "model.layers.1.mlp.gate_proj.weight"


def change_tensor(folder, name, change, file="model"):
    path = folder / f"{file}.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays[name] = change(arrays[name].copy())
    safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize(
    "left, right", [*itertools.combinations_with_replacement(FORMATS, 2)]
)
def test_the_same_model_is_the_same(tiny, left, right):
    report = converters.verify(tiny[left], tiny[right], logits=False)
    assert report == {
        "left": str(tiny[left]),
        "right": str(tiny[right]),
        "same": True,
        "config": {},
        "files": [],
        "code": [],
        "compared": 27 * 3 + 1,
        "tensors": [],
        "logits": {"skipped": "not asked for"},
    }


@pytest.mark.parametrize(
    "right, framework", [("keras", "keras_bwetaf"), ("torch", "transformers")]
)
def test_logits_of_two_formats(tiny, right, framework):
    report = converters.verify(tiny["flax"], tiny[right])
    logits = report["logits"]
    assert report["same"]
    assert logits["frameworks"] == ["keras_bwetaf", framework]
    assert logits["relative_l2"] <= 1e-5
    assert logits["same_top_1"]
    assert (logits["relative_l2"] == 0) == (right == "keras")
    cached = logits["cached_relative_l2"]
    assert len(cached) == 2 and max(cached) <= 1e-4


def test_one_bit_is_a_difference(tiny, copy):
    def flip(array):
        array.view("uint32")[3, 4] ^= 1
        return array

    folder = copy("safetensors")
    change_tensor(folder, NAME, flip)
    change_tensor(folder, f"exp_avg.{NAME}", flip, "optimizer")
    report = converters.verify(tiny["flax"], folder, logits=False)
    assert not report["same"]
    (weight, moment) = report["tensors"]
    assert weight["name"] == NAME
    assert weight["difference"].startswith("1 of 1536 values, by up to ")
    assert moment["name"] == f"exp_avg.{NAME}"
    report = converters.verify(
        tiny["flax"], folder, logits=False, optimizer=False
    )
    assert [each["name"] for each in report["tensors"]] == [NAME]


def test_signs_of_zero_and_bits_of_nan_count(tiny, copy):
    left, right = copy("safetensors", "left"), copy("safetensors", "right")

    def set_to(zero, nan):
        def change(array):
            array[0, 0] = zero
            array.view("uint32")[0, 1] = nan
            return array

        return change

    change_tensor(left, NAME, set_to(0.0, 0x7FC00000))
    change_tensor(right, NAME, set_to(-0.0, 0x7FC00001))
    report = converters.verify(left, right, logits=False)
    assert report["tensors"] == [
        {"name": NAME, "difference": "2 of 1536 values, by up to nan"}
    ]


def test_large_differences_reach_the_logits(tiny, copy):
    folder = copy("torch")
    change_tensor(folder, NAME, lambda array: array * 1.5)
    report = converters.verify(tiny["torch"], folder)
    assert not report["same"]
    assert report["logits"]["relative_l2"] > 1e-3


def test_dtypes_and_missing_states_are_differences(tiny, tmp_path):
    narrow = tmp_path / "narrow"
    converters.convert(
        tiny["flax"], narrow, to="keras", dtype="bfloat16", optimizer=False
    )
    report = converters.verify(tiny["flax"], narrow, logits=False)
    differences = {
        each["name"]: each["difference"] for each in report["tensors"]
    }
    assert differences[NAME] == "dtype float32 and bfloat16"
    assert differences["step"] == "only in the left one"
    assert len(differences) == 27 * 3 + 1
    assert not report["same"]


def test_configurations_and_tokens_are_compared(tiny, copy):
    folder = copy("safetensors")
    edit_json(folder / "config.json", hidden_dropout=0.5)
    edit_json(folder / "tokenizer_config.json", unk_token="<|EOS|>")
    report = converters.verify(folder, tiny["flax"])
    assert report["config"] == {"hidden_dropout": [0.5, 0.05]}
    assert report["files"] == ["special_tokens"]
    assert report["logits"] == {"skipped": "the configurations differ"}
    assert not report["same"]


def test_tokenizers_are_compared(tiny, copy):
    folder = copy("keras")
    path = folder / "assets/tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    end = {"SpecialToken": {"id": "<|EOS|>", "type_id": 0}}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "pair": [whole, whole]}
    template |= {"single": [whole], "special_tokens": {}}
    for changes, same in (
        ({}, True),  # but for whitespace
        ({"post_processor": template}, True),  # as transformers writes it
        ({"truncation": {"max_length": 8}, "padding": {"pad_id": 0}}, True),
        ({"model": model | {"ignore_merges": False}}, True),
        (
            {"model": model | {"merges": [*map(" ".join, model["merges"])]}},
            True,
        ),
        ({"post_processor": template | {"single": [whole, end]}}, False),
        ({"model": model | {"merges": model["merges"][:-1]}}, False),
        ({"model": model | {"ignore_merges": True}}, False),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"added_tokens": content["added_tokens"][:1]}, False),
    ):
        path.write_text(json.dumps(content | changes))
        report = converters.verify(folder, tiny["flax"], logits=False)
        assert report["files"] == ([] if same else ["tokenizer"])
        assert report["same"] == same
    shutil.rmtree(folder / "assets")
    report = converters.verify(folder, tiny["flax"], logits=False)
    assert report["files"] == ["tokenizer", "special_tokens"]


def test_a_tokenizer_that_transformers_saved_is_the_same(tiny, copy):
    """It writes a post-processor that adds nothing, and orders settings."""
    folder = copy("torch")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    path = folder / "tokenizer.json"
    saved = path.read_bytes()
    assert saved != (tiny["torch"] / "tokenizer.json").read_bytes()
    report = converters.verify(tiny["torch"], folder, logits=False)
    assert report["files"] == [] and report["same"]
    document = json.loads(saved)
    document["post_processor"]["single"] *= 2
    path.write_text(json.dumps(document))
    report = converters.verify(tiny["torch"], folder, logits=False)
    assert report["files"] == ["tokenizer"]


def test_training_statistics_are_no_part_of_the_model(tiny, copy):
    folder = copy("flax")
    (folder / "stats.json").write_text("{}")
    report = converters.verify(folder, tiny["flax"], logits=False)
    assert report["files"] == ["stats"]
    assert not report["same"]
    (folder / "stats.json").unlink()
    assert converters.verify(folder, tiny["flax"], logits=False)["same"]


def test_frameworks_that_are_not_there(tiny, monkeypatch):
    monkeypatch.setattr(
        runtimes.importlib.util, "find_spec", lambda name: name != "torch"
    )
    report = converters.verify(tiny["flax"], tiny["torch"])
    assert report["same"]
    assert report["logits"] == {"skipped": "not installed: transformers"}


def test_a_folders_own_code_is_compared_and_not_run(copy, tiny):
    folder = copy("torch")
    (folder / "modeling_bwetaf.py").write_text("raise SystemExit('run')")
    report = converters.verify(tiny["torch"], folder)
    assert not report["same"]
    (problem,) = report["code"]
    assert problem == (
        f"{folder}: of another version: modeling_bwetaf.py. "
        "transformers runs this code, and may compute something else. Bring "
        f"it up to date: bwetaf-convert convert {folder} NEW --to torch"
    )
    assert report["logits"]["frameworks"] == ["transformers"] * 2
    assert report["logits"]["relative_l2"] == 0


def test_converting_again_brings_code_up_to_date(copy, tiny, tmp_path):
    folder = copy("torch")
    for name in ("modeling_bwetaf.py", "configuration_bwetaf.py"):
        path = folder / name
        path.write_text(path.read_text() + "# of a version before\n")
    assert (
        "configuration_bwetaf.py, model"
        in (converters.inspect(folder)["problem"])
    )
    (folder / "configuration_bwetaf.py").unlink()
    assert (
        "version: modeling_bwetaf.py" in converters.inspect(folder)["problem"]
    )
    converters.convert(folder, tmp_path / "new", to="torch")
    assert_same_folders(tmp_path / "new", tiny["torch"])
    assert converters.inspect(tmp_path / "new")["problem"] is None
    report = converters.verify(tiny["torch"], tmp_path / "new", logits=False)
    assert report["same"]


@pytest.mark.parametrize(
    "left, fault",
    [
        ("keras", "forgets the cache"),
        ("torch", "forgets the cache"),
        ("torch", "counts padding"),
        ("torch", "sees padding"),
    ],
)
def test_faults_of_generation_are_found(tiny, monkeypatch, left, fault):
    """One pass over one row has none of them."""
    model = modeling_bwetaf.BwETAFForCausalLM
    forward = model.forward

    def broken(self, *args, **kwargs):
        if fault == "forgets the cache":
            kwargs |= {"cache": None, "past_key_values": None}
        elif fault == "counts padding":
            kwargs["position_ids"] = None
        else:
            kwargs["attention_mask"] = None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", functools.wraps(forward)(broken))
    report = converters.verify(tiny[left], tiny["torch"])
    logits = report["logits"]
    assert not report["same"]
    assert logits["relative_l2"] <= 1e-5 and logits["same_top_1"]
    assert logits["cached_relative_l2"][1] > 1e-2
    assert (logits["cached_relative_l2"][0] > 1e-2) == (left == "torch")


def test_a_failure_is_an_outcome(tiny, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runtimes.TorchModel, "generate", fail)
    report = converters.verify(tiny["keras"], tiny["torch"])
    assert not report["same"]
    assert report["logits"] == {"failed": "RuntimeError: out of memory"}


def test_progress_counts_every_byte(tiny):
    calls = []
    converters.verify(
        tiny["flax"],
        tiny["keras"],
        logits=False,
        progress=lambda *call: calls.append(call),
    )
    done, total = calls[-1]
    assert done == total
    assert len(calls) == 27 * 3 + 1
    assert np.all(np.diff([call[0] for call in calls]) > 0)
