import math

import jax
import keras
import numpy as np
import pytest

import keras_bwetaf
from keras_bwetaf.data import document_numbers
from keras_bwetaf.evaluation import perplexity
from tests import original, trained
from tests.evaluation.test_scoring import expected
from tests.test_trained_checkpoint import load_original


@pytest.fixture(scope="module")
def lm():
    lm = keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")
    lm.compile()
    return lm


@pytest.fixture(scope="module")
def texts():
    return trained.documents(trained.FOLDER)["val"][:9]


@pytest.fixture(scope="module")
def rows():
    token_ids = trained.validation_rows(trained.FOLDER)[:5].astype("int32")
    documents = document_numbers(token_ids, end_token_id=0)
    return {"token_ids": token_ids, "padding_mask": documents}


def nats(lm, text):
    """Of a text that fits into the context, by plain logits."""
    tokenizer = lm.preprocessor.tokenizer
    losses, _ = expected(lm, [tokenizer.end_token_id, *tokenizer(text)])
    return losses


@pytest.mark.fast
def test_bits_per_byte_of_one_document(lm, texts):
    losses = nats(lm, texts[0])
    result = perplexity(lm, texts[0])
    num_bytes = len(texts[0].encode())
    assert result.num_tokens == len(losses)
    assert result.num_bytes == num_bytes
    np.testing.assert_allclose(result.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        result.bits_per_byte, losses.sum() / math.log(2) / num_bytes, rtol=1e-5
    )
    np.testing.assert_allclose(
        result.perplexity, math.exp(losses.mean()), rtol=1e-4
    )
    np.testing.assert_allclose(
        result.by_position[: len(losses)], losses, rtol=1e-4, atol=1e-5
    )
    assert np.isnan(result.by_position[len(losses) :]).all()
    assert "bits per byte" in str(result)


def test_several_documents(lm, texts):
    result = perplexity(lm, iter(texts), batch_size=4)
    for text, document in zip(texts, result.documents, strict=True):
        losses = nats(lm, text)
        assert document.num_tokens == len(losses)
        np.testing.assert_allclose(document.nats, losses.sum(), rtol=1e-5)
    assert result.nats == sum(each.nats for each in result.documents)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 5, 16, None])
def test_windows_of_a_long_text(lm, texts, stride):
    """Each token is predicted once, from the window that ends soonest."""
    context = 16
    small = keras_bwetaf.from_preset(
        trained.FOLDER, dtype="float32", max_sequence_length=context
    )
    tokenizer = lm.preprocessor.tokenizer
    tokens = [tokenizer.end_token_id, *tokenizer(texts[0])][:60]
    text = tokenizer.detokenize(tokens[1:])
    assert [tokenizer.end_token_id, *tokenizer(text)] == tokens
    result = perplexity(small, text, stride=stride)
    assert result.num_tokens == len(tokens) - 1
    step = stride or context // 2
    total, done, start = 0.0, 0, 0
    while done < len(tokens) - 1:
        start = min(start, max(len(tokens) - 1 - context, 0))
        losses, _ = expected(lm, tokens[start : start + context + 1])
        end = start + len(losses)
        total += losses[done - start :].sum()
        done, start = end, start + step
    np.testing.assert_allclose(result.nats, total, rtol=1e-5)


@pytest.mark.slow
def test_a_window_of_all_is_one_long_context(lm, texts):
    long = " ".join(texts)
    count = len(lm.preprocessor.tokenizer(long))
    assert count > lm.backbone.max_sequence_length
    wide = keras_bwetaf.from_preset(
        trained.FOLDER, dtype="float32", max_sequence_length=count
    )
    np.testing.assert_allclose(
        perplexity(wide, long).nats, nats(lm, long).sum(), rtol=1e-5
    )
    # More context helps a little; that of half a window, less.
    assert perplexity(lm, long).num_tokens == count


@pytest.mark.parametrize("kind", ["dict", "tuple", "batches"])
def test_packed_rows_count_as_in_evaluate(lm, rows, kind):
    data = {
        "dict": rows,
        "tuple": (rows,),
        "batches": [
            {name: x[i : i + 2] for name, x in rows.items()} for i in (0, 2, 4)
        ],
    }[kind]
    result = perplexity(lm, data, batch_size=2)
    logs = lm.evaluate(rows, batch_size=5, verbose=0, return_dict=True)
    np.testing.assert_allclose(result.loss, logs["loss"], rtol=1e-5)
    assert result.num_tokens == rows["token_ids"].size - 5
    numbers = [len(np.unique(row)) for row in rows["padding_mask"]]
    assert len(result.documents) in (sum(numbers), sum(numbers) - 5)
    token_bytes = lm.preprocessor.tokenizer.token_bytes
    assert result.num_bytes == sum(
        len(token_bytes(row[1:])) for row in rows["token_ids"]
    )


@pytest.mark.slow
def test_it_is_the_loss_of_the_original(lm, rows):
    """Its loss function on the same rows; dropout 0, or as it is."""
    tokens = rows["token_ids"]
    batch = tokens, np.ones_like(tokens), tokens

    def of_original(dropout, seed):
        theirs = load_original(trained.FOLDER, "float32", dropout)
        key = jax.random.key(seed)
        return float(
            original.loss_fn(theirs.params, theirs.model_struct, batch, key)
        )

    np.testing.assert_allclose(
        perplexity(lm, rows).loss, of_original(0.0, 0), atol=1e-4
    )
    with_dropout = keras_bwetaf.from_preset(
        trained.FOLDER, dtype="float32", dropout=0.3
    )
    keras.utils.set_random_seed(0)
    received = perplexity(with_dropout, rows, dropout=True).loss
    assert received > perplexity(with_dropout, rows).loss + 0.05
    theirs = [of_original(0.3, seed) for seed in range(4)]
    spread = max(theirs) - min(theirs)
    assert abs(received - np.mean(theirs)) < 3 * spread


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "no token to predict"),
        ("", "no token to predict"),
        (3, "type int"),
    ],
)
def test_nothing_to_predict(lm, data, message):
    with pytest.raises(ValueError, match=message):
        perplexity(lm, data)


@pytest.mark.parametrize("stride", [0, 10**6, 1.5])
def test_wrong_strides(lm, stride):
    with pytest.raises(ValueError, match="stride"):
        perplexity(lm, "text", stride=stride)


def test_weights_are_0_or_1(lm, rows):
    weights = np.full(rows["token_ids"].shape, 0.5)
    with pytest.raises(ValueError, match=r"0 or 1.*0\.5"):
        perplexity(lm, (rows, rows["token_ids"], weights))


def test_a_model_without_a_tokenizer(rows):
    backbone = keras_bwetaf.BwETAFBackbone.from_preset(trained.FOLDER)
    lm = keras_bwetaf.BwETAFCausalLM(backbone)
    assert perplexity(lm, rows).bits_per_byte is None
    with pytest.raises(ValueError, match="no tokenizer"):
        perplexity(lm, "text")


def test_on_several_devices(lm, rows, texts):
    expected = perplexity(lm, rows).nats, perplexity(lm, texts).nats
    with keras_bwetaf.distribution.data_parallel().scope():
        sharded = keras_bwetaf.from_preset(trained.FOLDER, dtype="float32")
        received = (
            perplexity(sharded, rows).nats,
            perplexity(sharded, texts).nats,
        )
    np.testing.assert_allclose(received, expected, rtol=1e-5)
