"""KerasHub's own checks, for classes that live outside KerasHub."""

from keras_hub.src.tests.test_case import TestCase


class KerasHubTestCase(TestCase):
    # TensorFlow's base class brings a method of this name that is no test
    # and reports a skip.
    test_session = None
