import keras
import numpy as np
import pytest

from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFCausalLMPreprocessor,
    train_tokenizer,
)

TEXTS = [
    "In the beginning was the light, and the light was good.",
    "The night sky is full of stars; who can count them?",
    "naïve café — 光 🌟 \n a tab\tand a line",
] * 6
CONTEXT = 256


def random_weights(backbone, seed=0):
    """Weights that make every token depend on everything before it."""
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        values = rng.standard_normal(variable.shape)
        if variable.name == "scale":
            values = 1 + 0.2 * values
        elif variable.name == "kernel":
            values = 2 * values / np.sqrt(variable.shape[1])
        elif variable.name == "bias":
            values = 0.1 * values
        variable.assign(values)


def small_lm():
    """A small model with random weights and a tokenizer of its own."""
    tokenizer = train_tokenizer(TEXTS, 400)
    backbone = BwETAFBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=2,
        num_query_heads=[4, 2],
        num_key_value_heads=[2, 2],
        hidden_dim=32,
        intermediate_dim=48,
        max_sequence_length=CONTEXT,
    )
    random_weights(backbone)
    preprocessor = BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=CONTEXT
    )
    lm = BwETAFCausalLM(backbone, preprocessor)
    # An end token would cut the texts that tests compare.
    embeddings = backbone.token_embedding.embeddings.numpy()
    embeddings[tokenizer.end_token_id] = 0
    backbone.token_embedding.embeddings.assign(embeddings)
    return lm


@pytest.fixture(scope="module")
def lm():
    return small_lm()


@pytest.fixture
def fresh_lm(lm):
    """The same model, compiled anew."""
    again = BwETAFCausalLM(lm.backbone, lm.preprocessor)
    yield again
    keras.backend.clear_session(free_memory=False)
