"""A folder of `save_to_preset` -> a hub, with a card that says what loads it.

KerasHub's own card names another package, links to a page that is not there,
and takes the place of one that lies in the folder.
"""

from pathlib import Path

import huggingface_hub
import keras_hub

import converters
from converters.hub import SCHEME, is_address
from keras_bwetaf.arguments import PathLike
from keras_bwetaf.preset_files import read_config

CARD = "README.md"
TEMPLATE = """\
---
library_name: keras-hub
pipeline_tag: text-generation
tags:
- keras_bwetaf
---

A {name} language model, saved by `keras_bwetaf`, which loads it:

```python
import keras_bwetaf

lm = keras_bwetaf.from_preset("hf://{repo}")
lm.generate("Once upon a time", max_new_tokens=64)
```

| Configuration | |
|---|---|
{rows}
"""


def upload_preset(uri: str, preset: PathLike) -> None:
    """Uploads a model to a hub, as `keras_hub.upload_preset` does.

    A repository of the Hugging Face Hub that has no model card gets the
    folder's `README.md`, or else one that names `keras_bwetaf`.

    Args:
        uri: str. `"hf://owner/repo"`, or another that KerasHub knows.
        preset: str or path. A folder that `save_to_preset` wrote.

    Raises:
        ValueError: If the folder is none, or there is no such kind of URI.
            Nothing is uploaded then.

    Example:

    ```python
    lm.save_to_preset("stories")
    keras_bwetaf.upload_preset("hf://me/stories", "stories")
    ```
    """
    folder = Path(preset)
    if converters.detect_format(folder) != "keras":
        raise ValueError(
            "Only a folder that `save_to_preset` wrote can be uploaded. "
            f"Received: preset={str(preset)!r}"
        )
    architecture, config = read_config(folder)
    if is_address(uri):
        repo = huggingface_hub.create_repo(
            uri[len(SCHEME) :], exist_ok=True
        ).repo_id
        if not huggingface_hub.file_exists(repo, CARD):
            own = folder / CARD
            card = (
                own.read_text()
                if own.exists()
                else _card(repo, architecture, config)
            )
            huggingface_hub.upload_file(
                path_or_fileobj=card.encode(),
                path_in_repo=CARD,
                repo_id=repo,
            )
    keras_hub.upload_preset(uri, str(folder))


def _card(repo, architecture, config):
    rows = [
        f"| {name} | {value} |"
        for name, value in config.items()
        if name not in ("name", "trainable", "dtype", "inputs_quantizers")
    ]
    return TEMPLATE.format(
        name=architecture.name, repo=repo, rows="\n".join(rows)
    )
