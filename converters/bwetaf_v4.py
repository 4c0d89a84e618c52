"""Version 4: its configuration, and its table of stacked tensors."""

from dataclasses import replace

from converters import bwetaf_v3
from converters.architecture import (
    Architecture,
    KerasClass,
    KerasClasses,
    Kind,
)
from converters.bwetaf_v3_config import REPEATS, SharedHeads
from converters.configuration import (
    ANGLE,
    LAYERS,
    OPTIONAL_DEVIATION,
    POSITIVE,
    RATE,
    SIZE,
    Field,
)
from converters.errors import refuse
from converters.transforms import Layer

DISPATCH = (
    "'exact', 'original_token' or 'original_batch'",
    lambda value: value in ("exact", "original_token", "original_batch"),
)
# Canonical name, name in Flax, name in Keras, what it may be, what it is in
# the original where nothing is said.
FIELDS = (
    Field("vocab_size", "vocab_size", "vocabulary_size", *SIZE),
    Field("num_hidden_layers", "num_blocks", "num_layers", *LAYERS),
    Field("num_attention_heads", "num_heads", "num_query_heads", *SIZE),
    Field("num_key_value_heads", None, "num_key_value_heads", *SIZE),
    Field("hidden_size", "attention_dim", "hidden_dim", *SIZE),
    Field("intermediate_size", "ff_dim", "intermediate_dim", *SIZE),
    Field("num_local_experts", "num_experts", "num_experts", *SIZE),
    Field("num_experts_per_tok", "top_k", "num_experts_per_token", *SIZE),
    Field("expert_capacity", "capacity", "expert_capacity", *POSITIVE),
    Field("expert_dispatch", None, "expert_dispatch", *DISPATCH, "exact"),
    Field("max_position_embeddings", None, "max_sequence_length", *SIZE, 8192),
    Field("hidden_dropout", "dropout_rate", "dropout", *RATE, 0.0),
    Field("rope_theta", "theeta", "rope_max_wavelength", *POSITIVE),
    Field("rope_dtype", None, "rope_dtype", *ANGLE, None),
    Field("rms_norm_eps", None, "layer_norm_epsilon", *POSITIVE, 1e-8),
    Field(
        "initializer_range",
        None,
        "initializer_range",
        *OPTIONAL_DEVIATION,
        None,
    ),
)
# What the original's file has no place for, and no need: its context is not
# limited, and its rules are its own.
UNSAID = {"expert_dispatch", "max_position_embeddings"}
GROUPS = {
    "arc": (
        *("num_heads", "attention_dim", "num_blocks", "ff_dim"),
        "vocab_size",
    ),
    "attn": ("attn_chunks", REPEATS, "theeta"),
    "moe": ("num_experts", "top_k", "capacity"),
}


class Version4(SharedHeads):
    """A configuration in groups."""

    def config_from_flax(self, flax, *, source="Flax config", **others):
        flat = {"dropout_rate": flax.get("dropout_rate", 0.0)}
        problems = []
        for group, names in GROUPS.items():
            values = flax.get(group)
            values = values if isinstance(values, dict) else {}
            if missing := [name for name in names if name not in values]:
                problems.append(
                    f"{group} must be an object with {', '.join(names)}. "
                    f"Missing: {', '.join(missing)}"
                )
            flat |= {name: values[name] for name in names if name in values}
        refuse(source, problems)
        return super().config_from_flax(flat, source=source, **others)

    def config_to_flax(self, config, *, source="config"):
        flat = super().config_to_flax(config, source=source) | self.neutral
        groups = {
            group: {name: flat[name] for name in names}
            for group, names in GROUPS.items()
        }
        return groups | {"dropout_rate": flat["dropout_rate"]}

    def flax_settings(self, config, *, source="config"):
        return self.config_to_flax(config, source=source)

    def not_in_flax(self, config):
        said = {each.name: each.original for each in self.fields}
        unsaid = {name: said[name] for name in UNSAID}
        return super().not_in_flax(config | unsaid)

    def check_equal(self, config, written, *, source="config"):
        unsaid = {name: config[name] for name in UNSAID}
        super().check_equal(config, written | unsaid, source=source)

    def head_problems(self, values, names):
        problems = super().head_problems(values, names)
        chosen, experts = "num_experts_per_tok", "num_local_experts"
        if values[chosen] > values[experts]:
            problems.append(
                f"{names[chosen]} must be at most {names[experts]}. Received: "
                f"{values[chosen]} and {values[experts]}"
            )
        return problems


CONFIGURATION = Version4(
    model_type="bwetaf_v4",
    causal_lm="BwETAFV4ForCausalLM",
    fields=FIELDS,
    flax_order=(),
    neutral={"attn_chunks": 1},
)


def _expert(flax, keras, name):
    """The row of a tensor that has one part for each expert."""
    kind = Kind(f"{flax}_{name}", NAMES[name], f"{keras}_{name}")
    letters = {"kernel": "e f d" if flax == "out" else "e d f"}
    letters["bias"] = "e d" if flax == "out" else "e f"
    projection = {"intermediate": "up", "output": "down"}.get(keras, keras)
    return (
        kind,
        letters[name],
        "MoE_FFN",
        f"mlp.experts.{projection}_proj",
        "feedforward",
    )


NAMES = {"kernel": "weight", "bias": "bias"}
EXPERT_ROWS = tuple(
    _expert(flax, keras, name)
    for flax, keras in (
        ("gate", "gate"),
        ("key", "intermediate"),
        ("out", "output"),
    )
    for name in NAMES
)
ROUTER = Kind("router", "weight", "router", (bwetaf_v3.TURN,))
ROUTER_ROW = (ROUTER, "d e", "MoE_FFN", "mlp.router", "feedforward")
# Attention and norms are those of version 3.
FEED_FORWARD = ("d1", "d2")
SHARED_ROWS = tuple(
    row for row in bwetaf_v3.LAYER_ROWS if row[2] not in FEED_FORWARD
)
FINAL_NORM = (bwetaf_v3.SCALE, "d", "f_ln", "model.norm", "final_norm")


def tensors(config):
    """Lists the tensors of a model; see `Architecture`."""
    num_experts = config["num_local_experts"]
    rows = (*SHARED_ROWS, *EXPERT_ROWS)
    if num_experts > 1:
        rows += (ROUTER_ROW,)
    embedding, *of_layers, final_norm = bwetaf_v3.tensors(
        config, rows, (*bwetaf_v3.MODEL_ROWS, FINAL_NORM), {"e": num_experts}
    )
    num_layers = config["num_hidden_layers"]
    return [
        embedding,
        *(
            _stacked(tensor, i // len(rows), num_layers)
            for i, tensor in enumerate(of_layers)
        ),
        final_norm,
    ]


def _stacked(tensor, layer, num_layers):
    """The tensor of a layer, in Flax a part of that of all layers."""
    root, _, *path = tensor.flax
    kind = tensor.kind
    return replace(
        tensor,
        kind=replace(kind, from_flax=(Layer(layer), *kind.from_flax)),
        flax=(root, "blocks", "block", *path),
        flax_shape=(num_layers, *tensor.flax_shape),
    )


def optimizer_state(chain):
    """The state of optax's `multi_transform`, with one group of weights."""
    return {"inner_states": {"default": {"inner_state": chain}}}


BWETAF_V4 = Architecture(
    name="BwETAFv4",
    model_type=CONFIGURATION.model_type,
    keras=KerasClasses(
        *(
            KerasClass("keras_bwetaf", "models.bwetaf_v4", name, default)
            for name, default in (
                ("BwETAFV4Backbone", "bw_etafv4_backbone"),
                ("BwETAFV4CausalLM", "bw_etafv4_causal_lm"),
                (
                    "BwETAFV4CausalLMPreprocessor",
                    "bw_etafv4_causal_lm_preprocessor",
                ),
                ("BwETAFV4Tokenizer", "bw_etafv4_tokenizer"),
            )
        )
    ),
    auto_map={
        "AutoConfig": "configuration_bwetaf_v4.BwETAFV4Config",
        "AutoModel": "modeling_bwetaf_v4.BwETAFV4Model",
        "AutoModelForCausalLM": "modeling_bwetaf_v4.BwETAFV4ForCausalLM",
    },
    shared_code=("configuration_bwetaf", "modeling_bwetaf"),
    recognizes_flax=lambda flax: "arc" in flax,
    tensors=tensors,
    optimizer_state=optimizer_state,
    **CONFIGURATION.functions,
)
