"""Hugging Face's folder: the canonical one, and with PyTorch code beside it.

The canonical folder ("safetensors") and the one that `transformers` loads
with `trust_remote_code=True` ("torch") hold the same files, but for the code
and the entry of `config.json` that names it.
"""

from pathlib import Path

from converters.architectures import (
    ARCHITECTURES,
    MODEL_TYPES,
    architecture_of,
    check_config,
)
from converters.checkpoint import (
    STEP,
    check_coverage,
    optimizer_shapes,
    token_ids,
)
from converters.errors import refuse
from converters.files import read_bytes_or_none, read_json, read_json_or_none
from converters.format import Format
from converters.mapped import View, different
from converters.safetensors_format import (
    read_safetensors_folder,
    write_safetensors_folder,
)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"
CODE = tuple(sorted({name for each in ARCHITECTURES for name in each.code}))
CODE_FOLDER = Path(__file__).parent / "transformers_model"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Keys by which a document has transformers fetch and run code, whatever the
# folder. They are dropped: the code of a PyTorch folder is this package's.
CODE_KEYS = {
    *("auto_map", "custom_pipelines", "custom_generate"),
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
    *("quantization_config", "trust_remote_code"),
}


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
    check_config(config, source=path)
    return config


def _files(stem):
    """Patterns of the files of tensors whose names start with a stem."""
    return (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors")


def _index(stem):
    return f"{stem}.safetensors.index.json"


class HuggingFaceFolder(Format):
    """See the module.

    Args:
        name: str.
        runtime: str. See `Format`.
        has_code: bool. Whether PyTorch's code belongs to it.
    """

    sign = (
        f"{CONFIG} with model_type {' or '.join(map(repr, MODEL_TYPES))} "
        "(safetensors, PyTorch)"
    )
    # Both kinds of folder have one entry in the side file.
    entry = "hugging_face"
    options = ("max_shard_size", "duplicate_head")
    config = CONFIG
    tokenizer = TOKENIZER
    tokenizer_config = TOKENIZER_CONFIG
    required = (CONFIG, TOKENIZER)
    settings = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)
    heads = (f"{WEIGHTS}.safetensors", _index(WEIGHTS))
    weights = _files(WEIGHTS)
    optimizer = _files(OPTIMIZER)
    indexes = (_index(WEIGHTS), _index(OPTIMIZER))
    code = CODE

    def __init__(self, name, runtime, has_code):
        self.name = name
        self.runtime = runtime
        self.has_code = has_code

    def recognizes(self, folder):
        config = read_json_or_none(folder / CONFIG) or {}
        return (
            # As text, because a list, say, is no key.
            str(config.get("model_type")) in MODEL_TYPES
            and ("auto_map" in config) == self.has_code
            and "registered_name" not in config  # as in a preset of KerasHub
        )

    def read_documents(self, folder):
        config = _without_code(read_config(folder))
        if "torch_dtype" in config:  # dtype's name before transformers 5
            config.setdefault("dtype", config.pop("torch_dtype"))
        documents = {CONFIG: config}
        for name in (TOKENIZER_CONFIG, GENERATION_CONFIG):
            document = read_json_or_none(folder / name)
            if document is not None:
                documents[name] = _without_code(document)
        return documents

    def special_tokens(self, folder, documents, tokenizer):
        """The tokens of the settings, or else of the configuration's ids."""
        settings = documents.get(TOKENIZER_CONFIG, {})
        tokens = {"eos_token": None, "unk_token": None}
        for name in tokens:
            token = settings.get(name)
            # transformers writes either the text or an object that holds it.
            token = token.get("content") if isinstance(token, dict) else token
            tokens[name] = token if isinstance(token, str) else None
        if tokens["eos_token"] is None:
            _, special = token_ids(tokenizer, folder / TOKENIZER)
            by_id = {str(number): token for token, number in special.items()}
            end = documents[CONFIG].get("eos_token_id")
            end = end[0] if isinstance(end, list) and end else end
            tokens["eos_token"] = by_id.get(str(end))
        return tokens

    def canonical_config(self, folder, documents, eos_token_id=None):
        config = documents[CONFIG]
        architecture = architecture_of(config, source=folder / CONFIG)
        return architecture, architecture.canonical_config(
            config, dtype=config.get("dtype"), eos_token_id=eos_token_id
        )

    def read_weights(self, folder, rows):
        found = read_safetensors_folder(folder, WEIGHTS)
        head = found.pop(HEAD, None)
        check_coverage(folder, {row.name: row.shape for row in rows}, found)
        _check_head(folder, head, found[EMBEDDING])
        return {row.name: View(found[row.name]) for row in rows}

    def read_optimizer(self, folder, rows):
        if not any(folder.glob(f"{OPTIMIZER}.safetensors*")):
            return None, {}
        found = read_safetensors_folder(folder, OPTIMIZER)
        check_coverage(folder, optimizer_shapes(rows), found, counts={STEP})
        return {name: View(tensor) for name, tensor in found.items()}, {}

    def documents(self, checkpoint):
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
                # Generation needs it: new tokens follow each prompt's last.
                "padding_side": "left",
            }
        return documents

    def checked(self, documents, checkpoint):
        documents = {
            name: _without_code(each) for name, each in documents.items()
        }
        config, source = documents[CONFIG], checkpoint.source
        check_config(config, source=source)
        architecture = checkpoint.architecture
        architecture.check_equal(checkpoint.config, config, source=source)
        if self.has_code:
            config["auto_map"] = dict(architecture.auto_map)
            for name in architecture.code:
                documents[name] = (CODE_FOLDER / name).read_bytes()
        return documents

    def write_tensors(
        self,
        folder,
        checkpoint,
        documents,
        max_shard_size=None,
        duplicate_head=False,
    ):
        """Writes the tensors.

        Args:
            folder, checkpoint, documents: See `Format`.
            max_shard_size: int, or None for one file. Bytes of tensors in a
                file.
            duplicate_head: bool. Whether to write the head, too, which is
                the embedding.
        """
        tensors = dict(checkpoint.tensors)
        if duplicate_head:
            tensors[HEAD] = tensors[EMBEDDING]
        parts = {WEIGHTS: tensors, OPTIMIZER: checkpoint.optimizer}
        for stem, part in parts.items():
            if part is not None:
                write_safetensors_folder(
                    folder, part, stem=stem, max_shard_size=max_shard_size
                )

    def code_problem(self, folder):
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


SAFETENSORS = HuggingFaceFolder("safetensors", "keras_bwetaf", has_code=False)
TORCH = HuggingFaceFolder("torch", "transformers", has_code=True)
