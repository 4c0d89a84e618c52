"""Prompts in a file, continued into another."""

import json
import os
from pathlib import Path
from typing import Any

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int
from keras_bwetaf.data.formats import json_records
from keras_bwetaf.models import BwETAFCausalLM

# After so many texts, what there is so far is on disk.
TEXTS_AT_ONCE = 256
SEEDS = 2**32


def read_prompts(path: PathLike) -> list[dict[str, Any]]:
    """Reads prompts: of JSON Lines, or each line of a text file.

    Args:
        path: str or path. A file that ends in `.jsonl`, whose records have a
            str `"prompt"`; or any other, of which empty lines are left out.

    Returns:
        list of dict, each with `"prompt"`, and what else its record had.

    Raises:
        ValueError: If there is no prompt, or one is no text.
        OSError: If the file can't be read.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = []
        for where, record in json_records(path, str(path)):
            prompt = record.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(
                    f"{where}: expected a text under 'prompt'. Received: "
                    f"{str(record)[:80]}"
                )
            records.append(record)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [{"prompt": line} for line in lines if line]
    if not records:
        raise ValueError(f"{path}: expected prompts. Received: none")
    return records


def continue_prompts(
    lm: BwETAFCausalLM,
    records: list[dict[str, Any]],
    output: PathLike,
    *,
    num_samples: int = 1,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Continues prompts, and writes a line of JSON for each text.

    A line is the prompt's record with `"text"`, what comes after the prompt,
    and `"sample"`, 0, 1, 2, ... The file appears under its name when all of
    them are there. Until then, and after an error or an interrupt, those so
    far are in a file beside it, with `.partial` at the end of its name.

    Args:
        lm: `BwETAFCausalLM`, with a tokenizer.
        records: list of dict, as `read_prompts` returns it.
        output: str or path.
        num_samples: int. Texts of each prompt.
        seed: int or `None`. Of the first sample; each further one has the
            next. Defaults to a random one for each text.
        **options: Of `lm.generate`.

    Raises:
        ValueError: If an option is wrong.
        OSError: If the file can't be written.
    """
    num_samples = positive_int("num_samples", num_samples)
    texts = [
        (record, sample) for record in records for sample in range(num_samples)
    ]
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = texts[start : start + TEXTS_AT_ONCE]
            if seed is not None:
                seeds = [(seed + sample) % SEEDS for _, sample in batch]
                options["seed"] = seeds
            made = lm.generate(
                [record["prompt"] for record, _ in batch],
                strip_prompt=True,
                **options,
            )
            for (record, sample), text in zip(batch, made, strict=True):
                line = {**record, "text": text, "sample": sample}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, output)
