"""The keywords that editors know are those that the functions take."""

import dataclasses
import inspect
from typing import get_type_hints

import keras
import pytest

from keras_bwetaf import (
    BwETAFBackbone,
    BwETAFCausalLM,
    BwETAFSampler,
    BwETAFV2Backbone,
    BwETAFV4Backbone,
    arguments,
)
from keras_bwetaf.run.settings import TrainingSettings
from keras_bwetaf.training import AdamW
from keras_bwetaf.training.recipes import RECIPES

pytestmark = pytest.mark.fast


def parameters(function):
    """Names of what a function takes by keyword."""
    kinds = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return {
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.kind in kinds and name != "self"
    }


def names(keywords):
    return set(get_type_hints(keywords))


def test_backbone():
    backbones = (BwETAFBackbone, BwETAFV2Backbone, BwETAFV4Backbone)
    assert names(arguments.BackboneConfig) == {
        name for each in backbones for name in each.config_names()
    }


def test_sampling():
    assert names(arguments.Sampling) | {"seed"} == parameters(
        BwETAFSampler.__init__
    )


def test_training():
    fields = {field.name for field in dataclasses.fields(TrainingSettings)}
    assert names(arguments.TrainingOptions) == fields


def test_recipe():
    keras_arguments = parameters(keras.optimizers.AdamW.__init__)
    optimizer = parameters(AdamW.__init__) | keras_arguments
    assert set(RECIPES["97m"]) <= names(arguments.RecipeChanges)
    assert names(arguments.RecipeChanges) - set(RECIPES["97m"]) <= optimizer
    # A recipe has a schedule, and AMSGrad is refused.
    assert optimizer - names(arguments.RecipeChanges) == {
        "amsgrad",
        "learning_rate",
    }


@pytest.mark.parametrize(
    ("method", "keywords"),
    [("compile", arguments.CompileOptions), ("fit", arguments.FitOptions)],
)
def test_of_keras(method, keywords):
    taken = parameters(getattr(keras.Model, method))
    ours = parameters(getattr(BwETAFCausalLM, method))
    assert names(keywords) == taken - ours
