import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from keras_bwetaf.layers import initializers
from keras_bwetaf.layers.grouped_product import grouped_product
from keras_bwetaf.layers.sharding import device_axes, shard_mapped

DISPATCHES = ("exact", "original_token", "original_batch")
# Added to the deviation of a token's logits.
ROUTER_EPSILON = 1e-3


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class MixtureOfExperts(keras.layers.Layer):
    """Gated feed-forward networks, of which each token uses a few.

    A router gives each token a logit for each expert, and brings these to
    mean 0 and deviation 1. The token's output is the sum of the outputs of
    the most probable experts, times their probabilities, which add up to less
    than 1. An expert is `output(silu(gate(x)) · intermediate(x))`, with
    biases. One expert alone has no router.

    In training, `losses` has two values, times their weights: the product of
    the share of choices and the mean probability, summed over experts, times
    their number (1 if all are used equally); and the mean square of the
    probability that a token leaves to experts that it does not use. All
    tokens count, and so does padding.

    `dispatch` says which expert's output a token gets for a choice:

    - `"exact"`: that of the expert that was chosen.
    - `"original_token"`: what the original makes of the token when it
      generates, one token at a time. Of the chosen experts, only the first
      works, and the last one of the layer. In place of the others, tokens get
      what the last one makes of zeros.
    - `"original_batch"`: what the original makes of a batch of whole
      sequences. A token's output depends on other rows and on later tokens.
      For comparisons with the original only.

    Args:
        num_experts: int.
        num_experts_per_token: int, at most `num_experts`.
        intermediate_dim: int. Inner width of an expert.
        initializer_range: float. Standard deviation of the initial kernels;
            biases start at zero.
        dispatch: str. See above.
        capacity: float. Room of an expert, in units of the mean number of its
            tokens. Of `"original_batch"` only.
        loss_weights: two floats, one for each auxiliary loss.
        router_noise_steps: int. In training, noise is added to the logits:
            Gumbel's, times a factor that falls from 1 to 0 in this number of
            calls.

    Input shape:
        `(batch, length, hidden_dim)`.

    Output shape:
        The input's.

    Reference:
     - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538)
     - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961)
    """

    def __init__(
        self,
        *,
        num_experts: int,
        num_experts_per_token: int,
        intermediate_dim: int,
        initializer_range: float,
        dispatch: str = "exact",
        capacity: float = 1.25,
        loss_weights: Sequence[float] = (0.0, 0.0),
        router_noise_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dispatch not in DISPATCHES:
            raise ValueError(
                f"`dispatch` must be one of {DISPATCHES}. Received: "
                f"dispatch={dispatch!r}"
            )
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.intermediate_dim = intermediate_dim
        self.initializer_range = initializer_range
        self.dispatch = dispatch
        self.capacity = capacity
        self.loss_weights = tuple(loss_weights)
        self.router_noise_steps = router_noise_steps
        if router_noise_steps:
            self.seed_generator = keras.random.SeedGenerator()

    def build(self, input_shape):
        dim, inner_dim = input_shape[-1], self.intermediate_dim
        # Of the gate, the intermediate and the output: kernel and bias.
        self.projections = (
            self._projection("gate", dim, inner_dim),
            self._projection("intermediate", dim, inner_dim),
            self._projection("output", inner_dim, dim),
        )
        self.router = None
        if self.num_experts > 1:
            self.router = self._kernel("router", (self.num_experts, dim))
        self.built = True

    def _projection(self, name, num_inputs, num_outputs):
        kernel = self._kernel(
            f"{name}_kernel", (self.num_experts, num_inputs, num_outputs)
        )
        bias = self.add_weight(
            shape=(self.num_experts, num_outputs),
            initializer="zeros",
            name=f"{name}_bias",
        )
        return kernel, bias

    def _kernel(self, name, shape):
        initializer = initializers.normal(self.initializer_range)
        return self.add_weight(shape=shape, initializer=initializer, name=name)

    @property
    def num_idle_params(self) -> int:
        """The number of parameters of the experts that a token leaves."""
        of_expert = sum(
            math.prod(weight.shape[1:])
            for projection in self.projections
            for weight in projection
        )
        return of_expert * (self.num_experts - self.num_experts_per_token)

    def call(
        self, inputs: ArrayLike, training: bool | None = None
    ) -> jax.Array:
        if self.router is None:
            weights = jnp.ones((*inputs.shape[:2], 1))
            experts = jnp.zeros((*inputs.shape[:2], 1), "int32")
        else:
            weights, experts = self._route(inputs, training)

        # Each device has all experts of its rows, or some, and sums are added.
        rows, expert_axes = device_axes(inputs.shape[0], self.num_experts)
        by_row, by_expert = PartitionSpec(rows), PartitionSpec(expert_axes)

        def mix(*arguments):
            outputs = self._mix(*arguments, expert_axes)
            return jax.lax.psum(outputs, expert_axes)

        projections = jax.tree.map(
            keras.ops.convert_to_tensor, self.projections
        )
        return shard_mapped(
            mix, in_specs=(by_row, by_row, by_row, by_expert), out_specs=by_row
        )(inputs, weights, experts, projections)

    def _route(self, inputs, training):
        """Chosen experts and their probabilities, the highest last.

        Args:
            inputs: float tensor `(batch, length, hidden_dim)`.
            training: bool or None.

        Returns:
            Tuple of a float32 and an int32 array `(batch, length, chosen)`.
        """
        # b = batch, t = length, i = inputs, e = experts
        logits = jnp.einsum(
            "bti,ei->bte",
            inputs,
            keras.ops.convert_to_tensor(self.router),
            preferred_element_type="float32",
        )
        logits -= jnp.mean(logits, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(logits), axis=-1, keepdims=True)
        # The square root of 0 has no gradient.
        is_zero = variance == 0
        deviation = jnp.sqrt(jnp.where(is_zero, 1, variance))
        logits /= jnp.where(is_zero, 0, deviation) + ROUTER_EPSILON
        if training and self.router_noise_steps:
            logits += self._noise(logits.shape)

        probabilities = jax.nn.softmax(logits, axis=-1)
        # Among equal ones, the last.
        experts = jnp.argsort(probabilities, axis=-1)
        experts = experts[..., -self.num_experts_per_token :]
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        if training and any(self.loss_weights):
            chosen = jax.nn.one_hot(experts, self.num_experts)
            balance = self.num_experts * jnp.sum(
                jnp.mean(chosen, axis=(0, 1, 2))
                * jnp.mean(probabilities, axis=(0, 1))
            )
            unused = jnp.mean(jnp.square(1 - jnp.sum(weights, axis=-1)))
            self.add_loss(self.loss_weights[0] * balance)
            self.add_loss(self.loss_weights[1] * unused)
        return weights, experts

    def _noise(self, shape):
        # What the seeds are counted by counts the calls.
        num_calls = self.seed_generator.state.value[1].astype("float32")
        scale = jnp.maximum(1 - num_calls / self.router_noise_steps, 0)
        # As the original's, which is never infinite.
        uniform = keras.random.uniform(
            shape, minval=1e-8, dtype="float32", seed=self.seed_generator
        )
        return scale * -jnp.log(-jnp.log(uniform))

    def _mix(self, inputs, weights, experts, projections, expert_axes):
        """Sums of experts' outputs, of the tokens and experts of a device."""
        gate, intermediate, output = projections
        tokens = jnp.reshape(inputs, (-1, inputs.shape[-1]))
        shape = (len(tokens), self.num_experts_per_token)
        weights = jnp.reshape(weights, shape)
        experts = jnp.reshape(experts, shape)
        sources, experts, weights = self._dispatch(experts, weights)
        # What is beyond all tokens, "original" rules read as zeros.
        if self.dispatch != "exact":
            tokens = jnp.pad(tokens, ((0, 1), (0, 0)))

        num_experts = len(gate[0])
        experts = jnp.ravel(experts)
        if expert_axes:
            experts -= num_experts * jax.lax.axis_index(expert_axes)
        # Another device's experts come last, in no group.
        is_here = (experts >= 0) & (experts < num_experts)
        experts = jnp.where(is_here, experts, num_experts)
        order = jnp.argsort(experts)
        of_row = jax.nn.one_hot(experts[order], num_experts, dtype="float32")
        sizes = jnp.sum(of_row, axis=0).astype("int32")

        def project(rows, kernels, biases):
            bias = jnp.dot(of_row.astype(rows.dtype), biases, precision="high")
            return grouped_product(rows, kernels, sizes) + bias

        rows = tokens[jnp.ravel(sources)[order]]
        rows = jax.nn.silu(project(rows, *gate)) * project(rows, *intermediate)
        outputs = project(rows, *output)
        outputs *= jnp.ravel(weights)[order][:, None].astype(outputs.dtype)
        outputs = outputs[jnp.argsort(order)]
        outputs = jnp.sum(jnp.reshape(outputs, (*shape, -1)), axis=1)
        return jnp.reshape(outputs, inputs.shape)

    def _dispatch(self, experts, weights):
        """What each choice of a token is computed from, by the rule.

        Args:
            experts: int array `(tokens, chosen)`.
            weights: float array, as `experts`.

        Returns:
            Tuple of three arrays `(tokens, chosen)`: the token that is read,
            or the number of tokens for zeros; the expert; and the weight.
        """
        num_tokens, num_chosen = experts.shape
        token = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], experts.shape)
        if self.dispatch == "exact":
            return token, experts, weights
        last = self.num_experts - 1
        if self.dispatch == "original_token":
            order = jnp.argsort(experts, axis=-1)
            experts = jnp.take_along_axis(experts, order, axis=-1)
            weights = jnp.take_along_axis(weights, order, axis=-1)
            choice = jnp.arange(num_chosen)
            is_read = (choice == 0) | (
                (choice == 1) & (experts[:, -1:] == last)
            )
            token = jnp.where(is_read, token, num_tokens)
            return token, jnp.where(choice == 0, experts, last), weights

        # Choices in a queue, by expert. Each expert reads its part and writes
        # into a buffer that is too short, the next one over what it wrote.
        num_choices = num_tokens * num_chosen
        size = int(num_tokens / self.num_experts * num_chosen * self.capacity)
        queue = jnp.argsort(jnp.ravel(experts.T))
        counts = jnp.bincount(jnp.ravel(experts), length=self.num_experts)
        starts = jnp.cumsum(counts) - counts
        writes = jnp.minimum(starts, num_tokens)
        end = min(num_tokens + size, num_choices)
        row = jnp.minimum(jnp.argsort(queue), end - 1)[:, None]
        is_written = (writes <= row) & (row < writes + size)
        writer = last - jnp.argmax(is_written[:, ::-1], axis=-1)
        place = starts[writer] + row[:, 0] - writes[writer]
        token = jnp.where(
            place < num_choices,
            queue[jnp.minimum(place, num_choices - 1)] % num_tokens,
            num_tokens,
        )
        shape = (num_chosen, num_tokens)
        is_written = jnp.reshape(jnp.any(is_written, axis=-1), shape).T
        return (
            jnp.reshape(token, shape).T,
            jnp.reshape(writer, shape).T,
            jnp.where(is_written, weights, 0),
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "num_experts": self.num_experts,
                "num_experts_per_token": self.num_experts_per_token,
                "intermediate_dim": self.intermediate_dim,
                "initializer_range": self.initializer_range,
                "dispatch": self.dispatch,
                "capacity": self.capacity,
                "loss_weights": self.loss_weights,
                "router_noise_steps": self.router_noise_steps,
            }
        )
        return config
