import keras

OWN = ("sampler", "remat", "gradient_accumulation_steps")


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class CompileArguments(dict):
    """What a `BwETAFCausalLM` was compiled with, for any Keras model.

    `keras.models.clone_model` makes a plain model, and compiles it with what
    this is as a dict: arguments of `keras.Model.compile`.

    Args:
        **arguments: Of `BwETAFCausalLM.compile`.

    Attributes:
        arguments: dict.
    """

    def __init__(self, **arguments):
        self.arguments = arguments
        plain = {k: v for k, v in arguments.items() if k not in OWN}
        if plain["loss"] == "auto":
            plain["loss"] = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        if plain["weighted_metrics"] == "auto":
            plain["weighted_metrics"] = [
                keras.metrics.SparseCategoricalAccuracy(name="accuracy")
            ]
        super().__init__(plain)

    @classmethod
    def serialize(cls, config):
        """The form of a serialized object for serialized arguments."""
        return {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "config": config,
            "registered_name": keras.saving.get_registered_name(cls),
        }

    def get_config(self):
        return keras.saving.serialize_keras_object(self.arguments)

    @classmethod
    def from_config(cls, config):
        return cls(**keras.saving.deserialize_keras_object(config))
