"""Functions made from functions: a method's functional form, and a loss's part that runs once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from surestep.methods._base import StepResult, Update

P = ParamSpec("P")
T = TypeVar("T")


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


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function so that it runs once and then keeps returning its first result.

    For losses that update running values: AWP takes a second pass over the same update, which must
    not count as a second step.
    """
    found: list[T] = []

    def call(*args: Any) -> T:
        if not found:
            found.append(function(*args))
        return found[0]

    return call
