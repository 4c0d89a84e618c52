"""Optimizers with their settings, by name."""

import math
from typing import Literal, Unpack

import keras
from keras import ops

from keras_bwetaf.arguments import RecipeChanges
from keras_bwetaf.checks import is_number
from keras_bwetaf.training.optimizer import AdamW

RECIPES = {
    "97m": {
        "initial_learning_rate": 6e-4,
        "peak_learning_rate": 1.5e-3,
        "final_learning_rate": 1.8e-4,
        "warmup": 0.02,
        "decay": "cosine",
        "beta_1": 0.95,
        "beta_2": 0.98,
        "epsilon": 1.5e-8,
        "weight_decay": 0.1,
        "decay_vectors": True,
        "moments_dtype": "bfloat16",
        "global_clipnorm": 7.0,
    },
}
RECIPES["v3-97m"] = RECIPES["97m"]
RECIPES["v2-53m"] = {
    "initial_learning_rate": 0.0,
    "peak_learning_rate": 1.3e-3,
    "final_learning_rate": 1e-7,
    "warmup": 0.04,
    "decay": "cosine",
    "beta_1": 0.87,
    "beta_2": 0.94,
    "epsilon": 1e-6,
    "weight_decay": 0.1,
    "decay_vectors": True,
    "moments_dtype": "float32",
    "global_clipnorm": None,
}
RECIPES["v2-130m"] = {
    **RECIPES["v2-53m"],
    "initial_learning_rate": 2e-4,
    "peak_learning_rate": 5e-4,
    "final_learning_rate": 1e-8,
    "warmup": 0.03,
    "beta_1": 0.9,
    "beta_2": 0.95,
    "epsilon": 1e-7,
}
# The card has the peak, the decay and that weights are float32. The rest are
# usual values.
RECIPES["v4-preview"] = {
    **RECIPES["97m"],
    "initial_learning_rate": 0.0,
    "peak_learning_rate": 7e-4,
    "final_learning_rate": 7e-5,
    "beta_1": 0.9,
    "beta_2": 0.95,
    "epsilon": 1e-8,
    "decay_vectors": False,
    "moments_dtype": "float32",
    "global_clipnorm": 1.0,
}
RECIPES["small"] = {
    **RECIPES["97m"],
    "initial_learning_rate": 0.0,
    "peak_learning_rate": 3e-3,
    "final_learning_rate": 1e-4,
    "warmup": 0.1,
}
# What may be left out with None.
OPTIONAL = ("weight_decay", "global_clipnorm")
DECAYS = ("cosine", "linear")


def recipe(
    name: Literal["97m", "v3-97m", "v2-53m", "v2-130m", "v4-preview", "small"],
    total_steps: int,
    **changes: Unpack[RecipeChanges],
) -> AdamW:
    """An optimizer with the settings of a training that is known to work.

    `"97m"` is the card's: AdamW on all weights, norms and biases included,
    with moments in bfloat16, gradients clipped to a norm of 7, and a learning
    rate that rises from 6e-4 to 1.5e-3 in the first 2% of the steps and falls
    to 1.8e-4 along a cosine. `"v3-97m"` is the same.

    `"v2-53m"` and `"v2-130m"` are those of their cards: moments in float32,
    and gradients as they are.

    `"v4-preview"` has what the card of that model says: AdamW, and a learning
    rate that falls from 7e-4 along a cosine. The card says no more. Moments
    are float32, as the original's; warm-up, betas, weight decay, clipping and
    the end of the cosine are usual values.

    `"small"` is for models of a few million parameters, trained from nothing
    in hundreds or thousands of steps: as `"97m"`, but the learning rate rises
    from 0 to 3e-3 in the first 10% of the steps and falls to 1e-4.

    Args:
        name: str. `"97m"`, `"small"` or another of these.
        total_steps: int. Steps of the whole training.
        **changes: Settings that replace the recipe's:
            `initial_learning_rate`, `peak_learning_rate`,
            `final_learning_rate`; `warmup`, the share of steps at the
            beginning; `decay`, `"cosine"` or `"linear"`; and arguments of
            `AdamW`, such as `decay_vectors=False` for the usual weight decay
            without norms and biases, or `moments_dtype="float32"`.

    Returns:
        `AdamW`, for `compile`.

    Raises:
        ValueError: If there is no such recipe, or a setting is out of range.

    Example:

    ```python
    lm.compile(recipe("97m", total_steps=10_000))
    lm.fit(dataset)
    ```
    """
    if name not in RECIPES:
        raise ValueError(
            f"There are recipes for {sorted(RECIPES)}. Received: name={name!r}"
        )
    if "learning_rate" in changes:
        raise ValueError(
            "A recipe's learning rate rises and falls. Pass "
            "`peak_learning_rate`, its highest value; for a constant one, use "
            "`keras_bwetaf.training.AdamW(learning_rate=...)`. Received: "
            f"learning_rate={changes['learning_rate']!r}"
        )
    settings = {**RECIPES[name], **changes}
    for key, default in RECIPES[name].items():
        value = settings[key]
        is_left_out = value is None and key in OPTIONAL
        if isinstance(default, float) and not (is_left_out or is_number(value)):
            raise ValueError(
                f"`{key}` must be a number. Received: {key}={value!r} of type "
                f"{type(value).__name__}"
            )
    schedule = {
        key: settings.pop(key)
        for key in (
            "initial_learning_rate",
            "peak_learning_rate",
            "final_learning_rate",
            "decay",
        )
    }
    warmup = settings.pop("warmup")
    if not 0 <= warmup < 1:
        raise ValueError(
            "`warmup` is a share of the steps, at least 0 and less than 1. "
            f"Received: warmup={warmup}"
        )
    return AdamW(
        WarmupDecay(
            warmup_steps=int(warmup * total_steps),
            total_steps=total_steps,
            **schedule,
        ),
        **settings,
    )


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises along a line and falls along a curve.

    Args:
        initial_learning_rate: float. At step 0, if there is a warm-up.
        peak_learning_rate: float. At step `warmup_steps`.
        final_learning_rate: float. From step `total_steps` on.
        warmup_steps: int.
        total_steps: int. Greater than `warmup_steps`.
        decay: `"cosine"` or `"linear"`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        initial_learning_rate: float,
        peak_learning_rate: float,
        final_learning_rate: float,
        warmup_steps: int,
        total_steps: int,
        decay: Literal["cosine", "linear"] = "cosine",
    ):
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                "`total_steps` must be greater than `warmup_steps`, and that "
                f"not negative. Received: total_steps={total_steps}, "
                f"warmup_steps={warmup_steps}"
            )
        if decay not in DECAYS:
            raise ValueError(
                f"`decay` must be one of {DECAYS}. Received: decay={decay!r}"
            )
        self.initial_learning_rate = initial_learning_rate
        self.peak_learning_rate = peak_learning_rate
        self.final_learning_rate = final_learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay

    def __call__(self, step):
        step = ops.cast(step, "float32")
        peak = self.peak_learning_rate
        risen = step / max(self.warmup_steps, 1)
        rate = self.initial_learning_rate
        warming_up = rate + (peak - rate) * risen
        decay_steps = self.total_steps - self.warmup_steps
        fallen = ops.clip((step - self.warmup_steps) / decay_steps, 0.0, 1.0)
        if self.decay == "cosine":
            fallen = 0.5 * (1 - ops.cos(fallen * math.pi))
        falling = peak + (self.final_learning_rate - peak) * fallen
        return ops.where(step < self.warmup_steps, warming_up, falling)

    def get_config(self):
        return {
            "initial_learning_rate": self.initial_learning_rate,
            "peak_learning_rate": self.peak_learning_rate,
            "final_learning_rate": self.final_learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay": self.decay,
        }
