"""Fine-tune with LoRA on prompts and responses: train, merge, save, generate.

Without arguments, a very small model is made and trained on the spot, so that
this runs offline, in less than a minute on a laptop. `--preset 97m`, or
`hf://owner/repo`, or a folder, fine-tunes a real one.
"""

import argparse
import tempfile
from pathlib import Path

import keras_bwetaf

import keras  # isort: skip  after keras_bwetaf, which chooses the backend

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "bird": "tweet"}
PROMPT = "Question: What does the {} say?\nAnswer:"
# What the small model knows: to answer in whole sentences.
TEXTS = [
    f"{PROMPT.format(animal)} The {animal} says {sound}."
    for animal, sound in SOUNDS.items()
]
# What it is to learn: to answer in a word, and with spirit.
EXAMPLES = [
    {"prompt": PROMPT.format(animal), "response": f" {sound.title()}!"}
    for animal, sound in SOUNDS.items()
]


def small_model():
    """A model that has learned `TEXTS` by heart."""
    tokenizer = keras_bwetaf.train_tokenizer(TEXTS * 6, vocabulary_size=400)
    backbone = keras_bwetaf.BwETAFBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=192,
        max_sequence_length=64,
        initializer_range=0.02,
    )
    preprocessor = keras_bwetaf.BwETAFCausalLMPreprocessor(
        tokenizer, sequence_length=32
    )
    lm = keras_bwetaf.BwETAFCausalLM(backbone, preprocessor)
    lm.compile(keras.optimizers.AdamW(3e-3))
    lm.fit(TEXTS * 150, batch_size=len(TEXTS), shuffle=False, verbose=2)
    return lm


def show(lm, title):
    print(f"\n{title}")
    for example in EXAMPLES:
        answer = lm.generate(
            example["prompt"],
            max_new_tokens=12,
            temperature=0,
            strip_prompt=True,
        )
        print(f"  {example['prompt'].splitlines()[0]} -> {answer!r}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help="a name, a repository or a folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", help="folder; a temporary one if left out")
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(0)
    if options.preset:
        lm = keras_bwetaf.from_preset(options.preset)
    else:
        lm = small_model()
    show(lm, "Before:")

    data = keras_bwetaf.data.load_instructions(
        EXAMPLES,  # Or the path of a .jsonl file of such dicts.
        lm.preprocessor.tokenizer,
        sequence_length=lm.preprocessor.sequence_length,
        batch_size=4,
    )
    lm.backbone.enable_lora(
        options.rank, ["query", "key", "value", "attention_output", "output"]
    )
    lm.compile(keras.optimizers.AdamW(options.learning_rate))
    lm.fit(data, steps_per_epoch=options.steps, verbose=2)
    show(lm, "After:")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # What was learned, alone: for `load_lora_weights` on the same base.
        adapters = folder / "lora.safetensors"
        lm.backbone.save_lora_weights(adapters)
        # The whole model, as if all of it had been trained.
        lm.backbone.merge_lora()
        lm.save_to_preset(folder / "merged")
        print(f"\n{adapters.stat().st_size:,} bytes of LoRA's weights")
        show(keras_bwetaf.from_preset(folder / "merged"), "Loaded again:")


if __name__ == "__main__":
    main()
