"""What a device has and does at most, and what a token costs."""

import math
import re
from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """What a device has and does at most, as its maker states it.

    JAX's devices are the cores of a TPU v2 and v3, two to a chip, and whole
    chips of later ones.
    """

    pattern: str  # of a part of `jax.Device.device_kind`
    # Dense products a second, in units of 1e12 operations: in bfloat16
    # (float16 where a chip has no such products), and of float32 arrays at
    # JAX's default precision, which is TensorFloat-32 where there is that, and
    # bfloat16 on a TPU.
    bfloat16: float
    float32: float
    # GiB (GB of NVIDIA); of models with the same name, the smallest.
    memory: float
    bandwidth: float  # of that memory, 1e9 bytes a second


# What a longer name matches comes first. Sources: the pages of Google's
# documentation cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e; for v2,
# Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural
# Networks" (2020); for v4 lite (v4i), Jouppi et al., "Ten Lessons From Three
# Generations Shaped Google's TPUv4i" (2021); NVIDIA's data sheet of each GPU,
# and of a GeForce the white paper of its architecture.
DEVICES = (
    Device("TPU v2", 22.5, 22.5, 8, 350),
    Device("TPU v3", 61.5, 61.5, 16, 450),
    Device("TPU v4 lite", 138, 138, 8, 614),
    Device("TPU v4", 275, 275, 32, 1200),
    Device("TPU v5( lite|e)", 197, 197, 16, 819),
    Device("TPU v5p?", 459, 459, 95, 2765),
    Device("TPU v6( lite|e)", 918, 918, 32, 1638),
    Device("H200 NVL", 835.5, 417.5, 141, 4800),
    Device("H200", 989.5, 494.7, 141, 4800),
    Device("H100 NVL", 835.5, 417.5, 94, 3900),
    Device("H100 PCIe", 756, 378, 80, 2000),
    Device("H100", 989.5, 494.7, 80, 3350),
    Device("A100-SXM4-80GB", 312, 156, 80, 2039),
    Device("A100 80GB PCIe", 312, 156, 80, 1935),
    Device("A100", 312, 156, 40, 1555),
    Device("L40S", 362, 183, 48, 864),
    Device("L4", 121, 60, 24, 300),
    Device("RTX 4090", 165.2, 82.6, 24, 1008),
    Device("RTX 3090", 71, 35.6, 24, 936),
    Device("T4", 65, 8.1, 16, 320),
    Device("V100-PCIE", 112, 14, 16, 900),
    Device("V100", 125, 15.7, 16, 900),
)


def device(device_kind):
    """What a kind of device has and does at most.

    Args:
        device_kind: str. As `jax.Device.device_kind` has it.

    Returns:
        `Device`, or `None` if it is not known.
    """
    for each in DEVICES:
        if re.search(rf"\b{each.pattern}\b", device_kind):
            return each
    return None


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
    known = device(device_kind)
    if known is None:
        return None
    return 1e12 * (known.float32 if dtype == "float32" else known.bfloat16)


def num_idle_params(model, trainable_only=False):
    """The number of parameters that do not work on a token.

    They are those of the experts that it does not use.

    Args:
        model: `keras.Model`.
        trainable_only: bool. Whether to count only those that are trained.

    Returns:
        int.
    """
    return sum(
        getattr(layer, "num_idle_params", 0)
        for layer in model._flatten_layers()
        if layer.trainable_weights or not trainable_only
    )


def flops_per_token(model, sequence_length):
    """Floating-point operations that a token needs in a training step.

    For each weight that works on it, a product and a sum in the forward pass
    and as many for the gradient of its input, and, if it is trained, for its
    own: 6 for each weight of a model that is trained as a whole. Experts that
    it does not use do not count. The head is the embedding's
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
    num_trained -= num_idle_params(model, trainable_only=True)
    num_active = model.count_params() - num_idle_params(model)
    products = 4 * num_active + 2 * num_trained
    attention = 6 * backbone.num_layers * backbone.hidden_dim * sequence_length
    return products + attention
