"""Model folders that the original package wrote."""

import pytest

from tests.original import manager

TINY = dict(
    num_heads=4,
    attention_dim=32,
    vocab_size=128,
    num_blocks=2,
    ff_dim=48,
    max_len=64,
    gqa_repeats=2,
)


@pytest.fixture
def save_flax(tmp_path):
    """Saves a tiny model of the original, with changes to its config."""

    def save(name="flax", **changes):
        folder = tmp_path / name
        manager(**{**TINY, **changes}).save_model(str(folder), opt_state=False)
        return folder

    return save
