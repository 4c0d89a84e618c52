"""A live model -> the checkpoint that `converters` writes in any format."""

from dataclasses import dataclass

import keras
import numpy as np

from converters.checkpoint import STEP, Checkpoint
from converters.mapped import Held, View
from keras_bwetaf.exchange.optimizer_state import optimizer_state
from keras_bwetaf.layers.low_rank import merged_weight, weight_and_factors


def as_checkpoint(lm, include_optimizer=False):
    """A model as a checkpoint, whose tensors are copied when asked for.

    LoRA's weights are merged into those that they belong to.

    Args:
        lm: `BwETAFCausalLM`.
        include_optimizer: bool. Whether the state of its optimizer belongs
            to it.

    Returns:
        `converters.checkpoint.Checkpoint`.

    Raises:
        ValueError: If the weights are quantized, or `include_optimizer` and
            the optimizer's state cannot be expressed.
    """
    layers = list(lm.backbone._flatten_layers())
    modes = {getattr(each, "quantization_mode", None) for each in layers}
    if modes != {None}:
        raise ValueError(
            "Quantized weights have no place in a checkpoint of floats. "
            "Export the model before it is quantized. Received: quantization "
            f"{', '.join(sorted(map(str, modes - {None})))}"
        )
    tokenizer = lm.preprocessor and lm.preprocessor.tokenizer
    architecture = lm.backbone.architecture
    config = architecture.config_from_keras(
        lm.backbone.get_config(),
        dtype=lm.backbone.variable_dtype,
        eos_token_id=tokenizer.end_token_id if tokenizer else None,
        source="the model",
    )
    variables = {variable.path: variable for variable in lm.backbone.weights}
    lora_layers = {
        weight_and_factors(layer)[0].path: layer
        for layer in layers
        if getattr(layer, "lora_enabled", False)
    }
    weights = {
        row.name: _Weight(variables[row.keras], lora_layers.get(row.keras))
        for row in architecture.tensors(config)
    }
    return Checkpoint(
        source="the model",
        config=config,
        tensors={name: View(weight) for name, weight in weights.items()},
        optimizer=_optimizer(lm) if include_optimizer else None,
        tokenizer=tokenizer.content if tokenizer else None,
        special_tokens={
            "eos_token": tokenizer.end_token,
            "unk_token": tokenizer.unk_token,
        }
        if tokenizer
        else {},
    )


def _optimizer(lm):
    """The optimizer's state, as `Checkpoint` has it."""
    state = optimizer_state(lm)
    return {
        name: View(
            Held(state[name])
            if name == STEP
            else _Weight(state.moments[name], None)
        )
        for name in state
    }


@dataclass(frozen=True)
class _Weight:
    """A variable in the place of a mapped tensor.

    Args:
        variable: `keras.Variable`.
        lora_layer: None, or the layer whose LoRA is merged into the variable.
    """

    variable: keras.Variable
    lora_layer: keras.layers.Layer | None

    @property
    def dtype(self):
        return np.dtype(self.variable.dtype)

    @property
    def shape(self):
        return tuple(self.variable.shape)

    def array(self):
        value = self.variable
        if self.lora_layer is not None:
            value = merged_weight(self.lora_layer)
        return keras.ops.convert_to_numpy(value)

    def release(self):
        pass
