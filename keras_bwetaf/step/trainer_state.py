"""What Keras's trainer on JAX holds while it runs, kept within reach.

Keras takes the values of all variables out of the model, hands them from step
to step, and puts them back at the end of an epoch. In between, the variables
have none: an error would lose the weights, and whoever reads them gets an
error. Here, the values are known after every step, and return to their
variables as soon as one of these is read or assigned. A step costs no more
for it.
"""

import collections
import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")
PARTS = (  # Of a state, in Keras's order.
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)


def running(method: Callable[P, R]) -> Callable[P, R]:
    """Wraps a method of a model in `TrainerState.running`.

    Args:
        method: function of a model that has a `_trainer_state`, and more.

    Returns:
        Such a function.
    """

    @functools.wraps(method)
    def call(model, *args, **kwargs):
        with model._trainer_state.running():
            return method(model, *args, **kwargs)

    return call


class TrainerState:
    """The values of a model's variables while the model runs.

    Args:
        model: `keras.Model`, which takes values, keeps those of a step and
            puts them back here instead of by itself.
    """

    def __init__(self, model):
        self._model = model
        self._thread = None  # In which the model runs.
        self._variables = None  # Tuple of lists.
        self._values = None  # As many; `None` if the variables have them.
        self._handlers = {}  # Of signals, by number, which `_handle` calls.
        self._delayed = collections.deque()  # Calls of them.

    @contextlib.contextmanager
    def running(self):
        """A call of `fit`, `evaluate`, `predict` and the like.

        However it ends, the variables then have their values. A call within
        another, such as in a callback, leaves the metrics as they are.

        Raises:
            RuntimeError: If another thread runs the model.
        """
        self.check_thread()
        self.put_back()
        if self._thread is not None:
            with _restored(self._model.metrics_variables, self.put_back):
                yield
            return
        try:
            self._thread = threading.get_ident()
            yield
        finally:
            try:
                self.put_back()
            finally:
                self._thread = None
                self._unguard()

    def check_thread(self):
        """Checks that no other thread runs the model.

        Raises:
            RuntimeError: If one does.
        """
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "The model can't be used while another thread runs its `fit`, "
                "`evaluate` or `predict`, which change its weights. Wait for "
                "it, use the model in a callback, or use a copy: "
                "`type(lm).from_config(lm.get_config())`, with the weights of "
                "a checkpoint. Received: a call from the thread "
                f"{threading.current_thread().name!r}"
            )

    def take(self, parts):
        """Takes the values out of the variables.

        Args:
            parts: iterable of str, of `PARTS`.

        Returns:
            Tuple of lists of arrays, a list for each part. No array is there
            twice, since a step reuses the memory of each.
        """
        model = self._model
        variables = [
            model.optimizer.variables
            if part == "optimizer_variables"
            else getattr(model, part)
            for part in PARTS
            if part in parts
        ]
        self._variables = variables
        self._values = _without_doubles(
            [variable.value for variable in each] for each in variables
        )
        self._guard()
        self._empty_variables()
        return self._values

    def keep(self, step_function):
        """Makes a step's results the values of the variables.

        Args:
            step_function: function of a state, as `take` returns it, and
                data. Returns outputs and the new state.

        Returns:
            Such a function.
        """

        def step(state, data):
            if self._values is None:  # The data set has read the variables.
                self._values = state
                self._guard()
                self._empty_variables()
            outputs, state = step_function(state, data)
            self._values = state
            self._handle_delayed()
            return outputs, state

        return step

    def put_back(self):
        """Puts the values into the variables, where they are not."""
        if self._values is None:
            return
        self.check_thread()
        if self._has_lost_values():
            return
        for variable, value in self._pairs():
            type(variable)._direct_assign(variable, value)
            variable._initializer = None
            vars(variable).pop("_direct_assign", None)
        self._values = None
        self._model._jax_state = None
        self._model._jax_state_synced = True
        self._unguard()

    def _empty_variables(self):
        for variable, _ in self._pairs():
            # Keras calls the first for the value of an empty variable, and
            # the second to assign one.
            variable._initializer = functools.partial(self._read, variable)
            variable._direct_assign = functools.partial(self._assign, variable)
            variable._value = None

    def _read(self, variable, shape, dtype):
        self.put_back()
        if variable._value is None:
            raise RuntimeError(
                "A step failed on the device after it had taken the memory of "
                "the weights, which are lost. Load them again, and compile "
                f"the model anew. Received: variable={variable.path!r}"
            )
        return variable._value

    def _assign(self, variable, value):
        self.put_back()
        type(variable)._direct_assign(variable, value)

    def _pairs(self):
        for variables, values in zip(
            self._variables, self._values, strict=True
        ):
            yield from zip(variables, values, strict=True)

    def _has_lost_values(self):
        """Whether a step has taken the values' memory and not yet returned."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._values))

    def _guard(self):
        """Delays Python's signal handlers to the end of a running step.

        An exception that one of them raises, such as KeyboardInterrupt, would
        drop what the step returns. Only the main thread handles signals.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) and number not in self._handlers:
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _unguard(self):
        while self._handlers:
            number, handler = self._handlers.popitem()
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._handle_delayed()

    def _handle(self, number, frame):
        call = functools.partial(self._handlers[number], number, frame)
        if self._has_lost_values():
            self._delayed.append(call)
        else:
            call()

    def _handle_delayed(self):
        while self._delayed:
            self._delayed.popleft()()


@contextlib.contextmanager
def _restored(variables, put_back):
    """Gives variables at the end the values that they have now."""
    values = [variable.value for variable in variables]
    try:
        yield
    finally:
        put_back()
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def _without_doubles(state):
    """Copies arrays that are there more than once.

    Weights and their moving averages are the same arrays after
    `finalize_variable_values` of Keras's optimizers.

    Args:
        state: iterable of lists of arrays.

    Returns:
        Tuple of such lists.
    """
    seen = set()

    def once(x):
        is_new = id(x) not in seen
        seen.add(id(x))
        return x if is_new else jnp.copy(x)

    return tuple([once(x) for x in values] for values in state)
