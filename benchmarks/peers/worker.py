"""A process in which one model lives, and one that talks to it.

    python -m benchmarks.peers.worker

It is started and told what to do by `Worker`: a line of JSON in, a line out.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import process_memory
from benchmarks.peers.floors import Floors
from benchmarks.peers.models import PEERS

__all__ = ["FLOORS", "Worker"]

ROOT = Path(__file__).resolve().parents[2]
FLOORS = "floors"
# KerasHub is told its backend; on a GPU, several processes have to fit.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Worker:
    """Starts the process, with the model made.

    Args:
        name: str. A key of `PEERS`, or `FLOORS`.
        config: dict. Arguments of `BwETAFBackbone`.
        dtype: str.
        folder: Path. What `Peer.prepare` has written is in it.

    Example:

    ```python
    with Worker("transformers", config, "float32", folder) as worker:
        worker.ask("generate", batch=1, prompt=32, new=8, sampled=False)
    ```
    """

    def __init__(self, name, config, dtype, folder):
        self._name = name
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        self._exchange([name, config, dtype, str(folder)])

    def ask(self, method, **arguments):
        """Calls a method of the model.

        Returns:
            dict of `seconds`; `value`, what the method returned; and
            `peak_memory` of the process, in MiB.

        Raises:
            RuntimeError: If it failed, with what it wrote.
        """
        return self._exchange([method, arguments])

    def _exchange(self, message):
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            written = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"{self._name} has failed:\n{written[-4000:]}")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # At the end of its input it ends.
        self._process.communicate()
        self._errors.close()


def main():
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    messages = map(json.loads, sys.stdin)
    name, config, dtype, folder = next(messages)
    make = Floors if name == FLOORS else PEERS[name]
    model = make(config, dtype, Path(folder))
    print("{}", file=answers, flush=True)
    for method, arguments in messages:
        start = time.perf_counter()
        value = getattr(model, method)(**arguments)
        answer = {
            "seconds": time.perf_counter() - start,
            "value": value,
            "peak_memory": process_memory("VmHWM"),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
