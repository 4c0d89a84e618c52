"""Trains the small checkpoint of the tests with the original package.

    python -m tests.trained.make

Tokenizer, model, loss, optimizer, schedule, statistics and files are those of
BwETAF 0.6; the package has no training loop, so that is ours. The text is
stories that the grammar of the preset "tiny" makes up. It takes about ten
minutes on two cores, and only has to be run again if one of these changes.
"""

import contextlib
import io
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.tiny.grammar import tell
from tests import original
from tests.trained import FOLDER, ROWS

NUM_STORIES = {"train": 8_000, "val": 300}
VOCABULARY_SIZE = 1024
LENGTH = 512
NUM_STEPS = 700
NUM_BFLOAT16_STEPS = 50  # The last ones: a CPU takes ten times as long.
BATCH_SIZE = 2
CONFIG = dict(
    num_heads=4,
    attention_dim=96,
    vocab_size=VOCABULARY_SIZE,
    num_blocks=4,
    ff_dim=192,
    dropout_rate=0.05,
    max_len=LENGTH,
    gqa_repeats=2,
    emb_init_range=0.02,
    param_init_rage=0.02,
    use_fash_attention=False,
)
OPTIMIZER = dict(
    peaklr=4e-3,
    min_warmup_value=6e-4,
    min_value=1.8e-4,
    warmup_percent=0.02,
    total_steps=NUM_STEPS,
    training_decay="cosine",
    b1=0.95,
    b2=0.98,
    eps=1.5e-8,
    weight_decay=0.1,
)


def stories():
    """The documents, `{"train": list of str, "val": list of str}`.

    No story is in both.
    """
    seen = set()
    documents = {}
    for split, number in NUM_STORIES.items():
        source = random.Random(split)
        told = (tell(source) for _ in iter(int, 1))
        fresh = (story for story in told if story not in seen)
        documents[split] = [next(fresh) for _ in range(number)]
        seen.update(documents[split])
    return documents


def main():
    documents = stories()
    tokenizer = train_tokenizer(documents["train"])
    rows = {
        split: to_rows(tokenizer, texts) for split, texts in documents.items()
    }
    manager = make_manager("float32")
    started = time.time()
    num_steps = NUM_STEPS - NUM_BFLOAT16_STEPS, NUM_BFLOAT16_STEPS
    losses, val_losses = train(manager, rows, num_steps[0])
    manager = to_bfloat16(manager)
    more = train(manager, rows, num_steps[1])
    losses, val_losses = losses + more[0], val_losses + more[1]

    folder = str(FOLDER)
    tokenizer.save(folder)
    manager.save_model(folder)
    write_statistics(manager, losses, val_losses, time.time() - started)
    np.save(ROWS, rows["val"])


def make_manager(dtype):
    with contextlib.redirect_stdout(io.StringIO()):
        manager = original.ModelManager(**CONFIG, dtype=jnp.dtype(dtype))
        manager.training_setup(optax.adamw, OPTIMIZER)
    return manager


def to_bfloat16(manager):
    """The same model and optimizer in bfloat16, at the same step."""
    narrow = make_manager("bfloat16")
    narrow.params = optax.tree.cast(manager.params, "bfloat16")
    narrow.optimizer.state = jax.tree.map(
        lambda new, old: old.astype(new.dtype),
        narrow.optimizer.state,
        manager.optimizer.state,
    )
    return narrow


def train_tokenizer(texts):
    tokenizer = original.tokenizer.create("stories")
    tokenizer.train(
        texts, VOCABULARY_SIZE, special_tokens=["<|EOS|>", "<|UK|>"]
    )
    return tokenizer


def to_rows(tokenizer, texts):
    """Token ids, each story ended by EOS, cut into rows: uint16."""
    ids = [
        token for text in texts for token in tokenizer.encode(text + "<|EOS|>")
    ]
    num_rows = len(ids) // LENGTH
    return np.array(ids[: num_rows * LENGTH], "uint16").reshape(-1, LENGTH)


def train(manager, rows, num_steps):
    """Trains `manager` in place; the losses of the steps and of validation."""
    update = manager.optimizer.optimizer.update

    @jax.jit
    def step(params, state, batch, key):
        data = batch, jnp.ones_like(batch), batch
        loss, gradients = manager.grad_fn(
            params, manager.model_struct, data, key
        )
        updates, state = update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    batches = np.random.default_rng(num_steps)
    losses, val_losses = [], []
    for i in range(num_steps):
        batch = batches.choice(rows["train"], BATCH_SIZE).astype("int32")
        manager.params, manager.optimizer.state, loss = step(
            manager.params, manager.optimizer.state, batch, manager.key_bruh
        )
        losses.append(float(loss))
        if (i + 1) % 50 == 0:
            val_losses.append(evaluate(manager, rows["val"]))
            print(i + 1, np.mean(losses[-50:]), val_losses[-1], flush=True)
    return losses, val_losses


def evaluate(manager, rows):
    """Loss as the original validates: with document masks and dropout."""
    tokens = jnp.asarray(rows, "int32")
    batch = tokens, jnp.ones_like(tokens), tokens
    return float(
        original.loss_fn(
            manager.params, manager.model_struct, batch, manager.key
        )
    )


def write_statistics(manager, losses, val_losses, seconds):
    path = str(FOLDER / "stats.json")
    num_params = sum(x.size for x in jax.tree.leaves(manager.params))
    original.ProgressTracker.create(path, FOLDER.name, num_params)
    num_tokens = NUM_STEPS * BATCH_SIZE * LENGTH
    original.ProgressTracker.add(
        path, losses, val_losses, OPTIMIZER["peaklr"], seconds, num_tokens
    )


if __name__ == "__main__":
    main()
