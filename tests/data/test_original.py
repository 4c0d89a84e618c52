"""The same tokens and rows as the original's own pipeline."""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from keras_bwetaf.data import load_packed, pack
from keras_bwetaf.models import BwETAFTokenizer
from tests import original

LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer(trained_checkpoint):
    return BwETAFTokenizer(trained_checkpoint / "tokenizer" / "yap.json")


@pytest.fixture(scope="module")
def their_rows(trained_checkpoint, trained_documents):
    """Threads stand in for its processes, which it would fork."""
    theirs = original.tokenizer.load(trained_checkpoint)
    with mock.patch.object(
        original.tokenizer, "ProcessPoolExecutor", ThreadPoolExecutor
    ):
        return theirs.tokenize_max_util(trained_documents["train"], 2, LENGTH)


@pytest.fixture(scope="module")
def packed(trained_documents, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack(
        trained_documents["train"],
        folder,
        tokenizer,
        num_workers=2,
        progress=False,
    )
    return folder


def load(source, **arguments):
    data = load_packed(
        source, sequence_length=LENGTH, batch_size=1, repeat=False, **arguments
    )
    return np.concatenate([batch["token_ids"] for batch in data])


def test_rows(packed, their_rows):
    assert len(their_rows) > 1500
    rows = load(packed, shuffle=False)
    np.testing.assert_array_equal(rows, their_rows)


def test_their_files(their_rows, tokenizer, tmp_path):
    from BwETAF.data.data_low import data_mixer_low, save_ds_np

    path = str(tmp_path / "rows.npy")
    save_ds_np(their_rows.astype("uint16"), path)
    rows = load(path, shuffle=False, tokenizer=tokenizer)
    np.testing.assert_array_equal(rows, their_rows)

    with contextlib.redirect_stdout(io.StringIO()):
        mixed, _ = data_mixer_low([(path, 1.0)], their_rows.size, LENGTH)
    mine = {row.tobytes() for row in load(path).astype("uint16")}
    assert mine == {row.tobytes() for row in mixed}


def test_validation_rows(
    validation_rows, trained_documents, tokenizer, tmp_path
):
    """Of the file that comes with the checkpoint."""
    pack(
        trained_documents["val"],
        tmp_path,
        tokenizer,
        num_workers=1,
        progress=False,
    )
    rows = load(tmp_path, shuffle=False)
    np.testing.assert_array_equal(rows, validation_rows)
