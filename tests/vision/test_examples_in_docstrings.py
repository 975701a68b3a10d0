"""Examples in the docstrings of what deals with pictures run as they stand."""

import doctest
import importlib

import pytest
import torch
from torch import nn

from learnkit.data.random import Draws

MODULES = [
    "learnkit.data.random",
    "learnkit.data.loaders",
    "learnkit.vision.augmented",
    "learnkit.vision.models.resnet",
    "learnkit.vision.models.wrn",
    "learnkit.vision.transform",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "nn": nn, "Draws": Draws})
    assert result.attempted and not result.failed
