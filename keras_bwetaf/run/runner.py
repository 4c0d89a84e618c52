"""A training run, all of it in one folder: `keras-bwetaf train`."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Unpack

import jax
import keras

from converters.files import local_path, new_file, read_json_or_none
from keras_bwetaf import distribution, preset_files, presets
from keras_bwetaf.arguments import PathLike, TrainingOptions
from keras_bwetaf.data import load_packed, pack, read_documents
from keras_bwetaf.data.index import FILE_NAME, read_index
from keras_bwetaf.data.packing import clear
from keras_bwetaf.data.worker import VALIDATION
from keras_bwetaf.evaluation import perplexity
from keras_bwetaf.exchange.weights import check_changes
from keras_bwetaf.hardware import device
from keras_bwetaf.layers.sharding import num_row_groups
from keras_bwetaf.models.decoder_lm import CausalLM
from keras_bwetaf.models.registry import causal_lm_class
from keras_bwetaf.models.tokenizer import (
    SPECIAL_TOKENS,
    BwETAFTokenizer,
    train_tokenizer,
)
from keras_bwetaf.optional import import_optional
from keras_bwetaf.processes import (
    are_several,
    in_first_process,
    is_first_process,
)
from keras_bwetaf.run.folder import (
    CHECKPOINTS,
    LAST_MODEL,
    MODEL,
    PACKED,
    PREPARATION,
    TOKENIZER,
    finished,
    how_to_go_on,
    keep,
    keep_result,
    kept,
    resolve,
)
from keras_bwetaf.training.checkpoints import TrainingCheckpoint
from keras_bwetaf.training.monitor import Monitor
from keras_bwetaf.training.recipes import RECIPES, recipe
from keras_bwetaf.training.samples import Samples
from keras_bwetaf.training.statistics import add_evaluation

# Shares to hold out, of documents and of the only one.
HELD_OUT, HELD_OUT_OF_ONE = 0.01, 0.1
TENSORBOARD = "tensorboard"
# Rows of a step where nothing is known of the device.
BATCH_SIZE = 16


def train(folder: PathLike, **settings: Unpack[TrainingOptions]) -> CausalLM:
    """Trains a model, from text to a folder that `from_preset` loads.

    The folder gets the resolved settings (`config.yaml`), packed tokens
    (`packed`), checkpoints (`checkpoints`), statistics (`stats.json`, with the
    bits per byte of what was held out), a plot of the losses (`losses.png`)
    and at the end two models: `model`, the one with the lowest validation
    loss, and `model-last`. Without a validation, `model` is the last.
    `from_preset(folder)` finds `model`.

    The same call again goes on where the last one stopped, exactly. Once the
    text is packed, it is not needed any longer, and settings may be left out.
    A finished run says so and trains nothing. With more `steps`, it goes on,
    and is evaluated as often as before; its learning rate is from there on
    that of so long a run, and so rises at first. Ctrl-C saves a checkpoint.

    Of text in a single file, the end is held out for validation, and of
    several documents, some are.

    Several devices share each batch, unless a distribution is set. Of
    several processes, all must call it (see `initialize`). Without a batch
    size, it is what `distribution.recommend` says for these devices, with its
    `remat` and its parts, where those aren't given either; or 16 rows, if the
    devices are not known.

    Args:
        folder: path. Of the run; it is created.
        **settings: Fields of `TrainingSettings`, of which `data` and `steps`
            have no default.

    Returns:
        The model in `model`, such as a `BwETAFCausalLM`.

    Raises:
        ValueError: If settings are wrong, or not those of the run in the
            folder, of which a checkpoint is saved. `steps` may be more;
            `save_every`, `keep_last`, `on_damage`, `sample` and `tensorboard`
            may be others.
        TypeError: If there is no such setting, or no such name in `model`.
        OSError: If files can't be read or written.

    Example:

    ```python
    lm = keras_bwetaf.train(
        "runs/stories", data="stories/*.txt", preset="97m", steps=10_000
    )
    ```
    """
    folder = local_path("folder", folder)
    settings = resolve(folder, settings)
    if message := finished(folder, settings):
        _say(message)
        return presets.from_preset(folder / MODEL, dtype=settings.dtype)
    try:
        config = _config(settings)
        with _on_all_devices(settings, config):
            lm = _train(folder, settings, config)
    except (KeyboardInterrupt, SystemExit):
        _say(f"\n{how_to_go_on(folder)}")
        raise
    _say(finished(folder, settings))
    return lm


def _say(text):
    if is_first_process():
        print(text, flush=True)


def _on_all_devices(settings, config):
    """Data parallel on several devices, unless a distribution is set.

    Fully sharded if a device has no room for all of the optimizer's state.
    """
    num_devices = jax.device_count()
    if keras.distribution.distribution() or num_devices == 1:
        return contextlib.nullcontext()
    strategy = "data_parallel"
    # Of devices that are not known, or are too small, it says nothing.
    with contextlib.suppress(ValueError):
        strategy = _recommended(settings, config, num_devices).strategy
    return getattr(distribution, strategy)().scope()


def _train(folder, settings, config):
    # What can be wrong is found out before what takes long.
    epochs = _epochs(settings)
    optimizer = recipe(
        **{"name": _card(settings.preset), **settings.recipe},
        total_steps=settings.steps,
    )
    settings = _with_batch_size(settings, config)
    _check_batch_size(settings)
    callbacks = _callbacks(folder, settings)
    tokenizer, data = _tokenizer_and_data(folder, settings)
    options = {
        "sequence_length": settings.sequence_length
        or config["max_sequence_length"],
        "batch_size": settings.batch_size,
        "tokenizer": tokenizer,
        "vocabulary_size": config["vocabulary_size"],
        "seed": settings.seed,
    }
    batches = load_packed(data, **options)
    validation = _validation(data, settings, options)
    _say("Building the model.")
    keras.utils.set_random_seed(settings.seed)
    lm = _model(settings, config, tokenizer)
    lm.compile(
        optimizer,
        remat=settings.remat,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
    )
    in_first_process(keep, folder, settings)
    history = lm.fit(
        batches,
        steps_per_epoch=settings.steps // epochs,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        **validation,
    )
    _say("Saving the model.")
    losses = history.history.get("val_loss", [])
    models = _save_models(folder, lm, callbacks[-1], settings.steps, losses)
    if validation:
        _evaluate(folder, lm, **validation)
    if settings.lora_rank:
        lm.backbone.merge_lora()
    in_first_process(keep_result, folder, settings.steps, models)
    return lm


def _card(preset):
    """The recipe of a preset's card, or that of the first card."""
    return preset if preset in RECIPES else "97m"


def _callbacks(folder, settings):
    """The callbacks of `fit`, of which the last is the checkpoint."""
    for package in ("grain", "orbax.checkpoint"):
        import_optional(package, "train", "`train`")
    monitor = Monitor(folder, total_steps=settings.steps)
    callbacks = [_Announcement(settings.steps), monitor]
    log_dir = folder / TENSORBOARD if settings.tensorboard else None
    if settings.sample:
        samples = Samples(
            settings.sample,
            monitor=monitor,
            log_dir=log_dir and log_dir / "samples",
        )
        callbacks.insert(0, samples)
    if settings.tensorboard:
        import_optional("tensorboard", "train", "`tensorboard`")
        callbacks.append(
            keras.callbacks.TensorBoard(str(log_dir), write_graph=False)
        )
    return [
        *callbacks,
        TrainingCheckpoint(
            folder / CHECKPOINTS,
            save_every=settings.save_every,
            keep_last=settings.keep_last,
            on_damage=settings.on_damage,
        ),
    ]


class _Announcement(keras.callbacks.Callback):
    """Says what happens until the first step is done."""

    def __init__(self, total_steps):
        super().__init__()
        self.total_steps = total_steps

    def on_train_begin(self, logs=None):
        step = int(self.model.optimizer.iterations)
        if step:
            _say(f"Going on after step {step:,} of {self.total_steps:,}.")
        _say("Compiling the first step, which may take a minute.")


def _save_models(folder, lm, checkpoint, steps, losses):
    """Saves the last model, and the best if there were validations.

    Args:
        folder: Path.
        lm: `CausalLM`, the last. It becomes the best.
        checkpoint: `TrainingCheckpoint`.
        steps: int.
        losses: list of float, of the validations.

    Returns:
        dict of names of folders to dicts of `"step"` and `"val_loss"`.
    """
    last = {"step": steps, "val_loss": losses[-1] if losses else None}
    if not any(map(math.isfinite, losses)):
        lm.save_to_preset(folder / MODEL)
        return {MODEL: last}
    lm.save_to_preset(folder / LAST_MODEL)
    best = checkpoint.restore(lm, "best")
    lm.save_to_preset(folder / MODEL)
    best = {"step": best["step"], "val_loss": best["logs"]["val_loss"]}
    return {MODEL: best, LAST_MODEL: last}


def _evaluate(folder, lm, validation_data, validation_steps):
    """Says, and keeps, how well `model` predicts what was held out."""
    if are_several():  # Each of which has only its own rows.
        _say("Several processes do not evaluate; keras-bwetaf eval does.")
        return
    _say("Evaluating the model.")
    batches = itertools.islice(validation_data, validation_steps)
    result = perplexity(lm, batches, batch_size=1)
    _say(str(result))
    add_evaluation(folder, result.summary())


def _epochs(settings):
    """How often the model is evaluated; `fit` has epochs of equal length."""
    steps, epochs = settings.steps, settings.epochs
    if settings.validate_every is None and epochs < min(steps, 5):
        warnings.warn(
            f"{steps} steps divide into {epochs} equal parts, after each "
            "of which the model is evaluated; a multiple of 20 divides "
            f"into 20. Received: steps={steps}",
            stacklevel=4,
        )
    return epochs


# What the model is.


def _is_new(settings):
    return settings.from_scratch or bool(settings.vocabulary_size)


def _class(settings):
    """The class of the causal LM."""
    architecture, _ = preset_files.load_architecture(settings.preset)
    return causal_lm_class(architecture)


def _config(settings):
    """The model's configuration, checked.

    Raises:
        ValueError: If it is wrong, or the preset's weights do not fit it.
        TypeError: If there is an unknown name in it.
    """
    architecture, saved = preset_files.load_architecture(settings.preset)
    backbone_cls = causal_lm_class(architecture).backbone_cls
    backbone_cls.check_keywords("`model`", settings.model)
    saved = {
        name: saved[name]
        for name in backbone_cls.config_names()
        if name in saved
    }
    if _is_new(settings):
        # Only published weights need angles that are rounded as activations
        # are: new ones get the constructor's default.
        saved.pop("rope_dtype", None)
    config = {**saved, **settings.model}
    if not _is_new(settings):
        backbone_cls.checked_config(**config)
        check_changes(architecture, saved, settings.model)
        return config
    if settings.vocabulary_size:
        config["vocabulary_size"] = settings.vocabulary_size
    backbone_cls.checked_config(**config)
    return config


def _model(settings, config, tokenizer):
    """The model to train, with its tokenizer."""
    if not _is_new(settings):
        lm = presets.from_preset(
            settings.preset, dtype=settings.dtype, **settings.model
        )
    else:
        if settings.vocabulary_size:  # Or fewer, if the text has no more.
            size = tokenizer.vocabulary_size()
            config = {**config, "vocabulary_size": size}
        cls = _class(settings)
        backbone = cls.backbone_cls(**config, dtype=settings.dtype)
        preprocessor = cls.preprocessor_cls(
            tokenizer, sequence_length=backbone.max_sequence_length
        )
        lm = cls(backbone, preprocessor)
    if settings.lora_rank:
        lm.backbone.enable_lora(settings.lora_rank)
    return lm


# What it is trained on.


def _with_batch_size(settings, config):
    """Settings with a batch size, and with what goes with a recommended one."""
    if settings.batch_size is not None:
        return settings
    if device(jax.devices()[0].device_kind) is None:
        return dataclasses.replace(settings, batch_size=BATCH_SIZE)
    recommended = _recommended(settings, config, num_row_groups())
    _say(f"Without a given batch size, settings for\n{recommended}")
    changes = {"batch_size": recommended.batch_size}
    if settings.remat == "none":
        changes["remat"] = recommended.remat
    if settings.gradient_accumulation_steps == 1:
        changes["gradient_accumulation_steps"] = (
            recommended.gradient_accumulation_steps
        )
    return dataclasses.replace(settings, **changes)


def _recommended(settings, config, num_devices):
    return distribution.recommend(
        config,
        dtype=settings.dtype,
        sequence_length=settings.sequence_length,
        num_devices=num_devices,
    )


def _check_batch_size(settings):
    groups = num_row_groups()
    if settings.batch_size % groups:
        raise ValueError(
            f"`batch_size` must be a multiple of {groups}, among as many "
            "devices, or groups of them, its rows are split. Received: "
            f"batch_size={settings.batch_size}"
        )


def _tokenizer_and_data(folder, settings):
    """The tokenizer, and what `load_packed` takes: text is packed once."""
    data = settings.data
    if not _is_text(data):
        if settings.vocabulary_size:
            raise ValueError(
                "`vocabulary_size` trains a tokenizer on text, but the data "
                "are tokens already. Leave it out. Received: "
                f"vocabulary_size={settings.vocabulary_size}, data={data!r}"
            )
        if isinstance(data, list):  # A file of settings has no tuples, None.
            data = [(stage[0], *(stage[1:] or [None])) for stage in data]
        return BwETAFTokenizer.from_preset(settings.preset), data
    is_packed = _is_prepared(folder, settings)
    fraction = None
    if not is_packed:
        fraction = in_first_process(_prepare, folder, settings)
    if not settings.vocabulary_size:
        tokenizer = BwETAFTokenizer.from_preset(settings.preset)
    else:
        tokenizer = _class(settings).preprocessor_cls.tokenizer_cls(
            str(folder / TOKENIZER), *SPECIAL_TOKENS
        )
    if not is_packed:
        _say(f"Packing {data} into tokens.")
        pack(
            data,
            folder / PACKED,
            tokenizer,
            column=settings.text_column,
            errors=settings.errors,
            validation_fraction=fraction or 0.0,
            max_tokens=settings.max_tokens,
        )
    return tokenizer, folder / PACKED


def _of_text(settings):
    """The settings with which a tokenizer and tokens are made, a dict."""
    size = settings.vocabulary_size
    return {
        "tokenizer": settings.preset if size is None else size,
        "data": settings.data,
        "text_column": settings.text_column,
        "errors": settings.errors,
        "validation_fraction": settings.validation_fraction,
        "max_tokens": settings.max_tokens,
    }


def _is_prepared(folder, settings):
    """Whether the folder has the tokenizer and tokens for these settings."""
    saved = kept(folder)
    return saved is not None and _of_text(saved) == _of_text(settings)


def _prepare(folder, settings):
    """Trains a tokenizer, if one is wanted that is not there.

    What an earlier call left is kept only if it was made of the same text
    with the same settings.

    Returns:
        float, the share to hold out.
    """
    documents = read_documents(
        settings.data, column=settings.text_column, errors=settings.errors
    )
    source = dict(documents.description)
    source.pop("commit", None)  # In which the same files were found.
    made_of = json.dumps([source, _of_text(settings)], sort_keys=True)
    record = {"sha256": hashlib.sha256(made_of.encode()).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    if read_json_or_none(folder / PREPARATION) != record:
        (folder / TOKENIZER).unlink(missing_ok=True)
        clear(folder / PACKED)
        with new_file(folder / PREPARATION) as file:
            file.write(json.dumps(record).encode() + b"\n")
    if settings.vocabulary_size and not (folder / TOKENIZER).is_file():
        size = settings.vocabulary_size
        _say(f"Training a tokenizer of up to {size:,} tokens.")
        tokenizer = train_tokenizer(documents, size)
        with new_file(folder / TOKENIZER) as file:
            file.write(tokenizer.content)
    if settings.validation_fraction is not None:
        return settings.validation_fraction
    return HELD_OUT_OF_ONE if documents.num_documents == 1 else HELD_OUT


def _is_text(data):
    is_tokens = not isinstance(data, str) or data.endswith(".npy")
    return not (is_tokens or _is_packed(data))


def _is_packed(path):
    return (Path(path) / FILE_NAME).is_file()


def _validation(data, settings, options):
    """What was held out; of stages, the last one's.

    Returns:
        dict of arguments of `fit`, without any if nothing was held out.
    """
    last = data[-1][0] if isinstance(data, list) else data
    parts = last if isinstance(last, dict) else [last]
    sequence_length = options["sequence_length"]
    for part in parts:
        num_tokens = _num_held_out(part)
        if num_tokens < sequence_length:
            if num_tokens:
                warnings.warn(
                    f"{part}: no validation, since fewer tokens are held out "
                    f"than a row of {sequence_length} has. Hold out a larger "
                    f"share of the documents. Received: {num_tokens} tokens",
                    stacklevel=4,
                )
            return {}
    batches = load_packed(last, **options, split=VALIDATION, shuffle=False)
    # Keras asks how many there are, which Grain does not know.
    count = sum(
        1 for _ in itertools.islice(batches, settings.validation_batches)
    )
    return {"validation_data": batches, "validation_steps": count}


def _num_held_out(path):
    """Tokens for validation."""
    if not _is_packed(path):
        return 0
    return sum(
        shard["splits"].get(VALIDATION, {"tokens": 0})["tokens"]
        for shard in read_index(path)["shards"]
    )
