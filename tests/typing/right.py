"""Right uses of the public API, in which a type checker finds no fault."""

from collections.abc import Iterator

import numpy as np

import converters
import keras_bwetaf
from keras_bwetaf.data import load_packed, pack, read_documents
from keras_bwetaf.training import Monitor, TrainingCheckpoint

lm = keras_bwetaf.from_preset("tiny", dtype="bfloat16", dropout=0.1)
lm = keras_bwetaf.BwETAFCausalLM.from_preset("tiny", preprocessor=None)
backbone = keras_bwetaf.BwETAFBackbone.from_preset("tiny", rope_dtype=None)
lm = keras_bwetaf.BwETAFCausalLM(backbone)

text: str = lm.generate("Once", max_new_tokens=8, temperature=0.5, seed=1)
texts: list[str] = lm.generate(["Once", "A"], stop_strings=".", seed=[1, 2])
ids: dict[str, np.ndarray] = lm.generate(
    {"token_ids": [[1]], "padding_mask": [[1]]}, max_length=8
)
pieces: Iterator[str] = lm.stream("Once", max_new_tokens=8, top_k=50)

optimizer = keras_bwetaf.recipe("small", total_steps=100, warmup=0.1)
lm.compile(optimizer, remat=["none", "full"], steps_per_execution=1)
lm.compile(sampler=keras_bwetaf.BwETAFSampler(top_p=0.9), jit_compile=True)
lm.warm_up([64], batch_sizes=[1, 8], max_new_tokens=32)
keras_bwetaf.enable_compilation_cache("programs", max_size=10**9)

tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset("tiny")
report = pack(["a text"], "packed", tokenizer, validation_fraction=0.1)
documents = read_documents("corpus/*.txt", errors="replace")
mixture = {"packed": 0.5}
train = load_packed(mixture, sequence_length=64, batch_size=2)
history = lm.fit(
    train,
    epochs=2,
    steps_per_epoch=5,
    callbacks=[
        Monitor("run", total_steps=10),
        TrainingCheckpoint("run/checkpoints", save_every=5, mode="min"),
    ],
)
losses = history.history["loss"]
lm.save_to_preset("saved", include_optimizer=True)
lm.load_optimizer("saved")

lm = keras_bwetaf.train("run", data="a.txt", steps=10, model={"num_layers": 1})
tokenizer = keras_bwetaf.train_tokenizer(["a text"], vocabulary_size=300)
size: int = tokenizer.vocabulary_size()
keras_bwetaf.distribution.model_parallel(2, fully_sharded=True)

converters.convert("a", "b", to="torch", overwrite=True)
