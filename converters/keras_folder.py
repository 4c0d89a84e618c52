"""The folder that KerasHub's `save_to_preset` writes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from converters import kept
from converters.bwetaf_v3 import tensors
from converters.bwetaf_v3_config import (
    check_equal,
    config_from_keras,
    config_to_keras,
)
from converters.checkpoint import (
    MOMENTS,
    STEP,
    Checkpoint,
    check_coverage,
    common_dtype,
    end_token_id,
)
from converters.errors import CheckpointError, all_of
from converters.files import (
    read_bytes_or_none,
    read_json,
    read_json_or_none,
    read_stats,
    write_files,
)
from converters.hdf5_format import read_hdf5, write_hdf5
from converters.mapped import View

CONFIG = "config.json"
METADATA = "metadata.json"
TOKENIZER_CONFIG = "tokenizer.json"
PREPROCESSOR = "preprocessor.json"
TASK = "task.json"
TOKENIZER = "assets/tokenizer/tokenizer.json"
WEIGHTS = "model.weights.h5"
SHARDS = "model.weights.json"
OPTIMIZER = "optimizer.weights.h5"
STATS = "stats.json"
FILES = (
    *(CONFIG, METADATA, TOKENIZER_CONFIG, PREPROCESSOR, TASK, TOKENIZER),
    *(WEIGHTS, SHARDS, "model_?????.weights.h5", OPTIMIZER, STATS),
)
BACKBONE = "keras_bwetaf>BwETAFBackbone"
CLASSES = (
    (None, None),
    ("keras", "DTypePolicy"),
    ("keras", "DTypePolicyMap"),
    ("keras_bwetaf.models.backbone", "BwETAFBackbone"),
    ("keras_bwetaf.models.causal_lm", "BwETAFCausalLM"),
    (
        "keras_bwetaf.models.causal_lm_preprocessor",
        "BwETAFCausalLMPreprocessor",
    ),
    ("keras_bwetaf.models.tokenizer", "BwETAFTokenizer"),
)
# Keras names groups by class and attribute where its paths have the names of
# layers, and numbers the variables of a layer.
GROUPS = {
    "token_embedding": "reversible_embedding",
    "transformer_layer_0": "transformer_block",
    "self_attention": "attention",
    "output": "output_dense",
    "embeddings": "vars/0",
    "scale": "vars/0",
    "kernel": "vars/0",
    "bias": "vars/1",
}


def read_config(folder):
    """Reads and checks the configuration of the backbone in a folder.

    Args:
        folder: str or path.

    Returns:
        dict, the backbone's arguments and a few more.

    Raises:
        CheckpointError: if it is missing, or is not of a BwETAF model.
    """
    path = Path(folder) / CONFIG
    document = read_json(path)
    name, config = document.get("registered_name"), document.get("config")
    if name != BACKBONE or not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: expected the registered_name {BACKBONE!r} and a config. "
            f"Received: registered_name={name!r:.80}, config of type "
            f"{type(config).__name__}. Pass a BwETAF model."
        )
    return config


def read(folder, optimizer=True):
    """Reads and checks a folder.

    Args:
        folder: str or path.
        optimizer: bool. Whether to read the optimizer's state, if any.

    Returns:
        `Checkpoint`.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit the
            others; the message lists every problem of a file.
    """
    folder = Path(folder)
    keras_config = read_config(folder)
    documents = read_documents(folder)
    tokenizer, special_tokens = read_bytes_or_none(folder / TOKENIZER), {}
    if tokenizer is not None:
        settings = read_json(folder / TOKENIZER_CONFIG).get("config")
        settings = settings if isinstance(settings, dict) else {}
        special_tokens = {
            "eos_token": settings.get("end_token"),
            "unk_token": settings.get("unk_token"),
        }
    config = config_from_keras(
        keras_config,
        eos_token_id=end_token_id(
            tokenizer,
            folder / TOKENIZER,
            special_tokens.get("eos_token"),
            folder / TOKENIZER_CONFIG,
        ),
        source=folder / CONFIG,
    )
    if _is_quantized(keras_config):
        raise CheckpointError(
            f"{folder / CONFIG}: the weights are quantized, and have no place "
            "in a checkpoint of floats. Convert the model before it is "
            "quantized."
        )
    rows = tensors(config)
    found, state = all_of(
        lambda: _read_weights(folder, rows),
        lambda: (
            _read_optimizer(folder / OPTIMIZER, rows) if optimizer else None
        ),
    )
    config["dtype"] = common_dtype(found)
    checkpoint = Checkpoint(
        source=folder,
        config=config,
        tensors={row.name: View(found[place(row.keras)]) for row in rows},
        optimizer=state,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        stats=read_stats(folder / STATS),
    )
    return replace(
        checkpoint,
        kept=kept.keep(
            kept.read_kept(folder), "keras", documents, _documents(checkpoint)
        ),
    )


def read_documents(folder):
    """Reads the JSON files of a folder.

    Args:
        folder: path.

    Returns:
        dict of name to dict, of those that are there.

    Raises:
        CheckpointError: if one of them is damaged.
    """
    return {
        name: document
        for name in (CONFIG, METADATA, TOKENIZER_CONFIG, PREPROCESSOR, TASK)
        if (document := read_json_or_none(folder / name)) is not None
    }


def check_weights(folder):
    """Checks the weights of a folder, which may be quantized.

    Args:
        folder: path.

    Raises:
        CheckpointError: if a file is missing or damaged, or if the weights
            do not fit the configuration. Of quantized ones, it is not known
            what they should be.
    """
    config = read_config(folder)
    if _is_quantized(config):
        _read_files(folder)
    else:
        canonical = config_from_keras(config, source=folder / CONFIG)
        _read_weights(folder, tensors(canonical))


def _is_quantized(config):
    """Whether a layer has a policy such as Keras's `Int4DTypePolicy`."""
    policies = json.dumps(config.get("dtype"))
    return re.search(r'"(?!Float)\w+DTypePolicy"', policies) is not None


def write(folder, checkpoint, read, done):
    """Writes a folder that `from_preset` loads.

    Args:
        folder: path. It exists and is empty.
        checkpoint: `Checkpoint`.
        read: callable. Takes a canonical name, returns the numpy array.
        done: callable. Takes a canonical name whose array was written.

    Raises:
        CheckpointError: if what was kept for the folder contradicts it.
    """
    documents = kept.apply(
        checkpoint.kept, "keras", _documents(checkpoint), checkpoint.source
    )
    for name, document in documents.items():
        _check_classes(document, f"{checkpoint.source}: {name}")
    write_files(folder, documents, indent=4)
    check_equal(
        checkpoint.config,
        config_from_keras(read_config(folder), source=checkpoint.source),
        source=checkpoint.source,
    )
    write_files(
        folder,
        {
            TOKENIZER: checkpoint.tokenizer,
            STATS: checkpoint.stats,
            kept.FILE_NAME: kept.others(checkpoint.kept, "keras"),
        },
    )
    names = {place(row.keras): row.name for row in checkpoint.rows}
    _write(folder / WEIGHTS, checkpoint, names, read, done)
    if checkpoint.optimizer is not None:
        write_optimizer(folder, checkpoint, read, done)


def write_optimizer(folder, checkpoint, read=None, done=None):
    """Writes the optimizer's state into a folder.

    Args:
        folder: path.
        checkpoint: `Checkpoint` with such a state.
        read, done: As for `write`. Defaults to plain reading.
    """
    names = optimizer_names(checkpoint.rows)
    _write(
        folder / OPTIMIZER,
        checkpoint,
        names,
        read or (lambda name: checkpoint[name].array()),
        done or (lambda name: checkpoint[name].release()),
    )


def _check_classes(document, source):
    """Keras imports what a document names: only these classes may be named.

    Raises:
        CheckpointError: if the side file puts another one in.
    """
    if isinstance(document, list):
        document = dict(enumerate(document))
    if not isinstance(document, dict):
        return
    named = document.get("module"), document.get("class_name")
    if named not in CLASSES:
        raise CheckpointError(
            f"{source}: expected no class but those of a BwETAF model. "
            f"Received: {named!r:.80}. Remove {kept.FILE_NAME} to go on "
            "without it."
        )
    for value in document.values():
        _check_classes(value, source)


def place(keras_path):
    """Where a variable is in Keras's HDF5 files.

    Args:
        keras_path: str. Path of the variable in the model.

    Returns:
        str.
    """
    parts = [
        GROUPS.get(part, part.replace("transformer_layer", "transformer_block"))
        for part in keras_path.split("/")
    ]
    return "/".join(["layers", *parts])


def optimizer_names(rows):
    """Where the optimizer's state is in its HDF5 file.

    Args:
        rows: list of `bwetaf_v3.Tensor`.

    Returns:
        dict of path in the file to canonical name.
    """
    return {"iteration": STEP} | {
        f"{moment}/{row.keras}": f"{name}.{row.name}"
        for name, _, moment in MOMENTS
        for row in rows
    }


def _read_weights(folder, rows):
    found = _read_files(folder)
    check_coverage(folder, {place(row.keras): row.shape for row in rows}, found)
    return found


def _read_files(folder):
    """Indexes the weights, in one file or in the shards of an index."""
    if not (folder / SHARDS).exists():
        return read_hdf5(folder / WEIGHTS)
    if (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS}, or {SHARDS} with its shards. "
            "Received: both. Remove the one that is out of date."
        )
    weight_map = read_json(folder / SHARDS).get("weight_map")
    shards = set()
    for names in weight_map.values() if isinstance(weight_map, dict) else ():
        shards.update(map(str, names if isinstance(names, list) else [names]))
    if not shards or not all(
        PurePosixPath(shard).match("model_?????.weights.h5")
        and PurePosixPath(shard).name == shard
        for shard in shards
    ):
        raise CheckpointError(
            f"{folder / SHARDS}: weight_map must name model_?????.weights.h5 "
            f"files of the same folder. Received: {weight_map!r:.200}"
        )
    found = {}
    for shard in sorted(shards):
        tensors = read_hdf5(folder / shard)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(
                f"{folder / shard}: tensors of another shard occur again: "
                f"{', '.join(sorted(twice))}"
            )
        found |= tensors
    return found


def _read_optimizer(path, rows):
    if not path.is_file():
        return None
    found, names = read_hdf5(path), optimizer_names(rows)
    shapes = {"iteration": ()} | {
        f"{moment}/{row.keras}": row.shape
        for _, _, moment in MOMENTS
        for row in rows
    }
    check_coverage(path, shapes, found, counts={"iteration"})
    return {name: View(found[place]) for place, name in names.items()}


def _write(path, checkpoint, names, read, done):
    write_hdf5(
        path,
        {
            place: (checkpoint[name].dtype, checkpoint[name].shape)
            for place, name in names.items()
        },
        lambda place: read(names[place]),
        lambda place: done(names[place]),
    )


def _documents(checkpoint):
    """The JSON files that follow from a checkpoint."""
    config = checkpoint.config
    backbone = _object(
        "models.backbone",
        "BwETAFBackbone",
        config["dtype"],
        "bw_etaf_backbone",
        config_to_keras(config),
    )
    documents = {
        CONFIG: backbone,
        METADATA: {
            "parameter_count": sum(
                math.prod(row.shape) for row in checkpoint.rows
            ),
            "tasks": ["CausalLM"],
        },
        TOKENIZER_CONFIG: {},
        PREPROCESSOR: {},
    }
    if checkpoint.tokenizer is not None:
        documents[TOKENIZER_CONFIG] = _object(
            "models.tokenizer",
            "BwETAFTokenizer",
            "int32",
            "bw_etaf_tokenizer",
            {
                "config_file": "tokenizer.json",
                "end_token": checkpoint.special_tokens["eos_token"],
                "unk_token": checkpoint.special_tokens["unk_token"],
            },
        )
        documents[PREPROCESSOR] = _object(
            "models.causal_lm_preprocessor",
            "BwETAFCausalLMPreprocessor",
            "float32",
            "bw_etaf_causal_lm_preprocessor",
            {
                "tokenizer": documents[TOKENIZER_CONFIG],
                "config_file": "preprocessor.json",
                "sequence_length": config["max_position_embeddings"],
                "add_start_token": False,
                "add_end_token": True,
            },
        )
    documents[TASK] = {
        "module": "keras_bwetaf.models.causal_lm",
        "class_name": "BwETAFCausalLM",
        "config": {
            "backbone": backbone,
            "preprocessor": documents[PREPROCESSOR] or None,
            "name": "bw_etaf_causal_lm",
        },
        "registered_name": "keras_bwetaf>BwETAFCausalLM",
    }
    return documents


def _object(module, class_name, dtype, name, config):
    """An object of this library, as Keras serializes it."""
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype},
        "registered_name": None,
    }
    return {
        "module": f"keras_bwetaf.{module}",
        "class_name": class_name,
        "config": {"name": name, "trainable": True, "dtype": policy, **config},
        "registered_name": f"keras_bwetaf>{class_name}",
    }
