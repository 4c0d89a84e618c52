"""What a model writes while it is trained."""

import textwrap
from collections.abc import Sequence
from typing import Any

import keras

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.optional import import_optional
from keras_bwetaf.processes import is_first_process

WIDTH = 80


class Samples(keras.callbacks.Callback):
    """Continues texts at the end of each epoch, and shows them.

    They are drawn with the same seeds each time. Stand it before `Monitor` in
    the list of callbacks, which then keeps them in `stats.json`.

    Args:
        prompts: list of str. The texts to continue.
        max_new_tokens: int. Most tokens of a continuation; no more than half
            of the model's context.
        monitor: `Monitor` of the same `fit`, or `None`.
        log_dir: str or path. Where TensorBoard shows the texts, such as a
            sub-folder of the callback's; or `None`.

    Raises:
        ValueError: If `prompts` is no list of texts.
        ImportError: If there is a `log_dir`, and TensorBoard is not
            installed.

    Example:

    ```python
    monitor = Monitor("run")
    samples = Samples(["Once upon a time"], monitor=monitor)
    lm.fit(train, epochs=10, callbacks=[samples, monitor])
    ```
    """

    def __init__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        *,
        monitor: Any = None,
        log_dir: PathLike | None = None,
    ):
        super().__init__()
        is_list = isinstance(prompts, list | tuple) and len(prompts)
        if not is_list or not all(
            isinstance(prompt, str) and prompt for prompt in prompts
        ):
            raise ValueError(
                "`prompts` must be a list of str, none empty. Received: "
                f"prompts={prompts!r}"
            )
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.monitor = monitor
        self._texts = []  # That were not shown yet.
        self._writer = None
        if log_dir is not None:
            import_optional("tensorboard", "train", "`Samples` with a log_dir")
            from tensorflow import summary  # KerasHub brings it.

            self._summary = summary
            self._writer = self._summary.create_file_writer(str(log_dir))

    def on_epoch_end(self, epoch, logs=None):
        context = self.model.backbone.max_sequence_length
        texts = self.model.generate(
            self.prompts,
            max_new_tokens=min(self.max_new_tokens, context // 2),
            truncation="left",
            seed=list(range(len(self.prompts))),
        )
        step = int(self.model.optimizer.iterations)
        self._texts = [(step, text) for text in texts]
        for prompt, text in zip(self.prompts, texts, strict=True):
            self._keep(step, prompt, text)

    # The line of the epoch comes first.

    def on_epoch_begin(self, epoch, logs=None):
        self._show()

    def on_train_end(self, logs=None):
        self._show()

    def _keep(self, step, prompt, text):
        if self.monitor is not None:
            self.monitor.statistics.add_sample(step, prompt, text)
        if self._writer is not None and is_first_process():
            with self._writer.as_default():
                self._summary.text(prompt, text, step=step)
            self._writer.flush()

    def _show(self):
        if is_first_process():
            for step, text in self._texts:
                print(f"Sample after step {step:,}:\n{wrapped(text)}")
        self._texts = []


def wrapped(text):
    """Text as lines of a terminal, indented, without control characters."""
    text = "".join(
        each
        if each.isprintable() or each in "\n\t"
        else "\N{REPLACEMENT CHARACTER}"
        for each in text
    )
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  ")
        for line in text.split("\n")
    )
