"""Requests per second of lm-evaluation-harness, beside its own model.

    python -m benchmarks.evaluation [--count 64] [--rounds 3] [--preset tiny]

Three tasks of stories by the grammar of `examples/tiny`: multiple choice,
rolling log-likelihood, and generation. The harness's own model, `hf`, runs our
PyTorch export, of the same weights in float32, on the same device. Each has a
process of its own; they take turns, with batches of 16. The first round, in
which ours compiles, is shown apart. Peak memory is that of a process in which
one model does all three.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.memory import process_memory
from tests.evaluation import tasks

BATCH_SIZE = 16
MODELS = ("keras_bwetaf", "hf")


def serve(name, preset, folder):
    """Evaluates a task for each line of stdin; answers with its seconds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    answers = sys.stdout
    sys.stdout = sys.stderr
    if name == "hf":
        import torch
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            str(folder / "torch"),
            trust_remote_code=True,
            dtype="float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=BATCH_SIZE,
        )
    else:
        import keras_bwetaf
        from keras_bwetaf.evaluation.harness import HarnessModel

        lm = keras_bwetaf.from_preset(preset, dtype="float32")
        model = HarnessModel(lm, BATCH_SIZE)
    manager = TaskManager(include_path=str(folder))
    for line in sys.stdin:
        start = time.perf_counter()
        lm_eval.simple_evaluate(
            model,
            tasks=[line.strip()],
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
        answer = [time.perf_counter() - start, process_memory("VmHWM")]
        print(json.dumps(answer), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        name, folder = arguments.serve
        serve(name, arguments.preset, Path(folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks.write(folder, arguments.count)
        export(arguments.preset, folder / "torch")
        compare(arguments, folder)


def export(preset, folder):
    """In a process of its own, for its memory."""
    code = (
        "import sys, keras_bwetaf\n"
        "lm = keras_bwetaf.from_preset(sys.argv[1], dtype='float32')\n"
        "lm.export_to_transformers(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, preset, folder], check=True)


def compare(arguments, folder):
    command = [sys.executable, "-m", "benchmarks.evaluation"]
    command += ["--preset", arguments.preset]
    processes = {
        name: subprocess.Popen(
            [*command, "--serve", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in MODELS
    }

    def ask(name, task):
        process = processes[name]
        process.stdin.write(task + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    # Of a document, so many requests.
    requests = dict(zip(tasks.NAMES, (3, 1, 1), strict=True))
    table = Table("task", "model", "first, 1/s", "then, 1/s", "times hf")
    memory = {}
    for task, each in requests.items():
        number = each * arguments.count
        first = {name: number / ask(name, task)[0] for name in MODELS}
        speeds = {name: [] for name in MODELS}
        for _ in range(arguments.rounds):
            for name in MODELS:
                seconds, memory[name] = ask(name, task)
                speeds[name].append(number / seconds)
        medians = {k: statistics.median(v) for k, v in speeds.items()}
        for name in MODELS:
            table.add_row(
                task,
                name,
                f"{first[name]:.1f}",
                f"{medians[name]:.1f}",
                f"{medians[name] / medians['hf']:.2f}",
            )
    for process in processes.values():
        process.stdin.close()
        process.wait()
    console = Console()
    console.print(table)
    for name, peak in memory.items():
        console.print(f"peak memory of {name}: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
