"""What `fit`, `evaluate` and `predict` of a causal LM do beside Keras's."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
import keras_hub
import numpy as np

from keras_bwetaf.arguments import CompileOptions, FitOptions, Remat
from keras_bwetaf.checks import positive_int
from keras_bwetaf.data.tracking import tracked, untracked
from keras_bwetaf.generation.sampling import BwETAFSampler, from_keras_hub
from keras_bwetaf.models import fit_data
from keras_bwetaf.models.compile_arguments import CompileArguments
from keras_bwetaf.models.generator import Generator
from keras_bwetaf.step import train_step
from keras_bwetaf.step.loss import mean_loss, targets_and_weights
from keras_bwetaf.step.metrics import TokenMetrics
from keras_bwetaf.step.optimizer_checks import (
    check_accumulation,
    check_callbacks,
    check_variables,
    flat_callbacks,
    start_averages,
)
from keras_bwetaf.step.trainer_state import TrainerState, running

Callback = keras.callbacks.Callback | keras.callbacks.CallbackList


# A chain of classes, since Keras can't make a functional model of a class that
# inherits `keras.Model` in two ways.
class Trainer(Generator):
    """Training of a causal LM, whose head and loss are computed together.

    The methods of Keras's trainer, weighted by tokens. A subclass has the
    attributes `backbone`, with `transformer_layers` and a tied
    `token_embedding`, and `preprocessor`.
    """

    has_default_loss = fuses_head_and_loss = False  # `compile` decides.

    def __init__(self, *args, **kwargs):
        self._trainer_state = TrainerState(self)
        # Whether a step reports its values, and to which callbacks.
        self._reports_steps, self._step_listeners = False, []
        super().__init__(*args, **kwargs)

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer | str | None = "auto",
        loss: Any = "auto",
        *,
        metrics: Any = None,
        weighted_metrics: Any = "auto",
        sampler: keras_hub.samplers.Sampler | str = "auto",
        remat: Remat | Sequence[Remat] = "none",
        gradient_accumulation_steps: int = 1,
        **kwargs: Unpack[CompileOptions],
    ) -> None:
        """Configures training and generation.

        The default loss is the mean cross-entropy of the next token. Head and
        loss are computed together, a part of a row at a time, so that the
        logits of a batch never exist at once. `fit` and `evaluate` report
        `loss`, `accuracy` and `perplexity`, each a mean over tokens. What is
        in `losses`, such as a regularizer's, is added to the loss, and not to
        the perplexity. A loss or metrics of your own see all the logits, as
        in every Keras model.

        Args:
            optimizer: See `keras_hub.models.CausalLM.compile`, and
                `keras_bwetaf.training.recipe`.
            loss: `"auto"`, or what `keras.Model.compile` takes.
            metrics: See `keras.Model.compile`.
            weighted_metrics: `"auto"`, `None`, or what
                `keras.Model.compile` takes.
            sampler: `"auto"`, the card's temperature 0.8 and top-p 0.92; a
                `BwETAFSampler`; or a KerasHub sampler or the name of one.
            remat: str, or list of str, one for each block. What to compute a
                second time for the gradient, instead of keeping it: `"none"`;
                `"attention"`, the weight of each pair of tokens in attention;
                `"block"`, all of a block but its products with weights;
                `"full"`, all of a block. In a list, the last blocks save
                most: memory is fullest when their gradients begin.
            gradient_accumulation_steps: int. Into how many parts a batch is
                split, whose gradients are added up before the optimizer's
                step. The result is that of the whole batch, in less memory.
            **kwargs: See `keras.Model.compile`.

        Raises:
            ValueError: If the sampler is one that this model can't use, an
                argument is out of range, or gradients would be averaged over
                batches regardless of how many tokens these have.
        """
        if isinstance(sampler, str) and sampler == "auto":
            sampler = BwETAFSampler()
        sampler = keras_hub.samplers.get(sampler)
        if not isinstance(sampler, BwETAFSampler):
            sampler = from_keras_hub(sampler)
        gradient_accumulation_steps = positive_int(
            "gradient_accumulation_steps", gradient_accumulation_steps
        )
        fuses_head_and_loss = _is_auto(loss) and not metrics
        fuses_head_and_loss &= weighted_metrics is None or _is_auto(
            weighted_metrics
        )
        if fuses_head_and_loss:
            check_accumulation(optimizer)
        elif gradient_accumulation_steps > 1:
            raise ValueError(
                "`gradient_accumulation_steps` needs the default loss and "
                "metrics, which are weighted by tokens. Received: "
                f"gradient_accumulation_steps={gradient_accumulation_steps}, "
                f"loss={loss!r}, metrics={metrics!r}, "
                f"weighted_metrics={weighted_metrics!r}"
            )
        self._set_remat(remat)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.has_default_loss = _is_auto(loss)
        self.fuses_head_and_loss = fuses_head_and_loss
        self._reports_steps = False
        self.token_metrics = TokenMetrics(
            fuses_head_and_loss and weighted_metrics is not None
        )
        # Keras would keep those of the last call where there are none now.
        self.loss = self._compile_loss = self._compile_metrics = None
        super().compile(
            optimizer=optimizer,
            loss=None if self.has_default_loss else loss,
            metrics=metrics,
            weighted_metrics=None if fuses_head_and_loss else weighted_metrics,
            sampler=sampler,
            **kwargs,
        )

    @property
    def metrics(self):
        metrics = super().metrics
        return (
            metrics + self.token_metrics.metrics if self.compiled else metrics
        )

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The loss of a batch of logits, for a training step of one's own.

        Args:
            x: dict. See `fit`.
            y: int array `(batch, length)`, or `None`.
            y_pred: float array `(batch, length, vocabulary_size)`. Logits.
            sample_weight: float array `(batch, length)` or `(batch,)`, or
                `None`.
            training: bool. See `keras.Model.compute_loss`.

        Returns:
            float scalar: what was compiled, and the sum of `self.losses`.
        """
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if self.has_default_loss:
            loss += mean_loss(y_pred, x, y, sample_weight)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self.has_default_loss:  # They count what the loss counts.
            y, sample_weight = targets_and_weights(x, y, sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if self.preprocessor is None or isinstance(x, Mapping):  # Token ids.
            fit_data.check_token_rows(
                x, y, sample_weight, self.backbone.vocabulary_size
            )
            if y is None and sample_weight is not None:
                y = fit_data.next_tokens(x)
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        weights = sample_weight
        fit_data.check_beside_texts(x, y, weights)
        x, y, sample_weight = super().preprocess_samples(x)
        if weights is not None:
            sample_weight = np.asarray(weights)[:, None] * sample_weight
        return x, y, sample_weight

    @running
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        *,
        callbacks: Sequence[Any] | Callback | None = None,
        shuffle: bool | None = None,
        class_weight: None = None,
        **kwargs: Unpack[FitOptions],
    ) -> keras.callbacks.History:
        """Trains the model. See `keras.Model.fit`.

        On several devices, the last batch of strings or arrays is filled up
        with padding, which weighs nothing. The rows of a data set's batches
        must be a multiple of the devices.

        Whatever ends it, an error or an interrupt, the model keeps what it
        has learned up to the last step. Callbacks may use the model: generate,
        evaluate, save. Other threads may not, until it ends.

        Args:
            x: Strings, of which the preprocessor drops what is longer than
                its `sequence_length`; a dict of `token_ids` and
                `padding_mask`; or batches of either, such as
                `keras_bwetaf.data.load_packed` returns, which drops nothing:
                a data set of Grain or `tf.data`, a `keras.utils.PyDataset`,
                a PyTorch DataLoader or an iterator. A batch may be a tuple
                of inputs, labels and sample weights.
                To read batches of a `grain.IterDataset` again by the number
                of their step, pass `keras_bwetaf.data.track` of it.
            y: int array `(rows, length)`, or `None`. The tokens to predict
                instead of the next one of the row; negative ones are
                ignored. Not allowed with strings.
            batch_size: int, of strings or arrays. Defaults to 32.
            sample_weight: float array `(rows,)` or, beside arrays, `(rows,
                length)`. How much a row or a prediction counts.
            validation_data: As `x`, or a tuple of inputs, labels and sample
                weights.
            validation_split: float. The last strings or arrays, of which it
                is the share, are for validation.
            callbacks: list. With a `keras_bwetaf.training.TrainingCheckpoint`
                among them, training goes on from the latest checkpoint. A
                callback with a method `on_step_values` gets the values of
                each step, if the loss and metrics are the default ones: see
                `keras_bwetaf.step.train_step`.
            shuffle: bool. Whether strings and arrays come in a new order in
                each epoch, and the batches of a `PyDataset`. It depends on
                `keras.utils.set_random_seed`. Defaults to `True`. Other
                batches come in the order in which they are read.
            class_weight: Must be `None`: tokens are no classes to weigh.
            **kwargs: See `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: If there is data that can't be used.
        """
        check_callbacks(getattr(self, "optimizer", None), callbacks)
        if class_weight is not None:
            raise ValueError(
                "A language model's labels are tokens, so there is no "
                "`class_weight`. Use `sample_weight`, of rows or of single "
                f"tokens. Received: class_weight={class_weight!r}"
            )
        if self.preprocessor is not None and not self.preprocessor.built:
            # Or Keras traces the model anew at each validation, for which it
            # reads one more batch than there may be.
            self.preprocessor.build(None)
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = fit_data.split(
                (x, y, sample_weight), validation_split
            )
        is_for_keras_hub = fit_data.is_for_keras_hub(x)
        batches = tracked(x)
        if batches is not None:
            batches.restart()  # Those of an earlier `fit` are over.
        arguments = fit_data.for_fit(
            self,
            x if batches is None else batches,
            y,
            sample_weight,
            untracked(validation_data),
            batch_size=batch_size,
            shuffle=shuffle,
            **kwargs,
        )
        fit = super().fit
        if not is_for_keras_hub:
            fit = functools.partial(keras.Model.fit, self)
        fit = functools.partial(fit, **arguments)
        with fit_data.no_false_alarm(kwargs.get("steps_per_epoch")):
            return self._fit(fit, batches, callbacks, kwargs)

    def _fit(self, fit, batches, callbacks, arguments):
        """Calls Keras's `fit`, or lets the callback do so that drives it."""
        flat = flat_callbacks(callbacks)
        for callback in flat:
            if hasattr(callback, "set_train_batches"):
                callback.set_train_batches(batches)
        self._listen([c for c in flat if hasattr(c, "on_step_values")])
        try:
            for callback in flat:
                if hasattr(callback, "drive_fit"):
                    return callback.drive_fit(
                        fit, self, batches, callbacks=flat, **arguments
                    )
            return fit(callbacks=callbacks, **arguments)
        finally:
            self._listen([])

    def _listen(self, listeners):
        """From now on, steps report their values to these callbacks.

        Only steps with the default loss and metrics have such values.
        """
        can_report = self.compiled and self.fuses_head_and_loss
        if listeners and can_report and not self._reports_steps:
            self._reports_steps = True
            self.train_function = None  # It has to be compiled again.
        self._step_listeners = listeners

    @running
    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Means over tokens. See `keras.Model.evaluate`, and `fit`."""
        evaluate, x = super().evaluate, untracked(x)
        is_within_fit = kwargs.get("_use_cached_eval_dataset", False)
        if not is_within_fit and not fit_data.is_for_keras_hub(x):
            evaluate = functools.partial(keras.Model.evaluate, self)
            x, y, sample_weight = fit_data.for_keras(
                self, x, y, sample_weight, batch_size=batch_size
            )
        with fit_data.no_false_alarm(kwargs.get("steps")):
            return evaluate(
                x, y, batch_size, sample_weight=sample_weight, **kwargs
            )

    @running
    def predict(
        self, x: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Logits. See `keras.Model.predict`, and `fit`."""
        x = untracked(x)
        predict, data = super().predict, x
        if not fit_data.is_for_keras_hub(x):
            predict = functools.partial(keras.Model.predict, self)
            data, _, _ = fit_data.for_keras(self, x, batch_size=batch_size)
        with fit_data.no_false_alarm(kwargs.get("steps")):
            logits = predict(data, batch_size=batch_size, **kwargs)
        return logits[: fit_data.num_rows(x)]

    train_on_batch = running(keras_hub.models.CausalLM.train_on_batch)
    test_on_batch = running(keras_hub.models.CausalLM.test_on_batch)
    predict_on_batch = running(keras_hub.models.CausalLM.predict_on_batch)

    # === What Keras's trainer on JAX calls ===

    def jax_state_sync(self):
        self._trainer_state.put_back()

    def _get_jax_state(self, purge_model_variables=False, **parts):
        return self._trainer_state.take(
            [name for name, is_wanted in parts.items() if is_wanted]
        )

    def _make_function(self, step_function, **kwargs):
        step_function = self._trainer_state.keep(step_function)
        return super()._make_function(step_function, **kwargs)

    def make_generate_function(self):
        self._trainer_state.check_thread()
        return super().make_generate_function()

    def make_train_function(self, force=False):
        # Keras itself finds out in the middle of `fit`.
        check_variables(self)
        start_averages(self.optimizer)
        if self.train_function is not None and not force:
            return
        super().make_train_function(force=True)
        if self._reports_steps:
            self.train_function = train_step.without_step_values(
                self.train_function, self._tell_listeners
            )

    def _tell_listeners(self, values):
        for callback in self._step_listeners:
            callback.on_step_values(values)

    def _set_remat(self, remat):
        blocks = self.backbone.transformer_layers
        each = [remat] * len(blocks) if isinstance(remat, str) else remat
        if not isinstance(each, list | tuple) or len(each) != len(blocks):
            raise ValueError(
                "`remat` must be a string, or a list of one for each of the "
                f"{len(blocks)} blocks. Received: remat={remat!r}"
            )
        for block, value in zip(blocks, each, strict=True):
            block.remat = value
        self.remat = remat

    def train_step(self, state, data):
        if not self.fuses_head_and_loss:
            return super().train_step(state, data)
        return train_step.train_step(
            self, state, data, reports_values=self._reports_steps
        )

    def test_step(self, state, data):
        if not self.fuses_head_and_loss:
            return super().test_step(state, data)
        return train_step.test_step(self, state, data)

    def get_compile_config(self):
        config = super().get_compile_config()
        if config is not None:
            config["sampler"] = keras_hub.samplers.serialize(self.sampler)
            config["remat"] = self.remat
            config["gradient_accumulation_steps"] = (
                self.gradient_accumulation_steps
            )
            if self.has_default_loss:
                config["loss"] = "auto"
            if self.fuses_head_and_loss:
                has_metrics = bool(self.token_metrics.metrics)
                config["weighted_metrics"] = "auto" if has_metrics else None
            config = CompileArguments.serialize(config)
        return config

    def compile_from_config(self, config):
        arguments = keras.saving.deserialize_keras_object(config)
        if isinstance(arguments, CompileArguments):  # An older file has a dict.
            arguments = arguments.arguments
        self.compile(**arguments)
        if self.built and self.optimizer:
            self.optimizer.build(self.trainable_variables)


def _is_auto(value):
    return isinstance(value, str) and value == "auto"
