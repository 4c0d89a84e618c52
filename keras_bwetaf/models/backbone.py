import inspect
import types

import keras

from keras_bwetaf.checks import checked_number, is_number, positive_int
from keras_bwetaf.layers import (
    FeedForward,
    GroupedQueryAttention,
    RotaryEmbedding,
    TransformerBlock,
    initializers,
)
from keras_bwetaf.models.loading import load_backbone
from keras_bwetaf.models.lora import LoraBackbone
from keras_bwetaf.models.quantization import only_what_can_be
from keras_bwetaf.names import with_nearest
from keras_bwetaf.preset_files import open_preset

ROPE_DTYPES = (None, "float32", "bfloat16", "float16")
# What Keras takes besides, of every backbone.
KERAS_KEYWORDS = ("name", "trainable")
SIZES = ("vocabulary_size", "intermediate_dim", "max_sequence_length")


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class BwETAFBackbone(LoraBackbone):
    """The BwETAFv3 decoder-only transformer, up to its last hidden states.

    Token embeddings, rotated by position over their whole width, run through
    `num_layers` pre-norm blocks of grouped-query attention (with a rotary
    embedding that spans heads) and a gated feed-forward network. There is no
    final norm. `BwETAFCausalLM` puts the tied language-model head on top.

    A row may hold several documents, one after the other: `padding_mask`
    numbers them, and a token sees earlier tokens of its own document only.
    Positions count from the start of the row.

    Args:
        vocabulary_size: int. Number of token ids.
        num_layers: int. Number of transformer blocks.
        num_query_heads: int, or a list with one int per layer. Each divides
            `hidden_dim`.
        num_key_value_heads: int, or a list with one int per layer. Each
            divides the query heads of its layer.
        hidden_dim: int. Width of the hidden states.
        intermediate_dim: int. Inner width of the feed-forward network.
        max_sequence_length: int. The context: the longest sequence that
            `BwETAFCausalLM.generate` works on.
        dropout: float. After attention, in training.
        rope_max_wavelength: float. Base of the rotary frequencies.
        rope_dtype: str or `None`. Dtype of the rotary angles. `"float32"` is
            exact at any compute dtype; `None` rounds them to the compute
            dtype, as the original does, and is what an imported model has.
        layer_norm_epsilon: float. Epsilon of every norm.
        initializer_range: float. Standard deviation of the initial kernels.
        embedding_initializer_range: float or `None`. Standard deviation of
            the initial embeddings; `None` is `1 / sqrt(hidden_dim)`.
        dtype: str or `keras.DTypePolicy`. Dtype of computation and weights.

    Call arguments:
        token_ids: int tensor `(batch, length)`.
        padding_mask: int tensor `(batch, length)`. 0 for padding, otherwise
            the number of the token's document.

    Returns:
        float tensor `(batch, length, hidden_dim)`. What it holds where
        `padding_mask` is 0 has no meaning.

    Raises:
        ValueError: If an argument is out of range or arguments contradict
            each other.
        TypeError: If there is an unknown keyword.

    Example:

    ```python
    backbone = keras_bwetaf.models.BwETAFBackbone(
        vocabulary_size=16384,
        num_layers=12,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=768,
        intermediate_dim=2304,
        max_sequence_length=2048,
    )
    backbone.count_params()  # 97,609,728
    ```

    Reference:
     - [The original model](https://huggingface.co/WICKED4950/BwETAFv3-97M)
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_query_heads,
        num_key_value_heads,
        hidden_dim,
        intermediate_dim,
        max_sequence_length,
        dropout=0.0,
        rope_max_wavelength=10000.0,
        rope_dtype="float32",
        layer_norm_epsilon=1e-8,
        initializer_range=0.002,
        embedding_initializer_range=None,
        dtype=None,
        **kwargs,
    ):
        unknown = {
            name: value
            for name, value in kwargs.items()
            if name not in KERAS_KEYWORDS
        }
        check_keywords(f"{type(self).__name__}()", unknown)
        config = checked_config(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_query_heads=num_query_heads,
            num_key_value_heads=num_key_value_heads,
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            max_sequence_length=max_sequence_length,
            dropout=dropout,
            rope_max_wavelength=rope_max_wavelength,
            rope_dtype=rope_dtype,
            layer_norm_epsilon=layer_norm_epsilon,
            initializer_range=initializer_range,
            embedding_initializer_range=embedding_initializer_range,
        )

        # === Layers ===
        self.token_embedding = keras.layers.ReversibleEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            embeddings_initializer=initializers.normal(
                config.embedding_initializer_range or config.hidden_dim**-0.5
            ),
            dtype=dtype,
            name="token_embedding",
        )
        self.embedding_rotary = RotaryEmbedding(
            max_wavelength=config.rope_max_wavelength,
            rope_dtype=config.rope_dtype,
            dtype=dtype,
            name="embedding_rotary",
        )
        self.transformer_layers = []
        for i in range(config.num_layers):
            attention = GroupedQueryAttention(
                num_query_heads=config.num_query_heads[i],
                num_key_value_heads=config.num_key_value_heads[i],
                rope_max_wavelength=config.rope_max_wavelength,
                rope_dtype=config.rope_dtype,
                initializer_range=config.initializer_range,
                dtype=dtype,
                name="self_attention",
            )
            feedforward = FeedForward(
                intermediate_dim=config.intermediate_dim,
                initializer_range=config.initializer_range,
                dtype=dtype,
                name="feedforward",
            )
            block = TransformerBlock(
                attention,
                feedforward,
                dropout=config.dropout,
                layer_norm_epsilon=config.layer_norm_epsilon,
                # The original keeps the embedding in bfloat16, always.
                input_precision="bfloat16" if i == 0 else None,
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            self.transformer_layers.append(block)

        # === Functional Model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = self.token_embedding(token_ids)
        x = self.embedding_rotary(x)
        for block in self.transformer_layers:
            x = block(x, padding_mask=padding_mask)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x,
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.vocabulary_size = config.vocabulary_size
        self.num_layers = config.num_layers
        self.num_query_heads = _as_given(
            num_query_heads, config.num_query_heads
        )
        self.num_key_value_heads = _as_given(
            num_key_value_heads, config.num_key_value_heads
        )
        self.hidden_dim = config.hidden_dim
        self.intermediate_dim = config.intermediate_dim
        self.max_sequence_length = config.max_sequence_length
        self.dropout = config.dropout
        self.rope_max_wavelength = config.rope_max_wavelength
        self.rope_dtype = config.rope_dtype
        self.layer_norm_epsilon = config.layer_norm_epsilon
        self.initializer_range = config.initializer_range
        self.embedding_initializer_range = config.embedding_initializer_range

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "vocabulary_size": self.vocabulary_size,
                "num_layers": self.num_layers,
                "num_query_heads": self.num_query_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "hidden_dim": self.hidden_dim,
                "intermediate_dim": self.intermediate_dim,
                "max_sequence_length": self.max_sequence_length,
                "dropout": self.dropout,
                "rope_max_wavelength": self.rope_max_wavelength,
                "rope_dtype": self.rope_dtype,
                "layer_norm_epsilon": self.layer_norm_epsilon,
                "initializer_range": self.initializer_range,
                "embedding_initializer_range": (
                    self.embedding_initializer_range
                ),
            }
        )
        quantizers = {
            layer.path: keras.quantizers.serialize(layer.inputs_quantizer)
            for layer in self._layers_of_quantized_inputs()
        }
        if quantizers:
            config["inputs_quantizers"] = quantizers
        return config

    def quantize(self, mode=None, **kwargs):
        """Quantizes the weights. See `keras.Model.quantize`."""
        with only_what_can_be():
            super().quantize(mode, **kwargs)

    @classmethod
    def from_config(cls, config):
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

    def _layers_of_quantized_inputs(self):
        return [
            layer
            for layer in self._flatten_layers()
            if hasattr(layer, "inputs_quantizer")
        ]

    @classmethod
    def from_preset(
        cls, preset, load_weights=True, *, dtype=None, revision=None, **config
    ):
        """Loads a backbone: see `keras_bwetaf.from_preset`."""
        check_keywords("from_preset()", config)
        files = open_preset(preset, revision, load_weights)
        return load_backbone(cls, files, load_weights, dtype, config)

    @staticmethod
    def get_layout_map(
        device_mesh,
        model_parallel_dim_name="model",
        data_parallel_dim_name="batch",
    ):
        """How weights are split over the axes of a mesh.

        The model's axis splits the feed-forward network and the vocabulary.
        The kernels around attention are whole on each of its devices: RoPE
        pairs dimensions of two heads, which no split in equal contiguous
        parts keeps together. The axis of the data splits a dimension of each
        weight that the model's has left.

        Every weight of the backbone is matched, LoRA's and quantized ones
        included; and so are deliberately those with no split: the scales of
        quantized weights, and the state of random generators.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: str or `None`. An axis of the mesh.
                `None` splits no layer.
            data_parallel_dim_name: str or `None`. Another. `None` splits no
                weight over devices with different rows.

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
        model, data = model_parallel_dim_name, data_parallel_dim_name
        either = model or data
        embedding = "token_embedding"
        attention = r"transformer_layer_\d+/self_attention"
        inner = "(query|key|value|attention_output)"
        feedforward = r"transformer_layer_\d+/feedforward"
        first = "(gate|intermediate)"
        # Kernels are (outputs, inputs), LoRA's factors (outputs, rank) and
        # (rank, inputs).
        layouts = {
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
            r"transformer_layer_\d+/\w+_norm/scale": (data,),
            r".*/((kernel|embeddings)_(scale|zero)|g_idx)": (),
            r".*/seed_generator_state": (),
        }
        layout_map = keras.distribution.LayoutMap(device_mesh)
        for path, axes in layouts.items():
            layout_map[f"(.*/)?{path}"] = axes
        return layout_map


def config_names():
    """Names of a backbone's configuration, but for the dtype, a list."""
    parameters = inspect.signature(BwETAFBackbone.__init__).parameters
    others = ("self", "dtype", "kwargs")
    return [name for name in parameters if name not in others]


def check_keywords(caller, config):
    """Refuses what is no part of a backbone's configuration.

    Args:
        caller: str. Who got it, for the message.
        config: dict.

    Raises:
        TypeError: If there is an unknown name; it suggests a known one.
    """
    known = config_names()
    unknown = [name for name in config if name not in known]
    if unknown:
        received = ", ".join(f"{name}={config[name]!r}" for name in unknown)
        raise TypeError(
            f"{caller} got unknown keywords: {with_nearest(unknown, known)}. "
            f"Of the backbone's configuration, it takes {', '.join(known)}. "
            f"Received: {received}"
        )


def checked_config(
    *,
    num_layers,
    num_query_heads,
    num_key_value_heads,
    hidden_dim,
    dropout=0.0,
    rope_dtype="float32",
    embedding_initializer_range=None,
    **numbers,
):
    """Checks the arguments of a backbone, without making one.

    Args:
        **numbers, ...: See `BwETAFBackbone`.

    Returns:
        Namespace of the arguments, with numbers of Python, and the heads in
        lists of one int for each layer.

    Raises:
        ValueError: If an argument is out of range or arguments contradict
            each other.
    """
    num_layers = positive_int("num_layers", num_layers)
    hidden_dim = positive_int("hidden_dim", hidden_dim)
    query_heads = _heads_per_layer(
        "num_query_heads", num_query_heads, num_layers
    )
    key_value_heads = _heads_per_layer(
        "num_key_value_heads", num_key_value_heads, num_layers
    )
    _check_heads(query_heads, key_value_heads, hidden_dim)
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            "`dropout` is the share of outputs to drop, at least 0 and "
            f"less than 1. Received: dropout={dropout!r}"
        )
    if rope_dtype not in ROPE_DTYPES:
        raise ValueError(
            f"`rope_dtype` must be one of {ROPE_DTYPES}. Received: "
            f"rope_dtype={rope_dtype!r}"
        )
    if embedding_initializer_range is not None:
        numbers["embedding_initializer_range"] = embedding_initializer_range
    checked = {
        name: positive_int(name, value)
        if name in SIZES
        else checked_number(name, value, lambda x: x > 0, "greater than 0")
        for name, value in numbers.items()
    }
    checked.setdefault("embedding_initializer_range", None)
    return types.SimpleNamespace(
        num_layers=num_layers,
        num_query_heads=query_heads,
        num_key_value_heads=key_value_heads,
        hidden_dim=hidden_dim,
        dropout=float(dropout),
        rope_dtype=rope_dtype,
        **checked,
    )


def _heads_per_layer(name, heads, num_layers):
    """The number of heads of each layer, from one int or a list of them."""
    if not isinstance(heads, (list, tuple)):
        heads = [heads] * num_layers
    if len(heads) != num_layers:
        raise ValueError(
            f"`{name}` must be an int or hold one int for each of the "
            f"{num_layers} layers. Received: {name}={heads}"
        )
    return [positive_int(name, value) for value in heads]


def _as_given(given, heads):
    """One number for all layers, if one was given, or that of each."""
    return heads if isinstance(given, (list, tuple)) else heads[0]


def _check_heads(query_heads, key_value_heads, hidden_dim):
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
