"""The state of Adam, to and from the optimizer's variables.

In its canonical form, which has PyTorch's names, it is a mapping:

    step                int32 (), the number of steps made
    exp_avg.NAME        running mean of the gradient of the weight NAME
    exp_avg_sq.NAME     running mean of its square

NAME is the weight's canonical name, and both moments have its shape.
"""

from collections.abc import Mapping

import keras
import numpy as np

from converters.checkpoint import MOMENTS, STEP
from converters.errors import refuse

LARGEST_STEP = np.iinfo("int32").max


def load_optimizer_state(model, state):
    """Sets the optimizer's variables, so that training goes on from there.

    `fit` then takes the steps that the optimizer which the state is from
    would have taken, if its settings are the same: the learning rate of a
    schedule is that of the state's step.

    A moment is converted to the dtype of its variable, which is that of the
    weight: from bfloat16 to float32, that is exact. Everything is checked
    before the first variable is changed. What else there is to an optimizer
    starts anew: with `gradient_accumulation_steps`, the gradients gathered
    for the next step; the factor of a `LossScaleOptimizer` stays as it is.

    Optax adds epsilon after it has corrected the second moment's bias, and
    Keras before. So at step `t`, Keras's epsilon acts as one that is larger
    by `1 / sqrt(1 - beta_2**t)`: 7 times at the first step for a `beta_2` of
    0.98, 1.00 times from step 300 on. `keras_bwetaf.training.AdamW`, which
    recipes are made of, does as optax.

    Args:
        model: `BwETAFCausalLM`, compiled with `keras.optimizers.Adam` or
            `AdamW`, all of it trainable.
        state: Mapping of name to array. `"step"`, an int scalar, and for
            each weight the float arrays `"exp_avg.NAME"` and
            `"exp_avg_sq.NAME"`. It is asked for one array at a time, twice
            for each: once to check it, once to assign it.

    Raises:
        ValueError: If the model or its optimizer has no place for such a
            state, or if the state's names, shapes or dtypes are not the
            model's. It lists every problem.

    Example:

    ```python
    optimizer = keras.optimizers.AdamW(
        schedule, beta_1=0.95, beta_2=0.98, epsilon=1.5e-8, weight_decay=0.1
    )
    lm.compile(optimizer)
    load_optimizer_state(lm, state)
    lm.fit(texts)
    ```
    """
    optimizer = _adam(model)
    moments = _moments(model, optimizer)
    _check(state, moments, optimizer)
    for name, variable in moments.items():
        variable.assign(np.asarray(state[name]).astype(variable.dtype))
    # Keras counts batches, of which it takes several to make a step.
    batches = optimizer.gradient_accumulation_steps
    optimizer._iterations.assign(int(state[STEP]) * (batches or 1))
    for variable in optimizer._accumulated_gradients if batches else ():
        variable.assign(keras.ops.zeros(variable.shape, variable.dtype))


def optimizer_state(model):
    """The state of the optimizer, such as `load_optimizer_state` takes.

    An optimizer that has made no step gives zeros.

    Args:
        model: `BwETAFCausalLM`. As for `load_optimizer_state`.

    Returns:
        Mapping of name to numpy array: `"step"`, int32 `()`, then
        `"exp_avg.NAME"` and `"exp_avg_sq.NAME"` for each weight, of its
        shape and dtype. An array is copied from its variable when it is
        asked for: `dict(...)` keeps them all as they are now.

    Raises:
        ValueError: If the model's optimizer has another kind of state, or
            is between two steps, with gradients gathered.

    Example:

    ```python
    state = optimizer_state(lm)
    state["step"]  # 700
    state["exp_avg.model.embed_tokens.weight"].shape  # (16384, 768)
    ```
    """
    optimizer = _adam(model)
    batches = optimizer.gradient_accumulation_steps
    gathered = int(optimizer._iterations) % (batches or 1)
    if gathered:
        raise ValueError(
            "Gradients gathered for the next step have no place in the "
            "optimizer's state. Train on a multiple of "
            f"`gradient_accumulation_steps` batches. Received: {gathered} "
            f"batches since the last step, gradient_accumulation_steps="
            f"{batches}"
        )
    return _OptimizerState(optimizer, _moments(model, optimizer))


class _OptimizerState(Mapping):
    """Reads an optimizer's variables, each when it is asked for.

    Args:
        optimizer: `keras.optimizers.Adam`.
        moments: dict of name to variable.
    """

    def __init__(self, optimizer, moments):
        self._optimizer = optimizer
        self.moments = moments

    def __getitem__(self, name):
        if name == STEP:
            step = keras.ops.convert_to_numpy(self._optimizer.iterations)
            return step.astype("int32")
        return keras.ops.convert_to_numpy(self.moments[name])

    def __contains__(self, name):
        return name == STEP or name in self.moments

    def __iter__(self):
        yield STEP
        yield from self.moments

    def __len__(self):
        return 1 + len(self.moments)


def _adam(model):
    """The model's Adam, built for its trainable weights.

    Raises:
        ValueError: If it has none, or one with more state than Adam's own.
    """
    backbone = getattr(model, "backbone", None)
    if getattr(backbone, "architecture", None) is None:
        raise ValueError(
            "Expected a BwETAFCausalLM, whose weights have canonical names. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    outer = model.optimizer
    if outer is None:
        raise ValueError(
            "The model has no optimizer. Compile it with the one to train "
            "with first. Received: model.optimizer=None"
        )
    optimizer = outer
    if isinstance(outer, keras.optimizers.LossScaleOptimizer):
        optimizer = outer.inner_optimizer
    if not isinstance(optimizer, keras.optimizers.Adam):
        raise ValueError(
            "Only the state of Adam can be moved. Compile the model with "
            "keras.optimizers.AdamW or Adam. Received: optimizer of type "
            f"{type(optimizer).__name__}"
        )
    for name in ("amsgrad", "use_ema"):
        if getattr(optimizer, name):
            raise ValueError(
                f"`{name}` keeps variables that have no place in the state "
                f"of Adam. Compile the model with {name}=False. Received: "
                f"{name}={getattr(optimizer, name)}"
            )
    if not outer.built:
        _check_trainable(model)
        outer.build(model.trainable_variables)
    return optimizer


def _moments(model, optimizer):
    """The optimizer's variables by name in the state.

    Returns:
        dict of str to variable, in the order of the checkpoint's tensors.

    Raises:
        ValueError: If they are not for the weights of the model, and for
            all of them.
    """
    names = _check_trainable(model)
    built_for = optimizer._trainable_variables
    if {*map(id, built_for)} != {*map(id, model.trainable_variables)}:
        raise ValueError(
            "The optimizer was built for other variables than are trainable "
            "now. Compile the model with a new optimizer. Received: an "
            f"optimizer for {len(built_for)} variables, a model with "
            f"{len(model.trainable_variables)}"
        )
    moments = dict(
        zip(
            (variable.path for variable in built_for),
            zip(optimizer._momentums, optimizer._velocities, strict=True),
            strict=True,
        )
    )
    return {
        f"{moment}.{name}": moments[path][i]
        for i, (moment, _, _) in enumerate(MOMENTS)
        for path, name in names.items()
    }


def _check_trainable(model):
    """Checks that the weights with canonical names are what is trained.

    Returns:
        dict of path of the Keras variable to canonical name.

    Raises:
        ValueError: That lists the weights that are frozen or added.
    """
    architecture = model.backbone.architecture
    config = architecture.config_from_keras(model.backbone.get_config())
    names = {row.keras: row.name for row in architecture.tensors(config)}
    trained = [variable.path for variable in model.trainable_variables]
    problems = [f"{path} is frozen" for path in names if path not in trained]
    problems += [
        f"{path} is not in the checkpoint's format"
        for path in trained
        if path not in names
    ]
    if problems:
        raise ValueError(
            "The optimizer's state has moments for each weight of the model "
            "and for nothing else, so all of it must be trainable, without "
            "LoRA and quantization. Load the model anew, or set "
            "`trainable = True`, and compile it with a new optimizer. "
            "Received:\n" + "\n".join(f"- {each}" for each in problems)
        )
    return names


def _check(state, moments, optimizer):
    """Compares a state with the variables that it is for.

    Raises:
        CheckpointError: That lists every problem.
    """
    problems = [
        f"missing entry {name}"
        for name in (STEP, *moments)
        if name not in state
    ]
    most = LARGEST_STEP // (optimizer.gradient_accumulation_steps or 1)
    for name in state:
        array = np.asarray(state[name])
        received = f"Received: shape {array.shape}, dtype {array.dtype}"
        if name == STEP:
            if array.shape != () or array.dtype.kind not in "iu":
                problems.append(f"{name} must be an int scalar. {received}")
            elif not 0 <= array <= most:
                problems.append(
                    f"{name} must be from 0 to {most}. Received: {array}"
                )
        elif name not in moments:
            problems.append(f"unexpected entry {name}. {received}")
        elif array.shape != tuple(moments[name].shape) or not _is_float(array):
            problems.append(
                f"{name} must be floats of shape {tuple(moments[name].shape)}, "
                f"as the weight. {received}"
            )
    refuse("The optimizer's state", problems)


def _is_float(array):
    return keras.backend.is_float_dtype(array.dtype.name)
