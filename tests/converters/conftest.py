"""Model folders, and what they become in each format."""

import shutil

import pytest

from tests.converters.folders import (
    CASES,
    convert_to_all,
    normal,
    write_original,
)
from tests.original import manager, tokenizer
from tests.trained import NAMES, checkpoint

TINY = dict(
    num_heads=4,
    attention_dim=32,
    vocab_size=128,
    num_blocks=2,
    ff_dim=48,
    max_len=64,
    gqa_repeats=2,
)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory):
    """Where transformers copies a folder's code to.

    One place for all tests, as Python remembers where a package is.
    """
    import transformers

    modules = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        patch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules
        )
        yield


@pytest.fixture
def save_flax(tmp_path):
    """Saves a tiny model of the original, with changes to its config."""

    def save(name="flax", **changes):
        folder = tmp_path / name
        manager(**{**TINY, **changes}).save_model(str(folder), opt_state=False)
        return folder

    return save


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The two files of a tokenizer that the original trained."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = tokenizer.create("tiny")
    texts = ["In the beginning was the Word, and the night sky was bright."]
    trained.train(texts * 50, 400, special_tokens=["<|EOS|>", "<|UK|>"])
    trained.save(str(folder))
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_folder):
    """One small model in each format; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    source = write_original(
        folder / "source",
        moments=normal("float32", seed=1),
        tokenizer=tokenizer_folder,
    )
    return convert_to_all(source, folder)


@pytest.fixture(scope="session", params=[*CASES, *NAMES])
def every(request, tmp_path_factory, tokenizer_folder):
    """All kinds of models in each format; tests must not change them."""
    folder = tmp_path_factory.mktemp("every")
    if request.param not in CASES:
        source = checkpoint(request.param)
    else:
        draw, moments, changes = CASES[request.param]
        source = write_original(
            folder / "source",
            draw,
            moments=moments,
            tokenizer=moments and tokenizer_folder,
            **changes,
        )
    return convert_to_all(source, folder)


@pytest.fixture
def copy(tiny, tmp_path):
    """Copies the small model of a format, to be damaged."""

    def copied(layout, name="copy"):
        return shutil.copytree(tiny[layout], tmp_path / name)

    return copied
