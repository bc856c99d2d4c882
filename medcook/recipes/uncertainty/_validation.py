"""Choices that are made on patients who do not train, after the training and before the scoring."""

from collections.abc import Callable
from functools import wraps
from weakref import WeakKeyDictionary

from torch import nn


def once(choose: Callable) -> Callable:
    """`choose(fitted)`, called once for each trained model and remembered as long as its networks live."""
    made: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

    @wraps(choose)
    def remembered(fitted):
        if fitted.nets not in made:
            made[fitted.nets] = choose(fitted)
        return made[fitted.nets]

    return remembered
