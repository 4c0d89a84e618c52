"""A preset's name -> where its files live -> a local folder -> a model."""

import contextlib
import dataclasses
import hashlib
import inspect
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
from filelock import FileLock
from huggingface_hub import constants, errors

import converters
from converters.bwetaf_v3 import tensors
from converters.files import new_file, read_json

PRESETS = {
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

# Which files of a repository are needed, and which are welcome, by format.
# The optimizer's state, larger than the weights, is among neither.
FILES = {
    "safetensors": (
        ["config.json", "model.safetensors", "tokenizer.json"],
        ["tokenizer_config.json", "generation_config.json"],
    ),
    "flax": (
        [
            "understanding_good_stuff.json",
            "good_stuff.pkl",
            "tokenizer/yap.json",
        ],
        ["tokenizer/understanding_yap.json"],
    ),
    "keras": (
        ["config.json", "model.weights.h5", "tokenizer.json"],
        [
            "task.json",
            "task.weights.h5",
            "preprocessor.json",
            "metadata.json",
            "assets/tokenizer/tokenizer.json",
        ],
    ),
}
TOKENIZERS = {"safetensors": "tokenizer.json", "flax": "tokenizer/yap.json"}
WEIGHTS = (".pkl", ".safetensors", ".h5")
HUB_PREFIX = "hf://"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


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
        preset: str or path. One of `list_presets()`, `"hf://owner/repo"`, or
            a folder. A repository or folder is in the original's Flax
            format, holds safetensors, or was saved by `save_to_preset()`.
        dtype: str or `keras.DTypePolicy`. Dtype of computation and weights.
            Defaults to the global policy.
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
        OSError: If the cache cannot be written.

    Example:

    ```python
    lm = keras_bwetaf.from_preset("97m", dtype="bfloat16")
    lm.generate("The night sky", max_new_tokens=64)
    ```
    """
    _check_keywords(config)
    known = PRESETS.get(preset) if isinstance(preset, str) else None
    try:
        folder = preset_folder(preset, revision, weights=load_weights)
    except (OSError, ValueError) as error:
        if load_weights or not known:
            raise
        _warn_of_no_tokenizer(preset, error)
        return _build({**known["config"], **config}, dtype, tokenizer=None)
    layout = converters.detect_format(folder)
    if layout == "keras":
        return _load_keras(folder, dtype, load_weights, config)
    with contextlib.ExitStack() as stack:
        if layout == "flax" and load_weights:
            # A folder of the user's may change at any time: converted for
            # this load only, it is left alone and nothing goes stale.
            temporary = stack.enter_context(tempfile.TemporaryDirectory())
            converters.flax_to_safetensors(folder, f"{temporary}/model")
            folder, layout = Path(temporary, "model"), "safetensors"
        if known and not load_weights:
            config = {**known["config"], **config}
        else:
            config = {**backbone_config(folder), **config}
        tokenizer = folder / TOKENIZERS[layout]
        if not tokenizer.is_file():
            _warn_of_no_tokenizer(preset, f"There is no {TOKENIZERS[layout]}.")
            tokenizer = None
        weights = folder if load_weights else None
        return _build(config, dtype, tokenizer, weights)


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
        return Path(preset)
    return _cached(repo, revision) or _fetch(repo, revision, weights)


def cached_folder(preset, revision=None):
    """The local folder of a preset that is ready to load; no network.

    Args:
        preset: str or path. As for `from_preset`.
        revision: str. As for `from_preset`.

    Returns:
        A `Path`, or `None` if the preset has to be downloaded first.
    """
    repo, revision = _repository(preset, revision)
    return Path(preset) if repo is None else _cached(repo, revision)


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
    layout = converters.detect_format(folder)
    if layout == "keras":
        return read_json(folder / "config.json")["config"]
    if layout == "flax":
        path = folder / FILES["flax"][0][0]
        config = converters.config_from_flax(read_json(path), source=path)
    else:
        config = converters.read_config(folder)
    return converters.config_to_keras(config)


# === From a preset to a folder ===


def _repository(preset, revision):
    """Splits a preset into `(repository, revision)`; None for a folder."""
    if isinstance(preset, str) and preset in PRESETS:
        known = PRESETS[preset]
        return known["repo"], revision or known["revision"]
    if isinstance(preset, str) and preset.startswith(HUB_PREFIX):
        repo = preset.removeprefix(HUB_PREFIX)
        if not REPOSITORY.fullmatch(repo):
            raise ValueError(
                "A repository is written hf://owner/repo. Received: "
                f"preset={preset!r}"
            )
        return repo, revision or constants.DEFAULT_REVISION
    if not os.path.isdir(preset):
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


def _assets(repo):
    """Where the converted models of a repository live, a folder a commit.

    The path is that of `huggingface_hub.cached_assets_path`, which would
    create the folder: a look-up must leave no trace, and a conversion ends
    with the folder's creation.
    """
    assets = Path(constants.HF_ASSETS_CACHE).expanduser()
    return assets / "keras-bwetaf" / repo.replace("/", "--")


def _pin(repo, revision):
    """The file that holds the commit of a revision that was loaded."""
    return _assets(repo) / "refs" / quote(revision, safe="")


def _cached(repo, revision):
    """The folder that a revision was loaded from before, or None."""
    pin = _pin(repo, revision)
    if not pin.is_file():
        return None
    commit = pin.read_text()
    converted = _assets(repo) / commit
    return converted if converted.is_dir() else _snapshot(repo, commit)


def _snapshot(repo, revision):
    """The Hub cache's own folder of a revision, or None; no network."""
    for needed, _ in FILES.values():
        path = huggingface_hub.try_to_load_from_cache(
            repo, needed[0], constants.HF_HUB_CACHE, revision
        )
        if isinstance(path, str):
            return Path(path).parent
    return None


def _fetch(repo, revision, weights):
    """Downloads a revision; with weights, checks, converts and pins it."""
    commit, files = _resolve(repo, revision, weights)
    names, missing = _choose(files, weights)
    if missing:
        raise FileNotFoundError(
            f"The repository {repo} does not hold a whole model. Missing: "
            f"{', '.join(missing)}. Its owner has to add them, or pass a "
            "folder that holds the model."
        )
    with _clear_errors(repo, revision):
        if not weights:
            return _download(repo, commit, files, names)
        with _lock(repo):
            # Another process may have been faster.
            folder = _cached(repo, commit)
            if folder is None:
                folder = _download(repo, commit, files, names)
            for name in (commit, revision):
                pin = _pin(repo, name)
                pin.parent.mkdir(parents=True, exist_ok=True)
                with new_file(pin) as file:
                    file.write(commit.encode())
            return folder


def _resolve(repo, revision, weights):
    """Returns the commit of a revision and its files by name."""
    pin = _pin(repo, revision)
    if pin.is_file():
        revision = pin.read_text()
    try:
        with _clear_errors(repo, revision):
            info = huggingface_hub.HfApi().model_info(
                repo, revision=revision, files_metadata=True
            )
    except ConnectionError:
        # What another program put into the Hub's cache does as well.
        snapshot = _snapshot(repo, revision)
        files = {
            path.relative_to(snapshot).as_posix(): None
            for path in (snapshot.rglob("*") if snapshot else ())
        }
        _, missing = _choose(files, weights)
        if missing:
            raise
        return snapshot.name, files
    return info.sha, {file.rfilename: file for file in info.siblings}


def _choose(files, weights):
    """The names to download, in the likeliest format, and those missing."""
    needed, welcome = max(
        FILES.values(), key=lambda names: len(files.keys() & set(names[0]))
    )
    names = [
        name
        for name in needed + welcome
        if weights or not name.endswith(WEIGHTS)
    ]
    return (
        [name for name in names if name in files],
        [name for name in names if name in needed and name not in files],
    )


def _download(repo, commit, files, names):
    """Downloads and checks files, and converts them if need be.

    What turns out to be damaged is removed, so that the next attempt
    downloads it again.
    """
    weights = [name for name in names if name.endswith(WEIGHTS)]
    small = [name for name in names if name not in weights]
    try:
        # Weights come last: first it must be a model of this architecture.
        for batch in filter(None, (small, weights)):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo, revision=commit, allow_patterns=batch
                )
            )
            for name in batch:
                _check_digest(folder / name, files[name])
            backbone_config(folder)
        layout = converters.detect_format(folder)
        if weights and layout == "safetensors":
            converters.keras_tensors(folder)
        if weights and layout == "flax":
            target = _assets(repo) / commit
            for leftover in target.parent.glob(".*.tmp"):
                shutil.rmtree(leftover)  # of a process that was killed
            converters.flax_to_safetensors(folder, target)
            return target
        return folder
    except ValueError:
        _forget(repo, commit)
        raise


def _check_digest(path, file):
    """Compares a file with what the Hub says of it, if it was asked."""
    if file is None:
        return
    with path.open("rb") as content:
        if file.lfs is not None:
            expected = file.lfs.sha256
            received = hashlib.file_digest(content, "sha256").hexdigest()
        else:
            expected = file.blob_id
            data = content.read()
            header = b"blob %d\0" % len(data)
            received = hashlib.sha1(header + data).hexdigest()
    if received != expected:
        raise ValueError(
            f"{file.rfilename}: the download is corrupt and was removed. "
            f"Expected: digest {expected}. Received: {received}. Try again."
        )


def _forget(repo, commit):
    """Removes a revision from the Hub's cache."""
    cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    own = frozenset(each for each in cache.repos if each.repo_id == repo)
    cache = dataclasses.replace(cache, repos=own)
    cache.delete_revisions(commit).execute()


def _lock(repo):
    """One process at a time downloads and converts a repository."""
    name = f"models--{repo.replace('/', '--')}"
    folder = Path(constants.HF_HUB_CACHE, ".locks", name)
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "keras-bwetaf.lock")


@contextlib.contextmanager
def _clear_errors(repo, revision):
    """Says what went wrong on the way from the Hub, and what to do."""
    try:
        yield
    except (errors.HTTPError, OSError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            error = error.__cause__ or error
        raise _explain(error, repo, revision) from error


def _explain(error, repo, revision):
    where = f"{repo} (revision {revision}, {constants.ENDPOINT})"
    response = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{where} is gated. Accept its terms on its page, then {LOGIN}, "
            "as somebody who has access."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{where} does not exist, or is private. Check its name; if it is "
            f"private, {LOGIN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{where}: the repository has no such revision. Pass a branch, a "
            "tag or a commit that it has."
        )
    if response is not None and response.status_code in (401, 403):
        return PermissionError(
            f"{where} refuses access with status {response.status_code}. "
            f"To use another account or token, {LOGIN}."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{where} is not in the cache, and HF_HUB_OFFLINE forbids to "
            "download it. Unset HF_HUB_OFFLINE, or pass a folder that holds "
            "the model."
        )
    if response is not None:
        return ConnectionError(
            f"{where} answers with status {response.status_code}. Try again "
            "later."
        )
    if isinstance(error, errors.HTTPError):
        return ConnectionError(
            f"{where} cannot be reached: {error}. Check the network, or pass "
            "a folder that holds the model. Once downloaded, a model loads "
            "without the network."
        )
    if error.errno is not None:
        return OSError(
            error.errno,
            f"{error.strerror}. Cannot write the cache. Free space, or set "
            "HF_HOME to a folder that can be written",
            error.filename,
        )
    first_line = str(error).splitlines()[0]
    return ConnectionError(
        f"{where}: the download is incomplete. {first_line} Try again."
    )


# === From a folder to a model ===


def _check_keywords(config):
    from keras_bwetaf.models.backbone import BwETAFBackbone

    known = list(inspect.signature(BwETAFBackbone.__init__).parameters)
    known = [name for name in known if name not in ("self", "dtype", "kwargs")]
    unknown = [name for name in config if name not in known]
    if unknown:
        raise TypeError(
            f"from_preset() got unknown keywords: {', '.join(unknown)}. Of "
            f"the backbone's configuration, it takes {', '.join(known)}."
        )


def _warn_of_no_tokenizer(preset, reason):
    warnings.warn(
        f"The model has no preprocessor, because its tokenizer is not at "
        f"hand. {reason} Received: preset={os.fspath(preset)!r}",
        UserWarning,
        stacklevel=3,
    )


def _build(config, dtype, tokenizer, weights=None):
    """A model, its weights from a canonical folder or random.

    Args:
        config: dict. The backbone's arguments.
        dtype: str, `keras.DTypePolicy` or None.
        tokenizer: path or None.
        weights: path of a canonical folder or None.
    """
    from keras_bwetaf.layers.initializers import skip_initialization
    from keras_bwetaf.models.backbone import BwETAFBackbone
    from keras_bwetaf.models.causal_lm import BwETAFCausalLM
    from keras_bwetaf.models.causal_lm_preprocessor import (
        BwETAFCausalLMPreprocessor,
    )
    from keras_bwetaf.models.tokenizer import BwETAFTokenizer

    with skip_initialization() if weights else contextlib.nullcontext():
        backbone = BwETAFBackbone(**config, dtype=dtype)
    if weights:
        _assign(backbone, weights)
    preprocessor = None
    if tokenizer:
        preprocessor = BwETAFCausalLMPreprocessor(
            BwETAFTokenizer(str(tokenizer)),
            sequence_length=backbone.max_sequence_length,
        )
    return BwETAFCausalLM(backbone, preprocessor)


def _shapes(config):
    """Shapes by path of the variables that a configuration leads to."""
    canonical = converters.config_from_keras(config)
    return {each.keras: each.keras_shape for each in tensors(canonical)}


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
            "changes a shape, or pass load_weights=False. Tensors that "
            f"differ: {len(problems)}.\n" + "\n".join(problems)
        )


def _assign(backbone, folder):
    """Moves weights from a canonical folder into variables, one by one."""
    import jax

    variables = {variable.path: variable for variable in backbone.weights}
    _check_fit(
        _shapes(backbone_config(folder)),
        {path: tuple(each.shape) for path, each in variables.items()},
    )
    for variable in variables.values():
        variable.value.delete()  # zeros, whose memory the weights can have
    for path, array in converters.keras_tensors(folder):
        variable = variables[path]
        array = array.astype(variable.dtype, copy=False)
        # A copy, because the file may go; awaited, because copies in flight
        # pile up.
        array = jax.device_put(array, may_alias=False).block_until_ready()
        variable.assign(array)


def _load_keras(folder, dtype, load_weights, config):
    """A model that `save_to_preset` saved."""
    from keras_bwetaf.layers.initializers import skip_initialization
    from keras_bwetaf.models.backbone import BwETAFBackbone
    from keras_bwetaf.models.causal_lm import BwETAFCausalLM
    from keras_bwetaf.models.causal_lm_preprocessor import (
        BwETAFCausalLMPreprocessor,
    )

    if load_weights and config:
        saved = backbone_config(folder)
        _check_fit(_shapes(saved), _shapes({**saved, **config}))
    keywords = {"load_weights": load_weights, "dtype": dtype}
    with skip_initialization() if load_weights else contextlib.nullcontext():
        if not config:
            return BwETAFCausalLM.from_preset(str(folder), **keywords)
        backbone = BwETAFBackbone.from_preset(str(folder), **keywords, **config)
    preprocessor = BwETAFCausalLMPreprocessor.from_preset(str(folder))
    return BwETAFCausalLM(backbone, preprocessor)
