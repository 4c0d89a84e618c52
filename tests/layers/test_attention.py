"""Every kernel of attention against a naive one, and which one is chosen."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused_attention

from keras_bwetaf.layers import (
    GroupedQueryAttention,
    RotaryEmbedding,
    attention,
    attention_kernel,
    chosen_attention,
)
from keras_bwetaf.layers.attention import (
    document_attention,
    document_mask,
    plain_attention,
)
from tests.parity import relative_l2

NUM_HEADS = 4
HEAD_DIM = 16
LENGTH = 201  # Neither kernel's chunks divide it.
# One row is packed to the end, one has padding at both ends and between.
DOCUMENTS = np.repeat(
    [1, 2, 3, 4, 0, 7, 0, 8, 0],
    [90, 1, 60, 50, 17, 83, 5, 66, 30],
).reshape(2, LENGTH)
KERNELS = {
    "plain": functools.partial(document_attention),
    "plain, weights twice": functools.partial(
        document_attention, keep_weights=False
    ),
    "splash": functools.partial(document_attention),
    "cudnn": functools.partial(document_attention),
}


def run(name, *arguments):
    """Outputs, and gradients by query, key and value."""

    @jax.jit
    def with_gradients(query, key, value, cotangent, documents):
        outputs, gradient = jax.vjp(
            lambda *x: KERNELS[name](*x, documents), query, key, value
        )
        return outputs, *gradient(cotangent)

    with attention_kernel(name.split(",")[0]):
        results = with_gradients(*arguments)
    return [np.asarray(x, "float64") for x in results]


def naive(query, key, value, cotangent, documents):
    """What `run` returns, in float64, one row and head at a time."""
    query, key, value, cotangent = (
        np.asarray(x, "float64") for x in (query, key, value, cotangent)
    )
    group = query.shape[2] // key.shape[2]
    outputs, by_query = np.zeros_like(query), np.zeros_like(query)
    by_key, by_value = np.zeros_like(key), np.zeros_like(value)
    for b, row in enumerate(documents):
        sees = np.tri(len(row), dtype="bool") & (row[:, None] == row)
        for h in range(query.shape[2]):
            q, k, v = (
                query[b, :, h],
                key[b, :, h // group],
                value[b, :, h // group],
            )
            scores = np.where(sees, q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            outputs[b, :, h] = weights @ v
            by_value[b, :, h // group] += weights.T @ cotangent[b, :, h]
            by_weights = cotangent[b, :, h] @ v.T
            mean = (weights * by_weights).sum(axis=-1, keepdims=True)
            by_scores = weights * (by_weights - mean) / np.sqrt(q.shape[-1])
            by_query[b, :, h] = by_scores @ k
            by_key[b, :, h // group] += by_scores.T @ q
    return [outputs, by_query, by_key, by_value]


def arrays(num_key_value_heads=2, dtype="float32", seed=0):
    """Query, key, value and what the loss says of each output.

    It says nothing of padding's.
    """
    rng = np.random.default_rng(seed)

    def draw(num_heads):
        shape = (*DOCUMENTS.shape, num_heads, HEAD_DIM)
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, cotangent = draw(NUM_HEADS), draw(NUM_HEADS)
    key, value = draw(num_key_value_heads), draw(num_key_value_heads)
    is_real = (DOCUMENTS > 0)[..., None, None]
    return query, key, value, jnp.where(is_real, cotangent, 0)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, NUM_HEADS])
@pytest.mark.parametrize("name", KERNELS)
def test_parity(name, num_key_value_heads):
    inputs = arrays(num_key_value_heads)
    results = run(name, *inputs, DOCUMENTS)
    expected = naive(*inputs, DOCUMENTS)
    is_real = DOCUMENTS > 0
    for received, wanted in zip(results, expected, strict=True):
        assert np.isfinite(received).all()
        assert relative_l2(received[is_real], wanted[is_real]) < 1e-6
    for gradient in results[1:]:
        assert not gradient[~is_real].any()


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16(name):
    inputs = arrays(dtype="bfloat16")
    results = run(name, *inputs, DOCUMENTS)
    expected = naive(*inputs, DOCUMENTS)
    is_real = DOCUMENTS > 0
    for received, wanted in zip(results, expected, strict=True):
        assert relative_l2(received[is_real], wanted[is_real]) < 1e-2


@pytest.mark.parametrize("name", KERNELS)
def test_documents_are_isolated(name):
    """Another document, another loss: not a bit changes in this one."""
    inputs = arrays()
    others = arrays(seed=1)
    is_other = (DOCUMENTS == 1) | (DOCUMENTS == 4) | (DOCUMENTS == 8)
    changed = [
        jnp.where(is_other[..., None, None], 1000 * other, x)
        for x, other in zip(inputs, others, strict=True)
    ]
    for one, two in zip(
        run(name, *inputs, DOCUMENTS),
        run(name, *changed, DOCUMENTS),
        strict=True,
    ):
        np.testing.assert_array_equal(one[~is_other], two[~is_other])
        assert (one[is_other] != two[is_other]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_of_padding_is_finite(name):
    inputs = [jnp.ones_like(x) for x in arrays()]
    for result in run(name, *inputs, np.zeros_like(DOCUMENTS)):
        assert np.isfinite(result).all()


def test_document_mask():
    documents = jnp.array([[1, 1, 2, 2, 2, 0]])
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        "bool",
    )
    np.testing.assert_array_equal(document_mask(documents)[0], expected)
    np.testing.assert_array_equal(document_mask(documents, 4)[0], expected[4:])


def long_row():
    shape = (1, 1024, NUM_HEADS, HEAD_DIM)
    return jax.random.normal(jax.random.key(0), shape)


def test_plain_attention_reads_no_later_keys():
    x, documents = long_row(), jnp.ones((1, 1024), "int32")
    mask = document_mask(documents)[:, None]
    flops = [
        jax.jit(function).lower(x, x, x).compile().cost_analysis()["flops"]
        for function in (
            lambda *x: plain_attention(*x, documents),
            lambda *x: jax.nn.dot_product_attention(*x, mask=mask),
        )
    ]
    assert flops[0] < 0.6 * flops[1]


@pytest.mark.slow
@pytest.mark.parametrize("keep_weights", [False, True])
def test_keep_weights(keep_weights):
    """The gradient holds weights, or nothing larger than its inputs."""
    x, documents = long_row(), jnp.ones((1, 1024), "int32")
    _, gradient = jax.vjp(
        lambda *x: plain_attention(*x, documents, keep_weights), x, x, x
    )
    kept = sum(each.size for each in jax.tree.leaves(gradient))
    num_weights = NUM_HEADS * 1024 * (1024 + 128) // 2
    assert (kept > num_weights) == keep_weights


def test_a_gpu_gets_the_kernel_of_cudnn(monkeypatch):
    """It is in the program for CUDA, forward and backward, without scores.

    Such a program is made without a GPU: JAX is told that there is one.
    """
    on(monkeypatch, "gpu", "NVIDIA H100 80GB HBM3", "9.0")
    monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(
        fused_attention, "check_compute_capability", lambda _: True
    )
    shape = (2, LENGTH, NUM_HEADS, HEAD_DIM)
    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    documents = jax.ShapeDtypeStruct(shape[:2], "int32")

    def loss(*inputs):
        return document_attention(*inputs).astype("float32").sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, documents)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    pairs = f"x{LENGTH + 1}x{LENGTH + 1}x"
    assert f"<2x1{pairs}bf16>" in text
    assert f"x{NUM_HEADS}{pairs}" not in text


# === Which kernel ===


def on(monkeypatch, platform, kind, compute_capability=None):
    device = SimpleNamespace(
        platform=platform,
        device_kind=kind,
        compute_capability=compute_capability,
    )
    monkeypatch.setattr(attention, "_device", lambda: device)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (("cpu", "cpu"), "plain"),
        (("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "cudnn"),
        (("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "cudnn"),
        (("gpu", "NVIDIA GeForce RTX 5090", "12.0"), "cudnn"),
        (("gpu", "NVIDIA T4", "7.5"), "plain"),
        (("gpu", "Tesla V100-SXM2-16GB", "7.0"), "plain"),
        (("rocm", "AMD Instinct MI300X", "gfx942"), "plain"),
        (("gpu", "AMD Instinct MI300X", "gfx942"), "plain"),
        (("tpu", "TPU v2"), "plain"),
        (("tpu", "TPU v3"), "plain"),
        (("tpu", "TPU v4"), "splash"),
        (("tpu", "TPU v5 lite"), "splash"),
        (("tpu", "TPU v5"), "splash"),
        (("tpu", "TPU v6 lite"), "splash"),
    ],
)
def test_choice_by_device(monkeypatch, device, expected):
    on(monkeypatch, *device)
    assert chosen_attention(2048, "bfloat16") == expected


def test_choice_by_shape_and_dtype(monkeypatch):
    on(monkeypatch, "tpu", "TPU v4")
    assert chosen_attention(128, "float32") == "splash"
    assert chosen_attention(127, "float32") == "plain"
    assert chosen_attention(2048, "float16") == "plain"
    on(monkeypatch, "gpu", "NVIDIA L4", "8.9")
    assert chosen_attention(128, "float16") == "cudnn"
    assert chosen_attention(127, "float16") == "plain"
    assert chosen_attention(2048, "float32") == "plain"
    assert chosen_attention(2048, "bfloat16", head_dim=128) == "cudnn"
    assert chosen_attention(2048, "bfloat16", head_dim=136) == "plain"
    assert chosen_attention(2048, "bfloat16", head_dim=60) == "plain"


def test_choice_is_overruled(monkeypatch):
    on(monkeypatch, "tpu", "TPU v4")
    with attention_kernel("plain"):
        assert chosen_attention(2048, "bfloat16") == "plain"
        with attention_kernel("splash"):
            assert chosen_attention(1, "float16") == "splash"
    assert chosen_attention(2048, "bfloat16") == "splash"
    keras.config.disable_flash_attention()
    try:
        assert chosen_attention(2048, "bfloat16") == "plain"
    finally:
        keras.config.enable_flash_attention()
    assert chosen_attention(2048, "bfloat16") == "splash"


def test_unknown_kernel():
    with (
        pytest.raises(ValueError, match="must be one of .*name='flash'"),
        attention_kernel("flash"),
    ):
        pass


def test_choice_is_for_the_devices_of_the_program():
    devices = jax.devices()
    assert attention._device() == devices[0]
    with jax.default_device(devices[2]):
        assert attention._device() == devices[2]
    distribution = keras.distribution.DataParallel(devices=devices[3:5])
    with distribution.scope(), jax.default_device(devices[2]):
        assert attention._device() == devices[3]


def test_the_program_names_its_kernel():
    inputs = arrays()[:3]
    for name in attention.KERNELS:
        with attention_kernel(name):
            lowered = jax.jit(
                lambda *x: document_attention(*x, DOCUMENTS)
            ).lower(*inputs)
        assert f"{name}_attention" in lowered.as_text(debug_info=True)


# === In a layer, on several devices ===


def model_parallel(shape):
    mesh = keras.distribution.DeviceMesh(
        shape, ["batch", "model"], jax.devices()[: np.prod(shape)]
    )
    return keras.distribution.ModelParallel(
        layout_map=keras.distribution.LayoutMap(mesh)
    )


@pytest.mark.parametrize(
    ("shape", "rows", "heads"),
    [
        ((2, 1), 1, 4),
        ((2, 2), 1, 2),
        ((1, 4), 2, 1),  # Each gets a key/value head; there are two.
        ((1, 3), 2, 4),  # There are four heads.
        ((4, 1), 2, 4),  # There are two rows.
    ],
)
def test_splash_attention_is_split(monkeypatch, shape, rows, heads):
    """Each device works on its rows and heads, where these divide."""
    query, key, value, _ = arrays()
    with attention_kernel("splash"):
        expected = document_attention(query, key, value, DOCUMENTS)
    kernel = attention._splash_kernel
    shapes = []

    def recorded(query, *arguments):
        shapes.append(query.shape[:2])
        return kernel(query, *arguments)

    monkeypatch.setattr(attention, "_splash_kernel", recorded)
    with attention_kernel("splash"), model_parallel(shape).scope():
        # Another function for each mesh: JAX keeps compiled ones.
        split = jax.jit(lambda *x: document_attention(*x))
        received = split(query, key, value, DOCUMENTS)
    assert set(shapes) == {(rows, heads)}
    np.testing.assert_array_equal(received, expected)


def rotary_layers(rope_dtype):
    return {
        name: RotaryEmbedding(max_wavelength=10000.0, rope_dtype=rope_dtype)
        for name in ("query_rotary", "key_rotary")
    }


def test_the_layer_uses_the_kernel():
    layer = GroupedQueryAttention(
        num_query_heads=NUM_HEADS,
        num_key_value_heads=2,
        **rotary_layers(None),
        initializer_range=0.1,
    )
    x = np.random.default_rng(0).standard_normal((2, LENGTH, 32), "float32")
    expected = layer(x, padding_mask=DOCUMENTS)
    with attention_kernel("splash"):
        received = layer(x, padding_mask=DOCUMENTS)
    is_real = DOCUMENTS > 0
    assert relative_l2(received[is_real], expected[is_real]) < 1e-6
    assert (received != expected).any()


# === Rows of any length ===


def make_attention():
    layer = GroupedQueryAttention(
        num_query_heads=NUM_HEADS,
        num_key_value_heads=2,
        **rotary_layers("float32"),
        initializer_range=0.2,
    )
    layer.build((None, None, NUM_HEADS * HEAD_DIM))
    return layer


def hidden_states():
    shape = (2, LENGTH, NUM_HEADS * HEAD_DIM)
    return np.random.default_rng(0).standard_normal(shape, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["plain", "splash", "cudnn"])
@pytest.mark.parametrize(
    "shapes",
    [
        ("b, t, 64", "b, t"),
        ("b, 201, 64", "b, 201"),
        ("2, t, 64", "2, t"),
        # As Keras exports a model: each input for itself.
        ("b, t, 64", "b, u"),
    ],
)
def test_export_for_rows_of_any_length(shapes, kernel):
    layer = make_attention()
    scope = jax.export.SymbolicScope()
    arguments = [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(shape, scope=scope), dtype
        )
        for shape, dtype in zip(shapes, ("float32", "int32"), strict=True)
    ]
    is_long = "t" in shapes[0]
    with attention_kernel(kernel) if is_long else contextlib.nullcontext():
        exported = jax.export.export(jax.jit(layer))(*arguments)
    x = hidden_states()
    for length in (5, 130, LENGTH) if is_long else (LENGTH,):
        received = exported.call(x[:, :length], DOCUMENTS[:, :length])
        expected = layer(x[:, :length], DOCUMENTS[:, :length])
        assert relative_l2(received, expected) < 1e-5


def test_without_a_mask_a_row_is_one_document():
    layer, x = make_attention(), hidden_states()
    np.testing.assert_array_equal(layer(x), layer(x, np.ones(x.shape[:2], int)))
