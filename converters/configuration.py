"""The configuration of an architecture: one table of names for every direction.

What the methods take and return is said at `architecture.Architecture`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converters.errors import CheckpointError, refuse

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One value of the configuration under its three names.

    Args:
        name: str. Canonical name.
        flax: str, or None where the original has no such setting.
        keras: str.
        expected: str. What the value may be, for messages.
        accepts: callable. Takes a value, tells whether it may be.
        original: What the original uses when its configuration says
            nothing; `REQUIRED` when it must.
    """

    name: str
    flax: str | None
    keras: str
    expected: str
    accepts: Callable
    original: object = REQUIRED


def is_size(value):
    return type(value) is int and 0 < value <= 2**24


def _is_number(value):
    # Unlike math.isfinite, the comparison takes integers of any size.
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


SIZE = "an integer from 1 to 2**24", is_size
LAYERS = (
    "an integer from 1 to 1024",
    lambda value: is_size(value) and value <= 1024,
)
HEADS = (
    "an integer from 1 to 2**24, or a list of one for each layer",
    lambda value: (
        is_size(value) or (isinstance(value, list) and all(map(is_size, value)))
    ),
)
RATE = (
    "a number from 0 to below 1",
    lambda value: _is_number(value) and value < 1,
)
POSITIVE = "a positive number", lambda value: _is_number(value) and value > 0
DEVIATION = "a number, 0 or more", _is_number
OPTIONAL_DEVIATION = (
    "a number, 0 or more, or null",
    lambda value: value is None or _is_number(value),
)
ANGLE = (
    "null, 'float32', 'bfloat16' or 'float16'",
    lambda value: value in (None, "float32", "bfloat16", "float16"),
)
BOOLEAN = "true or false", lambda value: type(value) is bool


@dataclass(frozen=True)
class Configuration:
    """The configuration of an architecture.

    Args:
        model_type: str.
        causal_lm: str. The class of `transformers`' code.
        fields: tuple of `Field`.
        flax_order: tuple of str. The settings in the order in which the
            original writes them.
        neutral: mapping of those that have no place in the canonical
            configuration, for they change no number, to their values.
        end_token: callable. Takes a dict with the value of each field, and
            returns the id of the end token of models without a tokenizer.
        settled: mapping of what the canonical configuration says of all
            models.
    """

    model_type: str
    causal_lm: str
    fields: tuple
    flax_order: tuple
    neutral: Mapping
    end_token: Callable = lambda values: 0
    settled: Mapping = field(
        default_factory=lambda: {
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }
    )

    @property
    def functions(self):
        """What an `Architecture` takes of it: dict of arguments."""
        return {
            "config_names": tuple(self.names),
            **{
                name: getattr(self, name)
                for name in (
                    *("check_config", "check_equal", "canonical_config"),
                    *("config_from_flax", "config_to_flax", "flax_settings"),
                    *("config_from_keras", "config_to_keras"),
                )
            },
        }

    @property
    def flax_names(self):
        return {each.name: each.flax for each in self.fields if each.flax}

    @property
    def keras_names(self):
        return {each.name: each.keras for each in self.fields}

    @property
    def names(self):
        return {each.name: each.name for each in self.fields}

    @property
    def flax_defaults(self):
        return {each.flax: each.original for each in self.fields if each.flax}

    def config_from_flax(
        self,
        flax,
        *,
        dtype="float32",
        eos_token_id=None,
        source="Flax config",
    ):
        """The original's configuration -> the canonical one."""
        values = self.read(self.flax_defaults | flax, self.flax_names, source)
        names = self.flax_names | self.derived(values, flax, source)
        self.check_heads(values, names, source)
        for each in self.fields:
            values.setdefault(each.name, each.original)
        return self.canonical_config(
            values, dtype=dtype, eos_token_id=eos_token_id
        )

    def derived(self, values, flax, source):
        """Adds values that the original has other settings for.

        Args:
            values: dict of canonical name to value. It is added to.
            flax: dict, the original's configuration.
            source: str or path. For messages.

        Returns:
            dict of canonical name to the name of the other setting.
        """
        return {}

    def config_to_flax(self, config, *, source="config"):
        """The canonical configuration -> the original's."""
        self.check_config(config, source=source)
        refuse(source, self.not_in_flax(config))
        return {flax: config[name] for name, flax in self.flax_names.items()}

    def not_in_flax(self, config):
        """What of a configuration the original cannot express."""
        return [
            f"{each.name} must be {each.original!r}, for the original has no "
            f"such setting. Received: {config[each.name]!r}. Change it if the "
            "model may change with it."
            for each in self.fields
            if each.flax is None
            and each.original is not REQUIRED
            and config[each.name] != each.original
        ]

    def flax_settings(self, config, *, source="config"):
        """The canonical configuration -> all that the original writes."""
        flax = {**self.config_to_flax(config, source=source), **self.neutral}
        return {name: flax[name] for name in self.flax_order}

    def config_from_keras(
        self,
        keras,
        *,
        dtype="float32",
        eos_token_id=None,
        source="Keras config",
    ):
        """The backbone's arguments -> the canonical configuration."""
        values = self.read(keras, self.keras_names, source)
        self.check_heads(values, self.keras_names, source)
        return self.canonical_config(
            values, dtype=dtype, eos_token_id=eos_token_id
        )

    def config_to_keras(self, config, *, source="config"):
        """The canonical configuration -> the backbone's arguments."""
        self.check_config(config, source=source)
        return {keras: config[name] for name, keras in self.keras_names.items()}

    def check_config(self, config, *, source="config"):
        """Checks every value of a canonical configuration."""
        values = self.read(config, self.names, source)
        self.check_heads(values, self.names, source)
        problems = [
            f"{name} must be {expected!r}. Received: {config.get(name)!r:.80}"
            for name, expected in self.settled.items()
            if config.get(name) != expected
        ]
        refuse(source, problems)

    def check_equal(self, config, written, *, source="config"):
        """Checks that what is written still means the same model."""
        refuse(
            source,
            [
                f"{name} is {config.get(name)!r:.80}, but the side file makes "
                f"it {written.get(name)!r:.80}. Remove conversion_extras.json "
                "to go on without it."
                for name in ("model_type", *self.names)
                if config.get(name) != written.get(name)
            ],
        )

    def canonical_config(self, values, *, dtype, eos_token_id):
        """The canonical configuration with these values and no other."""
        if eos_token_id is None:
            eos_token_id = self.end_token(values)
        return {
            "architectures": [self.causal_lm],
            "model_type": self.model_type,
            **{name: values[name] for name in self.names},
            **self.settled,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": eos_token_id,
            "dtype": dtype,
        }

    def read(self, config, names, source):
        """Checks the named values one by one; returns them by their name."""
        values, problems = {}, []
        for each in self.fields:
            if each.name not in names:
                continue
            name = names[each.name]
            value = config.get(name, REQUIRED)
            value = list(value) if isinstance(value, tuple) else value
            values[each.name] = value
            if value is REQUIRED:
                problems.append(f"{name} is missing. Expected {each.expected}.")
            elif not each.accepts(value):
                problems.append(
                    f"{name} must be {each.expected}. Received: {value!r:.80}"
                )
        refuse(source, problems)
        return values

    def check_heads(self, values, names, source):
        """Checks what the numbers of heads, layers and dimensions share."""
        layers = values["num_hidden_layers"]
        for each in self.fields:
            value = values.get(each.name)
            if isinstance(value, list) and len(value) != layers:
                raise CheckpointError(
                    f"{source}: {names[each.name]} must have one number for "
                    f"each of {layers} layers. Received: {value!r:.80}"
                )
        refuse(source, self.head_problems(values, names))

    def head_problems(self, values, names):
        """What is wrong with numbers of heads: list of str."""
        hidden, given = values["hidden_size"], values["num_attention_heads"]
        dim, queries = names["hidden_size"], names["num_attention_heads"]
        if any(
            hidden % each for each in per_layer(values, "num_attention_heads")
        ):
            return [
                f"{dim} must be divisible by every {queries}. Received: "
                f"{dim}={hidden}, {queries}={given!r:.80}"
            ]
        return []


def per_layer(config, name):
    """A value of the configuration as a list with one for each layer."""
    value = config[name]
    if isinstance(value, list):
        return value
    return [value] * config["num_hidden_layers"]
