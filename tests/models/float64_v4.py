"""Version 4 in float64, all experts computed for each token, by its words."""

import numpy as np


def float64_logits(backbone, ids):
    """Logits of the weights of a backbone, by the rule that it has."""
    weights = {
        v.path: np.asarray(v.numpy(), "float64") for v in backbone.weights
    }
    embeddings = weights["token_embedding/embeddings"]
    length = ids.shape[1]
    x = embeddings[ids]

    def norm(x, name):
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-8)
        return x / rms * weights[f"{name}/scale"]

    def turned(x):  # (batch, heads, length, head_dim)
        half = x.shape[-1] // 2
        base = backbone.rope_max_wavelength
        angles = np.arange(length)[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = x[..., :half], x[..., half : 2 * half]
        pairs = [first * cos - second * sin, second * cos + first * sin]
        return np.concatenate([*pairs, x[..., 2 * half :]], -1)

    for i in range(backbone.num_layers):
        block = f"transformer_layer_{i}"
        attention = f"{block}/self_attention"
        y = norm(x, f"{block}/attention_norm")

        def heads(name, number, y=y, attention=attention):
            kernel = weights[f"{attention}/{name}/kernel"]
            y = (y @ kernel.T).reshape(*ids.shape, number, -1)
            return y.swapaxes(1, 2)

        queries, keys = backbone.num_query_heads, backbone.num_key_value_heads
        query = turned(heads("query", queries))
        key = turned(heads("key", keys)).repeat(queries // keys, axis=1)
        value = heads("value", keys).repeat(queries // keys, axis=1)
        scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])
        scores = np.where(np.tri(length, dtype="bool"), scores, -np.inf)
        y = (softmax(scores) @ value).swapaxes(1, 2).reshape(x.shape)
        name = f"{attention}/attention_output"
        x = x + y @ weights[f"{name}/kernel"].T + weights[f"{name}/bias"]
        y = norm(x, f"{block}/feedforward_norm").reshape(-1, x.shape[-1])
        prefix = f"{block}/feedforward/"
        parts = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        x = x + mixture(backbone, parts, y).reshape(x.shape)
    return norm(x, "final_norm") @ embeddings.T


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def expert(parts, e, x):
    gate = x @ parts["gate_kernel"][e] + parts["gate_bias"][e]
    inner = x @ parts["intermediate_kernel"][e] + parts["intermediate_bias"][e]
    inner = inner * gate / (1 + np.exp(-gate))
    return inner @ parts["output_kernel"][e] + parts["output_bias"][e]


def mixture(backbone, parts, x):
    if backbone.num_experts == 1:
        return expert(parts, 0, x)
    logits = x @ parts["router"].T
    logits = logits - logits.mean(-1, keepdims=True)
    weights = softmax(logits / (logits.std(-1, keepdims=True) + 1e-3))
    result, last = np.zeros_like(x), backbone.num_experts - 1
    for token, row in enumerate(x):
        order = np.argsort(weights[token], kind="stable")
        chosen = sorted(order[-backbone.num_experts_per_token :])
        for i, e in enumerate(chosen):
            y = expert(parts, e, row)
            if backbone.expert_dispatch == "original_token" and i > 0:
                works = i == 1 and chosen[-1] == last
                y = expert(parts, last, row if works else 0 * row)
            result[token] += weights[token, e] * y
    return result
