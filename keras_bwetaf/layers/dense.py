import keras

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
    return keras.layers.EinsumDense(
        "bti,ui->btu",
        output_shape=(None, units),
        bias_axes="u" if use_bias else None,
        kernel_initializer=initializers.normal(initializer_range),
        dtype=dtype,
        name=name,
    )
