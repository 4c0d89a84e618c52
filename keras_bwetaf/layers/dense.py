import keras
from keras import ops

from keras_bwetaf.layers import initializers


def dense(name, units, *, use_bias, initializer_range, dtype):
    """A dense layer whose kernel is `(units, inputs)`.

    Keras's `Dense` has it the other way round. Contracting over the last axis
    of both operands is what matrix-vector products on CPU are fastest at, and
    is how PyTorch and the safetensors files store kernels, so that these load
    without a transposition.

    Args:
        name: str.
        units: int. Width of the output.
        use_bias: bool.
        initializer_range: float. Standard deviation of the initial kernel.
        dtype: `keras.DTypePolicy`.

    Returns:
        `keras.layers.EinsumDense`, from `(batch, length, inputs)` to
        `(batch, length, units)`.
    """
    # b = batch, t = length, i = inputs, u = units
    return _Dense(
        "bti,ui->btu",
        output_shape=(None, units),
        bias_axes="u" if use_bias else None,
        kernel_initializer=initializers.normal(initializer_range),
        dtype=dtype,
        name=name,
    )


class _Dense(keras.layers.EinsumDense):
    """With LoRA, the factors multiply the inputs one after the other.

    Keras adds their product to the kernel first. That rounds it away where
    the kernel is in bfloat16, and needs the kernel's gradient to find theirs,
    a third of the work of the layer.
    """

    def call(self, inputs, training=None):
        if not self.lora_enabled:
            return super().call(inputs, training=training)
        # r = rank
        x = ops.einsum("bti,ri->btr", inputs, self.lora_kernel_b)
        x = ops.einsum("btr,ur->btu", x, self.lora_kernel_a)
        x *= self.lora_alpha / self.lora_rank
        x += ops.einsum(self.equation, inputs, self._kernel)
        return x if self.bias is None else x + self.bias

    def quantize(self, mode=None, type_check=True, config=None):
        if self.lora_enabled:
            raise ValueError(
                "A layer with LoRA cannot be quantized. Call `merge_lora()` "
                f"of the backbone first. Received: mode={mode!r}"
            )
        # Keras refuses subclasses, whose computation may be another one.
        super().quantize(mode, type_check=False, config=config)
