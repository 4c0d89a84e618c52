"""What a training run is made with: one definition for files and flags."""

import dataclasses
import json
import os
import re
import tomllib
import types
import typing
from pathlib import Path

import yaml

from keras_bwetaf.names import with_nearest


def _setting(*default, help, least=None, choices=None):
    """A field with what the command line says about it.

    Args:
        *default: The default, or nothing.
        help: str.
        least: int. The smallest value, or `None`.
        choices: tuple of str. The only values, or `None`.
    """
    metadata = {"help": help, "least": least, "choices": choices}
    # A tuple, to tell the default None from no default.
    if default in (({},), ([],)):
        factory = type(default[0])
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default:
        return dataclasses.field(default=default[0], metadata=metadata)
    return dataclasses.field(metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of `train`; `keras-bwetaf train --help` explains them.

    Raises:
        ValueError: If a setting is of another type than it should be, out
            of range, or contradicts another.
    """

    data: str | dict | list = _setting(
        help="Text: a name, files, hf://datasets/... or tfds:NAME. Or what "
        "`keras-bwetaf pack` wrote, or .npy files; in a file of settings "
        "also a mixture {FOLDER: WEIGHT}, or stages [[FOLDER, ROWS], ...]."
    )
    steps: int = _setting(
        help="Optimizer steps of the whole training. With more of them, a "
        "run goes on, with the learning rate of so long a run.",
        least=1,
    )
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
        None, help="Train a tokenizer of this size on the text.", least=258
    )
    lora_rank: int | None = _setting(
        None,
        help="Train LoRA matrices of this rank instead of all weights.",
        least=1,
    )
    sequence_length: int | None = _setting(
        None,
        help="Tokens in a row; as many as the model sees if not given.",
        least=2,
    )
    batch_size: int | None = _setting(
        None,
        help="Rows in a step; if not given, what fits the devices, where that "
        "is known, and 16 elsewhere.",
        least=1,
    )
    gradient_accumulation_steps: int = _setting(
        1,
        help="Parts in which a batch is worked on, to save memory.",
        least=1,
    )
    remat: str = _setting(
        "none",
        help="What to compute twice, to save memory: none, attention, block, "
        "full.",
        choices=("none", "attention", "block", "full"),
    )
    dtype: str = _setting(
        "float32",
        help="float32, bfloat16 or mixed_bfloat16.",
        choices=(
            "float32",
            "bfloat16",
            "float16",
            "mixed_bfloat16",
            "mixed_float16",
        ),
    )
    recipe: dict = _setting(
        {},
        help="Changes to the card's recipe, such as warmup=0.1; or "
        "name=small, the one for small models, and changes to that.",
    )
    text_column: str = _setting("text", help="Where records hold their text.")
    errors: str = _setting(
        "strict",
        help="What to do with invalid UTF-8: strict or replace.",
        choices=("strict", "replace"),
    )
    validation_fraction: float | None = _setting(
        None,
        help="Share of the documents to hold out, when text is packed; 0.01 "
        "if not given. Of a single text, the end is held out, a tenth if not "
        "given.",
    )
    max_tokens: int | None = _setting(
        None,
        help="Pack no more of the text than about so many tokens.",
        least=1,
    )
    validation_batches: int = _setting(
        20, help="How much of what is held out is evaluated.", least=1
    )
    validate_every: int | None = _setting(
        None,
        help="Steps between evaluations; about 20 in all if not given.",
        least=1,
    )
    sample: list = _setting(
        [],
        help="A text to continue at each evaluation, such as "
        "'Once upon a time'; may be given several times.",
    )
    tensorboard: bool = _setting(
        False, help="Also write for TensorBoard, to RUN/tensorboard."
    )
    save_every: int = _setting(500, help="Steps between checkpoints.", least=1)
    keep_last: int = _setting(
        2, help="Checkpoints to keep, beside the best.", least=1
    )
    on_damage: str = _setting(
        "raise",
        help="If the latest checkpoint is damaged: raise an error, or go on "
        "from the previous one.",
        choices=("raise", "previous"),
    )
    seed: int = _setting(0, help="Of weights, dropout and order.", least=0)

    def __post_init__(self):
        object.__setattr__(self, "data", _plain(self.data))
        if isinstance(self.sample, str):
            object.__setattr__(self, "sample", [self.sample])
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if float in _types(field) and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            problems += _problems(field, value)
        problems = problems or self._contradictions()
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def epochs(self):
        """How often the model is evaluated, after equal parts of the steps."""
        if self.validate_every:
            return self.steps // self.validate_every
        return max(n for n in range(1, 21) if self.steps % n == 0)

    def _contradictions(self):
        """What is wrong with settings whose types are right, a list of str."""
        problems = []
        if isinstance(self.data, list) and not all(
            isinstance(stage, list) and stage for stage in self.data
        ):
            problems.append(
                "data: a list has stages, [FOLDER, ROWS] each; for several "
                "files, pass a glob or their folder. Received: "
                f"data={self.data!r}"
            )
        if not 0 <= (self.validation_fraction or 0) < 1:
            problems.append(
                "`validation_fraction` must be at least 0 and below 1. "
                f"Received: validation_fraction={self.validation_fraction!r}"
            )
        if not all(isinstance(each, str) and each for each in self.sample):
            problems.append(
                "`sample` must hold texts, none empty. Received: "
                f"sample={self.sample!r}"
            )
        if self.seed >= 2**32:
            problems.append(
                f"`seed` must be below 2**32. Received: seed={self.seed!r}"
            )
        if (self.batch_size or 0) % self.gradient_accumulation_steps:
            problems.append(
                "`batch_size` must be a multiple of "
                "`gradient_accumulation_steps`. Received: batch_size="
                f"{self.batch_size!r}, gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps!r}"
            )
        if self.validate_every and self.steps % self.validate_every:
            fewer = self.steps // self.validate_every * self.validate_every
            more = fewer + self.validate_every
            problems.append(
                "`steps` must be a multiple of `validate_every`, such as "
                f"{f'{fewer} or ' if fewer else ''}{more}. Received: "
                f"steps={self.steps!r}, validate_every={self.validate_every!r}"
            )
        return problems


def _types(field):
    """The types of a field's values, a tuple."""
    return typing.get_args(field.type) or (field.type,)


def _problems(field, value):
    """What is wrong with the value of a field alone, a list of str."""
    least, choices = field.metadata["least"], field.metadata["choices"]
    received = f"Received: {field.name}={value!r}"
    is_misplaced_bool = type(value) is bool and field.type is not bool
    if not isinstance(value, field.type) or is_misplaced_bool:
        return [f"{field.name}: expected {_type_name(field)}. {received}"]
    if value is None:
        return []
    if least is not None and value < least:
        return [
            f"`{field.name}` must be an int of at least {least}. {received}"
        ]
    if choices is not None and value not in choices:
        names = ", ".join(choices)
        return [f"`{field.name}` must be one of {names}. {received}"]
    return []


def _plain(data):
    """Data as a file of settings holds them: str for paths, no tuples."""
    if isinstance(data, dict):
        return {_plain(path): weight for path, weight in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(each) for each in data]
    return os.fspath(data) if isinstance(data, os.PathLike) else data


def _type_name(field):
    names = [
        each.__name__ for each in _types(field) if each is not types.NoneType
    ]
    return " or ".join(names)


class _YamlLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(text):
    return yaml.load(text, _YamlLoader)


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
        ".yaml": _read_yaml,
        ".yml": _read_yaml,
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
    known = sorted(each.name for each in dataclasses.fields(TrainingSettings))
    unknown = sorted(settings.keys() - known, key=str)
    if unknown:
        raise ValueError(
            f"{path}: no such settings: {with_nearest(unknown, known)}. "
            f"Expected: settings among {known}. Received: {unknown}"
        )
    return settings
