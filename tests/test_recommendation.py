"""What is recommended was compiled, or estimated on the safe side."""

import math

import jax
import pytest

from keras_bwetaf import hardware
from keras_bwetaf.distribution import Recommendation, recommend
from keras_bwetaf.hardware import device
from keras_bwetaf.preset_files import PRESETS
from keras_bwetaf.recommendation import COMPILED, SPARE, estimated_memory

CARD = PRESETS["97m"]["config"]
LARGE = {
    "vocabulary_size": 32_000,
    "num_layers": 26,
    "num_query_heads": [16] * 26,
    "num_key_value_heads": 8,
    "hidden_dim": 2048,
    "intermediate_dim": 5632,
    "max_sequence_length": 2048,
}


@pytest.mark.parametrize("row", COMPILED)
def test_compiled_settings_fit(row):
    """With a tenth to spare, which twice as many rows would not leave."""
    assert row.peak <= (1 - SPARE) * device(row.device).memory
    state, each = estimated_memory(
        CARD, "bfloat16", 2048, device(row.device), "none", 1
    )
    assert row.peak < state + row.rows * each < 1.4 * row.peak
    recommended = recommend(device_kind=row.device, num_devices=row.num_devices)
    assert recommended.is_compiled
    assert recommended.rows_per_device == row.rows
    assert recommended.peak_memory == row.peak
    assert recommended.strategy == "data_parallel"
    assert recommended.batch_size >= 32
    assert f"batch_size={recommended.batch_size}," in str(recommended)
    assert f"{row.tokens_per_second:,.0f} tokens a second" in str(recommended)


def test_names_of_a_device():
    one, two = (
        recommend(device_kind=kind) for kind in ("TPU v5 lite", "TPU v5e")
    )
    assert one.is_compiled and one.peak_memory == two.peak_memory


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**CARD, "num_layers": 11}},
        {"dtype": "mixed_bfloat16"},
        {"sequence_length": 1024},
        {"num_devices": 2},
    ],
)
def test_other_trainings_are_estimated(changes):
    recommended = recommend(
        **{"device_kind": "TPU v5e", "num_devices": 8, **changes}
    )
    assert not recommended.is_compiled
    assert recommended.tokens_per_second is None
    assert recommended.batch_size == 32
    assert recommended.peak_memory < (1 - SPARE) * 16
    assert "estimated" in str(recommended)


# GiB of 4 rows of 2048 tokens, from docs/benchmarks.md.
PEAKS = {
    "TPU v2": {1: 4.067, 8: 3.771},
    "TPU v3": {1: 4.079, 8: 3.783},
    "TPU v4": {1: 3.037, 8: 2.745},
    "TPU v5e": {1: 2.486, 8: 2.543},
    "TPU v5p": {1: 2.982, 8: 2.667},
    "TPU v6e": {1: 2.513, 8: 2.206},
}


@pytest.mark.parametrize("kind", PEAKS)
@pytest.mark.parametrize("num_shards", [1, 8])
def test_estimate_is_safe_and_not_far_off(kind, num_shards):
    peak = PEAKS[kind][num_shards]
    state, row = estimated_memory(
        CARD, "bfloat16", 2048, device(kind), "none", num_shards
    )
    assert peak < state + 4 * row < 1.4 * peak


def test_large_models_compute_twice_and_are_sharded():
    options = {"device_kind": "TPU v5e", "model": LARGE}
    alone, several = recommend(**options), recommend(**options, num_devices=8)
    assert (alone.remat, alone.strategy) == ("full", "data_parallel")
    assert (several.remat, several.strategy) == ("none", "fully_sharded")
    for each in (alone, several):
        assert each.peak_memory <= (1 - SPARE) * 16
        parts = each.num_devices * each.gradient_accumulation_steps
        assert each.batch_size == each.rows_per_device * parts >= 32
        assert math.log2(each.rows_per_device).is_integer()


def test_too_large_a_model():
    model = {**LARGE, "hidden_dim": 8192}
    with pytest.raises(ValueError, match="a smaller model or more devices"):
        recommend(model, device_kind="TPU v5e")


def test_unknown_devices():
    with pytest.raises(ValueError, match="not known.*device_kind='cpu'"):
        recommend()
    with pytest.raises(ValueError, match="`num_devices` must be a positive"):
        recommend(device_kind="TPU v3", num_devices=0)
    with pytest.raises(ValueError, match="`dtype`"):
        recommend(device_kind="TPU v3", dtype="int8")


def test_devices_that_are_there(monkeypatch):
    """Of two CPUs that have 4 GiB each."""
    cpu = hardware.Device("cpu", 1, 1, 4, 1)
    monkeypatch.setattr(hardware, "DEVICES", [cpu])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    recommended = recommend("tiny", dtype="float32")
    assert isinstance(recommended, Recommendation)
    assert (recommended.device_kind, recommended.num_devices) == ("cpu", 2)
    assert recommended.batch_size == 32 and recommended.memory == 4
