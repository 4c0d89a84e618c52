"""A preset's name -> where its files live -> a local folder -> a model."""

import contextlib
import os
import warnings
from pathlib import Path

import jax
import numpy as np
from huggingface_hub import constants

import converters
from converters import keras_folder
from converters.architectures import tensors
from converters.files import read_bytes
from converters.formats import find_format
from converters.hub import parse_source
from keras_bwetaf import hub
from keras_bwetaf.training import run_folder

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
}


def list_presets():
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


def from_preset(preset, dtype=None, load_weights=True, revision=None, **config):
    """Loads a model with its tokenizer.

    A repository is downloaded once, by `huggingface_hub` and its settings
    (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...), checked,
    and converted to safetensors if it is in the original's Flax format. Its
    branch is resolved to a commit once and stays pinned to it: from then on
    the model loads without the network.

    Args:
        preset: str or path. One of `list_presets()`, `"hf://owner/repo"`
            (with `"@revision"` at the end if need be), or a folder. A
            repository or folder is in the original's Flax format, holds
            safetensors, or was saved by `save_to_preset()`; or the folder is
            that of a run of `train`, whose `model` is taken.
        dtype: str or `keras.DTypePolicy`. Dtype of computation and weights.
            Defaults to the global policy; quantized weights keep theirs.
        load_weights: bool. `False` starts from random weights and downloads
            none. A preset with a name then works without the network, too:
            it has no preprocessor if its tokenizer cannot be had.
        revision: str. Branch, tag or commit of the repository. Defaults to
            its main branch.
        **config: Changes to the backbone's configuration, such as
            `rope_dtype="float32"` or `dropout=0.1`.

    Returns:
        A `BwETAFCausalLM`.

    Raises:
        ValueError: If the preset is unknown, its files are damaged, or
            `config` does not fit the weights.
        TypeError: If `config` has an unknown keyword.
        FileNotFoundError: If the repository, the revision or one of its
            files does not exist.
        PermissionError: If the repository needs a login.
        ConnectionError: If the network is needed and cannot be reached.
        OSError: If the cache cannot be written and does not hold all files.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("97m", dtype="bfloat16")
    lm.generate("The night sky", max_new_tokens=64)
    ```
    """
    from keras_bwetaf.models.backbone import check_keywords
    from keras_bwetaf.models.causal_lm import BwETAFCausalLM

    check_keywords("from_preset()", config)
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    try:
        folder = preset_folder(preset, revision, weights=load_weights)
    except ConnectionError as error:
        if load_weights or not known:
            raise
        _warn_of_no_tokenizer(preset, error)
        backbone = _canonical_backbone({**known["config"], **config}, dtype)
        return BwETAFCausalLM(backbone, preprocessor=None)
    layout = find_format(folder)
    saved = backbone_config(folder)
    if load_weights:
        layout.check_weights(folder)  # A wrong size may ask for any memory.
    if layout.name == "keras":
        backbone = _keras_backbone(folder, saved, config, dtype, load_weights)
    elif not load_weights:
        base = load_config(preset) if known else saved
        backbone = _canonical_backbone({**base, **config}, dtype)
    else:
        backbone = _canonical_backbone({**saved, **config}, dtype, folder)
    preprocessor = None
    if (folder / layout.tokenizer).is_file():
        preprocessor = _preprocessor(folder, layout, backbone)
    else:
        _warn_of_no_tokenizer(preset, f"There is no {layout.tokenizer}.")
    return BwETAFCausalLM(backbone, preprocessor)


def preset_folder(preset, revision=None, weights=True):
    """The local folder of a preset, downloaded and converted if needed.

    Args:
        preset: str or path. As for `from_preset`.
        revision: str. As for `from_preset`.
        weights: bool. `False` is content with a folder that lacks them.

    Returns:
        A `Path`.

    Raises:
        As `from_preset`.
    """
    repo, revision = _repository(preset, revision)
    if repo is None:
        return _folder(preset)
    return hub.cached(repo, revision) or hub.fetch(
        repo, revision, weights, check=backbone_config
    )


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


def load_tokenizer(preset, revision=None, **options):
    """The tokenizer of a preset; downloads no weights.

    Args:
        preset: str or path. As for `from_preset`.
        revision: str. As for `from_preset`.
        **options: Arguments of the tokenizer.

    Returns:
        A `BwETAFTokenizer`.

    Raises:
        As `from_preset`.
    """
    from keras_hub.tokenizers import Tokenizer

    folder = preset_folder(preset, revision, weights=False)
    layout = find_format(folder)
    if layout.name == "keras":
        layout.read_documents(folder)
        with _clear_errors(folder):
            return Tokenizer.from_preset(str(folder), **options)
    return _tokenizer(folder, layout, **options)


def load_config(preset):
    """The backbone's configuration of a preset; no network for known names.

    Args:
        preset: str or path. As for `from_preset`.

    Returns:
        dict.

    Raises:
        As `from_preset`.
    """
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    if known and "config" in known:
        return known["config"]
    return backbone_config(preset_folder(preset, weights=False))


def backbone_config(folder):
    """The backbone's configuration of a model in a folder.

    Args:
        folder: path. It may lack weights and tokenizer.

    Returns:
        dict.

    Raises:
        ValueError: If it is no folder of a model, or the configuration is
            damaged.
    """
    layout = find_format(folder)
    documents = layout.read_documents(folder)
    _, config = layout.canonical_config(folder, documents)
    if layout.name == "keras":
        return keras_folder.read_config(folder)  # Dtypes, too.
    return converters.config_to_keras(config)


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


def _folder(preset):
    """The folder that a preset is, or that comes with this package."""
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    if known:
        return known["folder"]
    folder = Path(preset)
    if not (folder / run_folder.CONFIG).is_file():
        return folder
    if not (folder / run_folder.MODEL).is_dir():
        raise ValueError(
            f"{folder}: the training run has no model yet. Finish it with: "
            f"keras-bwetaf train {folder}. Received: preset="
            f"{os.fspath(preset)!r}"
        )
    return folder / run_folder.MODEL


def _warn_of_no_tokenizer(preset, reason):
    warnings.warn(
        f"The model has no preprocessor, because its tokenizer is not at "
        f"hand. {reason} Received: preset={os.fspath(preset)!r}",
        UserWarning,
        stacklevel=3,
    )


def _canonical_backbone(config, dtype, weights=None):
    """A backbone, its weights from a folder or random.

    Args:
        config: dict. The backbone's arguments.
        dtype: str, `keras.DTypePolicy` or None.
        weights: path of a folder, or None.
    """
    from keras_bwetaf.layers.initializers import skip_initialization
    from keras_bwetaf.models.backbone import BwETAFBackbone

    with skip_initialization() if weights else contextlib.nullcontext():
        backbone = BwETAFBackbone(**config, dtype=dtype)
    if weights:
        _assign(backbone, weights)
    return backbone


def _keras_backbone(folder, saved, config, dtype, load_weights):
    """A backbone that `save_to_preset` saved.

    Args:
        folder: path.
        saved: dict. Its `backbone_config`.
        config: dict. Changes to it.
        dtype: str, `keras.DTypePolicy` or None.
        load_weights: bool.
    """
    from keras_bwetaf.layers.initializers import skip_initialization
    from keras_bwetaf.models.backbone import BwETAFBackbone

    own_dtypes = _own_dtypes(saved)
    if load_weights:
        if own_dtypes and dtype is not None:
            raise ValueError(
                "The weights are quantized and keep their dtypes. Leave out "
                "`dtype`, or pass load_weights=False. Received: "
                f"dtype={dtype!r}"
            )
        check_changes(saved, config)
    with skip_initialization() if load_weights else contextlib.nullcontext():
        with _clear_errors(folder):
            return BwETAFBackbone.from_preset(
                str(folder),
                load_weights=load_weights,
                dtype=own_dtypes if dtype is None else dtype,
                **config,
            )


@contextlib.contextmanager
def _clear_errors(folder):
    """Names the folder where Keras stumbles over what it holds."""
    try:
        yield
    except (MemoryError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(
            f"{folder}: Keras cannot load it. Export it again, or pass "
            f"another folder. Received: {type(error).__name__}: {error}"
        ) from error


def _own_dtypes(config):
    """The dtypes of a quantized model; None if it is all of one float."""
    dtype = config.get("dtype")
    if isinstance(dtype, dict) and dtype.get("class_name") != "DTypePolicy":
        return dtype
    return None


def _preprocessor(folder, layout, backbone):
    """The preprocessor of a folder that has a tokenizer."""
    from keras_bwetaf.models.causal_lm_preprocessor import (
        BwETAFCausalLMPreprocessor,
    )

    if layout.name == "keras":
        layout.read_documents(folder)
        with _clear_errors(folder):
            return BwETAFCausalLMPreprocessor.from_preset(str(folder))
    return BwETAFCausalLMPreprocessor(
        _tokenizer(folder, layout), sequence_length=backbone.max_sequence_length
    )


def _tokenizer(folder, layout, **options):
    """The tokenizer of a folder that is not a KerasHub preset."""
    from keras_bwetaf.models.tokenizer import BwETAFTokenizer

    path = folder / layout.tokenizer
    special = layout.special_tokens(
        folder, layout.read_documents(folder), read_bytes(path)
    )
    names = {"end_token": "eos_token", "unk_token": "unk_token"}
    given = {
        argument: special[name]
        for argument, name in names.items()
        if isinstance(special[name], str)
    }
    return BwETAFTokenizer(str(path), **{**given, **options})


def _shapes(config):
    """Shapes by path of the variables that a configuration leads to."""
    canonical = converters.config_from_keras(config)
    return {each.keras: each.shape for each in tensors(canonical)}


def check_changes(config, changes):
    """Refuses changes to a configuration that its weights do not fit.

    Args:
        config: dict.
        changes: dict.

    Raises:
        ValueError: If a shape changes.
    """
    _check_fit(_shapes(config), _shapes({**config, **changes}))


def _check_fit(found, wanted):
    """Compares the shapes of a checkpoint and of a model."""
    problems = [
        f"{path}: {found.get(path, 'nothing')} in the checkpoint, "
        f"{wanted.get(path, 'nothing')} in the model"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]
    if problems:
        raise ValueError(
            "The configuration does not fit the weights. Change nothing that "
            "changes a shape, or start from random weights: "
            "load_weights=False, or from_scratch of `train`. Tensors that "
            f"differ: {len(problems)}.\n" + "\n".join(problems)
        )


def _assign(backbone, folder):
    """Moves weights from a folder into variables, one by one.

    Each goes straight to its devices, which get their own parts only.
    """
    from keras_bwetaf.layers.sharding import mesh

    variables = {variable.path: variable for variable in backbone.weights}
    checkpoint = converters.read_checkpoint(folder, optimizer=False)
    _check_fit(
        {row.keras: row.shape for row in checkpoint.rows},
        {path: tuple(each.shape) for path, each in variables.items()},
    )
    places = {path: each.value.sharding for path, each in variables.items()}
    for variable in variables.values():
        variable.value.delete()  # zeros, whose memory the weights can have
    for row in checkpoint.rows:
        variable = variables[row.keras]
        with checkpoint.tensor(row.name) as view:

            def read(part, view=view, dtype=variable.dtype):
                # A copy, because JAX goes on using an array where it lies,
                # and the file may change.
                return np.array(view[part], dtype, order="C")

            if mesh() is not None:
                value = jax.make_array_from_callback(
                    view.shape, places[row.keras], read
                )
            else:
                value = jax.device_put(read(...))
            # Finished, so that copies don't pile up.
            variable.assign(value.block_until_ready())
