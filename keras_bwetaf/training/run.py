"""A training run, all of it in one folder: `keras-bwetaf train`."""

import dataclasses
import itertools
from pathlib import Path

import keras
import yaml

from converters.files import new_file
from keras_bwetaf import presets
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


def train(folder, **settings):
    """Trains a model, from text to a folder that `from_preset` loads.

    The folder gets the resolved settings (`config.yaml`), packed tokens
    (`packed`), checkpoints (`checkpoints`), statistics (`stats.json`), a plot
    of the losses (`losses.png`) and at the end the model (`model`). The same
    call again, or one without settings, goes on where the last one stopped,
    exactly. Of several processes, all must call it (see `initialize`).

    Args:
        folder: path. Of the run; it is created.
        **settings: Fields of `TrainingSettings`, of which `data` and `steps`
            have no default. May be left out for a run that has begun.

    Returns:
        The trained `BwETAFCausalLM`.

    Raises:
        ValueError: If settings are wrong, or not those of the run in the
            folder.

    Example:

    ```python
    lm = keras_bwetaf.train(
        "runs/stories", data="stories/*.txt", preset="97m", steps=10_000
    )
    ```
    """
    folder = Path(folder)
    settings = _resolve(folder, settings)
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
    lm.compile(
        recipe("97m", total_steps=settings.steps, **settings.recipe),
        remat=settings.remat,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
    )
    in_first_process(_keep, folder, settings)
    lm.fit(
        load_packed(data, **options),
        steps_per_epoch=settings.steps // epochs,
        epochs=epochs,
        verbose=0,
        callbacks=[
            Monitor(folder, total_steps=settings.steps),
            TrainingCheckpoint(
                folder / CHECKPOINTS,
                save_every=settings.save_every,
                keep_last=settings.keep_last,
            ),
        ],
        **_validation(data, settings, options),
    )
    if settings.lora_rank:
        lm.backbone.merge_lora()
    lm.save_to_preset(folder / MODEL)
    return lm


def _resolve(folder, settings):
    """Settings of a run, which are kept in its folder once it has begun."""
    if not _has_begun(folder):
        missing = [name for name in ("data", "steps") if name not in settings]
        if missing:
            raise ValueError(
                "A new run needs the settings `data` and `steps`. Received: "
                f"{sorted(settings)}"
            )
        return TrainingSettings(**settings)
    saved = TrainingSettings(**read_settings(folder / CONFIG))
    wanted = dataclasses.replace(saved, **settings)
    differences = [
        f"{name}: {getattr(saved, name)!r} in the run"
        for name in settings
        if getattr(saved, name) != getattr(wanted, name)
    ]
    if differences:
        raise ValueError(
            f"{folder}: a run goes on with the settings that it began with. "
            "Leave them out, or choose another folder. Received others:\n"
            + "\n".join(differences)
        )
    return saved


def _has_begun(folder):
    return (folder / CONFIG).is_file()


def _keep(folder, settings):
    """Writes the settings, now that they are known to be sound."""
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / CONFIG) as file:
        content = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)
        file.write(content.encode())


def _epochs(settings):
    """How often the model is evaluated; `fit` has epochs of equal length."""
    steps, validate_every = settings.steps, settings.validate_every
    if validate_every is None:
        return max(n for n in range(1, 21) if steps % n == 0)
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
    backbone = BwETAFBackbone(
        **{**config, **settings.model, **changes}, dtype=settings.dtype
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
    if not _has_begun(folder):
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
    texts = read_documents(settings.data, column=settings.text_column)
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
    pack(
        data,
        folder / PACKED,
        tokenizer,
        column=settings.text_column,
        validation_fraction=settings.validation_fraction,
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
    if not all(_has_validation(part) for part in parts):
        return {}
    batches = load_packed(last, **options, split=VALIDATION, shuffle=False)
    # Keras asks how many there are, which Grain does not know.
    count = sum(
        1 for _ in itertools.islice(batches, settings.validation_batches)
    )
    return {"validation_data": batches, "validation_steps": count}


def _has_validation(path):
    return _is_packed(path) and any(
        VALIDATION in shard["splits"] for shard in read_index(path)["shards"]
    )
