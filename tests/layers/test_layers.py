"""Each layer against its counterpart in the original, and its config."""

import inspect

import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest

from keras_bwetaf.layers import (
    FeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    RMSNormalization,
    RotaryEmbedding,
    TransformerBlock,
)
from keras_bwetaf.layers.dense import product
from keras_bwetaf.layers.grouped_query_attention import _attend_to_slots
from keras_bwetaf.layers.initializers import normal, skip_initialization
from keras_bwetaf.layers.rotary_embedding import (
    inverse_frequencies,
    rotary_angles,
)
from tests import original
from tests.parity import relative_l2, weights_by_path

LENGTH = 1024
WIDTH = 96


def random(*shape, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype)


@pytest.fixture(scope="module")
def block_params():
    """Random parameters of a block of the original, without its `params`."""
    manager = original.manager(
        num_heads=8,
        attention_dim=WIDTH,
        vocab_size=8,
        num_blocks=1,
        ff_dim=160,
        gqa_repeats=2,
    )
    return manager.params["params"]["blocks_0"]


def assign(layer, params, prefix):
    """Moves the parameters of a block into a layer, by path."""
    params = {"params": {"emb": {"embedding": 0}, "blocks_0": params}}
    weights = {
        path.removeprefix("transformer_layer_0/"): weight
        for path, weight in weights_by_path(params).items()
    }
    for variable in layer.weights:
        path = variable.path.removeprefix("block/")
        assert path.startswith(prefix)
        variable.assign(weights[path])


def rotary_layers(max_wavelength=10000.0, rope_dtype=None):
    return {
        name: RotaryEmbedding(
            max_wavelength=max_wavelength, rope_dtype=rope_dtype, name=name
        )
        for name in ("query_rotary", "key_rotary")
    }


def attention_layer(**changes):
    return GroupedQueryAttention(
        **{
            "num_query_heads": 8,
            "num_key_value_heads": 4,
            "initializer_range": 0.02,
            **rotary_layers(),
            "name": "self_attention",
            **changes,
        }
    )


def feed_forward_layer(**changes):
    return FeedForward(
        **{
            "intermediate_dim": 160,
            "initializer_range": 0.02,
            "name": "feedforward",
            **changes,
        }
    )


def causal_mask(batch_size=1):
    return np.tile(np.tri(LENGTH, dtype="bool"), (batch_size, 1, 1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [768, 384, 63, 2])
def test_rotary_angles_are_the_original_bits(width, dtype):
    """Positions, frequencies and products in the activations' dtype."""
    pairs = width // 2
    frequencies = 10000.0 ** (-jnp.arange(0, pairs, 1, dtype="float32") / pairs)
    expected = jnp.arange(2048, dtype=dtype)[:, None] * frequencies.astype(
        dtype
    )
    assert expected.dtype == dtype
    angles = rotary_angles(
        jnp.arange(2048), inverse_frequencies(width, 10000.0), dtype
    )
    assert angles.dtype == "float32"
    np.testing.assert_array_equal(angles, expected.astype("float32"))
    # Rounding survives compilation.
    compiled = jax.jit(rotary_angles, static_argnums=2)(
        jnp.arange(2048), inverse_frequencies(width, 10000.0), dtype
    )
    np.testing.assert_array_equal(compiled, angles)
    if dtype == "bfloat16":
        exact = np.cos(np.asarray(angles, "float64"))
        np.testing.assert_array_equal(
            jnp.cos(expected), exact.astype(ml_dtypes.bfloat16)
        )


def test_rope_dtype_overrides_the_compute_dtype():
    layer = RotaryEmbedding(
        max_wavelength=10000.0, rope_dtype="float32", dtype="bfloat16"
    )
    x = random(1, LENGTH, WIDTH, dtype=ml_dtypes.bfloat16)
    exact = RotaryEmbedding(max_wavelength=10000.0, rope_dtype=None)
    assert relative_l2(layer(x), exact(x.astype("float32"))) < 0.003
    rounded = RotaryEmbedding(
        max_wavelength=10000.0, rope_dtype=None, dtype="bfloat16"
    )
    assert relative_l2(rounded(x), exact(x.astype("float32"))) > 0.05


@pytest.mark.parametrize("width", [WIDTH, 63])
def test_rotary_embedding(width):
    x = random(2, LENGTH, width)
    layer = RotaryEmbedding(max_wavelength=10000.0, rope_dtype=None)
    expected = original.layers.RoPE(jnp.asarray(x))
    np.testing.assert_array_equal(layer(x), expected)
    if width % 2:
        np.testing.assert_array_equal(layer(x)[..., -1], x[..., -1])
    # Positions of the caller's.
    positions = np.arange(LENGTH)[None, ::-1].repeat(2, axis=0)
    flipped = layer(x[:, ::-1], positions)[:, ::-1]
    np.testing.assert_array_equal(flipped, expected)


@pytest.mark.parametrize("shape", [(1, 0, 16), (0, 4, 16)])
def test_no_rows_or_no_tokens(shape):
    """The first layer behind the embedding says so."""
    layer = RotaryEmbedding(max_wavelength=10000.0, rope_dtype=None)
    with pytest.raises(ValueError, match="at least one token. Received: inp"):
        layer(np.zeros(shape, "float32"))


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_rms_normalization(precision, block_params):
    params = block_params["ln1"]
    norm = original.layers.RMSNorm(dtype=jnp.float32)
    x = random(2, LENGTH, WIDTH)
    if precision:
        x = x.astype(precision)
    expected = norm.apply({"params": params}, x)
    layer = RMSNormalization(epsilon=1e-8, precision=precision)
    layer.build(x.shape)
    layer.scale.assign(params["scale"])
    received = layer(x.astype("float32"))
    if precision:
        np.testing.assert_array_equal(received, expected)
    else:
        assert relative_l2(received, expected) < 1e-6
    compiled = jax.jit(lambda x: layer(x))(x.astype("float32"))
    assert relative_l2(compiled, expected) < 1e-6


def test_feed_forward(block_params):
    x = random(2, LENGTH, WIDTH)
    inner = x @ block_params["d1"]["w"] + block_params["d1"]["b"]
    value, gate = jnp.split(inner, 2, axis=-1)
    expected = jax.nn.swish(gate) * value
    expected = expected @ block_params["d2"]["w"] + block_params["d2"]["b"]
    layer = feed_forward_layer()
    layer.build(x.shape)
    variables = {
        "feedforward/" + "/".join(v.path.split("/")[-2:]): v
        for v in layer.weights
    }
    params = {"emb": {"embedding": 0}, "blocks_0": block_params}
    weights = weights_by_path({"params": params})
    for path, variable in variables.items():
        variable.assign(weights[f"transformer_layer_0/{path}"])
    assert relative_l2(layer(x), expected) < 1e-6


@pytest.mark.parametrize("key_value_heads", [8, 4, 1])
def test_attention(key_value_heads):
    x = random(2, LENGTH, WIDTH)
    theirs = original.layers.Attention(
        8, WIDTH, duplicates=8 // key_value_heads, dtype=jnp.float32
    )
    mask = causal_mask(2)
    params = theirs.init(jax.random.key(0), x, mask)
    params = original.randomize(params)
    expected = theirs.apply(params, x, mask)

    layer = attention_layer(num_key_value_heads=key_value_heads)
    layer.build(x.shape)
    params = params["params"]
    layer.query.kernel.assign(params["q_dense"]["w"].T)
    layer.key.kernel.assign(params["k_dense"]["w"].T)
    layer.value.kernel.assign(params["v_dense"]["w"].T)
    layer.attention_output.kernel.assign(params["d_out"]["w"].T)
    layer.attention_output.bias.assign(params["d_out"]["b"][0, 0])
    received = layer(x, padding_mask=np.ones((2, LENGTH), "int32"))
    assert relative_l2(received, expected) < 1e-5


def block_layer(**changes):
    return TransformerBlock(
        attention_layer(),
        feed_forward_layer(),
        **{
            "dropout": 0.5,
            "layer_norm_epsilon": 1e-8,
            "name": "block",
            **changes,
        },
    )


@pytest.mark.parametrize("input_precision", [None, "bfloat16"])
def test_block(block_params, input_precision):
    theirs = original.layers.Block(
        num_heads=8,
        attention_dim=WIDTH,
        ff_dim=160,
        dropout_rate=0.5,
        gqa_repeats=2,
        dtype=jnp.float32,
    )
    x = random(2, LENGTH, WIDTH)
    expected = theirs.apply(
        {"params": block_params},
        x.astype(input_precision or "float32"),
        causal_mask(2),
        train=False,
    )
    layer = block_layer(input_precision=input_precision)
    mask = np.ones((2, LENGTH), "int32")
    layer(x, padding_mask=mask)
    assign(layer, block_params, prefix="")
    assert relative_l2(layer(x, padding_mask=mask), expected) < 1e-5


def test_dropout_follows_attention_only(block_params):
    x = random(1, 64, WIDTH)
    mask = np.ones((1, 64), "int32")
    layer = block_layer()
    layer(x, padding_mask=mask)
    assign(layer, block_params, prefix="")
    attended = layer.attention(layer.attention_norm(x), padding_mask=mask)
    # With the feed-forward network silenced, what is left is x + dropout(a).
    layer.feedforward.output_dense.kernel.assign(np.zeros((WIDTH, 160)))
    layer.feedforward.output_dense.bias.assign(np.zeros(WIDTH))
    change = np.asarray(layer(x, padding_mask=mask, training=True)) - x
    is_dropped = np.abs(change) < 1e-6
    assert 0.45 < is_dropped.mean() < 0.55
    np.testing.assert_allclose(
        change[~is_dropped],
        2 * np.asarray(attended)[~is_dropped],
        rtol=1e-3,
        atol=1e-5,
    )


def test_skip_initialization():
    with skip_initialization():
        assert isinstance(normal(1.0), keras.initializers.Zeros)
    assert isinstance(normal(1.0), keras.initializers.RandomNormal)


CONFIGS = {
    RotaryEmbedding: dict(
        max_wavelength=500.0, rope_dtype="bfloat16", num_heads=4
    ),
    MixtureOfExperts: dict(
        num_experts=4,
        num_experts_per_token=2,
        intermediate_dim=24,
        initializer_range=0.5,
        dispatch="original_token",
        capacity=2.0,
        loss_weights=(0.1, 0.2),
        router_noise_steps=5,
    ),
    RMSNormalization: dict(epsilon=1e-4, precision="bfloat16"),
    FeedForward: dict(
        intermediate_dim=24, initializer_range=0.5, use_inner_bias=False
    ),
    GroupedQueryAttention: dict(
        num_query_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    ),
    TransformerBlock: dict(
        dropout=0.3,
        layer_norm_epsilon=1e-4,
        input_precision="bfloat16",
        residual_scale=0.5,
    ),
}


@pytest.mark.parametrize("cls", CONFIGS)
def test_config_holds_every_argument(cls):
    arguments = set(inspect.signature(cls).parameters) - {"kwargs"}
    values = CONFIGS[cls]
    parts = {}
    if cls is GroupedQueryAttention:
        parts = rotary_layers(500.0, "float32")
    if cls is TransformerBlock:
        parts = {
            "attention": attention_layer(),
            "feedforward": feed_forward_layer(),
        }
    assert arguments == set(values) | set(parts)
    layer = cls(**values, **parts, dtype="mixed_bfloat16", name="one")
    layer.build((None, None, 16))
    config = layer.get_config()
    assert values.items() <= config.items()
    assert arguments <= set(config)
    for name, part in parts.items():
        assert part.get_config().items() <= config[name]["config"].items()
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(again) is cls
    assert again.get_config() == config
    assert [v.path for v in again.weights] == [v.path for v in layer.weights]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32, 33])
def test_products_of_a_decode_step(batch_size):
    """By rows or by columns, it is the same product."""
    inputs = random(batch_size, 1, 40)
    kernel = random(70, 40, seed=1)
    received = jax.jit(product)(inputs, kernel)
    assert received.shape == (batch_size, 1, 70)
    assert relative_l2(received, inputs @ kernel.T) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_reads_the_cache_as_several_do(dtype):
    """Attention of one row alone, and in a batch, is the same."""
    query = jnp.asarray(random(2, 1, 6, 8), dtype)
    key = jnp.asarray(random(2 * 3, 8, 20, seed=1), dtype)
    value = jnp.asarray(random(2 * 3, 20, 8, seed=2), dtype)
    mask = np.broadcast_to(np.arange(20) < 15, (2, 1, 20))
    together = _attend_to_slots(query, key, value, mask)
    tolerance = 1e-6 if dtype == "float32" else 4e-3
    for i in range(2):
        heads = slice(3 * i, 3 * i + 3)
        alone = _attend_to_slots(
            query[i : i + 1], key[heads], value[heads], mask[i : i + 1]
        )
        assert alone.dtype == dtype
        assert relative_l2(alone[0], together[i]) < tolerance
