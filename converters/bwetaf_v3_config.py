"""The configuration of version 3, which has heads that share keys."""

from converters.configuration import (
    ANGLE,
    DEVIATION,
    HEADS,
    LAYERS,
    OPTIONAL_DEVIATION,
    POSITIVE,
    RATE,
    SIZE,
    Configuration,
    Field,
    is_size,
    per_layer,
)
from converters.errors import CheckpointError

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
# Instead of the number of key/value heads, Flax has the ratio of the two.
REPEATS = "gqa_repeats"


class SharedHeads(Configuration):
    """A configuration with numbers of key/value heads."""

    def derived(self, values, flax, source):
        repeats = flax.get(REPEATS, 1)
        heads = values["num_attention_heads"]
        every = heads if isinstance(heads, list) else [heads]
        if not is_size(repeats) or any(each % repeats for each in every):
            raise CheckpointError(
                f"{source}: {REPEATS} must be an integer that divides every "
                f"num_heads. Received: {REPEATS}={repeats!r:.80}, "
                f"num_heads={heads}"
            )
        shared = [each // repeats for each in every]
        values["num_key_value_heads"] = (
            shared if isinstance(heads, list) else shared[0]
        )
        return {"num_key_value_heads": REPEATS}

    def config_to_flax(self, config, *, source="config"):
        flax = super().config_to_flax(config, source=source)
        return flax | {REPEATS: _repeats(config).pop()}

    def not_in_flax(self, config):
        problems = super().not_in_flax(config)
        if len(_repeats(config)) > 1:
            problems.append(
                "num_attention_heads / num_key_value_heads must be the same "
                "in every layer, for the original has one setting for all. "
                f"Received: {per_layer(config, 'num_attention_heads')} and "
                f"{per_layer(config, 'num_key_value_heads')}"
            )
        return problems

    def head_problems(self, values, names):
        problems = super().head_problems(values, names)
        heads = per_layer(values, "num_attention_heads")
        shared = per_layer(values, "num_key_value_heads")
        if any(each % by for each, by in zip(heads, shared, strict=True)):
            problems.append(
                f"{names['num_key_value_heads']} must divide "
                f"{names['num_attention_heads']}. Received: "
                f"{values['num_key_value_heads']!r:.80} and "
                f"{values['num_attention_heads']!r:.80}"
            )
        return problems


def _repeats(config):
    """The ratios of query heads to key/value heads that occur: set of int."""
    heads = per_layer(config, "num_attention_heads")
    shared = per_layer(config, "num_key_value_heads")
    return {each // by for each, by in zip(heads, shared, strict=True)}


CONFIGURATION = SharedHeads(
    model_type="bwetaf",
    causal_lm="BwETAFForCausalLM",
    fields=FIELDS,
    flax_order=(
        *("num_heads", "attention_dim", "vocab_size", "num_blocks", "ff_dim"),
        *("dropout_rate", "possible_opt_path", "max_len", "attn_chunks"),
        *(REPEATS, "emb_init_range", "param_init_rage"),
    ),
    neutral={"possible_opt_path": "", "attn_chunks": 1},
)
