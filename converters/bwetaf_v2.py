"""Version 2: its configuration, and the tensors that differ from version 3."""

from converters import bwetaf_v3
from converters.architecture import Architecture, KerasClass, KerasClasses
from converters.configuration import (
    BOOLEAN,
    DEVIATION,
    HEADS,
    LAYERS,
    OPTIONAL_DEVIATION,
    POSITIVE,
    RATE,
    SIZE,
    Configuration,
    Field,
)
from converters.errors import CheckpointError
from converters.gpt2 import END_ID, NUM_TOKENS, gpt2_tokenizer

# Canonical name, name in Flax, name in Keras, what it may be, what it is in
# the original where nothing is said.
FIELDS = (
    Field("vocab_size", "vocab_size", "vocabulary_size", *SIZE),
    Field("num_hidden_layers", "num_blocks", "num_layers", *LAYERS),
    Field("num_attention_heads", "num_heads", "num_query_heads", *HEADS),
    Field("hidden_size", "attention_dim", "hidden_dim", *SIZE),
    Field("intermediate_size", "ff_dim", "intermediate_dim", *SIZE),
    Field("max_position_embeddings", "max_len", "max_sequence_length", *SIZE),
    Field("hidden_dropout", "dropout_rate", "dropout", *RATE),
    Field("use_rope", "use_rope", "use_rope", *BOOLEAN, False),
    Field(
        "embedding_scale", "emb_scaling_factor", "embedding_scale", *POSITIVE, 1
    ),
    Field("residual_scale", "res_scale", "residual_scale", *POSITIVE, 1),
    Field("rms_norm_eps", None, "layer_norm_epsilon", *POSITIVE, 1e-8),
    Field("initializer_range", None, "initializer_range", *DEVIATION, 0.02),
    Field(
        "embedding_initializer_range",
        "emb_init_range",
        "embedding_initializer_range",
        *OPTIONAL_DEVIATION,
        None,
    ),
)
FLASH = "use_fash_attention"  # As the original spells it.
OWN_SETTINGS = {"use_rope", "emb_splt", FLASH}


class Version2(Configuration):
    """A configuration without the original's faulty kernel of attention."""

    def derived(self, values, flax, source):
        if flax.get(FLASH, False) is not False:
            raise CheckpointError(
                f"{source}: {FLASH} must be false. With true, the original "
                "computes attention that is not causal: what follows a token "
                f"changes its logits. Received: {flax[FLASH]!r:.80}"
            )
        return {}

    def head_problems(self, values, names):
        problems = super().head_problems(values, names)
        if values["hidden_size"] % 2:
            problems.append(
                f"{names['hidden_size']} must be even, since positions pair "
                f"dimensions. Received: {values['hidden_size']}"
            )
        return problems


CONFIGURATION = Version2(
    model_type="bwetaf_v2",
    causal_lm="BwETAFV2ForCausalLM",
    fields=FIELDS,
    flax_order=(
        *("num_heads", "attention_dim", "vocab_size", "num_blocks", "ff_dim"),
        *("dropout_rate", "possible_opt_path", "max_len", "emb_splt"),
        *("attn_chunks", FLASH, "emb_init_range", "use_rope"),
        *("emb_scaling_factor", "res_scale"),
    ),
    neutral={
        "possible_opt_path": "",
        "emb_splt": 256,
        "attn_chunks": 1,
        FLASH: False,
    },
    end_token=lambda values: (
        END_ID if values["vocab_size"] >= NUM_TOKENS else 0
    ),
)

LAYER_ROWS = tuple(
    row
    for row in bwetaf_v3.LAYER_ROWS
    if row[0] not in (bwetaf_v3.VALUE_BIAS, bwetaf_v3.GATE_BIAS)
)


def tensors(config):
    """Lists the tensors of a model; see `Architecture`."""
    heads = {"num_key_value_heads": config["num_attention_heads"]}
    return bwetaf_v3.tensors(config | heads, LAYER_ROWS)


def recognizes_flax(flax):
    """Whether a configuration is of version 2: version 3 has `gqa_repeats`."""
    return "gqa_repeats" not in flax and not OWN_SETTINGS.isdisjoint(flax)


def tokenizer(vocab_size):
    """GPT-2's tokenizer, where the vocabulary has room for it."""
    has_room = type(vocab_size) is int and vocab_size >= NUM_TOKENS
    return gpt2_tokenizer() if has_room else None


BWETAF_V2 = Architecture(
    name="BwETAFv2",
    model_type=CONFIGURATION.model_type,
    keras=KerasClasses(
        *(
            KerasClass("keras_bwetaf", "models.bwetaf_v2", name, default)
            for name, default in (
                ("BwETAFV2Backbone", "bw_etafv2_backbone"),
                ("BwETAFV2CausalLM", "bw_etafv2_causal_lm"),
                (
                    "BwETAFV2CausalLMPreprocessor",
                    "bw_etafv2_causal_lm_preprocessor",
                ),
                ("BwETAFV2Tokenizer", "bw_etafv2_tokenizer"),
            )
        )
    ),
    auto_map={
        "AutoConfig": "configuration_bwetaf_v2.BwETAFV2Config",
        "AutoModel": "modeling_bwetaf_v2.BwETAFV2Model",
        "AutoModelForCausalLM": "modeling_bwetaf_v2.BwETAFV2ForCausalLM",
    },
    shared_code=("configuration_bwetaf", "modeling_bwetaf"),
    recognizes_flax=recognizes_flax,
    tensors=tensors,
    tokenizer=tokenizer,
    **CONFIGURATION.functions,
)
