"""A causal LM of any of this package's decoders: graph, saving, loading."""

import os
from typing import Any, Literal, Self, Unpack

import keras_hub

import converters
from converters import keras_folder
from converters.files import local_path
from converters.hub import local_folder
from keras_bwetaf.arguments import BackboneConfig, DType, PathLike
from keras_bwetaf.exchange.export import as_checkpoint
from keras_bwetaf.exchange.optimizer_state import load_optimizer_state
from keras_bwetaf.models.decoder import DecoderBackbone
from keras_bwetaf.models.loading import (
    is_left_to_keras_hub,
    load_backbone,
    load_preprocessor,
    warn_of_no_tokenizer,
)
from keras_bwetaf.models.lora import merged_for_saving
from keras_bwetaf.models.quantization import only_what_can_be
from keras_bwetaf.models.registry import class_for
from keras_bwetaf.models.trainer import Trainer
from keras_bwetaf.preset_files import open_preset
from keras_bwetaf.processes import gathered, in_first_process


class CausalLM(Trainer):
    """A decoder and its tied head, as a `keras_hub.models.CausalLM`.

    An architecture's own class names its `backbone_cls` and
    `preprocessor_cls`.

    Args:
        backbone: A decoder of this package.
        preprocessor: Its preprocessor, or `None`. Without one, inputs are
            token ids.
    """

    def __init__(
        self,
        backbone: keras_hub.models.Backbone,
        preprocessor: keras_hub.models.CausalLMPreprocessor | None = None,
        **kwargs: Any,
    ):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional Model ===
        inputs = backbone.input
        hidden_states = backbone(inputs)
        outputs = backbone.head(hidden_states)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        load_weights: bool = True,
        *,
        dtype: DType | None = None,
        revision: str | None = None,
        preprocessor: keras_hub.models.CausalLMPreprocessor
        | Literal["auto"]
        | None = "auto",
        **config: Unpack[BackboneConfig],
    ) -> Self:
        """Loads a model with its tokenizer: see `keras_bwetaf.from_preset`.

        Args:
            preprocessor: `"auto"`, that of the preset; another; or `None`.
            **others: See `keras_bwetaf.from_preset`.
        """
        if is_left_to_keras_hub(cls, preset):
            if preprocessor != "auto":
                config["preprocessor"] = preprocessor
            return super().from_preset(
                os.fspath(preset), load_weights, dtype=dtype, **config
            )

        def check(architecture):
            backbone_cls = class_for(cls, architecture).backbone_cls
            backbone_cls.check_keywords("from_preset()", config)

        files = open_preset(preset, revision, load_weights, check)
        found = class_for(cls, files.architecture)
        backbone = load_backbone(
            found.backbone_cls, files, load_weights, dtype, config
        )
        if preprocessor == "auto" and files.no_tokenizer:
            preprocessor = None
            warn_of_no_tokenizer(preset, files.no_tokenizer)
        elif preprocessor == "auto":
            preprocessor = load_preprocessor(found.preprocessor_cls, files)
        return found(backbone, preprocessor)

    def quantize(self, mode=None, **kwargs):
        """Quantizes the weights. See `keras.Model.quantize`."""
        with only_what_can_be():
            super().quantize(mode, **kwargs)

    def _run_through_graph(
        self, inputs, operation_fn=lambda operation: operation, call_fn=None
    ):
        def tied(operation):
            if operation is self.backbone.token_embedding:
                backbone = operation_fn(self.backbone)
                # Or `keras.models.clone_model` gives the head its own weights.
                if isinstance(backbone, DecoderBackbone):
                    return backbone.token_embedding
            return operation_fn(operation)

        return super()._run_through_graph(inputs, tied, call_fn)

    def save_to_preset(
        self,
        preset_dir: PathLike,
        max_shard_size: float = 10,
        include_optimizer: bool = False,
    ) -> None:
        """Saves the model to a folder that `from_preset` loads.

        LoRA's products are saved in the weights that they belong to. The
        model itself stays as it is. With several processes, all must call
        this; the first one writes.

        Args:
            preset_dir: str or path.
            max_shard_size: int or float. Gigabytes of weights in one file.
            include_optimizer: bool. Whether to save the optimizer's state,
                for `load_optimizer`, to `optimizer.weights.h5`.

        Raises:
            ValueError: If `include_optimizer` and the optimizer has another
                state than Adam's.
        """
        variables = list(self.variables)
        if include_optimizer and self.compiled:
            variables += self.optimizer.variables
        with merged_for_saving(self.backbone), gathered(variables):
            in_first_process(
                self._write_preset,
                local_path("preset_dir", preset_dir),
                max_shard_size,
                include_optimizer,
            )

    def _write_preset(self, folder, max_shard_size, include_optimizer):
        checkpoint = None
        if include_optimizer:
            checkpoint = as_checkpoint(self, include_optimizer=True)
        super().save_to_preset(folder, max_shard_size=max_shard_size)
        _remove_older_files(folder, include_optimizer)
        if checkpoint:
            keras_folder.write_optimizer(folder, checkpoint)

    def export_to_transformers(
        self, path: PathLike, overwrite: bool = False
    ) -> None:
        """Writes a folder that `transformers` loads, and what builds on it.

        `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`
        then computes the same logits in PyTorch, which is not needed to write
        the folder. It is what `converters.convert(..., to="torch")` writes,
        with the model and its tokenizer only. With several processes, all
        must call this; the first one writes.

        Args:
            path: str or path. The folder.
            overwrite: bool. Whether a model folder may be replaced.

        Raises:
            ValueError: If the folder exists, or the model is quantized.
        """
        with gathered(self.variables):
            in_first_process(
                converters.write_checkpoint,
                as_checkpoint(self),
                path,
                to="torch",
                overwrite=overwrite,
            )

    def load_optimizer(self, source: PathLike) -> None:
        """Goes on with the optimizer's state of a checkpoint.

        Load the weights of the same checkpoint with `from_preset`, compile
        the model with `keras_bwetaf.recipe` or another AdamW, and
        then call this: `fit` continues at the step at which the checkpoint
        was saved, with the moments that it had. The optimizer's settings are
        not in a checkpoint.

        Args:
            source: str or path. A folder of any format of `converters`, such
                as the original's with its `make_stuff_better.pkl`, or
                `"hf://owner/repo"`.

        Raises:
            ValueError: If there is no optimizer's state, it does not fit
                the model, or the model has another optimizer.

        Example:

        ```python
        lm = keras_bwetaf.from_preset("flax-folder", dtype="float32")
        lm.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1))
        lm.load_optimizer("flax-folder")
        lm.fit(texts)
        ```
        """
        checkpoint = converters.read_checkpoint(local_folder(source))
        if checkpoint.optimizer is None:
            raise ValueError(
                "The checkpoint has no optimizer's state. Expected: one that "
                "was saved with it. Received: "
                f"source={os.fspath(source)!r}"
            )
        load_optimizer_state(
            self,
            {
                name: tensor.array()  # A view of the file.
                for name, tensor in checkpoint.optimizer.items()
            },
        )


def _remove_older_files(folder, keep_optimizer):
    """Removes what an earlier `save_to_preset` left, which would be loaded.

    KerasHub writes one file of weights or shards, and leaves the others.
    """
    single = folder / keras_folder.WEIGHTS
    index = folder / keras_folder.SHARDS
    if single.exists() and index.exists():
        newest = max(single, index, key=lambda path: path.stat().st_mtime_ns)
        shards = [index, *folder.glob("model_?????.weights.h5")]
        for path in shards if newest == single else [single]:
            path.unlink()
    if not keep_optimizer:
        (folder / keras_folder.OPTIMIZER).unlink(missing_ok=True)
