"""LoRA on a backbone: enabled, merged, saved and loaded."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import jax
import keras
import numpy as np
import safetensors
from keras import ops
from keras_hub.models import Backbone
from safetensors.numpy import save

from converters.files import local_path, new_file
from keras_bwetaf.checks import checked_number, positive_int
from keras_bwetaf.layers.low_rank import (
    merged_weight,
    weight_and_factors,
    weight_name,
)
from keras_bwetaf.processes import gathered, in_first_process

SUFFIX = ".safetensors"
METADATA = "lora_config"
CONFIG = {"rank", "lora_alpha", "target_layer_names", "base_sha256"}


class LoraBackbone(Backbone):
    """A KerasHub backbone with LoRA: chosen layers, merging, a file of its own.

    LoRA adds the product of two low-rank factors to a weight, and trains the
    factors instead of the weight.

    Reference:
     - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
    """

    def default_lora_layer_names(self) -> list[str]:
        return ["query", "value"]

    def enable_lora(
        self,
        rank: int,
        target_layer_names: Sequence[str] | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        """Freezes all weights, and adds trainable factors to some.

        The model computes the same as before, until it is trained. Compile
        it afterwards. One factor of each pair starts with random numbers, by
        the seed of `keras.utils.set_random_seed`.

        Args:
            rank: int. The rank of the products: the width of the factors.
            target_layer_names: list of str, the names of layers in each
                block: `"query"`, `"key"`, `"value"`, `"attention_output"`,
                `"gate"`, `"intermediate"`, `"output"`; and
                `"token_embedding"`, which is the head, too. Defaults to
                query and value.
            lora_alpha: float. The product is multiplied by `lora_alpha /
                rank`. Defaults to `rank`.

        Raises:
            ValueError: If an argument is out of range, there is no such
                layer, it is quantized, or LoRA is enabled already.

        Example:

        ```python
        lm.backbone.enable_lora(8, ["query", "key", "value", "gate"])
        lm.compile(keras.optimizers.AdamW(1e-3))
        lm.fit(data, steps_per_epoch=100)
        lm.backbone.save_lora_weights("style.safetensors")
        lm.backbone.merge_lora()
        ```
        """
        if self._lora_layers():
            raise ValueError(
                "LoRA is on already. Call `merge_lora()` first, or load the "
                f"model anew. Received: rank={rank}"
            )
        if target_layer_names is None:
            target_layer_names = self.default_lora_layer_names()
        layers = self._layers_named(target_layer_names)
        _check_not_quantized(layers)
        rank = positive_int("rank", rank)
        if lora_alpha is not None:
            lora_alpha = checked_number(
                "lora_alpha", lora_alpha, lambda x: x > 0, "greater than 0"
            )
        if getattr(self, "_lora_was_merged", False):
            # JAX would take a function that it compiled for earlier factors,
            # of the same shapes, for one of these.
            jax.clear_caches()
        self.trainable = True
        for weight in self.weights:
            weight.trainable = False
        for layer in layers:
            layer.enable_lora(
                rank, lora_alpha=lora_alpha, **_initializers(layer)
            )

    def merge_lora(self) -> None:
        """Adds the products to their weights, and removes the factors.

        The model computes the same as before, within the rounding of its
        weights' dtype, and is an ordinary one again, all of it trainable.
        Compile it before you train it further.

        Raises:
            ValueError: If LoRA is not enabled, or weights are quantized.
        """
        layers = self._enabled_lora_layers()
        _check_not_quantized(layers)
        for layer in layers:
            weight, factors = weight_and_factors(layer)
            weight.assign(merged_weight(layer))
            for factor in factors:
                layer._untrack_variable(factor)
            layer.lora_enabled = False
            layer.lora_rank = layer.lora_alpha = None
        self.trainable = True
        self._lora_was_merged = True

    def save_to_preset(
        self, preset_dir: str | os.PathLike, max_shard_size: float = 10
    ) -> None:
        with merged_for_saving(self):
            super().save_to_preset(preset_dir, max_shard_size=max_shard_size)

    def save_lora_weights(self, filepath: str | os.PathLike) -> None:
        """Saves the factors, and nothing else, to a file.

        The file appears when it is complete. It belongs to the base model,
        and holds a digest of the base model's weights. With several
        processes, all must call this; the first one writes.

        Args:
            filepath: str or path, that ends in `.safetensors`.

        Raises:
            ValueError: If the name ends otherwise, LoRA is not enabled, or
                other weights are trained, too, and would be lost.
        """
        with gathered(self.variables):
            in_first_process(
                self._write_lora_weights,
                local_path("filepath", _checked_path(filepath)),
            )

    def _write_lora_weights(self, filepath):
        layers = self._enabled_lora_layers()
        factors = _factors(self)
        other = [
            weight.path
            for weight in self.trainable_weights
            if weight.path not in factors
        ]
        if other:
            raise ValueError(
                "Weights that are not LoRA's are trained, too, and have no "
                "place in its file. Save the whole model with "
                f"`save_to_preset`. Received: trainable weights {other}"
            )
        config = {
            "rank": layers[0].lora_rank,
            "lora_alpha": layers[0].lora_alpha,
            "target_layer_names": sorted({layer.name for layer in layers}),
            "base_sha256": _base_digest(self),
        }
        content = save(
            {
                path: ops.convert_to_numpy(factor.value)
                for path, factor in factors.items()
            },
            metadata={METADATA: json.dumps(config)},
        )
        with new_file(filepath) as file:
            file.write(content)

    def load_lora_weights(self, filepath: str | os.PathLike) -> None:
        """Loads what `save_lora_weights` saved into the same base model.

        If LoRA is not enabled, this enables it with the arguments of the
        file. Otherwise it must be enabled with the same arguments. The base
        model may have another dtype than it had.

        Args:
            filepath: str or path, that ends in `.safetensors`.

        Raises:
            ValueError: If the file is damaged, or made for another base
                model, or LoRA is enabled with another rank or other layers.
                Nothing is changed then.
            FileNotFoundError: If there is no such file.
        """
        filepath = _checked_path(filepath)
        config, tensors = _read(filepath)
        base, digest = config.pop("base_sha256"), _base_digest(self)
        if base != digest:
            raise ValueError(
                f"{filepath}: the file belongs to another base model, whose "
                f"weights have the SHA-256 {base}. Load that model first, "
                "and do not merge or train it. Received: a model with "
                f"{digest}"
            )
        layers = self._lora_layers()
        for name in ("rank", "lora_alpha") if layers else ():
            layer_name = f"lora_{name.removeprefix('lora_')}"
            ours = getattr(layers[0], layer_name)
            if ours != config[name]:
                raise ValueError(
                    f"{filepath}: the file has {name}={config[name]}. Load "
                    "the model anew, and let `load_lora_weights` switch LoRA "
                    f"on. Received: a model with {name}={ours}"
                )
        names = config["target_layer_names"]
        _check_shapes(
            filepath,
            tensors,
            layers or self._layers_named(names),
            config["rank"],
        )
        if not layers:
            self.enable_lora(**config)
        for path, factor in _factors(self).items():
            factor.assign(tensors[path])

    def _lora_layers(self):
        return [
            layer
            for layer in self._flatten_layers(include_self=False)
            if getattr(layer, "lora_enabled", False)
        ]

    def _enabled_lora_layers(self):
        layers = self._lora_layers()
        if not layers:
            raise ValueError(
                "LoRA is not on. Call `enable_lora(rank)` first, or "
                "`load_lora_weights(filepath)`. Received: a model without "
                "LoRA"
            )
        return layers

    def _layers_named(self, names):
        layers = [
            layer
            for layer in self._flatten_layers(include_self=False)
            if hasattr(layer, "enable_lora")
        ]
        known = {layer.name for layer in layers}
        if isinstance(names, str) or not names or not set(names) <= known:
            raise ValueError(
                "`target_layer_names` must be a list of names among "
                f"{sorted(known)}. Received: target_layer_names={names!r}"
            )
        return [layer for layer in layers if layer.name in names]


@contextlib.contextmanager
def merged_for_saving(backbone: LoraBackbone) -> Iterator[None]:
    """Inside, LoRA is disabled, and its products are in the weights.

    Keras, which merges when it saves, would round the sums to the compute
    dtype.

    Args:
        backbone: `LoraBackbone`.
    """
    weights = {}
    for layer in backbone._lora_layers():
        if layer.quantization_mode is None:
            weight, _ = weight_and_factors(layer)
            weights[layer] = weight, weight.value
            weight.assign(merged_weight(layer))
            layer.lora_enabled = False
    try:
        yield
    finally:
        for layer, (weight, value) in weights.items():
            weight.assign(value)
            layer.lora_enabled = True


def _check_not_quantized(layers):
    modes = {layer.quantization_mode for layer in layers} - {None}
    if modes:
        raise ValueError(
            "LoRA's products are added to weights of floats. Quantize the "
            "model last, after `merge_lora()`. Received: quantization "
            f"{', '.join(sorted(modes))}"
        )


def _initializers(layer):
    """Initializers of a layer's factors, made for this layer alone.

    An initializer draws its seed when it is made; one for several layers
    would give them the same numbers. As in the paper, the factor that
    multiplies the inputs starts with random numbers, of a deviation that
    depends on the number of inputs, and the other factor with zeros.
    """
    if weight_name(layer) == "embeddings":
        return {}  # Keras's own do the same.
    at_random = keras.initializers.VarianceScaling(
        scale=2.0, mode="fan_out", distribution="uniform"
    )
    # Kernels are `(outputs, inputs)`.
    return {"a_initializer": "zeros", "b_initializer": at_random}


def _factors(backbone):
    """LoRA's variables by path."""
    return {
        weight.path: weight
        for weight in backbone.weights
        if weight.name.startswith("lora_")
    }


def _base_digest(backbone):
    """SHA-256 of all weights but the factors, rounded to bfloat16.

    The published weights are in bfloat16. Rounded, they have the same digest
    whether they are loaded in bfloat16 or in float32.
    """
    digest = hashlib.sha256()
    for weight in backbone.weights:
        if weight.name.startswith("lora_"):
            continue
        digest.update(f"{weight.path} {tuple(weight.shape)}\n".encode())
        value = weight.value
        if keras.backend.is_float_dtype(weight.dtype):
            value = ops.cast(value, "bfloat16")
        digest.update(ops.convert_to_numpy(value).tobytes())
    return digest.hexdigest()


def _checked_path(filepath):
    filepath = os.fspath(filepath)
    if not filepath.endswith(SUFFIX):
        raise ValueError(
            f"The name of a file of LoRA weights must end in {SUFFIX!r}. "
            f"Received: filepath={filepath!r}"
        )
    return filepath


def _read(filepath):
    """A file's settings (arguments, the base's digest), and arrays by path."""
    try:
        with safetensors.safe_open(filepath, "numpy") as file:
            config = json.loads((file.metadata() or {})[METADATA])
            tensors = {path: file.get_tensor(path) for path in file.keys()}
        if {*config} != CONFIG:
            raise ValueError(f"the settings {config}")
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{filepath}: expected a file that `save_lora_weights` wrote. "
            f"Received: {error!r}"
        ) from error
    return config, tensors


def _check_shapes(filepath, tensors, layers, rank):
    expected = {}
    for layer in layers:
        name = weight_name(layer)
        first, second = getattr(layer, f"_{name}").shape
        expected[f"{layer.path}/lora_{name}_a"] = (first, rank)
        expected[f"{layer.path}/lora_{name}_b"] = (rank, second)
    received = {
        path: tensor.shape
        for path, tensor in tensors.items()
        if tensor.dtype == np.float32
    }
    problems = [
        f"{path}: expected {expected.get(path)}, received {received.get(path)}"
        for path in sorted(expected.keys() | tensors.keys())
        if expected.get(path) != received.get(path)
    ]
    if problems:
        raise ValueError(
            f"{filepath}: the file's float32 tensors are not those of the "
            "model's LoRA. Load the model anew, and let `load_lora_weights` "
            "switch LoRA on. Received:\n"
            + "\n".join(f"- {problem}" for problem in problems)
        )
