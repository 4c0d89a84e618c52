"""Hugging Face's folder: the canonical one, and with PyTorch code beside it.

The canonical folder ("safetensors") and the one that `transformers` loads
with `trust_remote_code=True` ("torch") hold the same files, but for the code
and the entry of `config.json` that names it.
"""

from dataclasses import replace
from pathlib import Path

from converters import kept
from converters.bwetaf_v3 import tensors
from converters.bwetaf_v3_config import (
    canonical_config,
    check_config,
    check_equal,
)
from converters.checkpoint import (
    STEP,
    Checkpoint,
    check_coverage,
    common_dtype,
    end_token_id,
    optimizer_shapes,
    token_ids,
)
from converters.errors import CheckpointError, all_of, refuse
from converters.files import (
    read_bytes_or_none,
    read_json,
    read_json_or_none,
    read_stats,
    write_files,
)
from converters.mapped import View, different
from converters.safetensors_format import (
    read_safetensors_folder,
    write_safetensors_folder,
)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
STATS = "stats.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"
CODE = ("configuration_bwetaf.py", "modeling_bwetaf.py")
CODE_FOLDER = Path(__file__).parent / "transformers_model"
FILES = (
    *(CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, STATS, *CODE),
    *(
        f"{stem}{ending}"
        for stem in (WEIGHTS, OPTIMIZER)
        for ending in (
            ".safetensors",
            "-?????-of-?????.safetensors",
            ".safetensors.index.json",
        )
    ),
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
AUTO_MAP = {
    "AutoConfig": "configuration_bwetaf.BwETAFConfig",
    "AutoModel": "modeling_bwetaf.BwETAFModel",
    "AutoModelForCausalLM": "modeling_bwetaf.BwETAFForCausalLM",
}
# Keys by which a document has transformers fetch and run code, whatever the
# folder. They are dropped: the code of a PyTorch folder is this package's.
CODE_KEYS = {
    *("auto_map", "custom_pipelines", "custom_generate"),
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
    *("quantization_config", "trust_remote_code"),
}
# Both kinds of folder have one entry in the side file.
LAYOUT = "hugging_face"


def read_config(folder):
    """Reads and checks the configuration of a folder.

    Args:
        folder: str or path.

    Returns:
        dict.

    Raises:
        CheckpointError: if it is missing or wrong.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    _check_config(config, path)
    return config


def _check_config(config, source):
    if config.get("model_type") != "bwetaf":
        raise CheckpointError(
            f"{source}: expected model_type 'bwetaf'. Received: "
            f"{config.get('model_type')!r:.80}"
        )
    check_config(config, source=source)


def read(folder, optimizer=True):
    """Reads and checks a folder; its code is neither read nor run.

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
    config = _without_code(read_config(folder))
    if "torch_dtype" in config:  # dtype's name before transformers 5
        config.setdefault("dtype", config.pop("torch_dtype"))
    documents = {CONFIG: config}
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
        document = read_json_or_none(folder / name)
        if document is not None:
            documents[name] = _without_code(document)
    tokenizer = read_bytes_or_none(folder / TOKENIZER)
    special_tokens = {}
    if tokenizer is not None:
        special_tokens = _special_tokens(
            documents.get(TOKENIZER_CONFIG, {}),
            config,
            token_ids(tokenizer, folder / TOKENIZER)[1],
        )
    rows = tensors(config)
    found, state = all_of(
        lambda: _read_weights(folder, rows),
        lambda: _read_optimizer(folder, rows) if optimizer else None,
    )
    checkpoint = Checkpoint(
        source=folder,
        config=canonical_config(
            config,
            dtype=common_dtype(found),
            eos_token_id=end_token_id(
                tokenizer,
                folder / TOKENIZER,
                special_tokens.get("eos_token"),
                folder / TOKENIZER_CONFIG,
            ),
        ),
        tensors={row.name: View(found[row.name]) for row in rows},
        optimizer=state
        and {name: View(tensor) for name, tensor in state.items()},
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        stats=read_stats(folder / STATS),
    )
    return replace(
        checkpoint,
        kept=kept.keep(
            kept.read_kept(folder),
            LAYOUT,
            documents,
            _documents(checkpoint),
        ),
    )


def write(
    folder,
    checkpoint,
    read,
    done,
    *,
    code=False,
    max_shard_size=None,
    duplicate_head=False,
):
    """Writes a folder.

    Args:
        folder: path. It exists and is empty.
        checkpoint: `Checkpoint`.
        read: callable. Takes a canonical name, returns the numpy array.
        done: callable. Takes a canonical name whose array was written.
        code: bool. Whether PyTorch's code belongs to it.
        max_shard_size: int, or None for one file. Bytes of tensors in a file.
        duplicate_head: bool. Whether to write the head, too, which is the
            embedding.

    Raises:
        CheckpointError: if what was kept for the folder contradicts it.
    """
    documents = kept.apply(
        checkpoint.kept, LAYOUT, _documents(checkpoint), checkpoint.source
    )
    documents = {
        name: _without_code(document) for name, document in documents.items()
    }
    _check_config(documents[CONFIG], checkpoint.source)
    check_equal(checkpoint.config, documents[CONFIG], source=checkpoint.source)
    files = documents | {
        TOKENIZER: checkpoint.tokenizer,
        STATS: checkpoint.stats,
        kept.FILE_NAME: kept.others(checkpoint.kept, LAYOUT),
    }
    if code:
        files[CONFIG]["auto_map"] = AUTO_MAP
        files |= {name: (CODE_FOLDER / name).read_bytes() for name in CODE}
    write_files(folder, files)

    tensors = dict(checkpoint.tensors)
    if duplicate_head:
        tensors[HEAD] = tensors[EMBEDDING]
    parts = {WEIGHTS: tensors}
    if checkpoint.optimizer is not None:
        parts[OPTIMIZER] = checkpoint.optimizer
    for stem, part in parts.items():
        write_safetensors_folder(
            folder,
            {name: (each.dtype, each.shape) for name, each in part.items()},
            lambda name: read(EMBEDDING if name == HEAD else name),
            lambda name: name == HEAD or done(name),
            stem=stem,
            max_shard_size=max_shard_size,
        )


def code_problem(folder):
    """What is wrong with the code of a PyTorch folder, which is never run.

    Args:
        folder: path.

    Returns:
        str, or None if it is this package's code, or not there.
    """
    others = []
    for name in CODE:
        code = read_bytes_or_none(folder / name)
        if code not in (None, (CODE_FOLDER / name).read_bytes()):
            others.append(name)
    if not others:
        return None
    return (
        f"{folder}: of another version: {', '.join(others)}. transformers "
        "runs this code, and may compute something else. Bring it up to "
        f"date: bwetaf-convert convert {folder} NEW --to torch"
    )


def _without_code(value):
    """A JSON value without what would have code fetched and run."""
    if isinstance(value, dict):
        return {
            key: _without_code(item)
            for key, item in value.items()
            if key not in CODE_KEYS
        }
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def _documents(checkpoint):
    """The JSON files that follow from a checkpoint."""
    config = checkpoint.config
    end = config["eos_token_id"]
    documents = {
        CONFIG: config,
        TOKENIZER_CONFIG: {},
        GENERATION_CONFIG: {
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.92,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }
    if checkpoint.tokenizer is not None:
        documents[TOKENIZER_CONFIG] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **checkpoint.special_tokens,
            "pad_token": checkpoint.special_tokens["eos_token"],
            "bos_token": None,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            # Generation needs it: new tokens follow each prompt's last one.
            "padding_side": "left",
        }
    return documents


def _read_weights(folder, rows):
    found = read_safetensors_folder(folder, WEIGHTS)
    head = found.pop(HEAD, None)
    check_coverage(folder, {row.name: row.shape for row in rows}, found)
    _check_head(folder, head, found[EMBEDDING])
    return found


def _read_optimizer(folder, rows):
    if not any(folder.glob(f"{OPTIMIZER}.safetensors*")):
        return None
    found = read_safetensors_folder(folder, OPTIMIZER)
    check_coverage(folder, optimizer_shapes(rows), found, counts={STEP})
    return found


def _special_tokens(settings, config, special):
    """The tokens that the settings name, or else the configuration's ids."""
    tokens = {"eos_token": None, "unk_token": None}
    for name in tokens:
        token = settings.get(name)
        # transformers writes either the text or an object that holds it.
        token = token.get("content") if isinstance(token, dict) else token
        tokens[name] = token if isinstance(token, str) else None
    if tokens["eos_token"] is None:
        by_id = {str(number): token for token, number in special.items()}
        end = config.get("eos_token_id")
        end = end[0] if isinstance(end, list) and end else end
        tokens["eos_token"] = by_id.get(str(end))
    return tokens


def _check_head(folder, head, embedding):
    """A duplicate head is the embedding, bit for bit."""
    if head is None:
        return
    same = (
        head.dtype == embedding.dtype
        and head.shape == embedding.shape
        and not different(head.array(), embedding.array())
    )
    refuse(
        folder,
        []
        if same
        else [
            f"{HEAD} differs from {EMBEDDING}. Expected: the same tensor, "
            "for the model has one for both"
        ],
    )
