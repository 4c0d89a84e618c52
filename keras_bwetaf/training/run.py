"""A training run, all of it in one folder: `keras-bwetaf train`."""

import contextlib
import dataclasses
import itertools
import warnings
from pathlib import Path

import jax
import keras
import yaml

from converters.files import local_path, new_file
from keras_bwetaf import distribution, presets
from keras_bwetaf.data import load_packed, pack, read_documents
from keras_bwetaf.data.index import FILE_NAME, read_index
from keras_bwetaf.data.worker import VALIDATION
from keras_bwetaf.models import BwETAFBackbone, BwETAFCausalLM
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.tokenizer import BwETAFTokenizer, train_tokenizer
from keras_bwetaf.processes import in_first_process
from keras_bwetaf.training.checkpoints import TrainingCheckpoint
from keras_bwetaf.training.monitor import Monitor
from keras_bwetaf.training.recipe import recipe
from keras_bwetaf.training.settings import TrainingSettings, read_settings

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
PACKED = "packed"
MODEL = "model"
TOKENIZER = "tokenizer.json"
# A run may go on with others of these: they change nothing of the model.
CHANGEABLE = ("save_every", "keep_last", "on_damage")


def train(folder, **settings):
    """Trains a model, from text to a folder that `from_preset` loads.

    The folder gets the resolved settings (`config.yaml`), packed tokens
    (`packed`), checkpoints (`checkpoints`), statistics (`stats.json`), a plot
    of the losses (`losses.png`) and at the end the model (`model`). The same
    call again goes on where the last one stopped, exactly. Once the text is
    packed, it is not needed any longer, and settings may be left out.

    Several devices share each batch, unless a distribution is set. Of
    several processes, all must call it (see `initialize`).

    Args:
        folder: path. Of the run; it is created.
        **settings: Fields of `TrainingSettings`, of which `data` and `steps`
            have no default.

    Returns:
        The trained `BwETAFCausalLM`.

    Raises:
        ValueError: If settings are wrong, or not those of the run in the
            folder, of which a checkpoint is saved. `save_every`, `keep_last`
            and `on_damage` may be others.

    Example:

    ```python
    lm = keras_bwetaf.train(
        "runs/stories", data="stories/*.txt", preset="97m", steps=10_000
    )
    ```
    """
    folder = local_path("folder", folder)
    settings = _resolve(folder, settings)
    with _on_all_devices():
        return _train(folder, settings)


def _on_all_devices():
    """Data parallel on several devices, unless a distribution is set."""
    if keras.distribution.distribution() is None and jax.device_count() > 1:
        return distribution.data_parallel().scope()
    return contextlib.nullcontext()


def _train(folder, settings):
    epochs = _epochs(settings)
    keras.utils.set_random_seed(settings.seed)
    lm = _model(folder, settings)
    data = _packed(folder, settings, lm.preprocessor.tokenizer)
    options = {
        "sequence_length": settings.sequence_length
        or lm.backbone.max_sequence_length,
        "batch_size": settings.batch_size,
        "tokenizer": lm.preprocessor.tokenizer,
        "seed": settings.seed,
    }
    batches = load_packed(data, **options)
    validation = _validation(data, settings, options)
    lm.compile(
        recipe(
            **{"name": "97m", **settings.recipe}, total_steps=settings.steps
        ),
        remat=settings.remat,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
    )
    callbacks = [
        Monitor(folder, total_steps=settings.steps),
        TrainingCheckpoint(
            folder / CHECKPOINTS,
            save_every=settings.save_every,
            keep_last=settings.keep_last,
            on_damage=settings.on_damage,
        ),
    ]
    in_first_process(_keep, folder, settings)
    lm.fit(
        batches,
        steps_per_epoch=settings.steps // epochs,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        **validation,
    )
    if settings.lora_rank:
        lm.backbone.merge_lora()
    lm.save_to_preset(folder / MODEL)
    return lm


def _resolve(folder, settings):
    """Settings of a run, which are kept in its folder once it has begun."""
    saved = _kept(folder)
    if saved is None:
        missing = [name for name in ("data", "steps") if name not in settings]
        if missing:
            raise ValueError(
                "A new run needs the settings `data` and `steps`. Received: "
                f"{sorted(settings)}"
            )
        return TrainingSettings(**settings)
    wanted = dataclasses.replace(saved, **settings)
    differences = [
        f"{name}: {getattr(saved, name)!r} in the run"
        for name in _differences(saved, wanted)
    ]
    if differences and any((folder / CHECKPOINTS).glob("[0-9]*")):
        raise ValueError(
            f"{folder}: a run goes on with the settings that it began with. "
            "Leave them out, or choose another folder. Received others:\n"
            + "\n".join(differences)
        )
    return wanted


def _kept(folder):
    """The settings in the folder of a run, or None."""
    path = folder / CONFIG
    return TrainingSettings(**read_settings(path)) if path.is_file() else None


def _differences(saved, wanted):
    """Names of settings with which another model would be trained."""
    return [
        field.name
        for field in dataclasses.fields(TrainingSettings)
        if field.name not in CHANGEABLE
        and getattr(saved, field.name) != getattr(wanted, field.name)
    ]


def _has_begun(folder, settings):
    """Whether the folder has the tokenizer and tokens for these settings."""
    saved = _kept(folder)
    return saved is not None and not _differences(saved, settings)


def _keep(folder, settings):
    """Writes the settings, once tokens are packed and all can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / CONFIG) as file:
        content = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)
        file.write(content.encode())


def _epochs(settings):
    """How often the model is evaluated; `fit` has epochs of equal length."""
    steps, validate_every = settings.steps, settings.validate_every
    if validate_every is None:
        epochs = max(n for n in range(1, 21) if steps % n == 0)
        if epochs < min(steps, 5):
            warnings.warn(
                f"{steps} steps divide into {epochs} equal parts, after each "
                "of which the model is evaluated; a multiple of 20 divides "
                f"into 20. Received: steps={steps}",
                stacklevel=4,
            )
        return epochs
    if validate_every < 1 or steps % validate_every:
        raise ValueError(
            "`steps` must be a multiple of `validate_every`. Received: "
            f"steps={steps}, validate_every={validate_every}"
        )
    return steps // validate_every


def _model(folder, settings):
    """The model to train, with its tokenizer."""
    if not (settings.from_scratch or settings.vocabulary_size):
        lm = presets.from_preset(
            settings.preset, dtype=settings.dtype, **settings.model
        )
    else:
        lm = _new_model(folder, settings)
    if settings.lora_rank:
        lm.backbone.enable_lora(settings.lora_rank)
    return lm


def _new_model(folder, settings):
    """A model with random weights, and perhaps a tokenizer of its own."""
    tokenizer, changes = _tokenizer(folder, settings), {}
    if settings.vocabulary_size:
        changes = {"vocabulary_size": tokenizer.vocabulary_size()}
    config = presets.load_config(settings.preset)
    # Only published weights need angles that are rounded as activations are.
    exact = {"rope_dtype": "float32"}
    backbone = BwETAFBackbone(
        **{**config, **exact, **settings.model, **changes},
        dtype=settings.dtype,
    )
    preprocessor = BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=backbone.max_sequence_length
    )
    return BwETAFCausalLM(backbone, preprocessor)


def _tokenizer(folder, settings):
    """The preset's tokenizer, or one that is trained once, on the text."""
    if not settings.vocabulary_size:
        return BwETAFTokenizer.from_preset(settings.preset)
    path = folder / TOKENIZER
    if not _has_begun(folder, settings):
        if not _is_text(settings.data):
            raise ValueError(
                "`vocabulary_size` trains a tokenizer on text, but the data "
                "are tokens already. Leave it out. Received: "
                f"vocabulary_size={settings.vocabulary_size}, "
                f"data={settings.data!r}"
            )
        in_first_process(_train_tokenizer, path, settings)
    return BwETAFTokenizer(str(path))


def _train_tokenizer(path, settings):
    texts = read_documents(
        settings.data, column=settings.text_column, errors=settings.errors
    )
    tokenizer = train_tokenizer(
        texts, settings.vocabulary_size, show_progress=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(tokenizer.content)


def _packed(folder, settings, tokenizer):
    """What `load_packed` takes: the data, or text that is packed once."""
    data = settings.data
    if isinstance(data, list):  # A file of settings has no tuples and None.
        return [(stage[0], *(stage[1:] or [None])) for stage in data]
    if not _is_text(data):
        return data
    if not _has_begun(folder, settings):
        pack(
            data,
            folder / PACKED,
            tokenizer,
            column=settings.text_column,
            errors=settings.errors,
            validation_fraction=settings.validation_fraction,
            max_tokens=settings.max_tokens,
        )
    return folder / PACKED


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
