"""Stories of the grammar, as a TensorFlow data set."""

import random

import tensorflow_datasets as tfds

from examples.tiny.grammar import tell


class GrammarStories(tfds.core.GeneratorBasedBuilder):
    """Children's stories that `grammar.py` makes up."""

    VERSION = tfds.core.Version("1.0.0")
    NUM_STORIES = {"train": 60_000, "test": 1_000}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        seen = set()  # No story is in both splits.
        return {
            split: self._generate_examples(split, seen)
            for split in ("test", "train")
        }

    def _generate_examples(self, split, seen):
        stories = random.Random(split)
        for number in range(self.NUM_STORIES[split]):
            story = tell(stories)
            while story in seen:
                story = tell(stories)
            seen.add(story)
            yield number, {"text": story}
