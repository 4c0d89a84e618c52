"""The tensors of the version 3 architecture: one table for every direction."""

from converters.architecture import (
    Architecture,
    KerasClass,
    KerasClasses,
    Kind,
    Tensor,
)
from converters.bwetaf_v3_config import CONFIGURATION
from converters.configuration import per_layer
from converters.transforms import Half, Squeeze, Transpose

TURN, FLAT, VALUE, GATE = Transpose(), Squeeze(), Half(0), Half(1)

EMBEDDING = Kind("embedding", "weight", "embeddings")
SCALE = Kind("scale", "weight", "scale")
KERNEL = Kind("w", "weight", "kernel", (TURN,))
BIAS = Kind("b", "bias", "bias", (FLAT,))
# The original's first feed-forward product holds two tensors of ours.
VALUE_KERNEL = Kind("w", "weight", "kernel", (VALUE, TURN))
VALUE_BIAS = Kind("b", "bias", "bias", (FLAT, VALUE))
GATE_KERNEL = Kind("w", "weight", "kernel", (GATE, TURN))
GATE_BIAS = Kind("b", "bias", "bias", (FLAT, GATE))

# Kind, sizes in Flax, path in Flax, canonical name (also PyTorch's), path in
# Keras. d: hidden, k: keys and values of all heads, f: intermediate, v:
# vocabulary, ff: both halves.
MODEL_ROWS = (
    (EMBEDDING, "v d", "emb", "model.embed_tokens", "token_embedding"),
)
LAYER_ROWS = (
    (SCALE, "d", "ln1", "input_layernorm", "attention_norm"),
    (KERNEL, "d d", "attn/q_dense", "self_attn.q_proj", "self_attention/query"),
    (KERNEL, "d k", "attn/k_dense", "self_attn.k_proj", "self_attention/key"),
    (KERNEL, "d k", "attn/v_dense", "self_attn.v_proj", "self_attention/value"),
    (
        KERNEL,
        "d d",
        "attn/d_out",
        "self_attn.o_proj",
        "self_attention/attention_output",
    ),
    (
        BIAS,
        "1 1 d",
        "attn/d_out",
        "self_attn.o_proj",
        "self_attention/attention_output",
    ),
    (SCALE, "d", "ln2", "post_attention_layernorm", "feedforward_norm"),
    (VALUE_KERNEL, "d ff", "d1", "mlp.up_proj", "feedforward/intermediate"),
    (VALUE_BIAS, "1 1 ff", "d1", "mlp.up_proj", "feedforward/intermediate"),
    (GATE_KERNEL, "d ff", "d1", "mlp.gate_proj", "feedforward/gate"),
    (GATE_BIAS, "1 1 ff", "d1", "mlp.gate_proj", "feedforward/gate"),
    (KERNEL, "f d", "d2", "mlp.down_proj", "feedforward/output"),
    (BIAS, "1 1 d", "d2", "mlp.down_proj", "feedforward/output"),
)


def tensors(
    config, layer_rows=LAYER_ROWS, model_rows=MODEL_ROWS, more_sizes=None
):
    """Lists the tensors of a model; see `Architecture`.

    Args:
        config: dict. A canonical configuration.
        layer_rows: tuple of rows as in `LAYER_ROWS`.
        model_rows: tuple of rows as in `MODEL_ROWS`. Layers come after the
            first.
        more_sizes: dict of letter to int, or None. Sizes that only these
            rows have.
    """
    sizes = {
        **(more_sizes or {}),
        "1": 1,
        "v": config["vocab_size"],
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "ff": 2 * config["intermediate_size"],
    }
    first, *last = (_tensor(row, sizes) for row in model_rows)
    result = [first]
    heads = per_layer(config, "num_attention_heads")
    shared = per_layer(config, "num_key_value_heads")
    for layer in range(config["num_hidden_layers"]):
        sizes["k"] = sizes["d"] // heads[layer] * shared[layer]
        prefixes = (
            f"blocks_{layer}/",
            f"model.layers.{layer}.",
            f"transformer_layer_{layer}/",
        )
        result += [_tensor(row, sizes, prefixes) for row in layer_rows]
    return result + last


def _tensor(row, sizes, prefixes=("", "", "")):
    kind, letters, *paths = row
    flax, name, keras = map("".join, zip(prefixes, paths, strict=True))
    return Tensor(
        kind=kind,
        flax=("params", *flax.split("/"), kind.flax),
        flax_shape=tuple(sizes[letter] for letter in letters.split()),
        name=f"{name}.{kind.name}",
        keras=f"{keras}/{kind.keras}",
    )


BWETAF_V3 = Architecture(
    name="BwETAFv3",
    model_type=CONFIGURATION.model_type,
    keras=KerasClasses(
        backbone=KerasClass(
            "keras_bwetaf",
            "models.backbone",
            "BwETAFBackbone",
            "bw_etaf_backbone",
        ),
        causal_lm=KerasClass(
            "keras_bwetaf",
            "models.causal_lm",
            "BwETAFCausalLM",
            "bw_etaf_causal_lm",
        ),
        preprocessor=KerasClass(
            "keras_bwetaf",
            "models.causal_lm_preprocessor",
            "BwETAFCausalLMPreprocessor",
            "bw_etaf_causal_lm_preprocessor",
        ),
        tokenizer=KerasClass(
            "keras_bwetaf",
            "models.tokenizer",
            "BwETAFTokenizer",
            "bw_etaf_tokenizer",
        ),
    ),
    auto_map={
        "AutoConfig": "configuration_bwetaf.BwETAFConfig",
        "AutoModel": "modeling_bwetaf.BwETAFModel",
        "AutoModelForCausalLM": "modeling_bwetaf.BwETAFForCausalLM",
    },
    recognizes_flax=lambda flax: True,
    tensors=tensors,
    **CONFIGURATION.functions,
)
