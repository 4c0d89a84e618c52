"""Checkpoints of a training in a folder, by Orbax, with checksums.

Orbax writes in the background, and renames a checkpoint's folder when it is
complete. It does not notice all damage. So the checksum of each array is
computed where the array is, and compared when the array was restored.
"""

import contextlib
import hashlib
import json
import logging
import math
import re

import jax
import jax.numpy as jnp
import keras

from keras_bwetaf import processes
from keras_bwetaf.optional import import_optional

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
RUN = "run"
# How many an error lists.
MOST_DIFFERENCES = 10
# What may change in an optimizer's configuration when a training goes on.
NO_SETTINGS = (
    "build_config",
    "module",
    "name",
    "registered_name",
    "total_steps",
    "warmup_steps",
)
# A damaged checkpoint may be deleted, so what else can fail must not pass for
# damage.
NOT_DAMAGE = (ConnectionError, MemoryError, PermissionError, TimeoutError)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# What TensorStore says of a call to the system, such as "File too large".
OS_ERROR = re.compile(r": ([^:]+?) \[os_error_code=")


class DamagedCheckpointError(ValueError):
    """A checkpoint can't be read, or does not hold what was saved."""


class CheckpointStore:
    """A folder of checkpoints; use it in a `with` statement.

    A checkpoint is a folder named by its step. It holds the items `weights`
    and `optimizer`, arrays by the paths of their variables, and `run`, JSON.

    Args:
        folder: Path.
        monitor: str. The entry of a run's `"logs"` that is compared.
        mode: `"min"` or `"max"`. Which values of it are better.
        keep_last: int. How many of the latest to keep when another is saved.
        keep_best: int. How many of the best to keep besides.
        create: bool. Whether to make the folder, and to remove what a
            process left in it that was killed while it saved.
    """

    def __init__(self, folder, *, monitor, mode, keep_last, keep_best, create):
        self._ocp = import_optional(
            "orbax.checkpoint", "train", "`TrainingCheckpoint`"
        )
        self.folder = folder
        self._monitor = monitor
        self._sign = {"min": 1, "max": -1}[mode]
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._values = {}
        options = self._ocp.CheckpointManagerOptions(
            create=create,
            cleanup_tmp_directories=create,
            save_root_metadata=False,
            # What is damaged shall be found later, by `restore`.
            lightweight_initialize=True,
            preservation_policy=self,
        )
        self._manager = self._ocp.CheckpointManager(folder, options=options)
        # It would ask JAX anew, and fail in a training that goes on.
        self._manager.reached_preemption = lambda step: False
        for step in self.steps:
            try:
                self._rate(self._read_run(step))
            except DamagedCheckpointError:
                pass  # It is none of the best.

    def __enter__(self):
        logging.getLogger("absl").addFilter(_is_no_traceback)
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if processes.is_of_lost_process(error):  # Orbax waits for all.
                return
            with contextlib.suppress(Exception) if error else self._writing():
                self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_is_no_traceback)

    @property
    def steps(self):
        """The steps that there are checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best_steps(self):
        """Those of them that have a value to compare, the best first."""
        rated = [step for step in self.steps if step in self._values]
        return sorted(rated, key=lambda step: self._sign * self._values[step])

    def should_preserve(self, checkpoints, *, context):
        """Which checkpoints to keep: Orbax asks for it with each new one."""
        kept = self.steps[-self._keep_last :]
        kept += self.best_steps[: self._keep_best]
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def save(self, model, run):
        """Copies a model's state, and begins to write it.

        Waits for the checkpoint before to be written.

        Args:
            model: `keras.Model`, compiled and built.
            run: dict that JSON can hold. What to save besides: `"step"`,
                `"logs"` and more.

        Returns:
            bool. Whether all numbers are finite. If not, nothing is saved.

        Raises:
            OSError: If this or the checkpoint before can't be written.
        """
        arrays = _arrays(model)
        checksums, are_finite = _examine(arrays)
        if not are_finite:
            return False
        # As text, since the run goes on while it is written.
        text = json.dumps({**run, "arrays": _described(arrays, checksums)})
        args = self._ocp.args
        items = {name: args.StandardSave(item) for name, item in arrays.items()}
        items[RUN] = args.JsonSave({"sha256": _sha256(text), RUN: text})
        self._rate(run)
        with self._writing():
            self._manager.save(
                run["step"], args=args.Composite(**items), force=True
            )
        return True

    def wait(self):
        """Waits until all is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, model, step, include_optimizer=True):
        """Puts a checkpoint's arrays into the variables of a model.

        Nothing is changed before all is read and checked. An array takes the
        sharding of its variable.

        Args:
            model: `keras.Model`.
            step: int. One of `steps`.
            include_optimizer: bool. Whether to restore the optimizer's state,
                too, into a compiled model.

        Returns:
            dict: what `save` was given as `run`.

        Raises:
            DamagedCheckpointError: If files are damaged or missing.
            ValueError: If the model has other variables, or its optimizer
                other settings.
        """
        run = self._read_run(step)
        variables = _variables(model, include_optimizer)
        saved = {name: run["arrays"][name] for name in variables}
        self._check_variables(step, saved, variables)
        if include_optimizer:
            self._check_optimizer(step, run, model.optimizer)
        args = self._ocp.args
        items = {
            name: args.StandardRestore(
                {key: _abstract(item[key].value) for key in item}
            )
            for name, item in variables.items()
        }
        with self._reading(step):
            restored = self._manager.restore(step, args=args.Composite(**items))
        arrays = {name: restored[name] for name in variables}
        checksums, _ = _examine(arrays)
        wrong = [
            f"{name}/{key}"
            for name, item in saved.items()
            for key, (_, _, checksum) in item.items()
            if checksum != checksums[name][key]
        ]
        if wrong:
            raise self._damaged(step, f"other numbers in {', '.join(wrong)}")
        for name, item in variables.items():
            for key, variable in item.items():
                variable.assign(arrays[name][key])
        return run

    def delete_after(self, step):
        """Deletes the checkpoints of later steps."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def _rate(self, run):
        value = (run["logs"] or {}).get(self._monitor)
        if value is not None and math.isfinite(value):
            self._values[run["step"]] = value

    def _read_run(self, step):
        args = self._ocp.args
        items = args.Composite(**{RUN: args.JsonRestore()})
        with self._reading(step):
            stored = self._manager.restore(step, args=items)[RUN]
            text, digest = stored[RUN], stored["sha256"]
            actual = _sha256(text)
        if digest != actual:
            raise self._damaged(step, f"other content in {RUN}")
        return json.loads(text)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # What fails in the background, too.
            if OUT_OF_MEMORY in str(error):
                raise
            reason = OS_ERROR.search(str(error))
            reason = reason[1] if reason else f"{error!s:.300}"
            complete = f"step {self.steps[-1]}" if self.steps else "none"
            raise OSError(
                f"{self.folder}: a checkpoint can't be written. Is there room "
                "on the disk? Run the training again to go on from the latest "
                f"that is complete: {complete}. Received: {reason}"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step):
        try:
            yield
        except NOT_DAMAGE:
            raise
        except Exception as error:  # Damage has many names.
            if OUT_OF_MEMORY in str(error):
                raise
            raise self._damaged(step, error) from error

    def _damaged(self, step, reason):
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason!s:.300}"
        earlier = [other for other in self.steps if other < step]
        return DamagedCheckpointError(
            f"{self.folder / str(step)}: the checkpoint is damaged. "
            + (
                f"The one before is {earlier[-1]}; to go on from the latest "
                'that is intact, pass `on_damage="previous"`. '
                if earlier
                else "There is none before it. "
            )
            + f"Received: {reason}"
        )

    def _check_variables(self, step, saved, variables):
        """Compares names, dtypes and shapes.

        Raises:
            ValueError: That lists the differences.
        """
        problems = []
        for name, item in variables.items():
            for key in sorted({*saved[name], *item}):
                there, here = "nothing", "nothing"
                if key in saved[name]:
                    dtype, shape, _ = saved[name][key]
                    there = f"{dtype} {tuple(shape)}"
                if key in item:
                    here = f"{item[key].dtype} {tuple(item[key].shape)}"
                if there != here:
                    problems.append(
                        f"- {name}/{key}: saved {there}, model has {here}"
                    )
        self._refuse(step, problems, "another model or optimizer")

    def _check_optimizer(self, step, run, optimizer):
        """Compares settings, if the checkpoint has them.

        Raises:
            ValueError: That lists the differences.
        """
        saved, here = run.get("optimizer", {}), optimizer_settings(optimizer)
        problems = [
            f"- {name}: saved {saved[name]!r}, optimizer has {here[name]!r}"
            for name in here
            if name in saved and saved[name] != here[name]
        ]
        self._refuse(step, problems, "an optimizer with other settings")

    def _refuse(self, step, problems, received):
        num_more = len(problems) - MOST_DIFFERENCES
        if num_more > 0:
            problems[MOST_DIFFERENCES:] = [f"- and {num_more} more"]
        if problems:
            raise ValueError(
                f"{self.folder / str(step)}: the checkpoint is of {received}. "
                "Build and compile the model as it was, or take another "
                "folder. Received:\n" + "\n".join(problems)
            )


def optimizer_settings(optimizer):
    """What was chosen for an optimizer, by name.

    Its name and the length of the training are left out. So is a learning
    rate that is a number once steps were taken: callbacks may have changed it.

    Args:
        optimizer: `keras.optimizers.Optimizer`.

    Returns:
        dict that JSON can hold.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    settings = dict(_leaves(keras.saving.serialize_keras_object(optimizer)))
    if int(optimizer.iterations):
        settings.pop("learning_rate", None)
    return json.loads(json.dumps(settings, default=str))


def _leaves(value, path=()):
    """Pairs of a name and what is in a configuration under it."""
    if not isinstance(value, dict):
        yield ".".join(path), value
        return
    for key, each in value.items():
        if key not in NO_SETTINGS:
            is_level = key == "config"
            yield from _leaves(each, path if is_level else (*path, key))


def _is_no_traceback(record):
    """Whether to log what Orbax does; its errors are raised besides."""
    return not (record.exc_info and "orbax" in record.pathname)


def _variables(model, include_optimizer=True):
    """The variables of a model and of its optimizer, by path.

    Keras numbers optimizers and random generators through a process: a path
    begins with `adam_w_1` if there was another optimizer before. So these
    numbers are left out.

    Returns:
        dict of `"weights"` and `"optimizer"` to dicts of path to variable.
    """
    weights = model.trainable_variables + model.non_trainable_variables
    items = {WEIGHTS: _by_path(weights, r"\b(seed_generator)_\d+/")}
    if include_optimizer:
        optimizer = model.optimizer
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        items[OPTIMIZER] = _by_path(optimizer.variables, r"^([^/]+?)_\d+/")
    return items


def _by_path(variables, numbered):
    named = {}
    for variable in variables:
        path = re.sub(numbered, r"\1/", variable.path)
        while path in named:  # Two generators of one layer.
            path += "_"
        named[path] = variable
    return named


def _arrays(model):
    return jax.tree.map(lambda variable: variable.value, _variables(model))


def _abstract(array):
    return jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=array.sharding
    )


def _described(arrays, checksums):
    """Dtype, shape and checksum of each array."""
    return jax.tree.map(
        lambda array, checksum: (str(array.dtype), array.shape, checksum),
        arrays,
        checksums,
    )


def _examine(arrays):
    """Looks at arrays where they are.

    Returns:
        Tuple of a tree of checksums, int, and a bool, whether all numbers
        are finite.
    """
    # One after the other: on several CPU devices, programs that are run at
    # the same time may wait for each other forever.
    examined = jax.tree.map(
        lambda array: jax.device_get(_examine_array(array)), arrays
    )
    checksums = jax.tree.map(lambda pair: int(pair[0]), examined)
    are_finite = all(pair[1] for pair in jax.tree.leaves(examined))
    return checksums, are_finite


@jax.jit
def _examine_array(array):
    """Sums up the bits of the elements, each times an odd number of its own.

    So no element can change without the sum, which is modulo 2**32 and does
    not depend on the sharding.

    Returns:
        uint32 `(2,)`: the sum, and 1 if all elements are finite.
    """
    width = 8 * min(array.dtype.itemsize, 4)
    bits = array
    if array.dtype != bool:
        bits = jax.lax.bitcast_convert_type(array, f"uint{width}")
    place = jnp.arange(bits.size, dtype="uint32").reshape(bits.shape)
    checksum = jnp.sum(bits.astype("uint32") * (2 * place + 1), dtype="uint32")
    return jnp.stack([checksum, jnp.isfinite(array).all().astype("uint32")])


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()
