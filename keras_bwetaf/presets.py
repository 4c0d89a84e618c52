"""`from_preset`: a name, a repository or a folder -> a model."""

from typing import Unpack

from keras_bwetaf.arguments import BackboneConfig, DType, PathLike
from keras_bwetaf.models.decoder_lm import CausalLM


def from_preset(
    preset: PathLike,
    dtype: DType | None = None,
    load_weights: bool = True,
    revision: str | None = None,
    **config: Unpack[BackboneConfig],
) -> CausalLM:
    """Loads a model with its tokenizer, of the class that its files ask for.

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
        A `BwETAFCausalLM`, or the causal LM of another architecture.

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
    return CausalLM.from_preset(
        preset, load_weights, dtype=dtype, revision=revision, **config
    )
