"""The functional form of a method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from torch import nn

from surestep.methods._base import StepResult, Update

P = ParamSpec("P")


def stepping(
    craft: Callable[Concatenate[nn.Module, P], Update],
) -> Callable[Concatenate[nn.Module, P], StepResult]:
    """Return the functional form of a method: a function that crafts an update and takes it."""

    @functools.wraps(craft)
    def step(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> StepResult:
        return craft(model, *args, **kwargs).take(model)

    step.__name__ = craft.__name__.replace("_update", "_loss")
    signature = inspect.signature(craft).replace(return_annotation=StepResult)
    step.__signature__ = signature  # type: ignore[attr-defined]
    return step
