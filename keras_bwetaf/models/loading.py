"""The files of a preset -> the parts of a model."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import keras_hub

from converters import keras_folder
from converters.files import read_json
from keras_bwetaf._later import stand_ins
from keras_bwetaf.exchange.weights import assign, check_changes
from keras_bwetaf.layers.initializers import skip_initialization


def is_left_to_keras_hub(cls, preset):
    """Whether a class of the user's is to be loaded as KerasHub saved it.

    Args:
        cls: Class of a backbone or a causal LM.
        preset: str or path.
    """
    if cls.__module__.partition(".")[0] == "keras_bwetaf":
        return False
    path = Path(preset) / keras_folder.CONFIG
    return path.is_file() and "registered_name" in read_json(path)


def load_backbone(cls, files, load_weights, dtype, changes):
    """The backbone of a preset.

    Args:
        cls: The backbone's class.
        files: `PresetFiles`.
        load_weights: bool. `False` starts from random weights.
        dtype: str, `keras.DTypePolicy` or None.
        changes: dict. Changes to its configuration.

    Returns:
        A `cls`.

    Raises:
        ValueError: If the files are damaged, or the changes do not fit the
            weights.
    """
    skipped = skip_initialization if load_weights else contextlib.nullcontext
    if files.layout is not None and files.layout.name == "keras":
        with skipped():
            return _keras_backbone(cls, files, load_weights, dtype, changes)
    with skipped():
        backbone = cls(**{**files.config, **changes}, dtype=dtype)
    if load_weights:
        assign(backbone, files.folder)
    return backbone


def _keras_backbone(cls, files, load_weights, dtype, changes):
    """A backbone that `save_to_preset` saved."""
    own_dtypes = _own_dtypes(files.config)
    if load_weights:
        if own_dtypes and dtype is not None:
            raise ValueError(
                "The weights are quantized and keep their dtypes. Leave out "
                "`dtype`, or pass load_weights=False. Received: "
                f"dtype={dtype!r}"
            )
        check_changes(files.architecture, files.config, changes)
    return _from_keras(
        keras_hub.models.Backbone,
        cls,
        files,
        load_weights=load_weights,
        dtype=own_dtypes if dtype is None else dtype,
        **changes,
    )


def load_preprocessor(cls, files, **options):
    """The preprocessor of a preset that has a tokenizer.

    Args:
        cls: The preprocessor's class.
        files: `PresetFiles`.
        **options: Arguments of the preprocessor.

    Returns:
        A `cls`.

    Raises:
        As `load_tokenizer`.
    """
    _check_tokenizer(files)
    if (
        files.folder is None
        or not (files.folder / keras_folder.PREPROCESSOR).is_file()
    ):
        length = {"sequence_length": files.config["max_sequence_length"]}
        options = {**length, **options}
    if files.layout is not None and files.layout.name == "keras":
        files.layout.read_documents(files.folder)
        return _from_keras(
            keras_hub.models.CausalLMPreprocessor, cls, files, **options
        )
    return cls(load_tokenizer(cls.tokenizer_cls, files), **options)


def load_tokenizer(cls, files, **options):
    """The tokenizer of a preset that has one.

    Args:
        cls: The tokenizer's class.
        files: `PresetFiles`.
        **options: Arguments of the tokenizer.

    Returns:
        A `cls`.

    Raises:
        ValueError: If there is no tokenizer, or its files are damaged.
        ConnectionError: If the tokenizer has to be downloaded first.
    """
    _check_tokenizer(files)
    if files.folder is None:
        known = files.known_tokenizer
        content, special = known.content, known.special_tokens
    elif files.layout.name == "keras":
        files.layout.read_documents(files.folder)
        return _from_keras(
            keras_hub.tokenizers.Tokenizer, cls, files, **options
        )
    else:
        content = files.layout.read_tokenizer(files.folder)
        special = files.layout.special_tokens(
            files.folder, files.layout.read_documents(files.folder), content
        )
        if files.tokenizer.is_file():
            content = str(files.tokenizer)
    names = {"end_token": "eos_token", "unk_token": "unk_token"}
    given = {
        argument: special[name]
        for argument, name in names.items()
        if isinstance(special[name], str)
    }
    return cls(content, **{**given, **options})


def _check_tokenizer(files):
    if files.folder is None and files.no_tokenizer:
        raise ConnectionError(files.no_tokenizer)
    if files.no_tokenizer:
        raise ValueError(
            f"{files.folder}: the model has no tokenizer. {files.no_tokenizer} "
            "Put the file there, or pass another preset."
        )


def warn_of_no_tokenizer(preset, reason):
    """Says why a model has no preprocessor."""
    warnings.warn(
        f"The model has no preprocessor, because its tokenizer is not at "
        f"hand. {reason} Received: preset={os.fspath(preset)!r}",
        UserWarning,
        stacklevel=_level_of_caller(),
    )


def _level_of_caller():
    """`stacklevel` of the code outside of the package, for whoever calls this.

    There is more than one way in: `keras_bwetaf.from_preset`, and the classes'.
    """
    package = __name__.partition(".")[0] + "."
    frame, level = sys._getframe(1), 1
    while frame.f_globals["__name__"].startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def _from_keras(base, cls, files, **arguments):
    """Calls KerasHub's own `from_preset`, which `cls` overrides.

    Raises:
        ValueError: That names the folder where Keras stumbles over what it
            holds.
    """
    try:
        # KerasHub would ask TensorFlow about the folder.
        with stand_ins("keras_hub"):
            return base.from_preset.__func__(
                cls, str(files.folder), **arguments
            )
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            f"{files.folder}: Keras cannot load it. Export it again, or pass "
            f"another folder. Received: {type(error).__name__}: {error}"
        ) from error


def _own_dtypes(config):
    """The dtypes of a quantized model; None if it is all of one float."""
    dtype = config.get("dtype")
    if isinstance(dtype, dict) and dtype.get("class_name") != "DTypePolicy":
        return dtype
    return None
