"""Batch, remat and strategy that fit given devices.

For the 97M model on the TPUs that Colab and Kaggle lend, `COMPILED` has what
TPU's compiler said of the train step. For everything else, memory is estimated
from sizes, on the safe side of what was compiled.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax

from keras_bwetaf.arguments import PathLike
from keras_bwetaf.checks import positive_int
from keras_bwetaf.hardware import GIB, device
from keras_bwetaf.preset_files import PRESETS, load_config

# Of a device's memory, what is left free.
SPARE = 0.1
# Rows of an optimizer step, or more where more devices have room for them.
ROWS = 32
# Bytes of a weight, and of what products are computed with.
BYTES = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "mixed_bfloat16": (4, 2),
    "mixed_float16": (4, 2),
}
SHAPE = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "num_experts",
)


class Compiled(NamedTuple):
    """What the compiler said of a train step, of one device."""

    device: str
    num_devices: int
    rows: int  # of a device at once; twice as many leave less than a tenth
    peak: float  # GiB
    tokens_per_second: float  # of all devices, by the compiler's estimate


# The 97M model, rows of 2048 tokens, bfloat16, the recipe "97m", no remat, data
# parallel, compiled by `benchmarks.tpu_compile` with jax 0.10.2 and libtpu
# 0.0.42.1. docs/benchmarks.md, "Recommended settings", has the commands, and
# how the seconds of a step are estimated.
COMPILED = (
    Compiled("TPU v5 lite", 1, 16, 8.779, 116_000),
    Compiled("TPU v6 lite", 1, 32, 16.278, 238_000),
    Compiled("TPU v5 lite", 8, 16, 8.388, 919_000),
    Compiled("TPU v3", 8, 16, 14.229, 316_000),
)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Settings for a training, by `recommend`.

    Attributes:
        device_kind: str.
        num_devices: int.
        sequence_length: int. Tokens of a row.
        batch_size: int. Rows of an optimizer step, of all devices together.
        gradient_accumulation_steps: int. Parts in which they are worked on.
        remat: str. For `compile`, as the one before.
        strategy: str. The function of `keras_bwetaf.distribution` to call.
        peak_memory: float. GiB that the step needs of a device.
        memory: float. GiB that a device has.
        is_compiled: bool. Whether `peak_memory` is the compiler's, or
            estimated.
        tokens_per_second: float, or None if there is no estimate. Of all
            devices.
    """

    device_kind: str
    num_devices: int
    sequence_length: int
    batch_size: int
    gradient_accumulation_steps: int
    remat: str
    strategy: str
    peak_memory: float
    memory: float
    is_compiled: bool
    tokens_per_second: float | None = None

    @property
    def rows_per_device(self) -> int:
        """Rows that a device works on at once."""
        parts = self.num_devices * self.gradient_accumulation_steps
        return self.batch_size // parts

    def __str__(self):
        source = "compiled" if self.is_compiled else "estimated"
        lines = [
            f"{self.num_devices} x {self.device_kind}, rows of "
            f"{self.sequence_length} tokens:",
            f"  batch_size={self.batch_size}, {self.rows_per_device} rows a "
            "device at once",
            "  gradient_accumulation_steps="
            f"{self.gradient_accumulation_steps}, remat={self.remat!r}, "
            f"{self.strategy}()",
            f"  {self.peak_memory:.1f} of {self.memory:g} GiB a device "
            f"({source})",
        ]
        if self.tokens_per_second:
            lines.append(
                f"  {self.tokens_per_second:,.0f} tokens a second by the "
                "compiler's estimate"
            )
        return "\n".join(lines)


def recommend(
    model: PathLike | dict = "97m",
    *,
    dtype: str = "bfloat16",
    sequence_length: int | None = None,
    device_kind: str | None = None,
    num_devices: int | None = None,
) -> Recommendation:
    """Settings with which a training fits, with a tenth of memory to spare.

    For the 97M model in bfloat16 at context 2048 with the recipe `"97m"`, on
    Colab's v5e-1 and v6e-1 and Kaggle's v5e-8 and v3-8, they come from TPU's
    compiler: the most rows at once, a power of two. Elsewhere they come from
    an estimate of memory that is meant to be too large. An optimizer step has
    32 rows, in parts if they don't fit; or more, where the compiled settings
    or the number of devices ask for it.

    Args:
        model: str or path of a preset, or dict, a backbone's configuration.
        dtype: str. As for `from_preset`.
        sequence_length: int. Tokens of a row; by default, as many as the
            model sees.
        device_kind: str. As `jax.Device.device_kind` has it, or a name such
            as `"TPU v5e"`; by default, that of JAX's first device.
        num_devices: int. By default, all that JAX has, or 1 if `device_kind`
            is given.

    Returns:
        `Recommendation`.

    Raises:
        ValueError: If the device is not known, the model is too large for it,
            or an argument is wrong.

    Example:

    ```python
    print(recommend("97m", device_kind="TPU v5e", num_devices=8))
    ```
    """
    if num_devices is None:
        num_devices = 1 if device_kind else jax.device_count()
    positive_int("num_devices", num_devices)
    if dtype not in BYTES:
        raise ValueError(
            f"`dtype` must be one of {sorted(BYTES)}. Received: dtype={dtype!r}"
        )
    device_kind = device_kind or jax.devices()[0].device_kind
    known = device(device_kind)
    if known is None:
        raise ValueError(
            "The memory of this device is not known. Choose `batch_size` "
            "yourself: the largest that does not run out of memory. "
            f"Received: device_kind={device_kind!r}"
        )
    config = model if isinstance(model, dict) else load_config(model)
    length = sequence_length or config["max_sequence_length"]
    compiled = _compiled(config, dtype, length, known, num_devices)
    if compiled:
        rows, remat, strategy = compiled.rows, "none", "data_parallel"
        peak = compiled.peak
    else:
        rows, remat, strategy, peak = _estimated(
            config, dtype, length, known, num_devices
        )
    num_parts = math.ceil(ROWS / (rows * num_devices))
    return Recommendation(
        device_kind=device_kind,
        num_devices=num_devices,
        sequence_length=length,
        batch_size=rows * num_devices * num_parts,
        gradient_accumulation_steps=num_parts,
        remat=remat,
        strategy=strategy,
        peak_memory=peak,
        memory=known.memory,
        is_compiled=compiled is not None,
        tokens_per_second=compiled and compiled.tokens_per_second,
    )


def _compiled(config, dtype, sequence_length, known, num_devices):
    """The row of `COMPILED` for this training, or None."""
    card = PRESETS["97m"]["config"]
    is_same_model = all(config.get(name) == card.get(name) for name in SHAPE)
    is_same_step = (dtype, sequence_length) == (
        "bfloat16",
        card["max_sequence_length"],
    )
    if not is_same_model or not is_same_step:
        return None
    for row in COMPILED:
        if (device(row.device), row.num_devices) == (known, num_devices):
            return row
    return None


def _estimated(config, dtype, sequence_length, known, num_devices):
    """Rows at once, remat, strategy and peak in GiB of any training.

    Raises:
        ValueError: If not even one row fits.
    """
    limit = (1 - SPARE) * known.memory
    most = 2 ** math.ceil(math.log2(max(ROWS / num_devices, 1)))
    for remat, strategy in itertools.product(
        ("none", "full"), ("data_parallel", "fully_sharded")
    ):
        shards = num_devices if strategy == "fully_sharded" else 1
        state, row = estimated_memory(
            config, dtype, sequence_length, known, remat, shards
        )
        if state + row <= limit:
            fitting = 2 ** math.floor(math.log2((limit - state) / row))
            rows = min(fitting, most)
            return rows, remat, strategy, state + rows * row
    raise ValueError(
        f"One row of {sequence_length} tokens needs about {state + row:.1f} "
        f"GiB a device, and {limit:.1f} of {known.memory:g} GiB are to be "
        "used. Take shorter rows, a smaller model or more devices; or, as "
        "this is an estimate, choose `batch_size` yourself. Received: "
        f"num_devices={num_devices}"
    )


def estimated_memory(config, dtype, sequence_length, known, remat, num_shards):
    """GiB that a train step needs of a device, on the safe side.

    Of each weight: itself, its gradient in float32, in which those of parts of
    a batch are added up, and two moments in bfloat16, as the recipes have
    them; and a copy to compute with, where that is of another dtype or put
    together from several devices. Of each token: what every
    layer keeps, which is 6 vectors of `hidden_dim`, 3 of `intermediate_dim`
    for each expert that the token uses,
    and, with the plain kernel of attention, the weights of 9/16 of all pairs
    of tokens; as much again for the layer whose gradient is computed; and an
    eighth of its logits, in float32 and in the dtype of the products. With
    `remat="full"`, a layer keeps one vector.

    Args:
        config: dict. A backbone's configuration.
        dtype: str. As for `from_preset`.
        sequence_length: int.
        known: `hardware.Device`.
        remat: str. `"none"` or `"full"`.
        num_shards: int. Devices over which weights and moments are split.

    Returns:
        Tuple of float: GiB without any row, and of each row.
    """
    width, inner = config["hidden_dim"], config["intermediate_dim"]
    num_layers, vocabulary = config["num_layers"], config["vocabulary_size"]
    experts = config.get("num_experts", 1)
    inner_of_token = inner * config.get("num_experts_per_token", 1)
    weight_bytes, product_bytes = BYTES[dtype]
    has_copy = num_shards > 1 or weight_bytes != product_bytes
    # Keys and values as wide as queries, which they are at most.
    num_weights = vocabulary * width + num_layers * (
        4 * width**2 + 4 * width + experts * (3 * width * inner + 2 * inner)
    )
    state = num_weights * (
        4 + has_copy * product_bytes + (weight_bytes + 4) / num_shards
    )
    of_layer = 6 * width + 3 * inner_of_token
    if not _has_splash(known):
        heads = config["num_query_heads"]
        heads = heads if isinstance(heads, int) else max(heads)
        of_layer += heads * sequence_length * 9 / 16
    kept = num_layers * (of_layer if remat == "none" else width)
    token = product_bytes * (kept + of_layer)
    token += vocabulary / 8 * (4 + product_bytes)
    return state / GIB, sequence_length * token / GIB


def _has_splash(known):
    """Whether attention keeps no weights there (see `layers.attention`)."""
    is_old = known.pattern in ("TPU v2", "TPU v3")
    return known.pattern.startswith("TPU") and not is_old
