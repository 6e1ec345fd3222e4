"""Stand-ins for a model that hides its gradients, and attacks on them; escalation.py uses these.

The points they find count only if the model itself misclassifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import hookable, hooked
from surestep.attacks.outcomes import in_turn, share_of
from surestep.attacks.white_box import pgd
from surestep.auditing.finite_differences import CONTRADICTED
from surestep.devices import exact, finest, out_of_memory
from surestep.errors import UserError
from surestep.evaluation.suite import Attack
from surestep.randomness import forked_rng, seed_everything
from surestep.threat import ThreatModel

EOT_SAMPLES = 10


class LogProbabilities(nn.Module):
    """Undo a softmax that a model returns as logits: log p differs from them by a constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return log probabilities (N, K)."""
        p = forward_logits(self.model, x).to(finest(x.device))
        return p.clamp(min=torch.finfo(p.dtype).tiny).log()


class Expected(nn.Module):
    """A random model's mean prediction over several passes (expectation over transformation)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the log probabilities (N, K)."""
        runs = [F.log_softmax(forward_logits(self.model, x), dim=1) for _ in range(EOT_SAMPLES)]
        return torch.stack(runs).mean(0)


def on_stand_in(stand_in: nn.Module, threat: ThreatModel, steps: int, restarts: int = 1) -> Attack:
    """Return PGD (margin, then cross entropy) on a stand-in, judged by the model itself.

    Args:
        stand_in: the model that gradients are taken from.
        threat: norm, radius and data range.
        steps: PGD steps.
        restarts: runs of each loss.
    """
    tries = [
        partial(pgd, stand_in, threat=threat, steps=steps, loss=loss)
        for loss in ("margin", "ce") * restarts
    ]
    return Attack(partial(in_turn, attacks=tries), 4 * steps * restarts, uses_gradient=True)


def blocking_layers(model: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the innermost layers through which no gradient, or a wrong one, flows.

    Args:
        model: in eval mode.
        x: some images (N, ...).
    """
    seen: dict[str, tuple[nn.Module, Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            # A copy, before a layer that works in place overwrites it.
            seen.setdefault(name, (module, args[0].detach().clone()))

    hooks = (m.register_forward_pre_hook(partial(note, name)) for name, m in hookable(model))
    with hooked(hooks), torch.no_grad():
        forward_logits(model, x)
    blocking = [n for n, layer in seen.items() if _is_flat(*layer) or _is_contradicted(*layer)]
    return [n for n in blocking if not any(other.startswith(f"{n}.") for other in blocking)]


def _alone(module: nn.Module, given: Tensor) -> Tensor | None:
    """Return what a layer by itself makes of its input; None if that is no tensor of floats."""
    try:
        out = module(given.clone())  # a leaf that requires a gradient cannot be changed in place
    except Exception as e:  # a layer that takes more than one argument
        if out_of_memory(e):
            raise
        return None
    # Integers have no gradient, and what follows takes nothing else.
    return out if isinstance(out, Tensor) and out.is_floating_point() else None


def _is_flat(module: nn.Module, given: Tensor) -> bool:
    with torch.enable_grad():
        given = given.clone().requires_grad_()
        out = _alone(module, given)
        if out is None:
            return False
        if not out.requires_grad:
            return True
        (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), given, allow_unused=True)
    if grad is None:
        return True
    # A ReLU is flat on some inputs; a quantiser on nearly all of them.
    return share_of(grad != 0) < 1e-3 and bool((out != 0).any())


def _is_contradicted(module: nn.Module, given: Tensor) -> bool:
    """Tell whether finite differences contradict the gradient of a layer that keeps the shape.

    Only such a layer can be passed as the identity: elsewhere even a wrong gradient may say more
    than a network fitted to the layer.
    """
    if given.dtype not in (torch.float32, torch.float64):
        return False
    # Beside the activations: where several tie, max-pooling has no slope to compare with.
    size = given.std().nan_to_num(0).clamp(min=1e-6)
    # Rounded to TF32, the step would be lost.
    with forked_rng(given.device), exact(given.device), torch.enable_grad():
        at = (given + 1e-2 * size * torch.randn_like(given)).requires_grad_()
        step = 1e-5 * size * torch.randn_like(given)
        weight = torch.randn_like(given)

        def passed(z: Tensor) -> Tensor | None:
            seed_everything(0)  # a random layer must draw the same in both passes
            out = _alone(module, z)
            same = out is not None and out.dtype == z.dtype and out.shape == z.shape
            return out if same else None

        out, moved = passed(at), passed(at.detach() + step)
        if out is None or moved is None or not out.requires_grad:
            return False
        (grad,) = torch.autograd.grad((out * weight).sum(), at, allow_unused=True)
    if grad is None:
        return False
    predicted = (grad * step).flatten(1).sum(1)
    growth = ((moved - out).detach() * weight).flatten(1).sum(1)
    return bool((growth / predicted - 1).abs().nanmedian() > CONTRADICTED)


@contextmanager
def bpda(model: nn.Module, x: Tensor, names: list[str]) -> Iterator[nn.Module]:
    """Lend the model with a differentiable backward through the named layers (BPDA).

    The forward pass is unchanged. In the backward pass a layer whose output has the shape of its
    input is treated as the identity (Athalye et al. 2018, section 4.1), any other as a small
    network fitted to it.

    Args:
        model: in eval mode.
        x: some images (N, ...) to fit the networks on.
        names: names of the layers, see ``blocking_layers``.
    """
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            smooth = _surrogate(*_first_call(model, module, x))
            if smooth is not None:
                hooks.enter_context(hooked(_led_through(module, smooth)))
        yield model


def _first_call(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a module first takes and returns when the model answers for images."""
    given: list[Tensor] = []
    returned: list[Tensor] = []
    # Copies: the module, or the next one, may work in place.
    before = module.register_forward_pre_hook(lambda _m, args: given.append(args[0].clone()))
    after = module.register_forward_hook(lambda _m, _args, out: returned.append(out.clone()))
    with before, after, torch.no_grad():
        forward_logits(model, x)
    # And again: nothing can be fitted to tensors that a forward made in inference mode.
    return given[0].clone(), returned[0].clone()


def _led_through(
    module: nn.Module, smooth: Callable[[Tensor], Tensor]
) -> Iterator[RemovableHandle]:
    """Hook a layer: its output is unchanged, to the bit, with the gradient of ``smooth``."""
    given: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        given.append(args[0].clone())  # before a layer that works in place overwrites it

    def after(_module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        soft = smooth(given.pop())
        return out.detach() + (soft - soft.detach()).to(out.dtype)

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)


MOST_SWITCHES = 3
"""Number of outputs that only switch something to attack, the last to be computed first."""


def switches(model: nn.Module, x: Tensor) -> list[str]:
    """Return modules that the logits depend on, but through no gradient, as on a router's argmax.

    The modules' own outputs have a gradient, so that they can be attacked by themselves.

    Args:
        model: in eval mode.
        x: some images (N, ...).
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        seen: dict[str, Tensor] = {}

        def note(name: str, out: Any) -> None:
            if isinstance(out, Tensor) and out.dim() == 2 and len(out) == len(x):
                seen.pop(name, None)
                seen[name] = out

        hooks = (
            module.register_forward_hook(lambda _m, _args, out, name=name: note(name, out))
            for name, module in hookable(model)
        )
        with hooked(hooks):
            logits = forward_logits(model, x)
        names = [
            name
            for name, out in seen.items()
            if _gradient(out, x) is not None and _gradient(logits, out) is None
        ]
    outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    deciding = (name for name in reversed(outermost) if _decides(model, name, x))
    return list(islice(deciding, MOST_SWITCHES))


def _decides(model: nn.Module, name: str, x: Tensor) -> bool:
    """Tell whether the logits change where a module's output changes its sign."""

    def turned(_module: nn.Module, _args: Any, out: Any) -> Any:
        return -out if isinstance(out, Tensor) else out

    with forked_rng(x.device), torch.no_grad():
        seed_everything(0)  # a random model must draw the same in both passes
        before = forward_logits(model, x)
        seed_everything(0)
        with model.get_submodule(name).register_forward_hook(turned):
            return not torch.equal(before, forward_logits(model, x))


def _gradient(out: Tensor, of: Tensor) -> Tensor | None:
    if not out.requires_grad or not of.requires_grad:
        return None
    (grad,) = torch.autograd.grad(out.sum(), of, allow_unused=True, retain_graph=True)
    return grad


class Output(nn.Module):
    """What a module inside a model returns, as logits.

    Args:
        model: pixels in, logits out.
        name: of the module, whose output is (N, K); K = 1 stands for two classes, by its sign.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output (N, K) for images.

        Raises:
            UserError: on these images it has none.
        """
        seen: list[Tensor] = []
        module = self.model.get_submodule(self.name)
        with module.register_forward_hook(lambda _m, _args, out: seen.append(out)):
            forward_logits(self.model, x)
        if not seen or len(seen[-1]) != len(x):
            raise UserError(f"{self.name} does not answer for each of {len(x)} images")
        out = seen[-1]
        return out if out.shape[1] > 1 else torch.cat([out, -out], 1)


def on_switch(model: nn.Module, name: str, threat: ThreatModel, steps: int) -> Attack:
    """Return PGD that changes what a module inside the model decides, judged by the model itself.

    Args:
        model: the model.
        name: of the module, see ``switches``.
        threat: norm, radius and data range.
        steps: PGD steps.
    """
    output = Output(model, name)

    def run(_model: nn.Module, x: Tensor, _y: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                own = output(x).argmax(1)
            return pgd(output, x, own, threat, steps, loss="margin")
        except UserError:  # a module that runs on some images only
            return x

    return Attack(run, 2 * steps, uses_gradient=True)


def _surrogate(given: Tensor, out: Tensor) -> Callable[[Tensor], Tensor] | None:
    if given.shape == out.shape:
        return lambda z: z
    if given.dim() == 4 and out.dim() == 4 and given.shape[2:] == out.shape[2:]:
        net: nn.Module = nn.Sequential(
            nn.Conv2d(given.shape[1], 64, 1), nn.GELU(), nn.Conv2d(64, out.shape[1], 1)
        )
    elif given.numel() / len(given) <= 20_000:
        size = out[0].numel()
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(given[0].numel(), 256), nn.GELU(), nn.Linear(256, size)
        )
    else:
        return None
    net = net.to(given.device, torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    with torch.enable_grad():
        for _ in range(200):
            loss = F.mse_loss(net(given.float()).view_as(out), out.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return lambda z: net(z.float()).view(len(z), *out.shape[1:])
