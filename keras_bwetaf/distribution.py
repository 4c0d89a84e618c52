"""Ready `keras.distribution` strategies for several devices.

| strategy | a device has | the rows of a batch are split over |
|---|---|---|
| `data_parallel()` | all weights | all devices |
| `fully_sharded()` | a part of each weight | all devices |
| `model_parallel(2)` | a part of each layer | groups of two devices |

Set one before the model is made; nothing else in a script changes.

```python
keras.distribution.set_distribution(keras_bwetaf.distribution.fully_sharded())
lm = keras_bwetaf.from_preset("97m")
lm.fit(dataset)
```
"""

import collections
import math
import re
import warnings
from collections.abc import Sequence

import jax
import keras
from jax.experimental import mesh_utils
from rich import box
from rich.console import Console
from rich.table import Table

from keras_bwetaf.checks import is_int
from keras_bwetaf.hardware import num_idle_params
from keras_bwetaf.models.backbone import BwETAFBackbone
from keras_bwetaf.processes import is_first_process
from keras_bwetaf.recommendation import Recommendation, recommend

__all__ = [
    "Recommendation",
    "Sharding",
    "data_parallel",
    "describe",
    "fully_sharded",
    "model_parallel",
    "recommend",
]

BATCH, MODEL = "batch", "model"


def data_parallel(
    devices: Sequence[jax.Device] | None = None,
) -> "Sharding":
    """Replicates the weights, and shards the rows of a batch.

    The fastest, as long as weights and optimizer state fit on a device.

    Args:
        devices: list of `jax.Device`, or None for all there are.

    Returns:
        `Sharding`, for `keras.distribution.set_distribution`.
    """
    return Sharding(_mesh(devices))


def fully_sharded(
    devices: Sequence[jax.Device] | None = None,
) -> "Sharding":
    """As `data_parallel`, with weights and optimizer state split, too.

    A device keeps a part of each weight. For a step of training, the weights
    are put together, and their gradients are added up to the part that the
    device keeps. Known as FSDP and ZeRO.

    Args:
        devices: list of `jax.Device`, or None for all there are.

    Returns:
        `Sharding`, for `keras.distribution.set_distribution`.
    """
    return Sharding(_mesh(devices), data_parallel_dim_name=BATCH)


def model_parallel(
    model: int,
    fully_sharded: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> "Sharding":
    """Groups of devices work together on the same rows.

    The feed-forward network and the vocabulary are split over the devices of
    a group; of a mixture of experts, each device has some experts. So are
    attention's heads, if `2 * model` divides the number of key/value heads:
    RoPE's pairs and the groups of heads then stay on one device each. Every
    device has the kernels around attention whole, as no contiguous part of
    them has the heads that a device needs. Otherwise, every device of a group
    computes all queries, keys and values; and from there on its own query
    heads, if `model` divides their number.

    Args:
        model: int. Devices in a group.
        fully_sharded: bool. Whether to split each weight over the groups,
            too, as `fully_sharded` does.
        devices: list of `jax.Device`, or None for all there are.

    Returns:
        `Sharding`, for `keras.distribution.set_distribution`.

    Raises:
        ValueError: If the devices can't be divided into such groups.
    """
    num_devices = len(devices or jax.devices())
    if not is_int(model) or model < 1 or num_devices % model:
        raise ValueError(
            "`model` must be a positive int that divides the number of "
            f"devices. Received: model={model!r}, {num_devices} devices"
        )
    return Sharding(
        _mesh(devices, model),
        model_parallel_dim_name=MODEL,
        data_parallel_dim_name=BATCH if fully_sharded else None,
    )


class Sharding(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` by `BwETAFBackbone.get_layout_map`.

    A dimension that is no multiple of its mesh axis is replicated; one note
    lists all of them, when the first batch comes. Each process feeds its own
    rows.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`, whose first axis is that
            of the rows.
        model_parallel_dim_name: str or None. See
            `BwETAFBackbone.get_layout_map`.
        data_parallel_dim_name: str or None.
    """

    def __init__(
        self,
        device_mesh,
        model_parallel_dim_name=None,
        data_parallel_dim_name=None,
    ):
        layout_map = BwETAFBackbone.get_layout_map(
            device_mesh, model_parallel_dim_name, data_parallel_dim_name
        )
        super().__init__(
            layout_map=layout_map,
            batch_dim_name=device_mesh.axis_names[0],
            auto_shard_dataset=False,
        )
        self._undivided = {}
        self._is_noted = False

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        mesh = self.device_mesh.backend_mesh
        axes = [None] * len(variable.shape)
        for i, axis in enumerate(layout.axes):
            if axis is None:
                continue
            size, num_devices = variable.shape[i], mesh.shape[axis]
            if size % num_devices == 0:
                axes[i] = axis
            else:
                path = re.sub(r"_\d+/", "_*/", variable.path)
                note = f"{path}: {size} over {num_devices} of {axis!r}"
                self._undivided[note] = None  # In order, and once.
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def get_data_layout(self, data_shape):
        num_groups = self.num_model_replicas
        if data_shape[0] * jax.process_count() % num_groups:
            raise ValueError(
                "The number of rows in a batch must be a multiple of "
                f"{num_groups}, the number of devices, or of groups of them. "
                "Pass another `batch_size`, or leave out the rest of a data "
                f"set. Received: a batch of shape {tuple(data_shape)}"
            )
        if self._undivided and not self._is_noted:
            self._is_noted = True
            warnings.warn(
                "Some dimensions are no multiples of the number of devices on "
                "their axis, and are replicated: " + "; ".join(self._undivided),
                stacklevel=2,
            )
        return super().get_data_layout(data_shape)


def describe(model: keras.Model) -> None:
    """Prints where the variables of a model and of its optimizer are.

    Layers that are alike share a line, and so do the moments of weights that
    are split as their weights are. Of a mixture of experts, it says how many
    parameters work on a token.

    Args:
        model: `keras.Model`.

    Example:

    ```python
    keras_bwetaf.distribution.describe(lm)
    ```
    """
    rows = collections.defaultdict(list)
    for variable in model.variables:
        path = re.sub(r"(layer_)\d+", r"\1*", variable.path)
        rows[path, *_shape_and_spec(variable)].append(variable)
    optimizer = getattr(model, "optimizer", None)
    weights = {each.path.replace("/", "_"): each for each in model.variables}
    for variable in optimizer.variables if optimizer else ():
        owner, _, name = variable.path.partition("/")
        weight, _, kind = name.rpartition("_")
        if weight in weights and _is_split_like(variable, weights[weight]):
            rows[f"{owner}/*_{kind}", "", "as the weights"].append(variable)
        else:
            rows[variable.path, *_shape_and_spec(variable)].append(variable)

    table = Table(
        "variable", "shape", "split over", "bytes a device", box=box.SIMPLE
    )
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    for (path, shape, spec), variables in rows.items():
        times = f"{len(variables)} x " if len(variables) > 1 else ""
        table.add_row(path, times + shape, spec, f"{_num_bytes(variables):,}")
    table.add_section()
    everything = [each for variables in rows.values() for each in variables]
    table.add_row("all", "", "", f"{_num_bytes(everything):,}")
    if num_idle := num_idle_params(model):
        total = model.count_params()
        table.caption = (
            f"{total - num_idle:,} of {total:,} parameters work on a token"
        )
    if is_first_process():
        Console().print(table)


def _is_split_like(variable, other):
    return variable.shape == other.shape and (
        variable.value.sharding.is_equivalent_to(
            other.value.sharding, len(other.shape)
        )
    )


def _shape_and_spec(variable):
    shape = f"{variable.dtype} {tuple(variable.shape)}"
    axes = getattr(variable.value.sharding, "spec", ())
    spec = ", ".join(axis or "-" for axis in axes) if any(axes) else ""
    return shape, spec


def _num_bytes(variables):
    """Bytes that a device has of them."""
    return sum(
        math.prod(each.value.sharding.shard_shape(tuple(each.shape)))
        * each.value.dtype.itemsize
        for each in variables
    )


def _mesh(devices, model=None):
    """Of all devices in a row, or in groups of `model`."""
    devices = list(devices or jax.devices())
    shape, names = (len(devices),), [BATCH]
    if model is not None:
        shape, names = (len(devices) // model, model), [BATCH, MODEL]
    # Neighbours on the mesh are neighbours in the machine.
    devices = mesh_utils.create_device_mesh(shape, devices)
    return keras.distribution.DeviceMesh(shape, names, devices)
