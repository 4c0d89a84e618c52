import functools
import itertools
import os
from collections.abc import Mapping

import keras
import keras_hub
import numpy as np
from keras_hub.models import CausalLM

import converters
from converters import keras_folder
from converters.files import local_path
from converters.hub import local_folder
from keras_bwetaf.checks import checked_seed, is_int, positive_int
from keras_bwetaf.generation.decoding import Decoder
from keras_bwetaf.generation.generation import (
    Request,
    fit_to_context,
    generate_tokens,
)
from keras_bwetaf.generation.sampling import (
    BwETAFSampler,
    SamplingSettings,
    from_keras_hub,
)
from keras_bwetaf.generation.streaming import TextStream
from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.compile_arguments import CompileArguments
from keras_bwetaf.models.lora import merged_for_saving
from keras_bwetaf.models.quantization import only_what_can_be
from keras_bwetaf.processes import gathered, in_first_process
from keras_bwetaf.training import fit_data, train_step
from keras_bwetaf.training.checkpoints import TrainingCheckpoint, track
from keras_bwetaf.training.loss import mean_loss, targets_and_weights
from keras_bwetaf.training.metrics import TokenMetrics
from keras_bwetaf.training.optimizer import check_callbacks, start_averages
from keras_bwetaf.training.trainer_state import TrainerState, running

# Often enough that a keyboard interrupt is answered within a second or two,
# seldom enough to cost nothing.
TOKENS_PER_DISPATCH = 64


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFCausalLM(CausalLM):
    """The BwETAFv3 language model: a backbone and its tied head.

    Called on `{"token_ids", "padding_mask"}` it returns logits. With a
    preprocessor, `fit`, `evaluate` and `predict` take plain strings, and
    `generate` and `stream` continue them.

    Args:
        backbone: `BwETAFBackbone`.
        preprocessor: `BwETAFCausalLMPreprocessor` or `None`. Without one,
            inputs are token ids.

    Call arguments:
        token_ids: int tensor `(batch, length)`.
        padding_mask: int tensor `(batch, length)`. See `BwETAFBackbone`.

    Returns:
        float tensor `(batch, length, vocabulary_size)`.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("97m")
    lm.generate("The night sky", max_new_tokens=64)
    for text in lm.stream("The night sky", max_new_tokens=64):
        print(text, end="", flush=True)
    ```
    """

    backbone_cls = BwETAFBackbone
    preprocessor_cls = BwETAFCausalLMPreprocessor
    has_default_loss = fuses_head_and_loss = False  # `compile` decides.
    # Of the last `fit`: `TrackedBatches`, if its data was a Grain data set.
    train_batches = None

    def __init__(self, backbone, preprocessor=None, **kwargs):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self._trainer_state = TrainerState(self)

        # === Functional Model ===
        inputs = backbone.input
        hidden_states = backbone(inputs)
        outputs = self.head(hidden_states)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        metrics=None,
        weighted_metrics="auto",
        sampler="auto",
        remat="none",
        gradient_accumulation_steps=1,
        **kwargs,
    ):
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
            _check_accumulation(optimizer)
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
        self.reports_steps = False  # `Monitor` turns it on.
        self.step_values = None  # Of the last step, if it does.
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
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=None,
        *,
        callbacks=None,
        shuffle=None,
        class_weight=None,
        **kwargs,
    ):
        """Trains the model. See `keras.Model.fit`.

        On several devices, the last batch of strings or arrays is filled up
        with padding, which weighs nothing. Batches of a data set must divide.

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
                Batches of a `grain.IterDataset` can be read again by the
                number of their step, from `train_batches`.
            y: int array `(rows, length)`, or `None`. The tokens to predict
                instead of the next one of the row; negative ones are
                ignored. Beside strings there are none.
            batch_size: int, of strings or arrays. Defaults to 32.
            sample_weight: float array `(rows,)` or, beside arrays, `(rows,
                length)`. How much a row or a prediction counts.
            validation_data: As `x`, or a tuple of inputs, labels and sample
                weights.
            validation_split: float. The last strings or arrays, of which it
                is the share, are for validation.
            callbacks: list. With a `keras_bwetaf.training.TrainingCheckpoint`
                among them, training goes on from the latest checkpoint.
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
        self.train_batches = track(x)
        arguments = fit_data.for_fit(
            self,
            x if self.train_batches is None else self.train_batches,
            y,
            sample_weight,
            validation_data,
            batch_size=batch_size,
            shuffle=shuffle,
            **kwargs,
        )
        fit = super().fit
        if not is_for_keras_hub:
            fit = functools.partial(keras.Model.fit, self)
        fit = functools.partial(fit, **arguments)
        with fit_data.no_false_alarm(kwargs.get("steps_per_epoch")):
            return self._fit(fit, callbacks, kwargs)

    def _fit(self, fit, callbacks, arguments):
        for callback in keras.tree.flatten(callbacks):
            if isinstance(callback, TrainingCheckpoint):
                return callback.run(
                    fit,
                    self,
                    self.train_batches,
                    callbacks=callbacks,
                    **arguments,
                )
        return fit(callbacks=callbacks, **arguments)

    @running
    def evaluate(
        self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs
    ):
        """Means over tokens. See `keras.Model.evaluate`, and `fit`."""
        evaluate = super().evaluate
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
    def predict(self, x=None, batch_size=None, **kwargs):
        """Logits. See `keras.Model.predict`, and `fit`."""
        predict, data = super().predict, x
        if not fit_data.is_for_keras_hub(x):
            predict = functools.partial(keras.Model.predict, self)
            data, _, _ = fit_data.for_keras(self, x, batch_size=batch_size)
        with fit_data.no_false_alarm(kwargs.get("steps")):
            logits = predict(data, batch_size=batch_size, **kwargs)
        return logits[: fit_data.num_rows(x)]

    train_on_batch = running(CausalLM.train_on_batch)
    test_on_batch = running(CausalLM.test_on_batch)
    predict_on_batch = running(CausalLM.predict_on_batch)

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

    def make_train_function(self, force=False):
        # Keras itself finds out in the middle of `fit`.
        train_step.check_optimizer(self)
        start_averages(self.optimizer)
        if self.train_function is not None and not force:
            return
        super().make_train_function(force=True)
        if self.reports_steps:
            self.train_function = train_step.keep_step_values(
                self, self.train_function
            )

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
        return train_step.train_step(self, state, data)

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

    def quantize(self, mode=None, **kwargs):
        """Quantizes the weights. See `keras.Model.quantize`."""
        with only_what_can_be():
            super().quantize(mode, **kwargs)

    def compile_from_config(self, config):
        arguments = keras.saving.deserialize_keras_object(config)
        if isinstance(arguments, CompileArguments):  # An older file has a dict.
            arguments = arguments.arguments
        self.compile(**arguments)
        if self.built and self.optimizer:
            self.optimizer.build(self.trainable_variables)

    def _run_through_graph(
        self, inputs, operation_fn=lambda operation: operation, call_fn=None
    ):
        def tied(operation):
            if operation is self.backbone.token_embedding:
                backbone = operation_fn(self.backbone)
                # Or `keras.models.clone_model` gives the head its own weights.
                if isinstance(backbone, BwETAFBackbone):
                    return backbone.token_embedding
            return operation_fn(operation)

        return super()._run_through_graph(inputs, tied, call_fn)

    def save_to_preset(
        self, preset_dir, max_shard_size=10, include_optimizer=False
    ):
        """Saves the model to a folder that `from_preset` loads.

        LoRA's products are saved in the weights that they belong to. The
        model itself stays as it is. With several processes, all must call
        this; the first one writes.

        Args:
            preset_dir: str or path.
            max_shard_size: int or float. Gigabytes of weights in one file.
            include_optimizer: bool. Whether to save the optimizer's state,
                for `load_optimizer`, to `optimizer.weights.h5`.

        Raises:
            ValueError: If `include_optimizer` and the optimizer has another
                state than Adam's.
        """
        variables = list(self.variables)
        if include_optimizer and self.compiled:
            variables += self.optimizer.variables
        with merged_for_saving(self.backbone), gathered(variables):
            in_first_process(
                self._write_preset,
                local_path("preset_dir", preset_dir),
                max_shard_size,
                include_optimizer,
            )

    def _write_preset(self, folder, max_shard_size, include_optimizer):
        from keras_bwetaf.export import as_checkpoint

        checkpoint = None
        if include_optimizer:
            checkpoint = as_checkpoint(self, include_optimizer=True)
        super().save_to_preset(folder, max_shard_size=max_shard_size)
        _remove_older_files(folder, include_optimizer)
        if checkpoint:
            keras_folder.write_optimizer(folder, checkpoint)

    def export_to_transformers(self, path, overwrite=False):
        """Writes a folder that `transformers` loads, and what builds on it.

        `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`
        then computes the same logits in PyTorch, which is not needed to write
        the folder. It is what `converters.convert(..., to="torch")` writes,
        with the model and its tokenizer only. With several processes, all
        must call this; the first one writes.

        Args:
            path: str or path. The folder.
            overwrite: bool. Whether a model folder may be replaced.

        Raises:
            ValueError: If the folder exists, or the model is quantized.
        """
        from keras_bwetaf.export import as_checkpoint

        with gathered(self.variables):
            in_first_process(
                converters.write_checkpoint,
                as_checkpoint(self),
                path,
                to="torch",
                overwrite=overwrite,
            )

    def load_optimizer(self, source):
        """Goes on with the optimizer's state of a checkpoint.

        Load the weights of the same checkpoint with `from_preset`, compile
        the model with `keras_bwetaf.training.recipe` or another AdamW, and
        then call this: `fit` continues at the step at which the checkpoint
        was saved, with the moments that it had. The optimizer's settings are
        not in a checkpoint.

        Args:
            source: str or path. A folder of any format of `converters`, such
                as the original's with its `make_stuff_better.pkl`, or
                `"hf://owner/repo"`.

        Raises:
            ValueError: If there is no optimizer's state, it does not fit
                the model, or the model has another optimizer.

        Example:

        ```python
        lm = keras_bwetaf.from_preset("flax-folder", dtype="float32")
        lm.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1))
        lm.load_optimizer("flax-folder")
        lm.fit(texts)
        ```
        """
        from keras_bwetaf.training import load_optimizer_state

        checkpoint = converters.read_checkpoint(local_folder(source))
        if checkpoint.optimizer is None:
            raise ValueError(
                "The checkpoint has no optimizer's state. Expected: one that "
                "was saved with it. Received: "
                f"source={os.fspath(source)!r}"
            )
        load_optimizer_state(
            self,
            {
                name: tensor.array()  # A view of the file.
                for name, tensor in checkpoint.optimizer.items()
            },
        )

    def head(self, hidden_states):
        """Logits of hidden states: their product with the embeddings."""
        return self.backbone.token_embedding(hidden_states, reverse=True)

    def make_cache(self, batch_size, num_slots):
        """Empty key/value caches.

        Returns:
            list with a `(key, value)` tuple for each layer, each
            `(batch_size * num_key_value_heads, num_slots, head_dim)` of the
            compute dtype.
        """
        caches = []
        for block in self.backbone.transformer_layers:
            attention = block.attention
            shape = (
                batch_size * attention.num_key_value_heads,
                num_slots,
                attention.head_dim,
            )
            zeros = keras.ops.zeros(shape, dtype=attention.compute_dtype)
            caches.append((zeros, zeros))
        return caches

    def call_with_cache(
        self,
        token_ids,
        cache,
        cache_index,
        positions,
        attention_mask=None,
        padding_mask=None,
    ):
        """The backbone on new tokens, with earlier ones in the cache.

        Args:
            token_ids: int tensor `(batch, length)`.
            cache: As `make_cache` returns it.
            cache_index: int. The slot of the first new token.
            positions: int tensor `(batch, length)`.
            attention_mask: bool tensor `(batch, length, num_slots)`, the
                slots that each new token sees.
            padding_mask: int tensor `(batch, length)`. Instead of
                `attention_mask`, where the cache is empty: see
                `BwETAFBackbone`.

        Returns:
            Tuple of hidden states `(batch, length, hidden_dim)` and the
            updated cache.
        """
        backbone = self.backbone
        x = backbone.token_embedding(token_ids)
        x = backbone.embedding_rotary(x, positions)
        updated = []
        for block, layer_cache in zip(
            backbone.transformer_layers, cache, strict=True
        ):
            x, layer_cache = block(
                x,
                padding_mask=padding_mask,
                positions=positions,
                cache=layer_cache,
                cache_index=cache_index,
                attention_mask=attention_mask,
            )
            updated.append(layer_cache)
        return x, updated

    def make_generate_function(self):
        """The `Decoder`, whose compiled functions are made on first use."""
        self._trainer_state.check_thread()
        if self.generate_function is None:
            self.generate_function = Decoder(self)
        return self.generate_function

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        *,
        max_new_tokens=None,
        stop_strings=None,
        truncation=None,
        seed=None,
        **sampling,
    ):
        """Continues prompts.

        Args:
            inputs: str, or list of str of any lengths. Without a
                preprocessor, a dict of `token_ids` and `padding_mask`, int
                arrays `(batch, length)` with padding on the right. Or a
                `tf.data.Dataset` of batches of either.
            max_length: int. Most tokens of a prompt and its continuation
                together. Defaults to the preprocessor's `sequence_length`.
            stop_token_ids: `"auto"`, the tokenizer's end token; a list of
                int; or `None` to go on until the length is reached. Only new
                tokens are looked at.
            strip_prompt: bool. Return the continuation only.
            max_new_tokens: int. Most tokens of a continuation; instead of
                `max_length`.
            stop_strings: str or list of str. A continuation ends before the
                first of them.
            truncation: `"left"` drops the oldest tokens of prompts that are
                too long for the model to see (a returned text still starts
                with its whole prompt); `None` raises an error.
            seed: int, or list with one int for each prompt. A prompt with
                the same seed continues in the same way, alone or in a batch.
                Defaults to the sampler's.
            **sampling: Arguments of `BwETAFSampler` that replace those of
                the compiled one: `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`.

        Returns:
            str or list of str, as `inputs`; or a dict of int arrays
            `(batch, length)`, as `inputs`, whose `padding_mask` covers the
            stop token.

        Raises:
            ValueError: If a prompt is empty, not a string or too long, or
                an argument is out of range.

        Example:

        ```python
        lm.generate(["The night sky", "Once"], max_new_tokens=32, seed=[1, 2])
        lm.generate("The night sky", max_new_tokens=32, temperature=0)
        ```
        """
        options = dict(
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            truncation=truncation,
            seed=seed,
            sampling=sampling,
        )
        stop_strings = _as_stop_strings(stop_strings)
        if hasattr(inputs, "as_numpy_iterator"):  # A tf.data.Dataset.
            batches = list(inputs.as_numpy_iterator())
            return _concatenate(
                self._generate(
                    batch, strip_prompt, stop_strings, {**options, "seed": seed}
                )
                for batch, seed in zip(
                    batches, _seeds_of_batches(seed, batches), strict=True
                )
            )
        return self._generate(inputs, strip_prompt, stop_strings, options)

    def _generate(self, inputs, strip_prompt, stop_strings, options):
        """`generate` for one batch."""
        if self.preprocessor is None:
            return self._generate_ids(
                inputs, strip_prompt, stop_strings, options
            )
        is_single = isinstance(inputs, str)
        texts = _as_texts([inputs] if is_single else inputs)
        prompts = self.preprocessor.tokenizer.tokenize(texts)
        request = self._request(prompts, **options)
        outputs = ["" if strip_prompt else text for text in texts]
        for pieces in self._generate_text(
            request, stop_strings, TOKENS_PER_DISPATCH
        ):
            outputs = [a + b for a, b in zip(outputs, pieces, strict=True)]
        return outputs[0] if is_single else outputs

    def stream(
        self,
        prompt,
        max_length=None,
        stop_token_ids="auto",
        *,
        max_new_tokens=None,
        stop_strings=None,
        truncation=None,
        seed=None,
        tokens_per_dispatch=8,
        **sampling,
    ):
        """Continues a prompt and yields the text as it is made.

        The pieces put together are what `generate` returns with
        `strip_prompt=True` and the same seed.

        Args:
            prompt: str.
            tokens_per_dispatch: int. How many tokens are made between two
                pieces of text. Fewer come sooner, more come faster.
            **sampling: See `generate`, also for all other arguments.

        Yields:
            str, never empty. A character is never split.

        Raises:
            ValueError: As `generate` does, at once and not at the first
                piece.
        """
        if self.preprocessor is None:
            raise ValueError(
                "`stream` needs a tokenizer, and this model has "
                "`preprocessor=None`. Attach a preprocessor, or pass token "
                "ids to `generate`."
            )
        if not isinstance(prompt, str):
            raise ValueError(
                "`stream` takes one prompt, a str. Use `generate` for a "
                f"batch. Received: prompt={prompt!r}"
            )
        tokens_per_dispatch = positive_int(
            "tokens_per_dispatch", tokens_per_dispatch
        )
        request = self._request(
            self.preprocessor.tokenizer.tokenize([prompt]),
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            truncation=truncation,
            seed=seed,
            sampling=sampling,
        )
        pieces = self._generate_text(
            request, _as_stop_strings(stop_strings), tokens_per_dispatch
        )
        return (piece for (piece,) in pieces if piece)

    def _generate_text(self, request, stop_strings, tokens_per_dispatch):
        """Yields the next piece of text of every row."""
        streams = [
            TextStream(
                self.preprocessor.tokenizer,
                stop_strings,
                request.stop_token_ids,
            )
            for _ in request.prompts
        ]
        finished = np.zeros(len(streams), "bool")
        for fresh in generate_tokens(
            self.make_generate_function(),
            request,
            tokens_per_dispatch,
            finished,
        ):
            yield [
                stream.push(tokens, final)
                for stream, tokens, final in zip(
                    streams, fresh, finished.tolist(), strict=True
                )
            ]
            finished |= [stream.stopped for stream in streams]

    def _generate_ids(self, inputs, strip_prompt, stop_strings, options):
        """`generate` without a preprocessor: token ids in and out."""
        if stop_strings:
            raise ValueError(
                "`stop_strings` needs a tokenizer, and this model has "
                "`preprocessor=None`. Attach a preprocessor or use "
                "`stop_token_ids`."
            )
        prompts, width = _as_prompts(inputs)
        if options["max_new_tokens"] is None and options["max_length"] is None:
            options = {**options, "max_length": width}
        request = self._request(prompts, **options)
        rows = [
            [] if strip_prompt else list(prompt) for prompt in request.prompts
        ]
        for fresh in generate_tokens(
            self.make_generate_function(),
            request,
            TOKENS_PER_DISPATCH,
            np.zeros(len(rows), "bool"),
        ):
            for row, tokens in zip(rows, fresh, strict=True):
                row.extend(tokens)
        width = max([width, *map(len, rows)])
        token_ids = np.zeros((len(rows), width), "int32")
        padding_mask = np.zeros((len(rows), width), "int32")
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def _request(
        self,
        prompts,
        *,
        max_length,
        max_new_tokens,
        stop_token_ids,
        truncation,
        seed,
        sampling,
    ):
        """Checks what was asked for and puts it in the form of a `Request`."""
        vocabulary_size = self.backbone.vocabulary_size
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(
                    f"Prompt {i} has no tokens. The model has no start "
                    "token, so it needs at least one to continue from."
                )
            if min(prompt) < 0 or max(prompt) >= vocabulary_size:
                raise ValueError(
                    f"Prompt {i} has token ids beyond the model's vocabulary "
                    f"of {vocabulary_size}. Use the tokenizer that belongs "
                    f"to the model. Received: {min(prompt)} to {max(prompt)}"
                )
        if max_length is not None and max_new_tokens is not None:
            raise ValueError(
                "Pass `max_length` or `max_new_tokens`, not both. Received: "
                f"max_length={max_length}, max_new_tokens={max_new_tokens}"
            )
        context = self.backbone.max_sequence_length
        if max_length is None and max_new_tokens is None:
            max_length = min(self.preprocessor.sequence_length, context)
        prompts, limits, longest = fit_to_context(
            [list(prompt) for prompt in prompts],
            context=context,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            truncation=truncation,
        )
        return Request(
            prompts,
            limits,
            longest,
            self._stop_token_ids(stop_token_ids),
            self._sampling_settings(sampling, seed, len(prompts)),
        )

    def _stop_token_ids(self, stop_token_ids):
        if stop_token_ids is None:
            return []
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            if self.preprocessor is None:
                raise ValueError(
                    "`stop_token_ids='auto'` is the tokenizer's end token, "
                    "and this model has `preprocessor=None`. Pass a list of "
                    "token ids, or `None` to go on until the length is "
                    "reached."
                )
            return [self.preprocessor.tokenizer.end_token_id]
        vocabulary_size = self.backbone.vocabulary_size
        ids = list(np.ravel(stop_token_ids))
        if not all(is_int(i) and 0 <= i < vocabulary_size for i in ids):
            raise ValueError(
                "`stop_token_ids` must be a list of ids out of the "
                f"vocabulary of {vocabulary_size} tokens. Received: "
                f"stop_token_ids={stop_token_ids!r}"
            )
        return [int(i) for i in ids]

    def _sampling_settings(self, sampling, seed, num_rows):
        sampler = self.sampler
        if not isinstance(sampler, BwETAFSampler):
            if sampling or seed is not None:
                raise ValueError(
                    "The compiled sampler is a class of its own, so its "
                    "settings can't be changed in a call. Received: "
                    f"{sorted(sampling) or 'seed'} for sampler={sampler}"
                )
            return None
        config = sampler.get_config()
        unknown = sorted(set(sampling) - set(config))
        if unknown:
            raise TypeError(
                f"Unknown arguments: {unknown}. Sampling can be changed by "
                f"{sorted(config)}."
            )
        sampler = BwETAFSampler(**{**config, **sampling})
        seed = sampler.seed if seed is None else seed
        return SamplingSettings.of(sampler, _seeds(seed, num_rows))


def _is_auto(value):
    return isinstance(value, str) and value == "auto"


def _check_accumulation(optimizer):
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


def _seeds(seed, num_rows):
    """One seed for each row."""
    if seed is None:
        return np.random.randint(2**32, size=num_rows, dtype="uint32")
    seeds = [seed] * num_rows if np.ndim(seed) == 0 else list(seed)
    if len(seeds) != num_rows:
        raise ValueError(
            f"`seed` must be an int or hold one for each of the {num_rows} "
            f"prompts. Received: seed={seed}"
        )
    return [checked_seed(value) for value in seeds]


def _seeds_of_batches(seed, batches):
    """The argument `seed` for each batch of prompts."""
    if np.ndim(seed) == 0:
        return [seed] * len(batches)
    sizes = [
        len(batch["token_ids"]) if isinstance(batch, dict) else np.size(batch)
        for batch in batches
    ]
    seeds = iter(_seeds(seed, sum(sizes)))
    return [list(itertools.islice(seeds, size)) for size in sizes]


def _concatenate(batches):
    """Joins the outputs of several batches, lists of str or dicts."""
    batches = list(batches)
    if not batches or isinstance(batches[0], list):
        return [text for batch in batches for text in batch]
    width = max(batch["token_ids"].shape[1] for batch in batches)
    return {
        name: np.concatenate(
            [
                np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1])))
                for batch in batches
            ]
        )
        for name in batches[0]
    }


def _remove_older_files(folder, keep_optimizer):
    """Removes what an earlier `save_to_preset` left, which would be loaded.

    KerasHub writes one file of weights or shards, and leaves the others.
    """
    single = folder / keras_folder.WEIGHTS
    index = folder / keras_folder.SHARDS
    if single.exists() and index.exists():
        newest = max(single, index, key=lambda path: path.stat().st_mtime_ns)
        shards = [index, *folder.glob("model_?????.weights.h5")]
        for path in shards if newest == single else [single]:
            path.unlink()
    if not keep_optimizer:
        (folder / keras_folder.OPTIMIZER).unlink(missing_ok=True)


def _as_texts(inputs):
    """A batch of prompts as a list of str."""
    if hasattr(inputs, "__array__"):
        inputs = [
            text.decode() if isinstance(text, bytes) else text
            for text in np.ravel(inputs).tolist()
        ]
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise ValueError(
            "Prompts must be a str or a list of at least one str. Received: "
            f"{inputs!r}"
        )
    for i, text in enumerate(inputs):
        if not isinstance(text, str):
            raise ValueError(
                f"Prompts must be strings. Received: {text!r} of type "
                f"{type(text).__name__} at index {i}"
            )
    return list(inputs)


def _as_stop_strings(stop_strings):
    if stop_strings is None:
        return []
    if isinstance(stop_strings, str):
        stop_strings = [stop_strings]
    if not isinstance(stop_strings, (list, tuple)) or not all(
        isinstance(stop, str) and stop for stop in stop_strings
    ):
        raise ValueError(
            "`stop_strings` must be a str or a list of str, none empty. "
            f"Received: stop_strings={stop_strings!r}"
        )
    return list(stop_strings)


def _as_prompts(inputs):
    """Token ids of each row without its padding, and the padded width."""
    if not isinstance(inputs, dict) or set(inputs) != {
        "token_ids",
        "padding_mask",
    }:
        raise ValueError(
            "Without a preprocessor, `generate` takes a dict with "
            f"'token_ids' and 'padding_mask'. Received: {inputs!r}"
        )
    token_ids = np.asarray(inputs["token_ids"])
    mask = np.asarray(inputs["padding_mask"]).astype("bool")
    if (
        token_ids.ndim != 2
        or token_ids.shape != mask.shape
        or not token_ids.size
    ):
        raise ValueError(
            "`token_ids` and `padding_mask` must have the same shape (batch, "
            f"length). Received: shapes {token_ids.shape} and {mask.shape}"
        )
    if np.any(mask[:, 1:] & ~mask[:, :-1]):
        raise ValueError(
            "`padding_mask` must be 1 for the prompt and 0 after it: pad on "
            "the right. Rows may have different lengths."
        )
    prompts = [
        row[:length].tolist()
        for row, length in zip(token_ids, mask.sum(axis=1), strict=True)
    ]
    return prompts, token_ids.shape[1]
