"""Programs are compiled once: in a process, and with the cache on disk."""

import os
import shutil
import stat
import subprocess
import sys

import jax
import keras_hub
import numpy as np
import pytest

import keras_bwetaf
from tests.read_only import read_only

SCRIPT = """
import jax, keras_bwetaf
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
keras_bwetaf.enable_compilation_cache()
lm = keras_bwetaf.from_preset("tiny")
lm.generate("Once", max_new_tokens=4)
asked = events.count("/jax/compilation_cache/compile_requests_use_cache")
assert asked > 1
print(asked - events.count("/jax/compilation_cache/cache_hits"))
"""


def run(script, **environment):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    folder = tmp_path / "programs"
    first, second = (
        run(SCRIPT, KERAS_BWETAF_COMPILATION_CACHE=str(folder)).stdout
        for _ in range(2)
    )
    assert int(first) > 1
    assert int(second) == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.fixture
def settings(monkeypatch):
    """What the call would set in JAX, which has no cache set up."""
    settings = {}
    monkeypatch.setattr(
        type(jax.config), "jax_compilation_cache_dir", None, raising=False
    )
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.delenv("KERAS_BWETAF_COMPILATION_CACHE", raising=False)
    return settings


def test_the_folder_of_the_user_or_of_the_caches(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    keras_bwetaf.enable_compilation_cache()
    if sys.platform == "linux":
        folder = tmp_path / "caches" / "keras-bwetaf"
        assert settings["jax_compilation_cache_dir"] == str(folder)
    assert settings["jax_compilation_cache_max_size"] == 2**30

    monkeypatch.setenv("KERAS_BWETAF_COMPILATION_CACHE", str(tmp_path / "b"))
    keras_bwetaf.enable_compilation_cache()
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "b")
    keras_bwetaf.enable_compilation_cache(tmp_path / "c", max_size=7)
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "c")
    assert settings["jax_compilation_cache_max_size"] == 7


def test_off_and_left_to_the_user(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BWETAF_COMPILATION_CACHE", "0")
    keras_bwetaf.enable_compilation_cache(tmp_path)
    monkeypatch.delenv("KERAS_BWETAF_COMPILATION_CACHE")
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "mine")
    keras_bwetaf.enable_compilation_cache()
    assert settings == {}
    with pytest.raises(ValueError, match="`max_size` must be a positive int"):
        keras_bwetaf.enable_compilation_cache(max_size=0)


def test_a_read_only_folder_costs_one_warning(settings, tmp_path):
    with read_only(tmp_path), pytest.warns() as warned:
        keras_bwetaf.enable_compilation_cache(tmp_path / "programs")
    (warning,) = warned
    assert "not kept" in str(warning.message) and warning.filename == __file__
    assert settings == {}


def test_a_full_disk_costs_one_warning(settings, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.warns(UserWarning, match="not kept.*No space left"):
        keras_bwetaf.enable_compilation_cache(tmp_path)
    assert settings == {}


@pytest.mark.fast
def test_after_a_warm_up_generate_compiles_nothing(caplog):
    lm = keras_bwetaf.from_preset("tiny", num_layers=1, load_weights=False)
    lm.compile(sampler=keras_bwetaf.BwETAFSampler(seed=3))
    state = np.random.get_state()[1].tolist()
    compiled = "Finished XLA compilation of jit({})"
    with jax.log_compiles():
        lm.warm_up([20], batch_sizes=[1, 10], max_new_tokens=10)
        # Of 16 rows, 4 and then 1 may remain.
        for name, count in (("_prefill_step", 2), ("_decode_steps", 3)):
            assert caplog.text.count(compiled.format(name)) == count
        assert np.random.get_state()[1].tolist() == state
        caplog.clear()
        lm.generate("Once", max_new_tokens=10)
        lm.generate("A day", max_new_tokens=10, temperature=0.3, top_p=0.8)
        lm.generate("It is", max_new_tokens=10, temperature=0, top_k=3, seed=1)
        lm.generate("It is", max_new_tokens=9, stop_token_ids=[5, 6, 7])
        lm.generate(["Once", "A day"] * 6, max_new_tokens=10)
        lm.generate(
            ["Once", "A day"] * 6, stop_strings=["a", "e"], max_new_tokens=10
        )
        assert list(lm.stream("There was", max_new_tokens=10))
        assert "XLA compilation" not in caplog.text
    with pytest.raises(ValueError, match="no room for 10 new tokens"):
        lm.warm_up([250], max_new_tokens=10)
    with pytest.raises(ValueError, match="`batch_sizes` must be a positive"):
        lm.warm_up([4], batch_sizes=[0])


class OwnSampler(keras_hub.samplers.RandomSampler):
    """A sampler of the user's own, with random numbers of its own."""


def test_a_warm_up_draws_no_random_numbers():
    texts = []
    for warms_up in (False, True):
        lm = keras_bwetaf.from_preset("tiny")
        lm.compile(sampler=OwnSampler(seed=3))
        if warms_up:
            lm.warm_up(max_new_tokens=4)
        texts.append(lm.generate("Once", max_new_tokens=4))
    assert texts[0] == texts[1]
