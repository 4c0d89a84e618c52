"""What `fit` asks of an optimizer before the first step."""

import keras

LEARNING_RATE_CALLBACKS = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
)


def flat_callbacks(callbacks):
    """What `fit` takes as `callbacks`, as a list without doubles.

    Args:
        callbacks: list of callbacks, one of them, a
            `keras.callbacks.CallbackList`, or `None`. May be nested.
    """
    flat = {}
    for each in keras.tree.flatten(callbacks):
        if isinstance(each, keras.callbacks.CallbackList):
            flat |= dict.fromkeys(each.callbacks)
        elif each is not None:
            flat[each] = None
    return list(flat)


def check_accumulation(optimizer):
    """Checks that the optimizer leaves accumulation to the model.

    Raises:
        ValueError: If it averages batches that have unequal numbers of tokens.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            "Keras's optimizers average the gradients of batches, whatever "
            "number of tokens they have. Pass `gradient_accumulation_steps` "
            "to `compile`, which weighs by tokens, and make the batches as "
            "many times larger. Received: an optimizer with "
            f"gradient_accumulation_steps={steps}"
        )


def check_callbacks(optimizer, callbacks):
    """Checks that no callback sets a learning rate that follows a schedule.

    Args:
        optimizer: `keras.optimizers.Optimizer`, or `None`.
        callbacks: list of callbacks, or `None`. May be nested.

    Raises:
        ValueError: If one does.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    schedule = getattr(optimizer, "_learning_rate", None)
    if not isinstance(
        schedule, keras.optimizers.schedules.LearningRateSchedule
    ):
        return
    for callback in flat_callbacks(callbacks):
        if isinstance(callback, LEARNING_RATE_CALLBACKS):
            raise ValueError(
                f"`{type(callback).__name__}` can't set the learning rate, "
                "which follows the schedule of the optimizer, such as that "
                "of a recipe. Leave out the callback and change the recipe's "
                "`peak_learning_rate` or `final_learning_rate`, or compile "
                "with an optimizer that has a constant one: "
                "`keras_bwetaf.training.AdamW(learning_rate=1e-3)`. "
                f"Received: learning_rate={schedule!r}"
            )


def start_averages(optimizer):
    """Sets the moving averages of weights to the weights, before any step.

    Keras starts them at zero. If `fit` ended before the first step, it would
    overwrite the weights with zeros. After the first step, the result is the
    same.

    Args:
        optimizer: `keras.optimizers.Optimizer`, or `None`.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not getattr(optimizer, "use_ema", False) or not optimizer.built:
        return
    if int(optimizer.iterations) == 0:
        averages = optimizer._model_variables_moving_average
        for average, variable in zip(
            averages, optimizer._trainable_variables, strict=True
        ):
            if average is not None:
                average.assign(variable)


def check_variables(model):
    """Checks that the optimizer is one for what is trainable now.

    Args:
        model: `BwETAFCausalLM`, compiled.

    Raises:
        ValueError: If weights were frozen, unfrozen, added or removed since
            its optimizer was built.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if optimizer is None or not optimizer.built:
        return
    built_for = optimizer._trainable_variables
    if [*map(id, built_for)] != [*map(id, model.trainable_variables)]:
        raise ValueError(
            "Weights were frozen, unfrozen, added or removed after the "
            "optimizer had been built. Compile the model with a new "
            f"optimizer. Received: an optimizer for {len(built_for)} "
            "variables, a model in which "
            f"{len(model.trainable_variables)} are trainable"
        )
