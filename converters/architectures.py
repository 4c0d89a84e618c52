"""The known architectures, and which of them a configuration is of.

A new one is a table of tensors and a configuration, as in `bwetaf_v3` and
`bwetaf_v3_config`, and an entry here.
"""

import os
from typing import Any

from converters.architecture import Architecture, Tensor
from converters.bwetaf_v2 import BWETAF_V2
from converters.bwetaf_v3 import BWETAF_V3
from converters.bwetaf_v4 import BWETAF_V4
from converters.errors import CheckpointError

# The first one that recognizes a configuration takes it. Version 3 comes
# last: it takes what no other does, and then says what is wrong with it.
ARCHITECTURES = (BWETAF_V4, BWETAF_V2, BWETAF_V3)
MODEL_TYPES = {
    each.model_type: each
    for each in sorted(ARCHITECTURES, key=lambda each: each.model_type)
}
KERAS_BACKBONES = {
    each.keras.backbone.registered_name: each for each in ARCHITECTURES
}


def architecture_of(
    config: dict[str, Any], *, source: str | os.PathLike = "config"
) -> Architecture:
    """The architecture of a canonical configuration.

    Args:
        config: dict.
        source: str or path. For messages.

    Returns:
        `Architecture`.

    Raises:
        CheckpointError: if its `model_type` is of none.
    """
    model_type = config.get("model_type")
    # A list, say, is no key.
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    raise CheckpointError(
        f"{source}: expected model_type "
        f"{' or '.join(map(repr, MODEL_TYPES))}. Received: {model_type!r:.80}"
    )


def architecture_of_flax(flax: dict[str, Any]) -> Architecture:
    """The architecture of a configuration of the original's.

    Args:
        flax: dict, the content of `understanding_good_stuff.json`.

    Returns:
        `Architecture`.
    """
    return next(each for each in ARCHITECTURES if each.recognizes_flax(flax))


def tensors(config: dict[str, Any]) -> list[Tensor]:
    """Lists the tensors of a model.

    Args:
        config: dict. A canonical configuration that `check_config` accepts.

    Returns:
        list of `Tensor`, the embedding first, then layer by layer.
    """
    return architecture_of(config).tensors(config)


def config_from_flax(
    flax: dict[str, Any],
    *,
    dtype: str = "float32",
    eos_token_id: int | None = None,
    source: str | os.PathLike = "Flax config",
) -> dict[str, Any]:
    """Converts the original's configuration to the canonical one.

    Args:
        flax: dict, the content of `understanding_good_stuff.json`. Keys
            that change nothing are left out.
        dtype: str. The weights'.
        eos_token_id: int. Defaults to that of models without a tokenizer.
        source: str or path. For messages.

    Returns:
        dict, the content of `config.json`.

    Raises:
        CheckpointError: if a value is missing or not accepted.
    """
    return architecture_of_flax(flax).config_from_flax(
        flax, dtype=dtype, eos_token_id=eos_token_id, source=source
    )


def config_to_flax(
    config: dict[str, Any], *, source: str | os.PathLike = "config"
) -> dict[str, Any]:
    """Converts the canonical configuration to the original's.

    Args:
        config: dict, a canonical configuration.
        source: str or path. For messages.

    Returns:
        dict, with the values that are the original's defaults.

    Raises:
        CheckpointError: if the original cannot express a value.
    """
    architecture = architecture_of(config, source=source)
    return architecture.config_to_flax(config, source=source)


def config_from_keras(
    keras: dict[str, Any],
    *,
    model_type: str = BWETAF_V3.model_type,
    dtype: str = "float32",
    eos_token_id: int | None = None,
    source: str | os.PathLike = "Keras config",
) -> dict[str, Any]:
    """Converts the configuration of a Keras backbone to the canonical one.

    Args:
        keras: dict with the keys that `config_to_keras` gives; others are
            left out.
        model_type: str. The architecture: `"bwetaf"`, that of a
            `BwETAFBackbone`, or another.
        dtype: str. The weights'.
        eos_token_id: int. Defaults to that of models without a tokenizer.
        source: str or path. For messages.

    Returns:
        dict, the content of `config.json`.

    Raises:
        CheckpointError: if a value is missing or not accepted.
    """
    architecture = architecture_of({"model_type": model_type}, source=source)
    return architecture.config_from_keras(
        keras, dtype=dtype, eos_token_id=eos_token_id, source=source
    )


def config_to_keras(
    config: dict[str, Any], *, source: str | os.PathLike = "config"
) -> dict[str, Any]:
    """Converts the canonical configuration to a Keras backbone's.

    Args:
        config: dict, a canonical configuration.
        source: str or path. For messages.

    Returns:
        dict, the arguments of the backbone.

    Raises:
        CheckpointError: if a value is missing or not accepted.
    """
    architecture = architecture_of(config, source=source)
    return architecture.config_to_keras(config, source=source)


def check_config(
    config: dict[str, Any], *, source: str | os.PathLike = "config"
) -> None:
    """Checks a canonical configuration.

    Args:
        config: dict. Keys that the model does not have are left alone.
        source: str or path. For messages.

    Raises:
        CheckpointError: that lists every value that is not accepted.
    """
    architecture_of(config, source=source).check_config(config, source=source)
