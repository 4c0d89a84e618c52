"""What one sees of a training, and what is written down of it."""

import collections
import datetime
import math
import time

import keras
import numpy as np
import rich.console
import rich.live
import rich.table

from converters.files import local_path, new_file
from keras_bwetaf import processes
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int
from keras_bwetaf.hardware import flops_per_token, peak_flops
from keras_bwetaf.layers.attention import chosen_attention
from keras_bwetaf.optional import import_optional
from keras_bwetaf.step.train_step import STEP_VALUE_NAMES
from keras_bwetaf.training.plots import LOSSES, plot_losses
from keras_bwetaf.training.statistics import Statistics

REFRESH_SECONDS = 1.0
LINE_WIDTH = 80
VALIDATION = "validation loss"


class Monitor(keras.callbacks.Callback):
    """Shows how a training goes, writes it down, stops it if it breaks.

    In a terminal, a table is renewed every second, and leaves a line at the
    end of each epoch. In a notebook, the table stays, above the plot of the
    losses. Elsewhere, lines are all there is. The table tells the step, its
    loss, the last validation loss, the time left, how many tokens count in
    the loss per second, the share of the devices' peak that this makes use of
    (see `keras_bwetaf.hardware`), the norm of the gradient before it
    is clipped, the learning rate, the exponential mean of losses, the tokens
    so far, how long the first step took, which compiles and counts in no
    speed, and the kernel of attention. A line tells as much of it as fits 80
    columns, from the step on.

    At the end of every epoch, it writes `stats.json`, with the keys of the
    original package, and `losses.png` to the folder. Of a training of more
    than 20,000 steps, values of every second, fourth, ... step are kept; all
    steps count in sums and means. The epoch's logs, which `History` and
    `TensorBoard` read, get `gradient_norm`, its mean, and
    `tokens_per_second`. Callbacks that stand before this one in the list do
    not see them.

    A loss or a gradient that is not finite stops the training, and the batch
    is saved to the folder. If the optimizer scales the loss and takes no step
    at such a gradient, only the loss counts.

    Steps are numbered from the optimizer's. With several processes, the first
    one prints and writes.

    Args:
        folder: str or path, or `None` to write nothing.
        total_steps: int. Steps of the whole training, to tell the time left.
        every: int. How many steps there are from line to line.

    Raises:
        ValueError: If an argument is out of range, or the model is no
            `BwETAFCausalLM`, compiled with the default loss and metrics and
            one step per execution.
        FloatingPointError: In `fit`, if a loss or a gradient is not finite.
        ImportError: If there is a folder, and matplotlib is not installed.

    Example:

    ```python
    lm.fit(
        train,
        steps_per_epoch=1000,
        epochs=10,
        verbose=0,
        callbacks=[Monitor("run", total_steps=10_000)],
    )
    ```
    """

    def __init__(
        self,
        folder: PathLike | None = None,
        total_steps: int | None = None,
        every: int = 100,
    ):
        super().__init__()
        if total_steps is not None:
            total_steps = positive_int("total_steps", total_steps)
        if folder is not None:
            import_optional("matplotlib", "train", "`Monitor` with a folder")
            folder = local_path("folder", folder).resolve()
        self.folder = folder
        self.total_steps = total_steps
        self.every = positive_int("every", every)
        self.statistics = Statistics()
        self._display = _Display()
        self._step = None  # The optimizer's, once training goes on.
        self._batches = None  # What `fit` trains on, if it can be read again.
        self._pending = collections.deque()  # Values that were not read yet.

    # === What the values of steps are, and when they are read ===
    #
    # `self.model` would bring the state of the training back to the model.
    # `on_train_batch_end` would wait for the step that was just dispatched.
    # So `fit` hands over the values of a step when it has been dispatched, and
    # they are read when the next one has been, too: the device never waits.

    def set_model(self, model):
        super().set_model(model)
        _check_model(model)

    def set_train_batches(self, batches):
        """`fit` calls it with its data, as `set_model` with the model.

        Args:
            batches: `TrackedBatches`, or None if batches have no numbers.
        """
        self._batches = batches

    def on_step_values(self, values):
        """`fit` calls it when a step has been dispatched.

        Args:
            values: float32 array, `STEP_VALUE_NAMES`, still to be computed.
        """
        if self._step is not None:
            self._pending.append(values)

    def on_train_begin(self, logs=None):
        model = self._model
        self._restart()
        self._display.begin()
        self._is_first_process = processes.is_first_process()
        weight = model.trainable_variables[0].value
        device = next(iter(weight.sharding.device_set))
        dtype = model.backbone.transformer_layers[0].compute_dtype
        peak = peak_flops(device.device_kind, dtype)
        self._peak = peak and peak * len(weight.sharding.device_set)
        # Such an optimizer takes no step at a gradient that is not finite.
        self._skips_steps = isinstance(
            model.optimizer, keras.optimizers.LossScaleOptimizer
        )
        self._flops_per_token = None  # It depends on the length of rows.
        self._compiles = True

    def on_epoch_begin(self, epoch, logs=None):
        self._clock = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:  # A training may go on within an epoch.
            self.statistics.begin_epoch()
        if self._step is None:
            self._step = int(self._model.optimizer.iterations)
            # From the steps before a batch to the number of the batch.
            self._offset = None
            if self._batches is not None:
                self._offset = self._batches.first_number - self._step
        self._collect(but=1)

    def on_test_begin(self, logs=None):
        self._collect()

    def on_epoch_end(self, epoch, logs=None):
        self._collect()
        statistics = self.statistics
        if logs and "val_loss" in logs:
            statistics.add_validation(self._step, logs["val_loss"])
        if logs is not None:
            logs.update(self._epoch_logs())
        if self._is_first_process:
            self._display.close(self._fields())
            self._write()

    def on_train_end(self, logs=None):
        self._collect()

    def _restart(self):
        """Forgets what was not read; the next step asks for its number."""
        self._step = None
        self._pending.clear()

    def _collect(self, but=0):
        """Reads the values of steps, but for the last ones."""
        while len(self._pending) > but:
            self._record(np.asarray(self._pending.popleft()))

    def _record(self, values):
        """Takes in the values of a step that has just been finished.

        Args:
            values: float32 array, `STEP_VALUE_NAMES`.
        """
        values = dict(zip(STEP_VALUE_NAMES, values, strict=True))
        now = time.perf_counter()
        self._step += 1
        self._check_finite(values["loss"], values["gradient_norm"])
        if self._flops_per_token is None:
            length = int(values["sequence_length"])
            self._flops_per_token = flops_per_token(self._model, length)
            block = self._model.backbone.transformer_layers[0]
            self._attention = chosen_attention(
                length, block.compute_dtype, block.attention.head_dim
            )
        self.statistics.add_step(
            step=self._step,
            loss=values["loss"],
            gradient_norm=values["gradient_norm"],
            learning_rate=values["learning_rate"],
            tokens=values["num_tokens"],
            seconds=now - self._clock,
            compiles=self._compiles,
        )
        self._clock, self._compiles = now, False
        if self._is_first_process:
            is_due = self._step % self.every == 0
            self._display.update(self._fields, is_due)

    # === Checkpoints ===

    def get_state(self):
        """The statistics up to the last step, to be written as JSON.

        Returns:
            dict.
        """
        self._collect()
        return self.statistics.get_state()

    def set_state(self, state):
        """Goes on from a state, and forgets what came after it.

        Args:
            state: dict, as `get_state` returned it.
        """
        self._restart()
        self.statistics.set_state(state)

    # === What is shown and written ===

    def _fields(self):
        """A dict of name to text. What matters most stands first."""
        statistics = self.statistics
        total = f"/{self.total_steps:,}" if self.total_steps else ""
        fields = {
            "step": f"{self._step:,}{total}",
            "loss": f"{statistics.last('loss'):.4f}",
        }
        loss = statistics.last("val_loss")
        if loss is not None:
            fields[VALIDATION] = f"{loss:.4f}"
        fields |= self._speed()
        norm = statistics.last("gradient_norm")
        return fields | {
            "gradient norm": "not finite" if norm is None else f"{norm:.3g}",
            "learning rate": f"{statistics.last('learning_rate'):.3g}",
            "smoothed": f"{statistics.smoothed_loss:.4f}",
            "tokens": f"{statistics.totals.tokens:,}",
            "first step": f"{statistics.compile_seconds:.1f} s",
            "attention": self._attention,
        }

    def _speed(self):
        """The fields that are known once a step did not compile."""
        speed = self.statistics.tokens_per_second()
        if speed is None:
            return {}
        fields = {}
        if self.total_steps:
            steps = max(self.total_steps - self._step, 0)
            left = round(steps * self.statistics.seconds_per_step())
            fields["left"] = str(datetime.timedelta(seconds=left))
        fields["tokens/s"] = f"{speed:,.0f}"
        fields["MFU"] = "n/a"
        if self._peak:
            share = speed * self._flops_per_token / self._peak
            fields["MFU"] = f"{share:.1%}"
        return fields

    def _epoch_logs(self):
        epoch = self.statistics.epoch
        norm, speed = epoch.mean_gradient_norm(), epoch.tokens_per_second()
        return {
            "gradient_norm": math.nan if norm is None else norm,
            "tokens_per_second": math.nan if speed is None else speed,
        }

    def _write(self):
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            statistics = self.statistics.write(
                self.folder, self.folder.name, self._model.count_params()
            )
            picture = plot_losses(statistics, self.folder / LOSSES)
            self._display.show_picture(picture)

    # === What must not be ===

    def _check_finite(self, loss, gradient_norm):
        is_sound = math.isfinite(gradient_norm) or self._skips_steps
        if math.isfinite(loss) and is_sound:
            return
        saved = "Its batch is saved by the first process."
        if self._is_first_process:
            self._display.stop()
            if len(self.statistics):
                self._write()
            saved = self._save_batch()
        raise FloatingPointError(
            f"The loss or the gradient of step {self._step} is not finite. "
            f"{saved} Go on from a checkpoint before it with a lower learning "
            "rate, or without that batch. Received: "
            f"loss={loss}, gradient_norm={gradient_norm}"
        )

    def _save_batch(self):
        """Saves the batch of this step; a sentence that says where it is."""
        if self.folder is None:
            return "Its batch is not saved: the monitor has no folder."
        if self._offset is None:
            return (
                "Its batch could not be saved: batches are kept for Grain "
                "data sets only."
            )
        number = self._step - 1 + self._offset
        try:
            batch = self._batches.batch(number)
        except ValueError as error:
            return f"Its batch could not be read again: {error}."
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        arrays = dict(x) if isinstance(x, dict) else {"x": x}
        if y is not None:
            arrays["y"] = y
        if sample_weight is not None:
            arrays["sample_weight"] = sample_weight
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"non_finite_step_{self._step}.npz"
        with new_file(path) as file:
            np.savez(file, **arrays)
        saved = f"Its batch is saved to {path}."
        largest = np.max(arrays.get("token_ids", 0))
        size = self._model.backbone.vocabulary_size
        if largest >= size:
            saved += (
                f" It has the token id {largest}, but the model's vocabulary "
                f"has {size} tokens: the data are of another tokenizer."
            )
        return saved


class _Display:
    """A table that renews itself in a terminal or a notebook; or lines.

    In a terminal it is there during an epoch only, so that others can print
    between epochs, and an interrupt finds the terminal as it should be.
    """

    def __init__(self):
        self._console = rich.console.Console(highlight=False)
        self._is_live = self._console.is_terminal or self._console.is_jupyter
        self._live = None
        self._shown_at = -math.inf
        self.begin()

    def begin(self):
        """Forgets the training before."""
        self._line = None  # To print, unless the epoch ends with its step.
        self._table, self._picture = _Output(), _Output()

    def update(self, fields, is_line_due):
        """Shows fields if it is time.

        Args:
            fields: function without arguments. Returns a dict of name to
                text.
            is_line_due: bool. Whether to print a line, if that is all that
                can be shown.
        """
        if not self._is_live:
            self._print_line()
            if is_line_due:
                self._line = _line({**fields(), VALIDATION: None})
            return
        now = time.monotonic()
        if now < self._shown_at + REFRESH_SECONDS:
            return
        self._shown_at = now
        table = _table(fields())
        if self._console.is_jupyter:
            self._table.show(table)
            return
        if self._live is None:
            self._live = rich.live.Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
            self._console.show_cursor(True)  # Should nobody stop it.
        self._live.update(table, refresh=True)

    def close(self, fields):
        """Shows the last fields of an epoch: a line, or the notebook's table.

        Args:
            fields: dict of name to text.
        """
        if self._console.is_jupyter:
            self._table.show(_table(fields))
            return
        self._line = _line(fields)
        self.stop()

    def show_picture(self, picture):
        """Shows a picture, in a notebook."""
        if self._console.is_jupyter:
            self._picture.show(picture)

    def stop(self):
        """Takes the terminal's table away, and prints what is to be."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._print_line()

    def _print_line(self):
        if self._line is not None:
            self._console.print(self._line, markup=False, soft_wrap=True)
        self._line = None


class _Output:
    """An output of a notebook's cell, which is renewed in its place."""

    def __init__(self):
        self._handle = None

    def show(self, value):
        """Shows a value in the place of the one before."""
        if self._handle is None:
            from IPython.display import display

            self._handle = display(value, display_id=True)
        else:
            self._handle.update(value)


def _line(fields):
    """As many fields as fit, the first of which matter most."""
    parts = [f"{name} {text}" for name, text in fields.items() if text]
    while len("  ".join(parts)) > LINE_WIDTH:
        parts.pop()
    return "  ".join(parts)


def _table(fields):
    table = rich.table.Table(show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=16)
    for name, text in fields.items():
        table.add_row(name, text)
    return table


def _check_model(model):
    """Refuses a model whose steps can't be told apart.

    Raises:
        ValueError: If it is such a model.
    """
    if not getattr(model, "fuses_head_and_loss", False):
        raise ValueError(
            "`Monitor` is for a `BwETAFCausalLM` that was compiled with the "
            "default loss and metrics. Received: model of class "
            f"{type(model).__name__}"
        )
    if model.steps_per_execution != 1:
        raise ValueError(
            "`Monitor` looks at every step, so the model must be compiled "
            "with steps_per_execution=1. Received: steps_per_execution="
            f"{model.steps_per_execution}"
        )
