"""Layers that are arguments of another layer, in its configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras


def serialized_parts(
    layer: keras.layers.Layer, names: Sequence[str]
) -> dict[str, Any]:
    """Configurations of the layers, or None, in attributes of a layer."""
    parts = {name: getattr(layer, name) for name in names}
    return {
        name: part and keras.layers.serialize(part)
        for name, part in parts.items()
    }


def with_parts(
    config: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """A layer's configuration, in which these parts are layers again."""
    config = dict(config)
    for name in names:
        if config[name] is None:
            continue
        serialized = dict(config[name])
        # The layer that has the parts builds them, under its own path.
        serialized.pop("build_config", None)
        config[name] = keras.layers.deserialize(serialized)
    return config
