"""A decoder of other parts than BwETAFv3's: each is one of its arguments."""

import types

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from keras_bwetaf.layers import (
    FeedForward,
    GroupedQueryAttention,
    RMSNormalization,
    TransformerBlock,
)
from keras_bwetaf.models.decoder import DecoderBackbone, per_layer
from tests.parity import relative_l2

pytestmark = pytest.mark.fast

CONFIG = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_query_heads": [4, 2],
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    # JAX 0.10.0 divides in eager code, and multiplies by the reciprocal in
    # compiled code: the same for a power of two.
    "theta": 8.0,
}


class AddedSinusoids(keras.layers.Layer):
    """Positions that are added, not turned."""

    def __init__(self, theta, **kwargs):
        super().__init__(**kwargs)
        self.theta = theta

    def call(self, inputs, positions=None, num_shards=1):
        if positions is None:
            positions = jnp.arange(inputs.shape[1])
        angles = positions[..., None] / self.theta
        return inputs + jnp.sin(angles * jnp.arange(inputs.shape[-1]))


class OtherBackbone(DecoderBackbone):
    """No position on the embedding, other ones in attention, a final norm."""

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        theta=5.0,
        dtype=None,
        **kwargs,
    ):
        self.check_keras_keywords(kwargs)
        arguments = self.checked_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            theta=theta,
        )
        config = types.SimpleNamespace(**arguments)
        super().__init__(
            token_embedding=keras.layers.ReversibleEmbedding(
                vocabulary_size,
                hidden_dim,
                dtype=dtype,
                name="token_embedding",
            ),
            transformer_layers=[
                self._block(i, config, dtype) for i in range(num_layers)
            ],
            final_norm=RMSNormalization(
                epsilon=1e-6, dtype=dtype, name="final_norm"
            ),
            config=arguments,
            dtype=dtype,
            **kwargs,
        )

    def _block(self, i, config, dtype):
        attention = GroupedQueryAttention(
            num_query_heads=per_layer(config.num_query_heads, 2)[i],
            num_key_value_heads=config.num_key_value_heads,
            query_rotary=AddedSinusoids(config.theta, dtype=dtype),
            key_rotary=AddedSinusoids(config.theta, dtype=dtype),
            initializer_range=0.5,
            dtype=dtype,
            name="self_attention",
        )
        feedforward = FeedForward(
            intermediate_dim=config.intermediate_dim,
            initializer_range=0.5,
            dtype=dtype,
            name="feedforward",
        )
        return TransformerBlock(
            attention,
            feedforward,
            dropout=0.0,
            layer_norm_epsilon=1e-6,
            dtype=dtype,
            name=f"transformer_layer_{i}",
        )


@pytest.fixture
def backbone():
    keras.utils.set_random_seed(0)
    backbone = OtherBackbone(**CONFIG)
    scale = np.random.default_rng(1).uniform(0.5, 2, 32)
    backbone.final_norm.scale.assign(scale)
    return backbone


@pytest.fixture
def token_ids():
    return np.random.default_rng(0).integers(0, 50, (2, 24))


def whole_rows(backbone, token_ids):
    mask = np.ones_like(token_ids)
    return backbone({"token_ids": token_ids, "padding_mask": mask})


def test_cached_equals_whole_rows(backbone, token_ids):
    expected = whole_rows(backbone, token_ids)
    slots = 32
    cache = backbone.make_cache(2, slots)
    assert [key.shape for key, _ in cache] == [(4, 8, slots), (4, 16, slots)]
    assert [x.shape for _, x in cache] == [(4, slots, 8), (4, slots, 16)]

    @jax.jit
    def step(tokens, cache, i):
        return backbone.hidden_states(
            tokens,
            positions=jnp.full((2, 1), i),
            cache=cache,
            cache_index=i,
            attention_mask=jnp.broadcast_to(
                jnp.arange(slots) <= i, (2, 1, slots)
            ),
        )

    for i in range(token_ids.shape[1]):
        received, cache = step(token_ids[:, i : i + 1], cache, i)
        assert relative_l2(received[:, 0], expected[:, i]) < 1e-5


def test_every_part_counts(backbone, token_ids):
    """Final norm and positions change the outputs, by row and column."""
    before = np.asarray(whole_rows(backbone, token_ids))
    normed = before / np.asarray(backbone.final_norm.scale)
    np.testing.assert_allclose(np.mean(normed**2, axis=-1), 1, rtol=1e-4)
    other = OtherBackbone(**{**CONFIG, "theta": 9.0})
    other.set_weights(backbone.get_weights())
    assert relative_l2(whole_rows(other, token_ids), before) > 0.05
    logits = backbone.head(before)
    assert logits.shape == (2, 24, 50)
    table = np.asarray(backbone.token_embedding.embeddings)
    assert relative_l2(logits, before @ table.T) < 1e-5


def test_config(backbone):
    config = backbone.get_config()
    assert CONFIG.items() <= config.items()
    again = OtherBackbone.from_config(config)
    assert again.get_config() == config
    assert [v.path for v in again.weights] == [v.path for v in backbone.weights]
    assert OtherBackbone.config_names() == list(CONFIG)
    with pytest.raises(TypeError, match=r"^OtherBackbone\(\) .* theta"):
        OtherBackbone(**CONFIG, thta=1.0)
    with pytest.raises(ValueError, match="`theta` must be greater than 0"):
        OtherBackbone(**{**CONFIG, "theta": 0})


def test_layout_map_matches_every_weight(backbone):
    mesh = keras.distribution.DeviceMesh(
        (1, 1), ("batch", "model"), jax.devices()[:1]
    )
    layout_map = OtherBackbone.get_layout_map(mesh)
    axes = {v.path: layout_map[v.path] for v in backbone.weights}
    assert None not in axes.values()
    (path,) = [path for path in axes if "final_norm" in path]
    assert axes[path].axes == ("batch",)
