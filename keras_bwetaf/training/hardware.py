"""What a device can do at most, and what a token costs."""

import math
import re

# Dense products a second, in units of 1e12 operations, as the makers state
# them: in bfloat16 (float16 where a chip has no such products), and of float32
# arrays at JAX's default precision, which is TensorFloat-32 where there is
# that, and bfloat16 on a TPU. JAX's devices are the cores of a TPU v2 and v3,
# two to a chip, and whole chips of later ones. Longer names come first.
PEAKS = (
    ("TPU v2", 22.5, 22.5),
    ("TPU v3", 61.5, 61.5),
    ("TPU v4 lite", 138, 138),
    ("TPU v4", 275, 275),
    ("TPU v5 lite", 197, 197),
    ("TPU v5e", 197, 197),
    ("TPU v5p", 459, 459),
    ("TPU v5", 459, 459),
    ("TPU v6 lite", 918, 918),
    ("TPU v6e", 918, 918),
    ("H200 NVL", 835.5, 417.5),
    ("H200", 989.5, 494.7),
    ("H100 NVL", 835.5, 417.5),
    ("H100 PCIe", 756, 378),
    ("H100", 989.5, 494.7),
    ("A100", 312, 156),
    ("L40S", 362, 183),
    ("L4", 121, 60),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
    ("T4", 65, 8.1),
    ("V100-PCIE", 112, 14),
    ("V100", 125, 15.7),
)


def peak_flops(device_kind, dtype):
    """The most floating-point operations that a device does in a second.

    Args:
        device_kind: str. As `jax.Device.device_kind` has it.
        dtype: str. The compute dtype.

    Returns:
        float, or `None` if the device is not known.

    Example:

    ```python
    peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16")  # 312e12
    ```
    """
    for name, bfloat16, float32 in PEAKS:
        if re.search(rf"\b{name}\b", device_kind):
            return 1e12 * (float32 if dtype == "float32" else bfloat16)
    return None


def flops_per_token(model, sequence_length):
    """Floating-point operations that a token needs in a training step.

    For each weight, a product and a sum in the forward pass and as many for
    the gradient of its input, and, if it is trained, for its own: 6 for each
    weight of a model that is trained as a whole. The head is the embedding's
    second use, and its lookup is free. To that come the scores and weighted
    sums of causal attention, `6 * num_layers * hidden_dim * sequence_length`.
    What rematerialisation computes a second time does not count.

    Args:
        model: `BwETAFCausalLM`.
        sequence_length: int. Tokens of a row.

    Returns:
        int.
    """
    backbone = model.backbone
    num_trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    products = 4 * model.count_params() + 2 * num_trained
    attention = 6 * backbone.num_layers * backbone.hidden_dim * sequence_length
    return products + attention
