"""The folder that KerasHub's `save_to_preset` writes."""

import json
import math
import re
from pathlib import Path, PurePosixPath

from converters import kept
from converters.architectures import ARCHITECTURES, KERAS_BACKBONES
from converters.checkpoint import MOMENTS, STEP, check_coverage
from converters.errors import CheckpointError
from converters.files import read_json, read_json_or_none
from converters.format import Format
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
SHARD = "model_?????.weights.h5"
DOCUMENTS = (CONFIG, METADATA, TOKENIZER_CONFIG, PREPROCESSOR, TASK)
# Module and name of each class that a document may have Keras import.
CLASSES = (
    (None, None),
    ("keras", "DTypePolicy"),
    ("keras", "DTypePolicyMap"),
    *(
        (each.path, each.name)
        for architecture in ARCHITECTURES
        for each in vars(architecture.keras).values()
    ),
)
# Keras names groups by class and attribute where its paths have the names of
# layers, and numbers the variables of a layer.
GROUPS = {
    "token_embedding": "reversible_embedding",
    "transformer_layer_0": "transformer_block",
    "self_attention": "attention",
    "output": "output_dense",
    "final_norm": "rms_normalization",
    "embeddings": "vars/0",
    "scale": "vars/0",
    "kernel": "vars/0",
    "bias": "vars/1",
    **{
        f"{projection}_{name}": f"vars/{2 * i + j}"
        for i, projection in enumerate(("gate", "intermediate", "output"))
        for j, name in enumerate(("kernel", "bias"))
    },
    "router": "vars/6",
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
    return _backbone(read_json(path), path)[1]


def _backbone(document, source):
    """The `Architecture` of a document, and the backbone's arguments."""
    name, config = document.get("registered_name"), document.get("config")
    if str(name) not in KERAS_BACKBONES or not isinstance(config, dict):
        raise CheckpointError(
            f"{source}: expected the registered_name "
            f"{' or '.join(map(repr, KERAS_BACKBONES))} and a config. "
            f"Received: registered_name={name!r:.80}, config of type "
            f"{type(config).__name__}. Pass a BwETAF model."
        )
    return KERAS_BACKBONES[name], config


class KerasFolder(Format):
    """KerasHub's format."""

    name = entry = "keras"
    sign = f"{CONFIG} with registered_name (Keras)"
    runtime = "keras_bwetaf"
    config = CONFIG
    tokenizer = TOKENIZER
    tokenizer_config = TOKENIZER_CONFIG
    required = (CONFIG, TOKENIZER_CONFIG, TOKENIZER)
    settings = (*DOCUMENTS, TOKENIZER)
    heads = (WEIGHTS, SHARDS)
    indexes = (SHARDS,)
    weights = (WEIGHTS, SHARD)
    optimizer = (OPTIMIZER,)
    indent = 4

    def recognizes(self, folder):
        return "registered_name" in (read_json_or_none(folder / CONFIG) or {})

    def read_documents(self, folder):
        return {
            name: document
            for name in DOCUMENTS
            if (document := read_json_or_none(folder / name)) is not None
        }

    def special_tokens(self, folder, documents, tokenizer):
        document = documents.get(TOKENIZER_CONFIG)
        if document is None:
            document = read_json(folder / TOKENIZER_CONFIG)  # says: missing
        settings = document.get("config")
        settings = settings if isinstance(settings, dict) else {}
        return {
            "eos_token": settings.get("end_token"),
            "unk_token": settings.get("unk_token"),
        }

    def canonical_config(self, folder, documents, eos_token_id=None):
        source = folder / CONFIG
        architecture, keras_config = _backbone(documents[CONFIG], source)
        return architecture, architecture.config_from_keras(
            keras_config, eos_token_id=eos_token_id, source=source
        )

    def read_weights(self, folder, rows):
        if _is_quantized(read_config(folder)):
            raise CheckpointError(
                f"{folder / CONFIG}: the weights are quantized, and have no "
                "place in a checkpoint of floats. Convert the model before it "
                "is quantized."
            )
        found = _read_files(folder)
        places = {place(row.keras): row for row in rows}
        check_coverage(
            folder, {name: row.shape for name, row in places.items()}, found
        )
        return {row.name: View(found[name]) for name, row in places.items()}

    def read_optimizer(self, folder, rows):
        path = folder / OPTIMIZER
        if not path.is_file():
            return None, {}
        found, names = read_hdf5(path), optimizer_names(rows)
        shapes = {"iteration": ()} | {
            f"{moment}/{row.keras}": row.shape
            for _, _, moment in MOMENTS
            for row in rows
        }
        check_coverage(path, shapes, found, counts={"iteration"})
        return {name: View(found[key]) for key, name in names.items()}, {}

    def documents(self, checkpoint):
        config, architecture = checkpoint.config, checkpoint.architecture
        causal_lm = architecture.keras.causal_lm
        backbone = _object(
            architecture.keras.backbone,
            config["dtype"],
            architecture.config_to_keras(config),
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
            documents |= _preprocessing(checkpoint)
        documents[TASK] = {
            "module": causal_lm.path,
            "class_name": causal_lm.name,
            "config": {
                "backbone": backbone,
                "preprocessor": documents[PREPROCESSOR] or None,
                "name": causal_lm.default,
            },
            "registered_name": causal_lm.registered_name,
        }
        return documents

    def checked(self, documents, checkpoint):
        source = checkpoint.source
        for name, document in documents.items():
            _check_classes(document, f"{source}: {name}")
        architecture, config = _backbone(documents[CONFIG], source)
        written = architecture.config_from_keras(config, source=source)
        architecture.check_equal(checkpoint.config, written, source=source)
        return documents

    def write_tensors(self, folder, checkpoint, documents):
        write_hdf5(
            folder / WEIGHTS,
            {place(row.keras): checkpoint[row.name] for row in checkpoint.rows},
        )
        if checkpoint.optimizer is not None:
            write_optimizer(folder, checkpoint)

    def check_weights(self, folder):
        """See `Format`. Of quantized weights, only that files are whole."""
        if _is_quantized(read_config(folder)):
            _read_files(folder)
            return
        documents = {CONFIG: read_json(folder / CONFIG)}
        architecture, config = self.canonical_config(folder, documents)
        self.read_weights(folder, architecture.tensors(config))


def _is_quantized(config):
    """Whether a layer has a policy such as Keras's `Int4DTypePolicy`."""
    policies = json.dumps(config.get("dtype"))
    return re.search(r'"(?!Float)\w+DTypePolicy"', policies) is not None


def write_optimizer(folder, checkpoint):
    """Writes the optimizer's state into a folder.

    Args:
        folder: path.
        checkpoint: `Checkpoint` with such a state.
    """
    names = optimizer_names(checkpoint.rows)
    write_hdf5(
        folder / OPTIMIZER,
        {key: checkpoint[name] for key, name in names.items()},
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
        rows: list of `architecture.Tensor`.

    Returns:
        dict of path in the file to canonical name.
    """
    return {"iteration": STEP} | {
        f"{moment}/{row.keras}": f"{name}.{row.name}"
        for name, _, moment in MOMENTS
        for row in rows
    }


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
        PurePosixPath(shard).match(SHARD) and PurePosixPath(shard).name == shard
        for shard in shards
    ):
        raise CheckpointError(
            f"{folder / SHARDS}: weight_map must name {SHARD} files of the "
            f"same folder. Received: {weight_map!r:.200}"
        )
    found = {}
    for shard in sorted(shards):
        more = read_hdf5(folder / shard)
        if twice := found.keys() & more.keys():
            raise CheckpointError(
                f"{folder / shard}: tensors of another shard occur again: "
                f"{', '.join(sorted(twice))}"
            )
        found |= more
    return found


def _preprocessing(checkpoint):
    """The documents of a checkpoint's tokenizer and preprocessor."""
    classes = checkpoint.architecture.keras
    tokenizer = _object(
        classes.tokenizer,
        "int32",
        {
            "config_file": "tokenizer.json",
            "end_token": checkpoint.special_tokens["eos_token"],
            "unk_token": checkpoint.special_tokens["unk_token"],
        },
    )
    preprocessor = _object(
        classes.preprocessor,
        "float32",
        {
            "tokenizer": tokenizer,
            "config_file": "preprocessor.json",
            "sequence_length": checkpoint.config["max_position_embeddings"],
            "add_start_token": False,
            "add_end_token": True,
        },
    )
    return {TOKENIZER_CONFIG: tokenizer, PREPROCESSOR: preprocessor}


def _object(kind, dtype, config):
    """An object of a `KerasClass`, as Keras serializes it."""
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype},
        "registered_name": None,
    }
    start = {"name": kind.default, "trainable": True, "dtype": policy}
    return {
        "module": kind.path,
        "class_name": kind.name,
        "config": start | config,
        "registered_name": kind.registered_name,
    }


KERAS = KerasFolder()
