import keras
from keras.src.trainers.compile_utils import MetricsList


@keras.saving.register_keras_serializable(package="keras_bwetaf")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean loss of a token.

    Example:

    ```python
    metric = Perplexity()
    metric.update_state([2.0, 4.0], sample_weight=[3, 1])
    metric.result()  # exp(2.5)
    ```
    """

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self._direction = "down"

    def result(self):
        return keras.ops.exp(super().result())


class _Directed(MetricsList):
    """Several metrics that stand in the list of a model's metrics as one.

    Keras's callbacks look for the direction of "auto" (smaller or greater is
    better) in lists of this class. Such a list has to have the method of a
    metric, `result`, to be among a model's metrics.
    """

    def result(self):
        return self.get_result()


class TokenMetrics:
    """What `fit` and `evaluate` report beside the loss, weighted by tokens.

    Args:
        has_metrics: bool. Without, there are none.
    """

    def __init__(self, has_metrics):
        self.metrics = []
        self._means = []
        if has_metrics:
            accuracy = keras.metrics.Mean(name="accuracy")
            accuracy._direction = "up"
            self._means = [accuracy, Perplexity()]
            self.metrics = [_Directed(self._means, name="token_metrics")]

    def update(self, loss, accuracy, num_tokens):
        """Adds a batch.

        Args:
            loss: float scalar. Mean over the batch's tokens.
            accuracy: float scalar. Share of tokens predicted rightly.
            num_tokens: float scalar. Sum of the weights of the tokens.
        """
        values = (accuracy, loss)
        # Not strict: there may be no metrics.
        for metric, value in zip(self._means, values, strict=False):
            metric.update_state(value, sample_weight=num_tokens)
