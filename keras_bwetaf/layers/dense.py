import jax
import keras
from jax.typing import ArrayLike
from keras import ops

from keras_bwetaf.layers import initializers, low_rank
from keras_bwetaf.layers.sharding import (
    halves_from_shards,
    halves_to_shards,
)

# From twice as many rows on, XLA's own order is as fast.
MOST_ROWS_AS_COLUMNS = 32


def product(inputs: ArrayLike, kernel: ArrayLike) -> jax.Array:
    """Multiplies vectors by a kernel of shape `(units, inputs)`.

    A decode step has one token in each of a few rows. XLA's CPU backend
    multiplies these up to twice as fast as columns, `kernel @ inputs.T`.

    Args:
        inputs: float tensor `(batch, length, inputs)`.
        kernel: float tensor `(units, inputs)`.

    Returns:
        float tensor `(batch, length, units)`.
    """

    def by_rows(inputs, kernel):
        # b = batch, t = length, i = inputs, u = units
        return ops.einsum("bti,ui->btu", inputs, kernel)

    def by_columns(inputs, kernel):
        outputs = ops.matmul(kernel, ops.transpose(inputs[:, 0]))
        # Without the barrier, XLA turns the product back.
        outputs = jax.lax.optimization_barrier(outputs)  # (units, batch)
        return ops.transpose(outputs)[:, None]

    batch_size, length, _ = inputs.shape
    is_decode_step = length == 1 and isinstance(batch_size, int)
    if is_decode_step and 1 < batch_size <= MOST_ROWS_AS_COLUMNS:
        return jax.lax.platform_dependent(
            inputs, kernel, cpu=by_columns, default=by_rows
        )
    return by_rows(inputs, kernel)


def dense(
    name: str,
    units: int,
    *,
    use_bias: bool,
    initializer_range: float,
    dtype: keras.DTypePolicy,
) -> keras.layers.EinsumDense:
    """A dense layer whose kernel is `(units, inputs)`.

    Keras's `Dense` has it the other way round. Matrix-vector products on CPU
    are fastest when they contract the last axis of both operands; and PyTorch
    and the safetensors files store kernels in this order, so that these load
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
    return _Dense(
        "bti,ui->btu",
        output_shape=(None, units),
        bias_axes="u" if use_bias else None,
        kernel_initializer=initializers.normal(initializer_range),
        dtype=dtype,
        name=name,
    )


class _Dense(keras.layers.EinsumDense):
    """Keras's layer, with outputs or inputs sharded as RoPE needs them.

    With `output_shards` or `input_shards`, outputs or inputs are in the order
    of `halves_to_shards`. The kernel is reordered, not the vectors, so that
    each device multiplies by its own part.

    With LoRA, the factors multiply the inputs one after the other. Keras adds
    their product to the kernel first. A bfloat16 kernel would round it away;
    and the factors' gradients would need the kernel's, a third of the work of
    the layer.
    """

    def call(self, inputs, training=None, output_shards=1, input_shards=1):
        def reordered(weight, output_axis=None, input_axis=None):
            weight = ops.convert_to_tensor(weight)
            if output_axis is not None:
                weight = halves_to_shards(weight, output_axis, output_shards)
            if input_axis is not None:
                weight = halves_to_shards(weight, input_axis, input_shards)
            return weight

        kernel = reordered(self._kernel, 0, 1)
        # (batch, length, units)
        outputs = product(inputs, kernel)
        if self.lora_enabled:
            # r = rank
            x = reordered(self.lora_kernel_b, input_axis=1)
            x = ops.einsum("bti,ri->btr", inputs, x)  # (batch, length, rank)
            x = ops.einsum(
                "btr,ur->btu", x, reordered(self.lora_kernel_a, output_axis=0)
            )
            outputs += x * low_rank.scale(self)
        if self.bias is None:
            return outputs
        return outputs + reordered(self.bias, output_axis=0)

    def quantized_call(self, inputs, output_shards=1, input_shards=1, **kwargs):
        inputs = halves_from_shards(inputs, -1, input_shards)
        outputs = super().quantized_call(inputs, **kwargs)
        return halves_to_shards(outputs, -1, output_shards)

    def quantize(self, mode=None, type_check=True, config=None):
        if self.lora_enabled:
            raise ValueError(
                "A layer with LoRA cannot be quantized. Call `merge_lora()` "
                f"of the backbone first. Received: mode={mode!r}"
            )
        if mode in ("gptq", "awq"):
            raise ValueError(
                "Keras's GPTQ and AWQ take the first axis of a kernel for "
                "its inputs. Kernels are (units, inputs) here. Use 'int8' or "
                f"'int4'. Received: mode={mode!r}"
            )
        # Keras refuses subclasses, whose computation may be another one.
        super().quantize(mode, type_check=False, config=config)
