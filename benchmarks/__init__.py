import keras_bwetaf  # noqa: F401  first, as it sets up Keras
