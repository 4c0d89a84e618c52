"""Wrong uses of the public API: an error on each line that is marked."""

import converters
import keras_bwetaf
from keras_bwetaf.data import load_packed, pack, read_documents
from keras_bwetaf.training import Monitor, TrainingCheckpoint

lm = keras_bwetaf.from_preset("tiny")
keras_bwetaf.from_preset(97)  # error
keras_bwetaf.from_preset("tiny", drop_out=0.1)  # error
keras_bwetaf.from_preset("tiny", dropout="much")  # error
keras_bwetaf.BwETAFBackbone.from_preset("tiny", layers=2)  # error

lm.generate("Once", temprature=0.5)  # error
lm.generate("Once", temperature="hot")  # error
lm.generate("Once", max_new_tokens="many")  # error
lm.generate("Once", truncation="right")  # error
number: int = lm.generate("Once")  # error
lm.stream(["Once"])  # error
lm.stream("Once", top_q=0.9)  # error

keras_bwetaf.recipe("97m", total_steps="many")  # error
keras_bwetaf.recipe("96m", total_steps=100)  # error
keras_bwetaf.recipe("97m", total_steps=100, learning_rate=1e-3)  # error
keras_bwetaf.recipe("97m", total_steps=100, decay="exponential")  # error
keras_bwetaf.BwETAFSampler(temprature=0.5)  # error

lm.compile(remat="blocks")  # error
lm.compile(gradient_acumulation_steps=2)  # error
lm.compile(gradient_accumulation_steps="2")  # error
lm.fit(["a text"], epoch=2)  # error
lm.fit(["a text"], epochs="two")  # error
lm.fit(["a text"], class_weight={0: 1.0})  # error
lm.save_to_preset(1)  # error

keras_bwetaf.train("run", dta="a.txt", steps=10)  # error
keras_bwetaf.train("run", data="a.txt", steps="ten")  # error
keras_bwetaf.train("run", data="a.txt", steps=10, remat="some")  # error
keras_bwetaf.train("run", data="a", steps=1, model={"layers": 1})  # error
keras_bwetaf.train_tokenizer(["a text"], "many")  # error

tokenizer = keras_bwetaf.BwETAFTokenizer.from_preset("tiny")
pack(["a text"], "packed", tokenizer, validation_fraction="a tenth")  # error
pack(["a text"], "packed", "tiny")  # error
read_documents("corpus", errors="ignore")  # error
load_packed("packed", sequence_length="64", batch_size=2)  # error
Monitor("run", total_step=10)  # error
TrainingCheckpoint("run")  # error
TrainingCheckpoint("run", save_every=5, mode="lowest")  # error
keras_bwetaf.distribution.model_parallel("2")  # error

converters.convert("a", "b", to="pytorch")  # error
converters.convert("a", "b", too="torch")  # error
