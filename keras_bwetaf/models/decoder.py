"""What decoder-only backbones have in common, whatever their parts are."""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import jax
import keras
from jax.typing import ArrayLike
from keras import ops

from converters.architecture import Architecture
from keras_bwetaf.arguments import BackboneConfig, DType, PathLike
from keras_bwetaf.checks import checked_number, is_number, positive_int
from keras_bwetaf.layers import TransformerBlock
from keras_bwetaf.layers.dense import product
from keras_bwetaf.models.loading import is_left_to_keras_hub, load_backbone
from keras_bwetaf.models.lora import LoraBackbone
from keras_bwetaf.models.quantization import only_what_can_be
from keras_bwetaf.models.registry import class_for
from keras_bwetaf.names import with_nearest
from keras_bwetaf.preset_files import open_preset

# Keywords that every Keras model takes, besides the configuration.
KERAS_KEYWORDS = ("name", "trainable")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SIZES = (
    *("vocabulary_size", "intermediate_dim", "max_sequence_length"),
    *("num_experts", "num_experts_per_token"),
)

# (key, value) for each layer, `(batch * heads, head_dim, slots)` and
# `(batch * heads, slots, head_dim)`.
Cache = Sequence[tuple[jax.Array, jax.Array]]


class DecoderBackbone(LoraBackbone):
    """A decoder-only transformer made of parts, with a tied head.

    An architecture is a subclass, and has the attribute `architecture`. Its
    constructor takes flat arguments, makes the parts of them, and hands both
    to this one. `hidden_states` is the only
    forward pass: the functional model is its graph, and `generate` calls it
    with a cache.

    Args:
        token_embedding: `keras.layers.ReversibleEmbedding`. The head, too.
        transformer_layers: list of `TransformerBlock`.
        embedding_rotary: layer or `None`. Gives the embeddings positions;
            called as `RotaryEmbedding` is.
        final_norm: layer or `None`. After the last block.
        config: dict. The arguments of the subclass's constructor, checked.
            Each becomes an attribute, of which `get_config` makes a
            configuration.
        dtype: str or `keras.DTypePolicy`.
        **kwargs: `name` and `trainable`, as of every Keras model.
    """

    architecture: Architecture | None = None

    # Of `config`.
    vocabulary_size: int
    num_layers: int
    num_query_heads: int | list[int]
    num_key_value_heads: int | list[int]
    hidden_dim: int
    intermediate_dim: int
    max_sequence_length: int
    dropout: float

    def __init__(
        self,
        *,
        token_embedding: keras.layers.ReversibleEmbedding,
        transformer_layers: list[TransformerBlock],
        config: Mapping[str, Any],
        embedding_rotary: keras.layers.Layer | None = None,
        final_norm: keras.layers.Layer | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        # === Layers ===
        self.token_embedding = token_embedding
        self.embedding_rotary = embedding_rotary
        self.transformer_layers = transformer_layers
        self.final_norm = final_norm

        # === Functional Model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.hidden_states(token_ids, padding_mask),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self._config_names = tuple(config)
        for name, value in config.items():
            setattr(self, name, value)

    def hidden_states(
        self,
        token_ids: ArrayLike,
        padding_mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        cache: Cache | None = None,
        cache_index: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
    ) -> Any:
        """The forward pass, with or without a cache of earlier tokens.

        Args:
            token_ids: int tensor `(batch, length)`.
            padding_mask: int tensor `(batch, length)`. 0 for padding,
                otherwise the number of the token's document. Defaults to one
                document in each row.
            positions: int tensor `(batch, length)`. Defaults to 0, 1, 2, ...
            cache: As `make_cache` returns it, or `None`. Keys and values of
                the tokens are written into it.
            cache_index: int. The slot of the first token. Needed with a
                cache.
            attention_mask: bool tensor `(batch, length, num_slots)`, the
                slots of the cache that each token sees. Without it, the
                tokens see each other by `padding_mask`, and nothing that was
                in the cache.

        Returns:
            float tensor `(batch, length, hidden_dim)`; with a cache, a tuple
            of it and the updated cache.
        """
        x = self.token_embedding(token_ids)  # (batch, length, hidden_dim)
        if self.embedding_rotary is not None:
            x = self.embedding_rotary(x, positions=positions)

        updated = []
        no_cache = [None] * len(self.transformer_layers)
        for block, layer_cache in zip(
            self.transformer_layers, cache or no_cache, strict=True
        ):
            x = block(
                x,
                padding_mask=padding_mask,
                positions=positions,
                cache=layer_cache,
                cache_index=cache_index,
                attention_mask=attention_mask,
            )
            if layer_cache is not None:
                x, layer_cache = x
            updated.append(layer_cache)

        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if cache is None else (x, updated)

    def make_cache(self, batch_size: int, num_slots: int) -> Cache:
        """Empty caches for `hidden_states`.

        Args:
            batch_size: int.
            num_slots: int. Tokens that have room in a row.

        Returns:
            list of what `GroupedQueryAttention.make_cache` returns, one for
            each layer.
        """
        return [
            block.attention.make_cache(batch_size, num_slots)
            for block in self.transformer_layers
        ]

    def cache_of_rows(
        self, cache: Cache, batch_size: int, rows: ArrayLike
    ) -> Cache:
        """The caches of some rows: see `GroupedQueryAttention`."""
        return [
            block.attention.cache_of_rows(layer_cache, batch_size, rows)
            for block, layer_cache in zip(
                self.transformer_layers, cache, strict=True
            )
        ]

    def head(self, hidden_states: ArrayLike) -> jax.Array:
        """Logits: the product of hidden states and token embeddings.

        Args:
            hidden_states: float tensor `(batch, length, hidden_dim)`.

        Returns:
            float tensor `(batch, length, vocabulary_size)`.
        """
        embedding = self.token_embedding
        is_symbolic = isinstance(hidden_states, keras.KerasTensor)
        if is_symbolic or embedding.quantization_mode is not None:
            return embedding(hidden_states, reverse=True)
        dtype = embedding.reverse_dtype or embedding.compute_dtype
        return product(
            ops.cast(hidden_states, dtype),
            ops.cast(embedding.embeddings, dtype),
        )

    def quantize(self, mode: str | None = None, **kwargs: Any) -> None:
        """Quantizes the weights. See `keras.Model.quantize`."""
        with only_what_can_be():
            super().quantize(mode, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name in self.config_names():
            if name in self._config_names:  # Not a subclass's own.
                config[name] = getattr(self, name)
        quantizers = {
            layer.path: keras.quantizers.serialize(layer.inputs_quantizer)
            for layer in self._layers_of_quantized_inputs()
        }
        if quantizers:
            config["inputs_quantizers"] = quantizers
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes a backbone; quantized layers get their inputs' quantizers.

        Keras saves these in no preset, and makes others than `quantize` did.
        """
        config = dict(config)
        quantizers = config.pop("inputs_quantizers", {})
        backbone = super().from_config(config)
        for layer in backbone._layers_of_quantized_inputs():
            if layer.path in quantizers:
                layer.inputs_quantizer = keras.quantizers.get(
                    quantizers[layer.path]
                )
        return backbone

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        load_weights: bool = True,
        *,
        dtype: DType | None = None,
        revision: str | None = None,
        **config: Unpack[BackboneConfig],
    ) -> Self:
        """Loads a backbone: see `keras_bwetaf.from_preset`."""
        if is_left_to_keras_hub(cls, preset):
            return super().from_preset(
                os.fspath(preset), load_weights, dtype=dtype, **config
            )

        def check(architecture):
            found = class_for(cls, architecture)
            found.check_keywords("from_preset()", config)

        files = open_preset(preset, revision, load_weights, check)
        found = class_for(cls, files.architecture)
        return load_backbone(found, files, load_weights, dtype, config)

    def _layers_of_quantized_inputs(self):
        return [
            layer
            for layer in self._flatten_layers()
            if hasattr(layer, "inputs_quantizer")
        ]

    @classmethod
    def config_names(cls) -> list[str]:
        """Names of the constructor's arguments, but for those of Keras.

        A subclass that hands `**kwargs` on takes those of its base, too.
        """
        names = {}
        for each in cls.__mro__[: cls.__mro__.index(DecoderBackbone)]:
            if "__init__" not in vars(each):
                continue
            parameters = inspect.signature(each.__init__).parameters.values()
            names |= {
                parameter.name: None
                for parameter in parameters
                if parameter.kind not in VARIADIC
                and parameter.name not in ("self", "dtype")
            }
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return list(names)

    @classmethod
    def check_keywords(cls, caller: str, config: Mapping[str, Any]) -> None:
        """Refuses what is no part of the configuration.

        Args:
            caller: str. Who got it, for the message.
            config: dict.

        Raises:
            TypeError: If there is an unknown name; it suggests a known one.
        """
        known = cls.config_names()
        unknown = [name for name in config if name not in known]
        if unknown:
            received = ", ".join(f"{name}={config[name]!r}" for name in unknown)
            raise TypeError(
                f"{caller} got unknown keywords: "
                f"{with_nearest(unknown, known)}. Of the backbone's "
                f"configuration, it takes {', '.join(known)}. Received: "
                f"{received}"
            )

    @classmethod
    def check_keras_keywords(cls, kwargs: Mapping[str, Any]) -> None:
        """Refuses keywords of the constructor that Keras does not know.

        Args:
            kwargs: dict. What the constructor got besides its arguments.

        Raises:
            TypeError: If there is such a keyword.
        """
        unknown = {
            name: value
            for name, value in kwargs.items()
            if name not in KERAS_KEYWORDS
        }
        cls.check_keywords(f"{cls.__name__}()", unknown)

    @classmethod
    def checked_config(
        cls,
        *,
        num_layers: int,
        num_query_heads: int | Sequence[int],
        hidden_dim: int,
        num_key_value_heads: int | Sequence[int] | None = None,
        dropout: float = 0.0,
        **numbers: float,
    ) -> dict[str, Any]:
        """Checks the arguments of a backbone, without making one.

        An architecture with more arguments than positive numbers checks the
        others itself.

        Args:
            **numbers, ...: See the backbone.

        Returns:
            dict of the arguments, with numbers of Python.

        Raises:
            ValueError: If an argument is out of range or arguments contradict
                each other.
        """
        num_layers = positive_int("num_layers", num_layers)
        hidden_dim = positive_int("hidden_dim", hidden_dim)
        query_heads = _checked_heads(
            "num_query_heads", num_query_heads, num_layers
        )
        heads = {"num_query_heads": query_heads}
        if num_key_value_heads is not None:  # Or keys for each query head.
            heads["num_key_value_heads"] = _checked_heads(
                "num_key_value_heads", num_key_value_heads, num_layers
            )
        shared = heads.get("num_key_value_heads", query_heads)
        _check_heads(query_heads, shared, num_layers, hidden_dim)
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` is the share of outputs to drop, at least 0 and "
                f"less than 1. Received: dropout={dropout!r}"
            )
        return {
            "num_layers": num_layers,
            **heads,
            "hidden_dim": hidden_dim,
            "dropout": float(dropout),
            **{name: _checked(name, x) for name, x in numbers.items()},
        }

    @classmethod
    def get_layout_map(
        cls,
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str | None = "model",
        data_parallel_dim_name: str | None = "batch",
    ) -> keras.distribution.LayoutMap:
        """How weights are sharded over the axes of a mesh.

        The model axis shards the feed-forward network and the vocabulary. The
        kernels around attention are replicated over it: RoPE pairs dimensions
        of two heads, which no split in equal contiguous parts keeps together.
        The data axis shards a dimension of each weight that the model axis
        has left.

        Every weight of the backbone is matched, LoRA's and quantized ones
        included; and so are those that are replicated on purpose: the scales
        of quantized weights, and the state of random generators.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: str or `None`. An axis of the mesh.
                `None` shards no layer.
            data_parallel_dim_name: str or `None`. Another. `None` replicates
                each weight over the devices with different rows.

        Returns:
            `keras.distribution.LayoutMap`, of full paths.

        Raises:
            ValueError: If the mesh has no such axis.

        Example:

        ```python
        mesh = keras.distribution.DeviceMesh((4, 2), ("batch", "model"))
        layout_map = keras_bwetaf.BwETAFBackbone.get_layout_map(mesh)
        ```
        """
        for name in (model_parallel_dim_name, data_parallel_dim_name):
            if name is not None and name not in device_mesh.axis_names:
                raise ValueError(
                    f"The mesh has the axes {list(device_mesh.axis_names)}. "
                    f"Received: {name!r}"
                )
        layout_map = keras.distribution.LayoutMap(device_mesh)
        layouts = cls._layouts(model_parallel_dim_name, data_parallel_dim_name)
        for path, axes in layouts.items():
            layout_map[f"(.*/)?{path}"] = axes
        return layout_map

    @staticmethod
    def _layouts(model, data):
        """The axes of each weight's dimensions, by a pattern of its path."""
        either = model or data
        embedding = "token_embedding"
        attention = r"transformer_layer_\d+/self_attention"
        inner = "(query|key|value|attention_output)"
        feedforward = r"transformer_layer_\d+/feedforward"
        first = "(gate|intermediate)"
        # Kernels are (outputs, inputs), LoRA's factors (outputs, rank) and
        # (rank, inputs).
        return {
            f"{embedding}/embeddings": (model, data),
            f"{embedding}/lora_embeddings_a": (either, None),
            f"{embedding}/lora_embeddings_b": (None, data),
            f"{attention}/{inner}/kernel": (data, None),
            f"{attention}/{inner}/lora_kernel_a": (data, None),
            f"{attention}/{inner}/lora_kernel_b": (None, data),
            f"{attention}/attention_output/bias": (data,),
            f"{feedforward}/{first}/kernel": (model, data),
            f"{feedforward}/{first}/lora_kernel_a": (either, None),
            f"{feedforward}/{first}/lora_kernel_b": (None, data),
            f"{feedforward}/{first}/bias": (either,),
            f"{feedforward}/output/kernel": (data, model),
            f"{feedforward}/output/lora_kernel_a": (data, None),
            f"{feedforward}/output/lora_kernel_b": (None, either),
            f"{feedforward}/output/bias": (data,),
            # Experts, (experts, inputs, outputs).
            f"{feedforward}/(gate|intermediate|output)_kernel": (
                *(model, data, None),
            ),
            f"{feedforward}/(gate|intermediate|output)_bias": (model, data),
            f"{feedforward}/router": (None, data),
            r"(transformer_layer_\d+/\w+|final)_norm/scale": (data,),
            r".*/((kernel|embeddings)_(scale|zero)|g_idx)": (),
            r".*/seed_generator_state": (),
        }


def per_layer(value: int | Sequence[int], num_layers: int) -> list[int]:
    """The number of each layer, from one for all or a list of them."""
    return list(value) if isinstance(value, Sequence) else [value] * num_layers


def _checked_heads(name, heads, num_layers):
    """An int for all layers, or a list of one for each, as it was given."""
    if not isinstance(heads, (list, tuple)):
        return positive_int(name, heads)
    if len(heads) != num_layers:
        raise ValueError(
            f"`{name}` must be an int or hold one int for each of the "
            f"{num_layers} layers. Received: {name}={heads}"
        )
    return [positive_int(name, value) for value in heads]


def _check_heads(query_heads, key_value_heads, num_layers, hidden_dim):
    query_heads = per_layer(query_heads, num_layers)
    key_value_heads = per_layer(key_value_heads, num_layers)
    for i, (query, key_value) in enumerate(
        zip(query_heads, key_value_heads, strict=True)
    ):
        if hidden_dim % query:
            raise ValueError(
                "`num_query_heads` must divide `hidden_dim`. Received: "
                f"num_query_heads={query} (layer {i}), "
                f"hidden_dim={hidden_dim}"
            )
        if query % key_value:
            raise ValueError(
                "`num_key_value_heads` must divide `num_query_heads`. "
                f"Received: num_key_value_heads={key_value} (layer {i}), "
                f"num_query_heads={query}"
            )


def _checked(name, value):
    if name in SIZES:
        return positive_int(name, value)
    return checked_number(name, value, lambda x: x > 0, "greater than 0")
