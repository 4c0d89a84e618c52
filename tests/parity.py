"""The original and the port with the same weights, side by side."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from keras_bwetaf.layers.rotary_embedding import (
    inverse_frequencies,
    rotary_angles,
)
from keras_bwetaf.models import BwETAFBackbone, BwETAFCausalLM


def relative_l2(received, expected):
    """Norm of the difference over the norm of what is expected."""
    received = np.asarray(received, "float64")
    expected = np.asarray(expected, "float64")
    assert received.shape == expected.shape
    assert np.isfinite(received).all()
    return np.linalg.norm(received - expected) / np.linalg.norm(expected)


def weights_by_path(params):
    """The original's parameters under the paths of Keras's variables.

    Written out here, apart from the converters' table, so that the one
    checks the other. Kernels are `(outputs, inputs)` in Keras.
    """
    params = jax.tree.map(np.asarray, params["params"])
    weights = {"token_embedding/embeddings": params["emb"]["embedding"]}
    for i in range(len(params) - 1):
        block = params[f"blocks_{i}"]
        value, gate = np.split(block["d1"]["w"], 2, axis=-1)
        value_bias, gate_bias = np.split(block["d1"]["b"][0, 0], 2)
        attention = block["attn"]
        layer = {
            "attention_norm/scale": block["ln1"]["scale"],
            "self_attention/query/kernel": attention["q_dense"]["w"].T,
            "self_attention/key/kernel": attention["k_dense"]["w"].T,
            "self_attention/value/kernel": attention["v_dense"]["w"].T,
            "self_attention/attention_output/kernel": attention["d_out"]["w"].T,
            "self_attention/attention_output/bias": attention["d_out"]["b"][
                0, 0
            ],
            "feedforward_norm/scale": block["ln2"]["scale"],
            "feedforward/intermediate/kernel": value.T,
            "feedforward/intermediate/bias": value_bias,
            "feedforward/gate/kernel": gate.T,
            "feedforward/gate/bias": gate_bias,
            "feedforward/output/kernel": block["d2"]["w"].T,
            "feedforward/output/bias": block["d2"]["b"][0, 0],
        }
        for path, weight in layer.items():
            weights[f"transformer_layer_{i}/{path}"] = weight
    return weights


def port(manager, dtype="float32", **config):
    """The same model in Keras, `BwETAFCausalLM`."""
    data = manager.data
    heads = data["num_heads"]
    repeats = data["gqa_repeats"]
    backbone = BwETAFBackbone(
        **{
            "vocabulary_size": data["vocab_size"],
            "num_layers": data["num_blocks"],
            "num_query_heads": heads,
            "num_key_value_heads": (
                heads // repeats
                if isinstance(heads, int)
                else [n // repeats for n in heads]
            ),
            "hidden_dim": data["attention_dim"],
            "intermediate_dim": data["ff_dim"],
            "max_sequence_length": data["max_len"],
            "dropout": data["dropout_rate"],
            "rope_dtype": None,
            "dtype": dtype,
            **config,
        }
    )
    weights = weights_by_path(manager.params)
    variables = {v.path: v for v in backbone.weights}
    assert set(variables) == set(weights)
    for path, weight in weights.items():
        variables[path].assign(weight)
    return BwETAFCausalLM(backbone)


def document_numbers(token_ids):
    """1, 2, ...: a document ends with token 0, which belongs to it."""
    ends = (np.asarray(token_ids) == 0).astype("int32")
    return 1 + np.cumsum(ends, axis=1) - ends


def float64_logits(manager, token_ids, angle_dtype):
    """The model in float64, but with angles rounded to `angle_dtype`.

    Args:
        manager: The original's model.
        token_ids: int array `(length,)`.
        angle_dtype: str.

    Returns:
        float64 array `(length, vocabulary)`.
    """
    params = jax.tree.map(
        lambda x: np.asarray(x, "float64"), manager.params["params"]
    )
    num_heads = manager.data["num_heads"]
    repeats = manager.data["gqa_repeats"]
    length = len(token_ids)
    causal = np.tri(length, dtype="bool")

    def rotate(x):
        angles = rotary_angles(
            jnp.arange(length),
            inverse_frequencies(x.shape[-1], 10000.0),
            angle_dtype,
        )
        angles = np.asarray(angles, "float64")
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin], axis=-1
        )

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-8) * scale

    def heads(x, count):
        return x.reshape(length, count, -1).swapaxes(0, 1)

    x = rotate(params["emb"]["embedding"][token_ids])
    x = x.astype(ml_dtypes.bfloat16).astype("float64")
    for i in range(manager.num_blocks):
        block = params[f"blocks_{i}"]
        attention = block["attn"]
        y = norm(x, block["ln1"]["scale"])
        query = heads(rotate(y @ attention["q_dense"]["w"]), num_heads)
        key = heads(
            rotate(y @ attention["k_dense"]["w"]), num_heads // repeats
        ).repeat(repeats, axis=0)
        value = heads(
            y @ attention["v_dense"]["w"], num_heads // repeats
        ).repeat(repeats, axis=0)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])
        scores = np.where(causal, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ value
        y = y.swapaxes(0, 1).reshape(length, -1)
        x = x + y @ attention["d_out"]["w"] + attention["d_out"]["b"][0]
        y = norm(x, block["ln2"]["scale"])
        inner = y @ block["d1"]["w"] + block["d1"]["b"][0]
        y, gate = np.split(inner, 2, axis=-1)
        y = y * gate / (1 + np.exp(-gate))
        x = x + y @ block["d2"]["w"] + block["d2"]["b"][0]
    return x @ params["emb"]["embedding"].T
