"""Train, save, load and generate, offline, in half a minute on a laptop.

A very small model learns four nursery rhymes by heart, is saved as a KerasHub
preset, loaded again and asked to go on from the first words of each.
"""

import tempfile

import keras_bwetaf

import keras  # isort: skip  after keras_bwetaf, which chooses the backend

RHYMES = [
    "Mary had a little lamb, its fleece was white as snow, and everywhere "
    "that Mary went the lamb was sure to go.",
    "Twinkle, twinkle, little star, how I wonder what you are, up above the "
    "world so high, like a diamond in the sky.",
    "Hey diddle diddle, the cat and the fiddle, the cow jumped over the "
    "moon, the little dog laughed to see such sport, and the dish ran away "
    "with the spoon.",
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall; all the "
    "king's horses and all the king's men couldn't put Humpty together "
    "again.",
]
STEPS = 150


def main():
    keras.utils.set_random_seed(0)
    tokenizer = keras_bwetaf.train_tokenizer(RHYMES * 6, vocabulary_size=400)
    backbone = keras_bwetaf.BwETAFBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=4,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=128,
        intermediate_dim=384,
        max_sequence_length=128,
        initializer_range=0.02,
    )
    preprocessor = keras_bwetaf.BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=96
    )
    lm = keras_bwetaf.BwETAFCausalLM(backbone, preprocessor)
    lm.compile(optimizer=keras.optimizers.AdamW(2e-3))
    lm.fit(RHYMES * STEPS, batch_size=len(RHYMES), shuffle=False)

    with tempfile.TemporaryDirectory() as folder:
        lm.save_to_preset(folder)
        lm = keras_bwetaf.from_preset(folder)

    for rhyme in RHYMES:
        prompt = " ".join(rhyme.split()[:3])
        print()
        print(prompt, end="", flush=True)
        for text in lm.stream(prompt, max_new_tokens=80, temperature=0):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
