"""The files beside the weights: tokenizer, settings, statistics."""

from converters.bwetaf_v3_config import FLAX_DEFAULTS
from converters.errors import CheckpointError
from converters.files import parse_json, read_bytes, read_json

FLAX_CONFIG = "understanding_good_stuff.json"
FLAX_TOKENIZER = "tokenizer/yap.json"
FLAX_TOKENIZER_CONFIG = "tokenizer/understanding_yap.json"
FLAX_EXTRAS = "flax_extras.json"
STATS = "stats.json"
# Of a configuration that does not come from Flax; the order is the one in
# which the original writes its own.
NEW_CONFIG = {
    "keys": [
        *("num_heads", "attention_dim", "vocab_size", "num_blocks", "ff_dim"),
        *("dropout_rate", "possible_opt_path", "max_len", "attn_chunks"),
        *("gqa_repeats", "emb_init_range", "param_init_rage"),
    ],
    "values": {"possible_opt_path": "", "attn_chunks": 1},
}


def from_flax(source, flax_config):
    """Converts what lies beside the weights in a Flax folder.

    Args:
        source: path. The Flax folder.
        flax_config: dict, its configuration.

    Returns:
        dict of canonical file name to bytes or dict, and the id of the token
        that ends a document. `flax_extras.json` keeps what the canonical
        files have no place for.

    Raises:
        CheckpointError: if the tokenizer is incomplete or wrong.
    """
    files, eos_token_id = {}, 0
    extras = {"config": _rest(flax_config, FLAX_DEFAULTS)}
    if (source / "tokenizer").is_dir():
        tokenizer = read_bytes(source / FLAX_TOKENIZER)
        settings = read_json(source / FLAX_TOKENIZER_CONFIG)
        eos_token = settings.get("eos_token")
        ids = _ids(parse_json(tokenizer, source / FLAX_TOKENIZER))
        if (
            not isinstance(eos_token, str)
            or type(ids.get(eos_token)) is not int
        ):
            raise CheckpointError(
                f"{source / FLAX_TOKENIZER_CONFIG}: eos_token must be a token "
                f"of {FLAX_TOKENIZER}. Received: {eos_token!r:.80}"
            )
        eos_token_id = ids[eos_token]
        files["tokenizer.json"] = tokenizer
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos_token,
            "unk_token": settings.get("uk_token"),
            "pad_token": eos_token,
            "bos_token": None,
            "model_max_length": flax_config.get("max_len"),
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        }
        extras["tokenizer"] = _rest(settings, ("eos_token", "uk_token"))
    if (source / STATS).is_file():
        files[STATS] = read_bytes(source / STATS)
    files["generation_config.json"] = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.92,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }
    files[FLAX_EXTRAS] = extras
    return files, eos_token_id


def to_flax(source, flax_config):
    """Converts what lies beside the weights in a canonical folder.

    Args:
        source: path. The canonical folder.
        flax_config: dict, the configuration as far as it follows from the
            canonical one.

    Returns:
        dict of Flax file name to bytes or dict.

    Raises:
        CheckpointError: if a file is wrong.
    """
    files, extras = {}, {}
    if (source / FLAX_EXTRAS).is_file():
        extras = read_json(source / FLAX_EXTRAS)
        _check_extras(extras, source / FLAX_EXTRAS)
    files[FLAX_CONFIG] = _restore(
        flax_config,
        extras.get("config", NEW_CONFIG),
        defaults=FLAX_DEFAULTS,
    )
    if (source / "tokenizer.json").is_file():
        tokenizer = read_bytes(source / "tokenizer.json")
        content = parse_json(tokenizer, source / "tokenizer.json")
        settings = read_json(source / "tokenizer_config.json")
        new_settings = {
            "name": source.name,
            "vocab_size": len(_ids(content)),
            "special_tokens": [
                token["content"] for token in _added_tokens(content)
            ],
        }
        files[FLAX_TOKENIZER] = tokenizer
        files[FLAX_TOKENIZER_CONFIG] = _restore(
            {
                "eos_token": settings.get("eos_token"),
                "uk_token": settings.get("unk_token"),
            },
            extras.get(
                "tokenizer",
                {"keys": list(new_settings), "values": new_settings},
            ),
        )
    if (source / STATS).is_file():
        files[STATS] = read_bytes(source / STATS)
    return files


def _rest(original, expressed):
    """The order of all keys, and the values that are not expressed."""
    return {
        "keys": list(original),
        "values": {
            key: value
            for key, value in original.items()
            if key not in expressed
        },
    }


def _restore(expressed, rest, defaults=()):
    """The inverse of `_rest`; leaves out new values that are defaults."""
    values = rest["values"] | expressed
    keys = [key for key in rest["keys"] if key in values]
    keys += [
        key
        for key, value in expressed.items()
        if key not in keys and (key not in defaults or defaults[key] != value)
    ]
    return {key: values[key] for key in keys}


def _check_extras(extras, path):
    for name, rest in extras.items():
        if (
            not isinstance(rest, dict)
            or not isinstance(rest.get("values"), dict)
            or not isinstance(rest.get("keys"), list)
            or not all(isinstance(key, str) for key in rest["keys"])
        ):
            raise CheckpointError(
                f"{path}: {name} must hold a list of keys and an object of "
                f"values. Received: {rest!r:.80}. Remove the file to go on "
                "without it."
            )


def _added_tokens(tokenizer):
    added = tokenizer.get("added_tokens")
    return [
        token
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
    ]


def _ids(tokenizer):
    """Every token of a `tokenizers` JSON and its id."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = {
        token["content"]: token["id"] for token in _added_tokens(tokenizer)
    }
    return (vocabulary if isinstance(vocabulary, dict) else {}) | added
