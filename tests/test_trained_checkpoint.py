"""The main job on real input: a model that the original trained and saved."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import keras_bwetaf
from tests import original
from tests.parity import document_numbers

NUM_ROWS = 48


@pytest.fixture(scope="module")
def rows(validation_rows):
    return validation_rows[:NUM_ROWS]


def load_original(folder, dtype, dropout=0.0):
    """The original's own model, with its dropout turned off by default."""
    config = json.loads((folder / "understanding_good_stuff.json").read_text())
    model = original.ModelManager(
        **{**config, "dropout_rate": dropout}, dtype=jnp.dtype(dtype)
    )
    data = (folder / "good_stuff.pkl").read_bytes()
    params = flax.serialization.from_bytes(model.params, data)
    model.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    return model


def losses(logits, rows):
    """Mean next-token loss of all, early and late positions, in nats."""
    logits = jnp.asarray(logits, "float32")[:, :-1]
    log_probabilities = jax.nn.log_softmax(logits)
    targets = rows[:, 1:, None].astype("int32")
    loss = -np.take_along_axis(np.asarray(log_probabilities), targets, 2)[
        ..., 0
    ]
    return np.array([loss.mean(), loss[:, :256].mean(), loss[:, 256:].mean()])


def original_losses(folder, dtype, masks, rows):
    theirs = load_original(folder, dtype)
    logits = theirs.model_struct.apply(
        theirs.params,
        rows,
        np.ones_like(rows),
        training=masks == "documents",
        rngs={"dropout": theirs.key},
    )
    return losses(logits, rows)


@pytest.mark.parametrize(
    "masks", ["causal", pytest.param("documents", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"]
)
def test_validation_loss(trained_checkpoint, rows, dtype, masks):
    """Within 1e-3 of the original, or of what its own rounding costs it."""
    expected = original_losses(trained_checkpoint, dtype, masks, rows)
    exact = original_losses(trained_checkpoint, "float32", masks, rows)

    lm = keras_bwetaf.from_preset(trained_checkpoint, dtype=dtype)
    mask = np.ones_like(rows)
    if masks == "documents":
        mask = document_numbers(rows)
    inputs = {"token_ids": rows.astype("int32"), "padding_mask": mask}
    lm.preprocessor = None
    received = losses(lm.predict(inputs, batch_size=16, verbose=0), rows)
    print(dtype, masks, "ours", received.round(4), "theirs", expected.round(4))
    tolerance = np.maximum(np.abs(expected - exact), 1e-3)
    assert np.all(np.abs(received - expected) <= tolerance)


def test_greedy_continuations(trained_checkpoint, trained_documents):
    """64 tokens after each of 20 prompts, checked one by one."""
    num_prompts, num_tokens = 20, 64
    texts = trained_documents["val"][:num_prompts]
    prompts = [" ".join(text.split()[: 5 + i]) for i, text in enumerate(texts)]
    lm = keras_bwetaf.from_preset(trained_checkpoint)
    tokenizer = lm.preprocessor.tokenizer
    prompt_ids = tokenizer.tokenize(prompts)
    lm.preprocessor = None
    width = max(map(len, prompt_ids)) + num_tokens
    token_ids = np.zeros((num_prompts, width), "int32")
    padding_mask = np.zeros_like(token_ids)
    for i, ids in enumerate(prompt_ids):
        token_ids[i, : len(ids)] = ids
        padding_mask[i, : len(ids)] = 1
    made = lm.generate(
        {"token_ids": token_ids, "padding_mask": padding_mask},
        max_new_tokens=num_tokens,
        stop_token_ids=None,
        temperature=0,
    )

    theirs = load_original(trained_checkpoint, "float32")
    likeliest = theirs(made["token_ids"], made["padding_mask"]).argmax(-1)
    num_compared = 0
    for i, ids in enumerate(prompt_ids):
        end = len(ids) + num_tokens
        np.testing.assert_array_equal(
            made["token_ids"][i, len(ids) : end],
            likeliest[i, len(ids) - 1 : end - 1],
        )
        num_compared += num_tokens
    assert num_compared == num_prompts * num_tokens


def test_continues_a_real_sentence(trained_checkpoint):
    lm = keras_bwetaf.from_preset(trained_checkpoint)
    prompt = "And God said unto"
    arguments = dict(max_new_tokens=32, temperature=0)
    text = lm.generate(prompt, **arguments)
    assert text.startswith(prompt) and len(text) > len(prompt) + 50
    assert "".join([prompt, *lm.stream(prompt, **arguments)]) == text
