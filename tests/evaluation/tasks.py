"""Three small tasks of lm-evaluation-harness, of text that is at hand."""

import json

import yaml

from tests import trained

# Of each story: how it begins, the right next words, and two other stories'.
NAMES = ("stories_choice", "stories_rolling", "stories_generate")


def write(folder, count):
    """Writes the tasks with so many documents each."""
    texts = trained.documents(trained.FOLDER)["val"][: count + 2]
    words = [text.split(" ") for text in texts]
    records = []
    for i in range(count):
        choices = [" ".join(each[8:12]) for each in words[i : i + 3]]
        answer = i % 3
        choices[0], choices[answer] = choices[answer], choices[0]
        records.append(
            {
                "text": texts[i],
                "begin": " ".join(words[i][:8]),
                "choices": choices,
                "answer": answer,
                "end": " ".join(words[i][8:16]),
            }
        )
    data = folder / "stories.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in records))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "metadata": {"version": 1},
    }
    choice, rolling, generate = NAMES
    tasks = {
        choice: {
            "output_type": "multiple_choice",
            "doc_to_text": "{{begin}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        rolling: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "word_perplexity"},
                {"metric": "bits_per_byte"},
            ],
        },
        generate: {
            "output_type": "generate_until",
            "doc_to_text": "{{begin}}",
            "doc_to_target": "{{end}}",
            "generation_kwargs": {
                "until": ["?", "\n"],
                "max_gen_toks": 40,
                "do_sample": False,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        content = yaml.safe_dump({"task": name, **common, **task})
        (folder / f"{name}.yaml").write_text(content)
