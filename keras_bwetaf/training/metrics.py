import keras


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

    def result(self):
        return keras.ops.exp(super().result())


class TokenMetrics:
    """What `fit` and `evaluate` report beside the loss, weighted by tokens.

    Args:
        has_metrics: bool. Without, there are none.
    """

    def __init__(self, has_metrics):
        self.metrics = []
        if has_metrics:
            self.metrics = [keras.metrics.Mean(name="accuracy"), Perplexity()]

    def update(self, loss, accuracy, num_tokens):
        """Adds a batch.

        Args:
            loss: float scalar. Mean over the batch's tokens.
            accuracy: float scalar. Share of tokens predicted rightly.
            num_tokens: float scalar. Sum of the weights of the tokens.
        """
        values = (accuracy, loss)
        for metric, value in zip(self.metrics, values, strict=False):
            metric.update_state(value, sample_weight=num_tokens)
