"""What a training run is made with: one definition for files and flags."""

import dataclasses
import json
import os
import tomllib
import types
import typing
from pathlib import Path

import yaml


def _setting(*default, help):
    """A field with what the command line says about it."""
    metadata = {"help": help}
    if default == ({},):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    if default:
        return dataclasses.field(default=default[0], metadata=metadata)
    return dataclasses.field(metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of `train`; `keras-bwetaf train --help` explains them.

    Raises:
        ValueError: If a setting is of another type than it should be.
    """

    data: str | dict | list = _setting(
        help="Text: a name, files, hf://datasets/... or tfds:NAME. Or what "
        "`keras-bwetaf pack` wrote, or .npy files; in a file of settings "
        "also a mixture {FOLDER: WEIGHT}, or stages [[FOLDER, ROWS], ...]."
    )
    steps: int = _setting(help="Optimizer steps of the whole training.")
    preset: str = _setting(
        "97m", help="The model: a name, hf://owner/repo, or a folder."
    )
    from_scratch: bool = _setting(
        False, help="Start from random weights instead of the preset's."
    )
    model: dict = _setting(
        {}, help="Changes to the model's configuration, such as num_layers=4."
    )
    vocabulary_size: int | None = _setting(
        None, help="Train a tokenizer of this size on the text."
    )
    lora_rank: int | None = _setting(
        None, help="Train LoRA matrices of this rank instead of all weights."
    )
    sequence_length: int | None = _setting(
        None, help="Tokens in a row; as many as the model sees if not given."
    )
    batch_size: int = _setting(16, help="Rows in a step.")
    gradient_accumulation_steps: int = _setting(
        1, help="Parts in which a batch is worked on, to save memory."
    )
    remat: str = _setting(
        "none",
        help="What to compute twice, to save memory: none, attention, block, "
        "full.",
    )
    dtype: str = _setting(
        "float32", help="float32, bfloat16 or mixed_bfloat16."
    )
    recipe: dict = _setting(
        {},
        help="Changes to the card's recipe, such as warmup=0.1; or "
        "name=small, the one for small models, and changes to that.",
    )
    text_column: str = _setting("text", help="Where records hold their text.")
    errors: str = _setting(
        "strict", help="What to do with invalid UTF-8: strict or replace."
    )
    validation_fraction: float = _setting(
        0.01, help="Share of the documents to hold out, when text is packed."
    )
    max_tokens: int | None = _setting(
        None, help="Pack no more of the text than about so many tokens."
    )
    validation_batches: int = _setting(
        20, help="How much of what is held out is evaluated."
    )
    validate_every: int | None = _setting(
        None, help="Steps between evaluations; about 20 in all if not given."
    )
    save_every: int = _setting(500, help="Steps between checkpoints.")
    keep_last: int = _setting(2, help="Checkpoints to keep, beside the best.")
    on_damage: str = _setting(
        "raise",
        help="If the latest checkpoint is damaged: raise an error, or go on "
        "from the previous one.",
    )
    seed: int = _setting(0, help="Of weights, dropout and order.")

    def __post_init__(self):
        object.__setattr__(self, "data", _plain(self.data))
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            is_misplaced_bool = type(value) is bool and field.type is not bool
            if not isinstance(value, field.type) or is_misplaced_bool:
                problems.append(
                    f"{field.name}: expected {_type_name(field.type)}. "
                    f"Received: {field.name}={value!r}"
                )
        if isinstance(self.data, list) and not all(
            isinstance(stage, list) and stage for stage in self.data
        ):
            problems.append(
                "data: a list has stages, [FOLDER, ROWS] each; for several "
                "files, pass a glob or their folder. Received: "
                f"data={self.data!r}"
            )
        if problems:
            raise ValueError("\n".join(problems))


def _plain(data):
    """Data as a file of settings holds them: str for paths, no tuples."""
    if isinstance(data, dict):
        return {_plain(path): weight for path, weight in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(each) for each in data]
    return os.fspath(data) if isinstance(data, os.PathLike) else data


def _type_name(annotation):
    names = [
        each.__name__
        for each in typing.get_args(annotation) or (annotation,)
        if each is not types.NoneType
    ]
    return " or ".join(names)


def read_settings(path):
    """Reads settings from a file.

    Args:
        path: path of a TOML, YAML or JSON file.

    Returns:
        dict.

    Raises:
        ValueError: If the file is none of these, or holds anything else.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    parsers = {
        ".toml": tomllib.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".json": json.loads,
    }
    if path.suffix not in parsers:
        raise ValueError(
            f"Expected a file that ends with one of {sorted(parsers)}. "
            f"Received: {str(path)!r}"
        )
    try:
        settings = parsers[path.suffix](path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: expected names and values of settings. Received: "
            f"{type(settings).__name__}"
        )
    known = {field.name for field in dataclasses.fields(TrainingSettings)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(
            f"{path}: expected settings among {sorted(known)}. Received: "
            f"{unknown}"
        )
    return settings
