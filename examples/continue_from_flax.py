"""Go on with a training that the original package began, and hand it back.

Takes a folder that BwETAF saved with its optimizer's state, trains at the step
where it stopped, and writes a folder that BwETAF loads, state included:

    python examples/continue_from_flax.py flax-folder new-folder \\
        --text corpus.txt --steps 100 --total-steps 5000
"""

import argparse
import tempfile
from pathlib import Path

import converters
import keras_bwetaf

TEXT = """\
And God saw the light, that it was good: and God divided the light from the \
darkness. And God called the light Day, and the darkness he called Night. And \
the evening and the morning were the first day.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of the original package")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--text", help="a file; a few verses if left out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--total-steps",
        type=int,
        default=5000,
        help="of the whole training, which the learning rate is a curve over",
    )
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args(arguments)

    # The weights may be in bfloat16; what is added in a step is too small
    # for that, so train in float32 ("mixed_bfloat16" on TPU and GPU).
    lm = keras_bwetaf.from_preset(options.source, dtype="float32")
    lm.compile(keras_bwetaf.recipe("97m", total_steps=options.total_steps))
    lm.load_optimizer(options.source)
    print(f"Going on at step {int(lm.optimizer.iterations)}")

    with tempfile.TemporaryDirectory() as temporary:
        packed, preset = Path(temporary, "packed"), Path(temporary, "preset")
        keras_bwetaf.data.pack(
            Path(options.text).read_text().splitlines()
            if options.text
            else [TEXT] * 100,
            packed,
            lm.preprocessor.tokenizer,
            num_workers=1,
            progress=False,
        )
        data = keras_bwetaf.data.load_packed(
            packed,
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            tokenizer=lm.preprocessor.tokenizer,
        )
        lm.fit(data, steps_per_epoch=options.steps, verbose=2)

        lm.save_to_preset(preset, include_optimizer=True)
        converters.convert(preset, options.target, to="flax")
    print(f"{options.target}: step {int(lm.optimizer.iterations)}, for BwETAF")


if __name__ == "__main__":
    main()
