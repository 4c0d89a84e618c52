"""Rows for training, prompts for generation, and text back from ids."""

import json
import multiprocessing

import keras
import keras_hub
import numpy as np
import pytest

from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.models.causal_lm_preprocessor import (
    BwETAFCausalLMPreprocessor,
)
from keras_bwetaf.models.tokenizer import BwETAFTokenizer, train_tokenizer
from tests.keras_hub_checks import KerasHubTestCase

pytestmark = pytest.mark.fast

TEXTS = ["the heaven", "and the earth 😀"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 280)


@pytest.fixture
def preprocessor(tokenizer):
    return BwETAFCausalLMPreprocessor(tokenizer, sequence_length=12)


def test_training_rows_end_with_the_end_token(tokenizer, preprocessor):
    ids = tokenizer(TEXTS)
    assert [len(row) for row in ids] == [2, 4]
    x, y, sample_weight = preprocessor(TEXTS)
    for i, row in enumerate(ids):
        padding = [0] * (12 - len(row))
        assert x["token_ids"][i].tolist() == row + padding
        assert y[i].tolist() == row[1:] + [0] + padding
        ones = len(row) + 1  # The end token is learned, padding is not.
        expected = [1] * ones + [0] * (12 - ones)
        assert np.int32(x["padding_mask"][i]).tolist() == expected
        assert np.int32(sample_weight[i]).tolist() == expected[1:] + [0]


def test_long_rows_are_cut(tokenizer):
    preprocessor = BwETAFCausalLMPreprocessor(tokenizer, sequence_length=3)
    ids = tokenizer(TEXTS[1])
    x, y, sample_weight = preprocessor(TEXTS[1])
    assert x["token_ids"].tolist() == ids[:3].tolist()
    assert y.tolist() == [*ids[1:3], tokenizer.end_token_id]
    assert sample_weight.tolist() == [True] * 3


def test_prompts_get_no_end_token(tokenizer, preprocessor):
    prompt = preprocessor.generate_preprocess(TEXTS)
    for row, mask, ids in zip(
        prompt["token_ids"],
        prompt["padding_mask"],
        tokenizer(TEXTS),
        strict=True,
    ):
        assert row[: len(ids)].tolist() == ids
        assert np.int32(mask).sum() == len(ids)


def test_generated_ids_come_back_as_text(preprocessor):
    prompt = preprocessor.generate_preprocess(TEXTS)
    assert preprocessor.generate_postprocess(prompt) == TEXTS
    prompt = preprocessor.generate_preprocess(TEXTS[0])
    assert preprocessor.generate_postprocess(prompt) == TEXTS[0]


def test_a_prompt_cannot_hold_the_end_token(tokenizer, preprocessor):
    prompt = preprocessor.generate_preprocess("a<|EOS|>", sequence_length=20)
    length = np.int32(prompt["padding_mask"]).sum()
    assert tokenizer.end_token_id not in prompt["token_ids"][:length]
    assert preprocessor.generate_postprocess(prompt) == "a<|EOS|>"


@pytest.mark.parametrize("length", [1, 3, 12])
@pytest.mark.parametrize("texts", [TEXTS[0], "", TEXTS, [TEXTS[0], ""]])
def test_keras_hubs_own_arrays(tokenizer, texts, length):
    ours, theirs = (
        kind(tokenizer, sequence_length=length, add_start_token=False)
        for kind in (
            BwETAFCausalLMPreprocessor,
            keras_hub.models.CausalLMPreprocessor,
        )
    )
    for layer in (ours, theirs):
        layer.build(None)
    for method in ("__call__", "generate_preprocess"):
        received, expected = (
            keras.tree.map_structure(np.asarray, getattr(layer, method)(texts))
            for layer in (ours, theirs)
        )
        keras.tree.map_structure(
            np.testing.assert_array_equal, received, expected
        )
        keras.tree.map_structure(
            lambda a, b: np.testing.assert_equal(a.dtype, b.dtype),
            received,
            expected,
        )


@pytest.mark.filterwarnings("ignore:.*fork")
def test_in_a_process_that_was_forked(preprocessor):
    """As PyTorch's `DataLoader` does; JAX's threads are not there."""

    def work():
        prompts = preprocessor.generate_preprocess(TEXTS)
        return (
            preprocessor(TEXTS),
            preprocessor(TEXTS[0], sequence_length=5),
            prompts,
            preprocessor.generate_postprocess(prompts),
        )

    expected = work()
    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sending.send(work()))
    process.start()
    try:
        assert receiving.poll(60)
        received = receiving.recv()
    finally:
        process.kill()
        process.join()
    keras.tree.map_structure(np.testing.assert_array_equal, received, expected)


@pytest.mark.parametrize("length", [0, -1, 8.0, "8", True])
def test_the_length_is_a_positive_int(tokenizer, length):
    with pytest.raises(ValueError, match="`sequence_length` must be a posit"):
        BwETAFCausalLMPreprocessor(tokenizer, sequence_length=length)


def test_there_is_no_start_token(tokenizer):
    with pytest.raises(ValueError, match="Received: add_start_token=True"):
        BwETAFCausalLMPreprocessor(tokenizer, add_start_token=True)


def test_class_and_defaults(tokenizer):
    preprocessor = BwETAFCausalLMPreprocessor(tokenizer)
    assert BwETAFCausalLMPreprocessor.backbone_cls is BwETAFBackbone
    assert BwETAFCausalLMPreprocessor.tokenizer_cls is BwETAFTokenizer
    assert BwETAFTokenizer.backbone_cls is BwETAFBackbone
    assert preprocessor.sequence_length == 1024
    assert preprocessor.add_start_token is False
    assert preprocessor.add_end_token is True


def test_keras_serialization(tokenizer, preprocessor, tmp_path):
    config = json.dumps(keras.saving.serialize_keras_object(preprocessor))
    revived = keras.saving.deserialize_keras_object(json.loads(config))
    assert type(revived) is BwETAFCausalLMPreprocessor
    assert json.dumps(keras.saving.serialize_keras_object(revived)) == config
    tokenizer.save_assets(tmp_path)
    revived.tokenizer.load_assets(tmp_path)
    expected, actual = preprocessor(TEXTS), revived(TEXTS)
    keras.tree.map_structure(np.testing.assert_array_equal, expected, actual)


class KerasHubChecks(KerasHubTestCase):
    def test_preprocessor_basics(self):
        tokenizer = train_tokenizer(TEXTS * 20, 280)
        first, second = tokenizer(TEXTS)
        self.init_kwargs = {"tokenizer": tokenizer, "sequence_length": 8}
        self.run_preprocessor_test(
            BwETAFCausalLMPreprocessor,
            self.init_kwargs,
            input_data=TEXTS,
            expected_output=(
                {
                    "token_ids": [first + [0] * 6, second + [0] * 4],
                    "padding_mask": [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3],
                },
                [first[1:] + [0] * 7, second[1:] + [0] * 5],
                [[1] * 2 + [0] * 6, [1] * 4 + [0] * 4],
            ),
        )
