"""Which classes stand for an architecture.

A causal LM is registered, and names the others: its `backbone_cls` and
`preprocessor_cls`, and that one's `tokenizer_cls`.
"""

from typing import Any

from converters.architecture import Architecture

_CAUSAL_LMS: dict[str, type] = {}


def register(cls: type) -> type:
    """Registers a causal LM's class, a decorator."""
    _CAUSAL_LMS[cls.backbone_cls.architecture.model_type] = cls
    return cls


def causal_lm_class(architecture: Architecture) -> Any:
    """The causal LM's class of an architecture."""
    return _CAUSAL_LMS[architecture.model_type]


def class_for(cls: Any, architecture: Architecture) -> Any:
    """The class whose object `cls.from_preset` returns, as KerasHub's does.

    Args:
        cls: Class of a backbone, causal LM, preprocessor or tokenizer.
        architecture: `Architecture`, of the preset.

    Returns:
        `cls`, if it is of this architecture, or else the subclass that is.

    Raises:
        ValueError: If there is none.
    """
    backbone_cls = getattr(cls, "backbone_cls", cls)
    if getattr(backbone_cls, "architecture", None) is architecture:
        return cls
    causal_lm = causal_lm_class(architecture)
    others = (
        causal_lm.backbone_cls,
        causal_lm,
        causal_lm.preprocessor_cls,
        causal_lm.preprocessor_cls.tokenizer_cls,
    )
    for other in others:
        if issubclass(other, cls):
            return other
    raise ValueError(
        f"The preset is a {architecture.name} model, of the classes "
        f"{', '.join(each.__name__ for each in others)}: call the "
        "`from_preset` of one of them, or `keras_bwetaf.from_preset`. "
        f"Received: {cls.__name__}"
    )
