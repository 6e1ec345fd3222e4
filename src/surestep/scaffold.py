"""The scaffold of a new method: a module, a card and tests, which pass as they are.

In a checkout of surestep they go where the others are; elsewhere they form a plug-in package,
which surestep finds by its entry point once it is installed.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from surestep.errors import UserError

_USED = ("cost", "method", "tensor", "update", "box", "signs", "mean_ce", "len", "slice", "sum")
"""Names that the files below use, and that the method's class or oracle would hide."""
_METHOD = '''"""{title}: what it changes, in a line.

Authors YEAR, "Title", arXiv NNNN.NNNNN.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from surestep.methods import (
    Cost,
    LossAndTerms,
    Method,
    Update,
    attack_gradient,
    param,
    recipe_of,
    register,
)


@register("{slug}")
@dataclass
class {name}(Method):
    """{title}: FGSM plus lam times the squared logits; replace it with your method."""

    summary = "what a step does, in a line"
    paper = "Authors YEAR, arXiv NNNN.NNNNN"
    presets = {{
        "mnist": recipe_of("fgsm", "mnist-fast", lam=0.001),
        "cifar10": recipe_of("fgsm", "cifar10", lam=0.001),
    }}

    lam: float = param(0.001, ge=0)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Update:
        """Attack, and return the images to train on and the loss to minimise."""
        grad, _ = attack_gradient(model, x, y)
        x_adv = self.threat.ascend(x, grad, self.threat.eps, x)

        def loss(logits: Tensor) -> LossAndTerms:
            ce = self.criterion(logits, y)
            penalty = logits.square().sum(1).mean()
            return ce + self.lam * penalty, {{"ce": ce, "penalty": penalty}}

        return Update(x_adv, loss)

    def cost(self, batch_size: int) -> Cost:
        """One input gradient and one update."""
        return Cost.of(attack=1, update=1)
'''
_CARD = """# {title}: what it changes, in a line

Why it should work, in a few sentences.

## How to use

```python
import surestep

method = surestep.methods.get("{slug}")(surestep.Linf(eps=8 / 255), lam=0.001)
```

```
surestep train --method {slug} --dataset mnist
```

## Hyperparameters

| name | default | meaning | mnist | cifar10 |
|---|---|---|---|---|
| `lam` | 0.001 | weight of the penalty, >= 0 | 0.001 | 0.001 |

## Technical details

```
x_adv = Box(x + eps * sign(grad A(f(x), y)))
loss  = mean CE(f(x_adv), y) + lam * mean_i sum_c f_c(x_adv)^2
```

- `terms`: `ce`, `penalty`. Cost: 2 forward, 2 input gradients, 1 weight gradient per image.
- State deviations from the authors' code and known failure modes here.

## Attribution

Authors, "Title", venue YEAR, arXiv NNNN.NNNNN.
"""
_FAMILY = '''"""{title}, compared with a second implementation."""

from families.maths import EPS, box, mean_ce, signs


def {function}(net, x, y, smoothing, lam):
    points = box(x + EPS * signs(net, x, y))

    def loss(z):
        return mean_ce(z, y, smoothing) + lam * sum((row**2).sum() for row in z) / len(z)

    return points, loss, slice(None)


CASES = {{
    "{slug}": ({function}, {{"lam": 0.001}}, {{}}),
    "{slug} more": ({function}, {{"lam": 0.3}}, {{}}),
}}
BY_HAND = [("{slug}", {{}}, 2, 2, 1)]
REFUSED = [("{slug}", {{"lam": -1.0}}, ("{slug}", "lam", "-1.0", ">= 0"))]
DETERMINISTIC = ("{slug}",)
'''
_TEST = '''"""{title}, compared with a second implementation."""

import surestep
import torch


def test_a_step_is_what_the_card_says():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    method = surestep.methods.get("{slug}")(surestep.Linf(0.1), lam=0.3)
    points = []
    for image, label in zip(x, y, strict=True):
        leaf = image[None].clone().requires_grad_()
        torch.nn.functional.cross_entropy(net(leaf), label[None]).backward()
        points.append((image + 0.1 * leaf.grad[0].sign()).clamp(0, 1))
    logits = net(torch.stack(points))
    ce = sum(row.logsumexp(0) - row[k] for row, k in zip(logits, y, strict=True)) / 5
    expected = ce + 0.3 * (logits**2).sum() / 5
    torch.testing.assert_close(method(net, x, y).loss, expected)


def test_it_trains():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    data = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    method = surestep.methods.get("{slug}")(surestep.Linf(0.1))
    result = surestep.fit(net, data, method, epochs=1, batch_size=10, lr=0.1, quiet=True)
    assert result.history[-1]["loss"] > 0
'''
_PROJECT = """[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "surestep-{slug}"
version = "0.1.0"
description = "The training method {slug} for surestep"
requires-python = ">=3.10"
dependencies = ["surestep"]

[project.entry-points."surestep.methods"]
{slug} = "{package}"

[tool.setuptools.package-data]
{package} = ["cards/*.md"]
"""


def method(slug: str, where: str | Path = ".") -> list[Path]:
    """Write the scaffold of a method and return its files.

    Args:
        slug: name of the method: lower-case letters, digits and single hyphens.
        where: a checkout of surestep, or the folder in which to make a plug-in package.

    Raises:
        UserError: the slug is invalid or taken, or a file exists already (then nothing is written),
            or a file cannot be written.
    """
    from surestep import methods

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise UserError(f"{slug!r} is not a method name: write one like sat-r1 or my-method")
    if slug in methods.names():
        raise UserError(f"method {slug!r} already exists: choose another name")
    module = slug.replace("-", "_")
    if keyword.iskeyword(module):
        raise UserError(f"{slug!r} is a Python keyword: choose another name")
    if module in _USED:
        raise UserError(f"{slug!r} is a name that every method uses: choose another one")
    words = {
        "slug": slug,
        "title": slug.upper() if len(slug) <= 4 else slug.replace("-", " ").capitalize(),
        "name": "".join(part.capitalize() for part in slug.split("-")),
        "function": module,
        "package": f"surestep_{module}",
    }
    root = Path(where)
    if (room := root / "src" / "surestep" / "methods").is_dir():
        texts = {
            room / f"{module}.py": _METHOD,
            room / "cards" / f"{slug}.md": _CARD,
            root / "tests" / "methods" / "families" / f"{module}.py": _FAMILY,
        }
    else:
        root /= f"surestep-{slug}"
        package = root / "src" / words["package"]
        texts = {
            root / "pyproject.toml": _PROJECT,
            package / "__init__.py": _METHOD,
            package / "cards" / f"{slug}.md": _CARD,
            root / "tests" / f"test_{module}.py": _TEST,
        }
    taken = [path for path in texts if path.exists()]
    if taken:
        raise UserError(f"{taken[0]} exists already: delete it, or choose another name")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(**words), "utf-8")
    except OSError as e:
        raise UserError(f"cannot write {e.filename}: {e.strerror or e}") from e
    return list(texts)
