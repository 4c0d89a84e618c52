import contextlib
import warnings


@contextlib.contextmanager
def only_what_can_be():
    """Keeps Keras from warning of each layer that has no weights to quantize.

    Within it, a model is quantized.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Layer .* does not have a `quantize` method"
        )
        yield
