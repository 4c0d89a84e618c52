from typing import Any

import keras
from keras import ops

MOMENTS = ("momentum", "velocity")


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class AdamW(keras.optimizers.AdamW):
    """AdamW as optax computes it.

    It differs from `keras.optimizers.AdamW`, whose state it shares, in that

    - epsilon is added after the second moment's bias has been corrected;
    - a step is computed in float32, whatever the dtypes of weights, gradients
      and moments, and rounded once, when it is stored. In bfloat16, Keras
      would count steps up to 256 only, and decay nothing;
    - the moments can have a dtype of their own;
    - a schedule counts the optimizer's steps, and not batches, when gradients
      are accumulated.

    Args:
        learning_rate: float or `LearningRateSchedule`.
        weight_decay: float. The share of a weight, times the learning rate,
            that a step takes off.
        beta_1: float. Decay of the first moment.
        beta_2: float. Decay of the second moment.
        epsilon: float.
        moments_dtype: str or `None`. Dtype of the stored moments; `None` is
            each weight's.
        decay_vectors: bool. Whether norm scales and biases decay, too.
        **kwargs: See `keras.optimizers.AdamW`.

    Raises:
        ValueError: If `amsgrad` is asked for, or `moments_dtype` is no float
            dtype.

    Reference:
     - [Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101)
    """

    def __init__(
        self,
        learning_rate: float
        | keras.optimizers.schedules.LearningRateSchedule = 0.001,
        weight_decay: float | None = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        moments_dtype: str | None = None,
        decay_vectors: bool = True,
        **kwargs: Any,
    ):
        if kwargs.get("amsgrad"):
            raise ValueError("`amsgrad` is not supported. Received: True")
        if moments_dtype is not None:
            moments_dtype = keras.backend.standardize_dtype(moments_dtype)
            if not keras.backend.is_float_dtype(moments_dtype):
                raise ValueError(
                    "`moments_dtype` must be a float dtype or None. "
                    f"Received: moments_dtype={moments_dtype!r}"
                )
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            **kwargs,
        )
        self.moments_dtype = moments_dtype
        self.decay_vectors = decay_vectors

    def add_variable_from_reference(
        self, reference_variable, name=None, initializer="zeros"
    ):
        if self.moments_dtype is None or name not in MOMENTS:
            return super().add_variable_from_reference(
                reference_variable, name=name, initializer=initializer
            )
        return self.add_variable(
            shape=reference_variable.shape,
            initializer=initializer,
            dtype=self.moments_dtype,
            layout=getattr(reference_variable, "_layout", None),
            name=f"{reference_variable.path.replace('/', '_')}_{name}",
        )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        momentum = self._momentums[index]
        velocity = self._velocities[index]
        step = _float32(self.iterations + 1)
        gradient = _float32(gradient)
        weight = _float32(variable)

        # Each is used before it is rounded to the dtype it is stored in.
        first = _moving_average(momentum, gradient, self.beta_1)
        second = _moving_average(velocity, ops.square(gradient), self.beta_2)
        self.assign(momentum, first)
        self.assign(velocity, second)
        first /= 1 - ops.power(_float32(self.beta_1), step)
        second /= 1 - ops.power(_float32(self.beta_2), step)
        direction = first / (ops.sqrt(second) + self.epsilon)
        if self._use_weight_decay(variable):
            direction += self.weight_decay * weight
        self.assign(variable, weight - _float32(learning_rate) * direction)

    def _use_weight_decay(self, variable):
        if len(variable.shape) < 2 and not self.decay_vectors:
            return False
        return super()._use_weight_decay(variable)

    def _apply_weight_decay(self, variables):
        """`update_step` does it, so that it is rounded but once."""

    def _clip_gradients(self, grads):
        return super()._clip_gradients([_float32(grad) for grad in grads])

    def _get_current_learning_rate(self):
        schedule = self._learning_rate
        if isinstance(
            schedule, keras.optimizers.schedules.LearningRateSchedule
        ):
            return schedule(self.iterations)
        return super()._get_current_learning_rate()

    def get_config(self):
        config = super().get_config()
        config["moments_dtype"] = self.moments_dtype
        config["decay_vectors"] = self.decay_vectors
        return config


def _float32(x):
    return ops.cast(x, "float32")


def _moving_average(average, new, decay):
    return decay * _float32(average) + (1 - decay) * new
