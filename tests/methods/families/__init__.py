"""What the generic tests must know of each method: a module or more, found by themselves.

A module may define
    CASES: "slug" or "slug, what differs" -> (oracle, the method's parameters, what the oracle calls
        differently). An oracle ``f(net, x, y, smoothing, **parameters)`` computes the first step
        from the paper's recipe, in plain float64, with nothing of surestep. It returns the images
        of the update pass, a function of their logits that gives the loss, and the rows of x_adv.
        Its parameters may hold "progress", a mapping for ``methods.Progress``.
    SMALL: slug -> parameters for the smallest setting in which all parts are at work.
    BY_HAND: (slug, parameters, forward, input_grad, weight_grad), passes per image at batch 8.
    REFUSED: (slug, parameters, words of the message), all at eps 0.1.
    PUBLISHED: (slug, preset, eps, model or None, the preset's parameters, some of its settings).
    REACH: slug -> how far beyond eps = 0.1 the method's x_adv may lie, with SMALL.
    TRAIN_PASSES: slug -> passes in train mode, where there are more than the update.
    APART: slug -> parameters with which the loss of a batch is the mean of that of its halves,
        where by default it is not.
    COUPLED: slug -> why the loss of a batch is not the mean of that of its halves.
    MAY_STAY: slugs that may leave an image as it is.
    DETERMINISTIC: slugs whose step draws nothing at random.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from surestep import methods

MODULES = [
    import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__) if m.name != "maths"
]


def merged(name: str) -> dict[str, Any]:
    """Return the union of the families' mappings of a name."""
    return {k: v for module in MODULES for k, v in getattr(module, name, {}).items()}


def joined(name: str) -> list[Any]:
    """Return the families' lists of a name, one after the other."""
    return [item for module in MODULES for item in getattr(module, name, ())]


def remembering() -> list[str]:
    """Return the methods that have a state of their own, which a resume must bring back."""
    kinds = {slug: methods.get(slug) for slug in methods.names()}
    plain = methods.Method.state_dict
    return [s for s, k in kinds.items() if k.kept or k.kept_rows or k.state_dict is not plain]
