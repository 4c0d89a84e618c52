"""A preset's name -> where its files live -> a local folder; no model yet."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from converters import keras_folder
from converters.architecture import Architecture
from converters.architectures import MODEL_TYPES
from converters.bwetaf_v2 import BWETAF_V2
from converters.bwetaf_v3 import BWETAF_V3
from converters.bwetaf_v4 import BWETAF_V4
from converters.format import Format
from converters.formats import find_format
from converters.hub import parse_source
from keras_bwetaf import hub

# Of version 3, where no `model_type` is named.
PRESETS = {
    "tiny": {
        "folder": Path(__file__).parent / "assets" / "tiny",
        "description": (
            "Children's stories, context 256, trained by examples/tiny; "
            "comes with the package"
        ),
        "parameters": 2_629_632,
    },
    "97m": {
        "repo": "WICKED4950/BwETAFv3-97M",
        "revision": "main",
        "description": (
            "English, context 2048, trained on TinyStories, then FineWeb "
            "(3.4 billion tokens)"
        ),
        "parameters": 97_609_728,
        "config": {
            "vocabulary_size": 16384,
            "num_layers": 12,
            "num_query_heads": 8,
            "num_key_value_heads": 4,
            "hidden_dim": 768,
            "intermediate_dim": 2304,
            "max_sequence_length": 2048,
            "dropout": 0.05,
            "rope_dtype": None,
            "initializer_range": 0.002,
            "embedding_initializer_range": 0.02,
        },
    },
    "v2-53m": {
        "model_type": BWETAF_V2.model_type,
        "repo": "WICKED4950/BwETAFv2-53M",
        "revision": "main",
        "description": (
            "English, context 2048, GPT-2's tokenizer (1.3 billion tokens)"
        ),
        "parameters": 53_012_480,
        "config": {
            "vocabulary_size": 50260,
            "num_layers": 8,
            "num_query_heads": 8,
            "hidden_dim": 512,
            "intermediate_dim": 1536,
            "max_sequence_length": 2048,
            "dropout": 0.1,
            "use_rope": True,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "initializer_range": 0.02,
            "embedding_initializer_range": 0.02,
        },
    },
    "v2-130m": {
        "model_type": BWETAF_V2.model_type,
        "repo": "WICKED4950/BwETAFv2-130M",
        "revision": "main",
        "description": (
            "English, context 8192, trained at 4096 (3 billion tokens), "
            "GPT-2's tokenizer"
        ),
        "parameters": 130_649_088,
        "config": {
            "vocabulary_size": 50260,
            "num_layers": 12,
            "num_query_heads": 12,
            "hidden_dim": 768,
            "intermediate_dim": 2304,
            "max_sequence_length": 8192,
            "dropout": 0.1,
            "use_rope": True,
            "embedding_scale": 1.0,
            "residual_scale": 1.0,
            "initializer_range": 0.02,
            "embedding_initializer_range": 0.02,
        },
    },
    "v4-preview": {
        "model_type": BWETAF_V4.model_type,
        "repo": "WICKED4950/BwETAFv4-preview",
        "revision": "main",
        "description": (
            "English, context 8192, a mixture of 8 experts, of which 2 work "
            "on a token: 83,491,584 parameters (10 billion tokens)"
        ),
        "parameters": 253_545_216,
        "config": {
            "vocabulary_size": 16384,
            "num_layers": 8,
            "num_query_heads": 8,
            "num_key_value_heads": 4,
            "hidden_dim": 768,
            "intermediate_dim": 1536,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "max_sequence_length": 8192,
            "expert_dispatch": "exact",
            "expert_capacity": 1.25,  # The card does not say.
            "dropout": 0.03,
            "rope_dtype": None,
            "initializer_range": None,
        },
    },
}
PRESETS["v3-97m"] = PRESETS["97m"]

# Of the folder of a training run: what makes it one, and its model.
RUN_SETTINGS = "config.yaml"
MODEL = "model"


@dataclasses.dataclass(frozen=True)
class PresetFiles:
    """The files of a preset on this machine.

    Args:
        folder: Path; or None if weights are not wanted and the repository of
            a preset with a name cannot be reached.
        layout: `converters.format.Format`, or None.
        architecture: `converters.architecture.Architecture`.
        config: dict. The backbone's configuration.
        no_tokenizer: str. Why there is no tokenizer; empty if there is one.
    """

    folder: Path | None
    layout: Format | None
    architecture: Architecture
    config: dict
    no_tokenizer: str = ""

    @property
    def known_tokenizer(self):
        """The `KnownTokenizer` of the architecture, or None."""
        return self.architecture.tokenizer(self.config["vocabulary_size"])

    @property
    def tokenizer(self):
        """Path of the tokenizer's file."""
        return self.folder / self.layout.tokenizer


def list_presets() -> dict[str, dict[str, Any]]:
    """The models that `from_preset` knows by name.

    Returns:
        dict of name to a dict with `"description"` and `"parameters"`.

    Example:

    ```python
    keras_bwetaf.list_presets()["97m"]["parameters"]  # 97,609,728
    ```
    """
    return {
        name: {key: preset[key] for key in ("description", "parameters")}
        for name, preset in PRESETS.items()
    }


def open_preset(preset, revision=None, weights=True, check=None):
    """The files of a preset, downloaded and converted if needed.

    Args:
        preset: str or path. As for `keras_bwetaf.from_preset`.
        revision: str. As for `from_preset`.
        weights: bool. `False` is content without them; then the configuration
            of a preset with a name is the one that this package knows.
        check: callable, optional. Takes the `Architecture` as soon as it is
            known, before weights are downloaded, and raises an error if it is
            not what is wanted.

    Returns:
        `PresetFiles`.

    Raises:
        As `from_preset`.
    """
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    check = check or (lambda architecture: None)
    if known:
        check(_architecture(known))
    try:
        folder = preset_folder(preset, revision, weights, check)
    except ConnectionError as error:
        if weights or not known:
            raise
        files = PresetFiles(None, None, _architecture(known), known["config"])
        if files.known_tokenizer:
            return files
        return dataclasses.replace(files, no_tokenizer=str(error))
    layout = find_format(folder)
    architecture, config = read_config(folder)
    check(architecture)
    if weights:
        layout.check_weights(folder)  # A wrong size may ask for any memory.
    elif layout.name != "keras" and known:
        config = known.get("config", config)
    files = PresetFiles(folder, layout, architecture, config)
    if files.tokenizer.is_file() or layout.has_known_tokenizer(folder):
        return files
    reason = f"There is no {layout.tokenizer}."
    return dataclasses.replace(files, no_tokenizer=reason)


def preset_folder(preset, revision=None, weights=True, check=None):
    """The local folder of a preset, downloaded and converted if needed.

    Args:
        preset: str or path. As for `from_preset`.
        revision: str. As for `from_preset`.
        weights: bool. `False` is content with a folder that lacks them.
        check: callable, optional. As for `open_preset`; called for what is
            downloaded.

    Returns:
        A `Path`.

    Raises:
        As `from_preset`.
    """
    repo, revision = _repository(preset, revision)
    if repo is None:
        return _folder(preset)

    def check_folder(folder):
        architecture, _ = read_config(folder)
        if check is not None:
            check(architecture)

    return hub.cached(repo, revision) or hub.fetch(
        repo, revision, weights, check_folder
    )


def check_preset(preset, revision=None):
    """Raises `from_preset`'s errors of a preset that there cannot be."""
    _repository(preset, revision)


def cached_folder(preset, revision=None):
    """The local folder of a preset that is ready to load; no network.

    Args:
        preset: str or path. As for `from_preset`.
        revision: str. As for `from_preset`.

    Returns:
        A `Path`, or `None` if the preset has to be downloaded first.
    """
    repo, revision = _repository(preset, revision)
    return _folder(preset) if repo is None else hub.cached(repo, revision)


def load_config(preset):
    """The backbone's configuration of a preset; no network for known names.

    Args:
        preset: str or path. As for `from_preset`.

    Returns:
        dict.

    Raises:
        As `from_preset`.
    """
    _, config = load_architecture(preset)
    return config


def load_architecture(preset):
    """What a preset is; no network for known names.

    Args:
        preset: str or path. As for `from_preset`.

    Returns:
        Tuple of `Architecture`, and dict: the backbone's configuration.

    Raises:
        As `from_preset`.
    """
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    if known and "config" in known:
        return _architecture(known), known["config"]
    return read_config(preset_folder(preset, weights=False))


def read_config(folder):
    """What the model in a folder is.

    Args:
        folder: path. It may lack weights and tokenizer.

    Returns:
        Tuple of `Architecture`, and dict: the backbone's configuration.

    Raises:
        ValueError: If it is no folder of a model, or the configuration is
            damaged.
    """
    layout = find_format(folder)
    documents = layout.read_documents(folder)
    architecture, config = layout.canonical_config(folder, documents)
    if layout.name == "keras":
        return architecture, keras_folder.read_config(folder)  # Dtypes, too.
    return architecture, architecture.config_to_keras(config)


def _repository(preset, revision):
    """Splits a preset into `(repository, revision)`; None for a folder."""
    if not isinstance(preset, (str, os.PathLike)):
        raise ValueError(
            f"A preset is a str or a path: one of {list(PRESETS)}, "
            "'hf://owner/repo' or a folder. Received: "
            f"preset={preset!r} of type {type(preset).__name__}"
        )
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    if known and "repo" in known:
        return known["repo"], revision or known["revision"]
    if repository := parse_source("preset", preset):
        repo, own = repository
        if own and revision not in (None, own):
            raise ValueError(
                "Two revisions are given. Leave one out. Received: "
                f"preset={preset!r}, revision={revision!r}"
            )
        return repo, own or revision or constants.DEFAULT_REVISION
    if not (known or os.path.isdir(preset)):
        raise ValueError(
            "Unknown preset: there is no such name and no such folder. Pass "
            f"one of {list(PRESETS)}, 'hf://owner/repo' or an existing "
            f"folder. Received: preset={os.fspath(preset)!r}"
        )
    if revision is not None:
        raise ValueError(
            "Only a repository has revisions, a folder has none. Received: "
            f"preset={os.fspath(preset)!r}, revision={revision!r}"
        )
    return None, None


def _architecture(known):
    """The `Architecture` of an entry of `PRESETS`."""
    return MODEL_TYPES[known.get("model_type", BWETAF_V3.model_type)]


def _folder(preset):
    """The folder that a preset is, or that comes with this package."""
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    if known:
        return known["folder"]
    folder = Path(preset)
    if not (folder / RUN_SETTINGS).is_file():
        return folder
    if not (folder / MODEL).is_dir():
        raise ValueError(
            f"{folder}: the training run has no model yet. Finish it with: "
            f"keras-bwetaf train {folder}. Received: preset="
            f"{os.fspath(preset)!r}"
        )
    return folder / MODEL
