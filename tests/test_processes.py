"""Several processes train as one does, and none is left waiting."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf import processes
from keras_bwetaf.training import TrainingCheckpoint
from keras_bwetaf.training.statistics import read_statistics
from tests.data.conftest import make_documents
from tests.run.test_run import MODEL as RUN_MODEL
from tests.training.resumable import (
    SAVE_EVERY,
    STEPS_PER_EPOCH,
    Steps,
    make_lm,
    read_rows,
    state,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[1]
# Three of them in one process, two in several.
EPOCHS, EPOCHS_OF_SEVERAL = 3, 2
NUM_STEPS = EPOCHS_OF_SEVERAL * STEPS_PER_EPOCH
KILLED = -signal.SIGKILL
TERMINATED = 128 + signal.SIGTERM
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:The model has no preprocessor"),
]


def free_address():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return f"localhost:{server.getsockname()[1]}"


def slurm(num_processes):
    """What SLURM says to each process of a job on one host."""
    port = free_address().split(":")[1]
    return [
        {
            "JAX_COORDINATOR_PORT": port,
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(num_processes),
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
        }
        for number in range(num_processes)
    ]


def start(commands, folder, cluster=None):
    """Runs processes at the same time; returns exit statuses and outputs.

    `cluster` is a list of what the environment of each says of the others.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    cluster = cluster or [{}] * len(commands)
    paths = [folder / f"output-{i}.txt" for i in range(len(commands))]
    started = []
    try:
        for command, path, others in zip(commands, paths, cluster, strict=True):
            with path.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", *map(str, command)],
                    cwd=ROOT,
                    env=environment | others,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            started.append(process)
        statuses = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return statuses, [path.read_text() for path in paths]


def train(folder, num_processes=2, **arguments):
    address = free_address()
    arguments = json.dumps({"epochs": EPOCHS_OF_SEVERAL, **arguments})
    commands = [
        ["tests.training.several", address, num_processes, number, folder]
        + [arguments]
        for number in range(num_processes)
    ]
    return start(commands, folder)


def train_alone(lm, folder, epochs=EPOCHS):
    lm.fit(
        read_rows(folder / "rows.npy", seed=3),
        steps_per_epoch=STEPS_PER_EPOCH,
        epochs=epochs,
        callbacks=[
            TrainingCheckpoint(
                folder / "checkpoints", save_every=SAVE_EVERY, keep_last=9
            ),
            Steps(folder / "steps-0.txt"),
        ],
        verbose=0,
    )


def lines(folder, process=0):
    """The last line of each step, in order."""
    text = (folder / f"steps-{process}.txt").read_text().splitlines()
    return {int(line.split()[0]): line for line in text}


def losses(folder):
    return {
        step: float.fromhex(line.split()[1])
        for step, line in lines(folder).items()
    }


def final(folder, process=0):
    arrays = np.load(folder / f"final-{process}.npz")
    return {name: array.tobytes() for name, array in arrays.items()}


def bytes_of(lm):
    return {name: array.tobytes() for name, array in state(lm).items()}


def check_saved(folder, lm):
    """Loads in one process what several saved, bit for bit."""
    checkpoint = TrainingCheckpoint(folder / "checkpoints", save_every=1)
    assert checkpoint.restore(lm, include_optimizer=True)["step"] == NUM_STEPS
    assert bytes_of(lm) == final(folder)
    model = keras_bwetaf.from_preset(folder / "model")
    model.compile(keras_bwetaf.recipe("97m", total_steps=40))
    model.load_optimizer(folder / "model")
    assert int(model.optimizer.iterations) == NUM_STEPS
    for one, two in zip(
        model.trainable_weights, lm.trainable_weights, strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def one(lm, tmp_path_factory):
    """The folder of a training in one process."""
    folder = tmp_path_factory.mktemp("one")
    write_rows(folder / "rows.npy")
    train_alone(lm, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of one in two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    write_rows(folder / "rows.npy")
    statuses, outputs = train(folder)
    assert statuses == [0, 0], outputs
    return folder, outputs


@pytest.mark.slow
def test_two_processes_train_as_one(one, two, lm):
    """With dropout, since its numbers are those of one process, too."""
    folder, outputs = two
    assert lines(folder, 0) == lines(folder, 1)
    assert final(folder, 0) == final(folder, 1)
    steps = range(1, NUM_STEPS + 1)
    received, expected = losses(folder), losses(one)
    np.testing.assert_allclose(
        [received[step] for step in steps],
        [expected[step] for step in steps],
        rtol=1e-5,
    )
    assert outputs[0].count("Epoch 1/2") == 1
    assert outputs[0].count("step 3  loss") == 1
    assert "Epoch" not in outputs[1] and "step" not in outputs[1]
    check_saved(folder, lm)


@pytest.mark.slow
def test_interrupted_processes_go_on_exactly(two, tmp_path):
    folder, _ = two
    shutil.copy(folder / "rows.npy", tmp_path)
    step = SAVE_EVERY + 3
    statuses, outputs = train(
        tmp_path, process=1, signal=signal.SIGKILL, step=step
    )
    assert statuses == [1, KILLED], outputs
    assert outputs[0].endswith(processes.ADVICE + "\n")

    statuses, outputs = train(
        tmp_path, process=0, signal=signal.SIGTERM, step=step
    )
    assert statuses == [TERMINATED, TERMINATED], outputs
    assert "going on after step" in outputs[0]
    assert "going on after step" not in outputs[1]
    last = max(lines(tmp_path))
    assert step < last < NUM_STEPS and max(lines(tmp_path, 1)) == last
    assert (tmp_path / "checkpoints" / str(last)).is_dir()

    statuses, outputs = train(tmp_path)
    assert statuses == [0, 0], outputs
    assert f"going on after step {last}," in outputs[0]
    assert lines(tmp_path) == lines(folder)
    assert final(tmp_path) == final(folder)


@pytest.mark.slow
def test_one_process_to_four_and_back(one, lm, tmp_path):
    """With weights that no process has the whole of."""
    shutil.copy(one / "rows.npy", tmp_path)
    saved = str(STEPS_PER_EPOCH)
    shutil.copytree(
        one / "checkpoints" / saved, tmp_path / "checkpoints" / saved
    )
    statuses, outputs = train(
        tmp_path, num_processes=4, strategy="fully_sharded"
    )
    assert statuses == [0] * 4, outputs
    assert final(tmp_path, 0) == final(tmp_path, 3)
    check_saved(tmp_path, lm)

    train_alone(lm, tmp_path)
    received, expected = losses(tmp_path), losses(one)
    assert list(received) == [*expected][STEPS_PER_EPOCH:]
    np.testing.assert_allclose(
        list(received.values()),
        list(expected.values())[STEPS_PER_EPOCH:],
        rtol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("under_slurm", [False, True])
def test_two_hosts(under_slurm, tmp_path):
    """The example, which packs text."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Once upon a time, there was a fox.\n\n" * 200)
    command = ["examples.two_hosts", "--data", corpus]
    command += ["--run", tmp_path / "run"]
    command += ["--sequence-length", "16", "--batch-size", "4"]
    command += ["--steps", "2", "--steps-per-epoch", "1"]
    if under_slurm:
        commands = [command, command]
        cluster = slurm(num_processes=2)
    else:
        command += ["--coordinator", free_address(), "--processes", "2"]
        commands = [[*command, "--process", number] for number in range(2)]
        cluster = None
    statuses, outputs = start(commands, tmp_path, cluster)
    assert statuses == [0, 0], outputs
    assert "step 2/2" in outputs[0] and "The model is in" in outputs[0]
    assert "step" not in outputs[1] and "The model" not in outputs[1]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == (
        {"packed", "checkpoints", "model", "stats.json", "losses.png"}
    )


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    """`train`, from text to a model."""
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as file:
        for text in make_documents(200):
            print(json.dumps({"text": text}), file=file)
    settings = {
        "data": str(corpus),
        "preset": "tiny",
        "model": RUN_MODEL,
        "vocabulary_size": 300,
        "steps": 4,
        "batch_size": 4,
        "validate_every": 2,
        "validation_fraction": 0.2,
    }
    folder, address = tmp_path / "two", free_address()
    command = ["tests.training.several_runs", address, 2]
    commands = [
        [*command, process, folder, json.dumps(settings)]
        for process in range(2)
    ]
    statuses, outputs = start(commands, tmp_path)
    assert statuses == [0, 0], outputs
    assert "step 4/4" in outputs[0] and "step" not in outputs[1]

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    keras_bwetaf.train(tmp_path / "one", **settings)
    one, two = (read_statistics(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-5)
    assert keras_bwetaf.from_preset(folder / "model").generate("a")


# === In this process alone ===


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1",), "Pass all of .*num_processes=None"),
        ((None, 2, 0), "Pass all of .*coordinator_address=None"),
        (("host", 2, 0), "'host:port'.*coordinator_address='host'"),
        (("host:65536", 2, 0), "'host:port'.*='host:65536'"),
        (("host:x", 2, 0), "'host:port'"),
        (("host:1", 0, 0), "`num_processes` must be .*num_processes=0"),
        (("host:1", 2, 2), "`process_id` must be .*process_id=2"),
        (("host:1", 2, "1"), "`process_id` must be .*process_id='1'"),
    ],
)
def test_addresses_that_are_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_bwetaf.initialize(*arguments)


def test_seconds_that_are_wrong():
    with pytest.raises(ValueError, match="heartbeat_timeout_seconds=0"):
        keras_bwetaf.initialize(heartbeat_timeout_seconds=0)


def test_initialized_too_late(monkeypatch):
    jax.devices()
    with pytest.raises(RuntimeError, match="before anything that computes"):
        keras_bwetaf.initialize("localhost:1", 1, 0)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Call `initialize` once"):
        keras_bwetaf.initialize("localhost:1", 1, 0)


def test_no_cluster(monkeypatch):
    def initialize(**arguments):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="JAX found no TPU pod"):
        keras_bwetaf.initialize()


def test_port_in_use(monkeypatch):
    def initialize(**arguments):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(RuntimeError, match="free .*'localhost:1'"):
        keras_bwetaf.initialize("localhost:1", 1, 0)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_others_hear_of_a_failure(monkeypatch, is_first):
    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(processes, "is_first_process", lambda: is_first)
    monkeypatch.setattr(
        processes.multihost_utils, "broadcast_one_to_all", lambda failed: True
    )
    kind, message = (
        (OSError, "disk full")
        if is_first
        else (RuntimeError, "The first process failed.*fail")
    )
    with pytest.raises(kind, match=message):
        processes.in_first_process(fail)
