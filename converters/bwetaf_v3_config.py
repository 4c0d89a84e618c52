"""The configuration of version 3: one table of names for every direction.

What its functions take and return is said at `architecture.Architecture`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

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


def _is_size(value):
    return type(value) is int and 0 < value <= 2**24


def _is_number(value):
    # Unlike math.isfinite, the comparison takes integers of any size.
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


SIZE = "an integer from 1 to 2**24", _is_size
LAYERS = (
    "an integer from 1 to 1024",
    lambda value: _is_size(value) and value <= 1024,
)
HEADS = (
    "an integer from 1 to 2**24, or a list of one for each layer",
    lambda value: (
        _is_size(value)
        or (isinstance(value, list) and all(map(_is_size, value)))
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

# Canonical name, name in Flax, name in Keras, what it may be, what it is in
# the original where nothing is said.
FIELDS = (
    Field("vocab_size", "vocab_size", "vocabulary_size", *SIZE),
    Field("num_hidden_layers", "num_blocks", "num_layers", *LAYERS),
    Field("num_attention_heads", "num_heads", "num_query_heads", *HEADS),
    Field("num_key_value_heads", None, "num_key_value_heads", *HEADS),
    Field("hidden_size", "attention_dim", "hidden_dim", *SIZE),
    Field("intermediate_size", "ff_dim", "intermediate_dim", *SIZE),
    Field("max_position_embeddings", "max_len", "max_sequence_length", *SIZE),
    Field("hidden_dropout", "dropout_rate", "dropout", *RATE),
    Field("rope_theta", None, "rope_max_wavelength", *POSITIVE, 10000.0),
    Field("rope_dtype", None, "rope_dtype", *ANGLE, None),
    Field("rms_norm_eps", None, "layer_norm_epsilon", *POSITIVE, 1e-8),
    Field(
        "initializer_range",
        "param_init_rage",
        "initializer_range",
        *DEVIATION,
        0.002,
    ),
    Field(
        "embedding_initializer_range",
        "emb_init_range",
        "embedding_initializer_range",
        *OPTIONAL_DEVIATION,
        None,
    ),
)
MODEL_TYPE = "bwetaf"
SETTLED = {"hidden_act": "silu", "tie_word_embeddings": True}

FLAX_NAMES = {field.name: field.flax for field in FIELDS if field.flax}
KERAS_NAMES = {field.name: field.keras for field in FIELDS}
CANONICAL_NAMES = {field.name: field.name for field in FIELDS}
# Instead of the number of key/value heads, Flax has the ratio of the two.
REPEATS = "gqa_repeats"
# In the order in which the original writes them; the two without a place in
# the canonical configuration change no number.
FLAX_SETTINGS = (
    *("num_heads", "attention_dim", "vocab_size", "num_blocks", "ff_dim"),
    *("dropout_rate", "possible_opt_path", "max_len", "attn_chunks"),
    *(REPEATS, "emb_init_range", "param_init_rage"),
)
NEUTRAL = {"possible_opt_path": "", "attn_chunks": 1}
FLAX_DEFAULTS = {
    field.flax: field.original for field in FIELDS if field.flax
} | {REPEATS: 1}


def config_from_flax(
    flax, *, dtype="float32", eos_token_id=0, source="Flax config"
):
    """The original's configuration -> the canonical one."""
    values = _read(FLAX_DEFAULTS | flax, FLAX_NAMES, source)
    repeats = flax.get(REPEATS, FLAX_DEFAULTS[REPEATS])
    heads = values["num_attention_heads"]
    every = heads if isinstance(heads, list) else [heads]
    if not _is_size(repeats) or any(each % repeats for each in every):
        raise CheckpointError(
            f"{source}: {REPEATS} must be an integer that divides every "
            f"num_heads. Received: {REPEATS}={repeats!r:.80}, "
            f"num_heads={heads}"
        )
    shared = [each // repeats for each in every]
    values["num_key_value_heads"] = (
        shared if isinstance(heads, list) else shared[0]
    )
    _check_heads(values, FLAX_NAMES | {"num_key_value_heads": REPEATS}, source)
    for field in FIELDS:
        values.setdefault(field.name, field.original)
    return canonical_config(values, dtype=dtype, eos_token_id=eos_token_id)


def config_to_flax(config, *, source="config"):
    """The canonical configuration -> the original's."""
    check_config(config, source=source)
    problems = [
        f"{field.name} must be {field.original!r}, for the original has no "
        f"such setting. Received: {config[field.name]!r}. Change it if the "
        "model may change with it."
        for field in FIELDS
        if field.name not in FLAX_NAMES
        and field.original is not REQUIRED
        and config[field.name] != field.original
    ]
    heads = per_layer(config, "num_attention_heads")
    shared = per_layer(config, "num_key_value_heads")
    repeats = {each // by for each, by in zip(heads, shared, strict=True)}
    if len(repeats) > 1:
        problems.append(
            "num_attention_heads / num_key_value_heads must be the same in "
            "every layer, for the original has one setting for all. Received: "
            f"{heads} and {shared}"
        )
    refuse(source, problems)
    flax = {names: config[name] for name, names in FLAX_NAMES.items()}
    return flax | {REPEATS: repeats.pop()}


def flax_settings(config, *, source="config"):
    """The canonical configuration -> all that the original writes."""
    flax = config_to_flax(config, source=source) | NEUTRAL
    return {name: flax[name] for name in FLAX_SETTINGS}


def config_from_keras(
    keras, *, dtype="float32", eos_token_id=0, source="Keras config"
):
    """The backbone's arguments -> the canonical configuration."""
    values = _read(keras, KERAS_NAMES, source)
    _check_heads(values, KERAS_NAMES, source)
    return canonical_config(values, dtype=dtype, eos_token_id=eos_token_id)


def config_to_keras(config, *, source="config"):
    """The canonical configuration -> the backbone's arguments."""
    check_config(config, source=source)
    return {keras: config[name] for name, keras in KERAS_NAMES.items()}


def check_config(config, *, source="config"):
    """Checks every value of a canonical configuration."""
    values = _read(config, CANONICAL_NAMES, source)
    _check_heads(values, CANONICAL_NAMES, source)
    problems = [
        f"{name} must be {expected!r}. Received: {config.get(name)!r:.80}"
        for name, expected in SETTLED.items()
        if config.get(name) != expected
    ]
    refuse(source, problems)


def check_equal(config, written, *, source="config"):
    """Checks that what is written still means the same model."""
    refuse(
        source,
        [
            f"{field.name} is {config[field.name]!r:.80}, but the side file "
            f"makes it {written[field.name]!r:.80}. Remove "
            "conversion_extras.json to go on without it."
            for field in FIELDS
            if config[field.name] != written[field.name]
        ],
    )


def per_layer(config, name):
    """A value of the configuration as a list with one for each layer."""
    value = config[name]
    if isinstance(value, list):
        return value
    return [value] * config["num_hidden_layers"]


def _read(config, names, source):
    """Checks the named values one by one; returns them by canonical name."""
    values, problems = {}, []
    for field in FIELDS:
        if field.name not in names:
            continue
        name = names[field.name]
        value = config.get(name, REQUIRED)
        value = list(value) if isinstance(value, tuple) else value
        values[field.name] = value
        if value is REQUIRED:
            problems.append(f"{name} is missing. Expected {field.expected}.")
        elif not field.accepts(value):
            problems.append(
                f"{name} must be {field.expected}. Received: {value!r:.80}"
            )
    refuse(source, problems)
    return values


def _check_heads(values, names, source):
    """Checks what the numbers of heads, layers and dimensions share."""
    layers, hidden = values["num_hidden_layers"], values["hidden_size"]
    for name in ("num_attention_heads", "num_key_value_heads"):
        value = values[name]
        if isinstance(value, list) and len(value) != layers:
            raise CheckpointError(
                f"{source}: {names[name]} must have one number for each of "
                f"{layers} layers. Received: {value!r:.80}"
            )
    queries, shares = names["num_attention_heads"], names["num_key_value_heads"]
    given = values["num_attention_heads"], values["num_key_value_heads"]
    dim = names["hidden_size"]
    heads = per_layer(values, "num_attention_heads")
    shared = per_layer(values, "num_key_value_heads")
    problems = []
    if any(hidden % each for each in heads):
        problems.append(
            f"{dim} must be divisible by every {queries}. Received: "
            f"{dim}={hidden}, {queries}={given[0]!r:.80}"
        )
    if any(each % by for each, by in zip(heads, shared, strict=True)):
        problems.append(
            f"{shares} must divide {queries}. Received: {given[1]!r:.80} and "
            f"{given[0]!r:.80}"
        )
    refuse(source, problems)


def canonical_config(values, *, dtype, eos_token_id):
    """The canonical configuration with these values and no other."""
    return {
        "architectures": ["BwETAFForCausalLM"],
        "model_type": MODEL_TYPE,
        **{field.name: values[field.name] for field in FIELDS},
        **SETTLED,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "dtype": dtype,
    }
