"""What tells models of one kind from those of another, in every format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.transforms import view_shape


@dataclass(frozen=True)
class Kind:
    """How each format ends a tensor's name and lays out its values.

    Args:
        flax: str. Last part of the Flax path.
        name: str. Last part of the canonical name.
        keras: str. Last part of the Keras path.
        from_flax: tuple of transforms that show the Flax tensor in the
            canonical layout, which is Keras's, too.
    """

    flax: str
    name: str
    keras: str
    from_flax: tuple = ()


@dataclass(frozen=True)
class Tensor:
    """One canonical tensor of one model, and its place in every format.

    Args:
        kind: `Kind`.
        flax: tuple of str. Path in the Flax tree.
        flax_shape: tuple of int.
        name: str. Canonical name.
        keras: str. Path of the Keras variable.
    """

    kind: Kind
    flax: tuple
    flax_shape: tuple
    name: str
    keras: str

    @property
    def shape(self):
        return view_shape(self.kind.from_flax, self.flax_shape)


@dataclass(frozen=True)
class KerasClass:
    """A class of a Keras library, as Keras's JSON names it.

    Args:
        package: str. The library, under which the class is registered.
        module: str. Path of its module in the library.
        name: str.
        default: str. What Keras calls the first object of the class.
    """

    package: str
    module: str
    name: str
    default: str

    @property
    def path(self):
        return f"{self.package}.{self.module}"

    @property
    def registered_name(self):
        return f"{self.package}>{self.name}"


@dataclass(frozen=True)
class KerasClasses:
    """The classes that stand for an architecture, a `KerasClass` each."""

    backbone: KerasClass
    causal_lm: KerasClass
    preprocessor: KerasClass
    tokenizer: KerasClass


@dataclass(frozen=True)
class KnownTokenizer:
    """A tokenizer that is the same for all models of an architecture.

    Args:
        content: bytes of a `tokenizers` JSON.
        special_tokens: dict of `"eos_token"` and `"unk_token"` to str.
    """

    content: bytes
    special_tokens: dict


@dataclass(frozen=True)
class Architecture:
    """A kind of model: its tensors, and its configuration in each format.

    All functions that convert or check a configuration take `source`, a str
    or path for messages, and raise a `CheckpointError` that lists every value
    that is missing or not accepted.

    Args:
        name: str. What people call it.
        model_type: str. What the canonical configuration calls it.
        keras: `KerasClasses`.
        auto_map: mapping of a class of `transformers` to the module, of
            `converters.transformers_model`, and the class that stand for it.
        recognizes_flax: callable. Takes the original's configuration, which
            names no architecture, and tells whether it is of this one.
        tensors: callable. Takes a canonical configuration, returns the list
            of `Tensor`, in canonical order.
        config_names: tuple of str. The values that a canonical configuration
            has of the model.
        check_config: callable. Takes a canonical configuration.
        check_equal: callable. Takes two of them, of which the second is read
            back from what is to be written.
        canonical_config: callable. Takes a dict with a value for each of
            `config_names`, and `dtype` and `eos_token_id`; returns the
            canonical configuration with these and no other.
        config_from_flax: callable. Takes the original's configuration.
        config_to_flax: callable. The other way.
        flax_settings: callable. As `config_to_flax`; returns all that the
            original writes, in its order.
        config_from_keras: callable. Takes the arguments of the backbone.
        config_to_keras: callable. The other way.
        optimizer_state: callable. Takes the state of a chain of optax, and
            returns that of the original's optimizer, of which it is a part.
        shared_code: tuple of str. Modules that those of `auto_map` import.
        tokenizer: callable. Takes the size of a vocabulary, returns the
            `KnownTokenizer` of models whose folders have none, or None.
    """

    name: str
    model_type: str
    keras: KerasClasses
    auto_map: Mapping
    recognizes_flax: Callable
    tensors: Callable
    config_names: tuple
    check_config: Callable
    check_equal: Callable
    canonical_config: Callable
    config_from_flax: Callable
    config_to_flax: Callable
    flax_settings: Callable
    config_from_keras: Callable
    config_to_keras: Callable
    optimizer_state: Callable = lambda chain: chain
    shared_code: tuple = ()
    tokenizer: Callable = lambda vocab_size: None

    @property
    def code(self):
        """The files of `converters.transformers_model` that it needs."""
        modules = {each.partition(".")[0] for each in self.auto_map.values()}
        modules.update(self.shared_code)
        return tuple(f"{module}.py" for module in sorted(modules))
