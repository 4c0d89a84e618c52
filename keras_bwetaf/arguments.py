"""Keywords of the public functions, for editors and type checkers.

A test compares them with what the functions take.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

import keras
import numpy as np

PathLike = str | os.PathLike[str]
DType = str | keras.DTypePolicy
Seed = int | Sequence[int] | np.ndarray


Remat = Literal["none", "attention", "block", "full"]


class Tokenizer(Protocol):
    """What `pack` and `load_instructions` need of a `BwETAFTokenizer`."""

    end_token_id: int

    def specification(self) -> str: ...
    def vocabulary_size(self) -> int: ...


class TextDataset(Protocol):
    """A `tf.data.Dataset`."""

    def as_numpy_iterator(self) -> Any: ...


class BackboneConfig(TypedDict, total=False):
    """Of the backbones, each of which has some, but for the dtype."""

    vocabulary_size: int
    num_layers: int
    num_query_heads: int | Sequence[int]
    num_key_value_heads: int | Sequence[int]
    hidden_dim: int
    intermediate_dim: int
    max_sequence_length: int
    dropout: float
    rope_max_wavelength: float
    rope_dtype: Literal["float32", "bfloat16", "float16"] | None
    use_rope: bool
    embedding_scale: float
    residual_scale: float
    num_experts: int
    num_experts_per_token: int
    expert_dispatch: Literal["exact", "original_token", "original_batch"]
    expert_capacity: float
    balance_loss_weight: float
    unused_loss_weight: float
    router_noise_steps: int
    layer_norm_epsilon: float
    initializer_range: float | None
    embedding_initializer_range: float | None


class Sampling(TypedDict, total=False):
    """Of `BwETAFSampler`, but for the seed."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


class CompileOptions(TypedDict, total=False):
    """Of `keras.Model.compile`, beside those of `BwETAFCausalLM.compile`."""

    loss_weights: Any
    run_eagerly: bool
    steps_per_execution: int
    jit_compile: bool | Literal["auto"]
    auto_scale_loss: bool


class FitOptions(TypedDict, total=False):
    """Of `keras.Model.fit`, beside those of `BwETAFCausalLM.fit`."""

    epochs: int
    verbose: int | Literal["auto"]
    initial_epoch: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: int | Sequence[int]


class RecipeChanges(TypedDict, total=False):
    """Of `recipe`: the schedule's, and those of `AdamW`."""

    initial_learning_rate: float
    peak_learning_rate: float
    final_learning_rate: float
    warmup: float
    decay: Literal["cosine", "linear"]
    weight_decay: float | None
    beta_1: float
    beta_2: float
    epsilon: float
    moments_dtype: str | None
    decay_vectors: bool
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None
    name: str


class TrainingOptions(TypedDict, total=False):
    """Of `train`: the fields of `TrainingSettings`."""

    data: PathLike | Mapping[str, float] | Sequence[Any]
    steps: int
    preset: PathLike
    from_scratch: bool
    model: BackboneConfig
    vocabulary_size: int | None
    lora_rank: int | None
    sequence_length: int | None
    batch_size: int | None
    gradient_accumulation_steps: int
    remat: Remat
    dtype: Literal[
        "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"
    ]
    recipe: Mapping[str, Any]
    text_column: str
    errors: Literal["strict", "replace"]
    validation_fraction: float | None
    max_tokens: int | None
    validation_batches: int
    validate_every: int | None
    sample: str | Sequence[str]
    tensorboard: bool
    save_every: int
    keep_last: int
    on_damage: Literal["raise", "previous"]
    seed: int
