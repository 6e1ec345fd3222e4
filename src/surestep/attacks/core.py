"""What every gradient attack and every training method is made of.

Input gradients only (no weight gradient is ever computed), and a model that is left as it was
found: modes, ``requires_grad`` flags, ``.grad`` and buffers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from surestep.attacks.losses import Objective, log_odds, margin
from surestep.devices import exact, in_fp16, rounding
from surestep.errors import UserError
from surestep.threat import ThreatModel, per_sample

_BUCKET = 32
_INSIDE = "_orig_mod"
"""Where torch.compile keeps the module that it wraps."""


def round_up(count: int, most: int) -> int:
    """Round a number of images up to a multiple of 32, but not above ``most``.

    Backends prepare, and keep, kernels for every batch size they meet. Batches that shrink one
    image at a time would fill memory with them and spend their time making them.
    """
    return min(most, -(-count // _BUCKET) * _BUCKET)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Leave the random states as they were: python's, numpy's, torch's, also that of the device.

    Seeding inside, ``torch.manual_seed``, reaches every device.
    """
    # A model may draw from any of them.
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    # torch's own fork_rng asks for the state of a device by its number, which mps has not.
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    used = torch.cuda.is_initialized() or device.type == "cuda"
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        if state is not None:
            torch.mps.set_rng_state(state)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside a compiled one, for passes of odd sizes or with hooks."""
    return getattr(model, _INSIDE, model)


def compiled_whole(model: nn.Module) -> bool:
    """Tell whether a model is compiled as one: by ``torch.compile``, or in place."""
    return _INSIDE in model._modules or model._compiled_call_impl is not None


def compiled(model: nn.Module) -> bool:
    """Tell whether a model, or a part of it, is compiled."""
    return any(map(compiled_whole, model.modules()))


def uses_batch_statistics(model: nn.Module) -> bool:
    """Tell whether the images of a pass, in the model's present mode, depend on each other."""
    norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
    # Without running statistics it takes the batch's in eval mode, too.
    return any(m.training or m.running_mean is None for m in norms)


@contextmanager
def interpreted(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of a model eagerly: compiled code ignores hooks that are added later."""
    if compiled(model) and hasattr(torch.compiler, "set_stance"):  # torch 2.6
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside a DistributedDataParallel one, which may be compiled.

    Its passes wait for no other process.
    """
    inner = uncompiled(model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Temporarily set ``requires_grad`` to False on all parameters."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


@contextmanager
def attacking(model: nn.Module, *, train_mode: bool = False) -> Iterator[nn.Module]:
    """Lend the unwrapped ``model`` to an attack and give it back as it was.

    Args:
        model: any module; of a DistributedDataParallel one, the module inside is lent, since
            an attack must not take part in gradient synchronisation.
        train_mode: in train mode (batch statistics, dropout) rather than eval mode. One that is
            in train mode as a whole keeps the modes of its layers.
    """
    inner = unwrapped(model)
    # Of a model that is trained, layers kept in eval mode are no others in the attack.
    as_found = train_mode and inner.training
    modules = list(inner.modules())
    changed = [] if as_found else [m for m in modules if m.training != train_mode]
    # In eval mode a forward writes no buffer; in train mode batch norm would count the attack in.
    buffers = [(b, b.clone()) for b in inner.buffers()] if train_mode else []
    for module in changed:
        module.training = train_mode
    try:
        # A compiled backward pass computes the gradients of all that wants any, asked for or not.
        # Else the weights are left alone: autocast keeps its casts of what wants a gradient only.
        with frozen(inner) if any(map(compiled_whole, modules)) else nullcontext():
            yield inner
    finally:
        for module in changed:
            module.training = not train_mode
        for buffer, saved in buffers:
            # .data: a graph recorded before the attack may hold this buffer.
            buffer.data.copy_(saved)


def forward_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Run the model and return its logits (N, K) in float32 (float64 stays).

    Of a tuple or list the first entry is taken, of a dict or a Hugging Face output ``logits``.

    Raises:
        UserError: what the model returns holds no tensor of shape (N, K), K >= 2.
    """
    returned = model(x)
    logits = returned
    if isinstance(returned, Mapping):
        logits = returned.get("logits")
    elif hasattr(returned, "logits"):
        logits = returned.logits
    elif isinstance(returned, tuple | list) and returned:
        logits = returned[0]
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the model returned a {type(returned).__name__}, expected a tensor of logits (N, K), "
            "a tuple that begins with it or a dict with 'logits': "
            "wrap it in a module that returns the logits"
        )
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise UserError(
            f"the model returned shape {tuple(logits.shape)} for {len(x)} images, "
            "expected logits of shape (N, K) with K >= 2 classes"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        return logits.float()
    # What CUDA graphs return (torch.compile's reduce-overhead) the next pass writes over.
    return logits.clone() if compiled_whole(model) else logits


def check_inputs(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, unlabelled: bool = False
) -> None:
    """Refuse what would silently give wrong numbers, or fail later in a puzzling way.

    Looks at the values, so it waits for the device: call it at the door, not in a step. With
    ``unlabelled`` a label may be -1, for none.

    Raises:
        UserError: x is empty, not floating, not finite or outside the data range; y is not an
            int64 tensor (N,) of labels from 0 to K - 1; the model fails on one such image or
            returns no logits.
    """
    low, high = threat.bounds
    if not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        raise UserError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, expected floating point images (N, ...) "
            f"in [{low:g}, {high:g}]: of uint8 images take x.float() / 255"
        )
    lowest, highest = (float(v) for v in torch.aminmax(x.detach()))
    # Written so that NaN fails it too.
    if not (lowest >= low and highest <= high):
        near = max(low - lowest, highest - high) < 1e-3 * threat.span
        advice = (
            f"if this is rounding, use x.clamp({low:g}, {high:g})"
            if near
            else "scale to the data range and put any normalisation inside the model"
        )
        raise UserError(
            f"x has values in [{lowest:.9g}, {highest:.9g}], expected [{low:g}, {high:g}]: {advice}"
        )
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UserError(
            f"y is {y.dtype} of shape {tuple(y.shape)}, expected torch.int64 labels of shape "
            f"({len(x)},)"
        )
    check_labels(y, count_classes(model, x), unlabelled=unlabelled)


def check_labels(y: Tensor, classes: int, *, unlabelled: bool = False) -> None:
    """Refuse labels that are no class of the model, nor -1 where ``unlabelled`` allows that.

    Raises:
        UserError: a label is outside 0 .. classes - 1.
    """
    lowest, highest = (int(v) for v in torch.aminmax(y))
    if lowest < (-1 if unlabelled else 0) or highest >= classes:
        hint = (
            "; only training with uat takes -1, no label" if lowest == -1 and not unlabelled else ""
        )
        raise UserError(
            f"y has labels from {lowest} to {highest}, but the model has {classes} classes: "
            f"labels must run from 0 to {classes - 1}{hint}"
        )


@torch.no_grad()
def count_classes(model: nn.Module, x: Tensor) -> int:
    """Run the model on the first of the images x (N, ...) and return its number of classes.

    Raises:
        UserError: the model fails on it or returns no logits.
    """
    # A look at the model must not change what it draws at random afterwards.
    with attacking(uncompiled(unwrapped(model))) as inner, forked_rng(x.device):
        try:
            return forward_logits(inner, x[:1]).shape[1]
        except UserError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise UserError(
                f"the model fails on one image of shape {tuple(x.shape[1:])} and type {x.dtype}: "
                f"{reason}"
            ) from e


class NoGradient(UserError):
    """The logits do not depend on the images through autograd."""


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective = log_odds
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the objective with respect to the images, and nothing else.

    Args:
        model: in the mode the caller wants; see ``attacking``.
        x: images (N, ...).
        y: labels (N,).
        objective: per-sample, to be maximised.

    Returns:
        The gradient (as x), the objective's values (N,) and the logits (N, K), all detached.

    Raises:
        NoGradient: the logits do not depend on x through autograd.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # y is cloned too: a tensor made in inference mode cannot be saved for backward.
        x, y = x.detach().clone().requires_grad_(), y.clone()
        logits = forward_logits(model, x)
        values = objective(logits, y)
        grad = None
        if values.requires_grad:
            if in_fp16(x.device):
                grad = _gradient_by_fp16(model, x, logits, values)
            else:
                (grad,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        if grad is None:
            raise NoGradient(
                "the model's output has no gradient with respect to its input (a detach() or "
                "no_grad() in its forward?): gradient attacks and adversarial training need one"
            )
    return grad, values.detach(), logits.detach()


def _gradient_by_fp16(model: nn.Module, x: Tensor, logits: Tensor, values: Tensor) -> Tensor | None:
    """Return the gradient by way of the logits', which is brought to a size that fp16 has.

    That of a sure image's divergence, or of its cross entropy, is 0 there otherwise, and the image
    would not be attacked. In train mode images depend on each other: one factor for all of them.
    """
    (pull,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    size = pull.abs().amax(1, keepdim=True)
    together = model.training or uses_batch_statistics(model)
    size = size.amax(0, keepdim=True).expand_as(size) if together else size
    size = torch.where(size > 0, size, 1)
    (grad,) = torch.autograd.grad(logits, x, pull / size, allow_unused=True)
    return None if grad is None else grad * per_sample(size.squeeze(1), grad)


def l1_unit(grad: Tensor) -> Tensor:
    """Return each sample's gradient over the sum of its absolute values; zero stays zero."""
    size = per_sample(grad.abs().flatten(1).sum(1), grad)
    return grad / torch.where(size > 0, size, 1)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return which samples are wrong: another class leads, or a logit is NaN."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def share_of(flags: Tensor) -> float:
    """Return the share of a boolean tensor that is true, exactly, on any device; NaN of none."""
    return int(flags.sum()) / flags.numel() if flags.numel() else math.nan


def in_turn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Iterable[Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:
    """Run attacks one after another, each on the samples that the earlier ones left.

    Args:
        model: what decides whether a point is misclassified.
        x: images (N, ...).
        y: labels (N,).
        attacks: each maps images and labels to points, on whatever model it likes.

    Returns:
        x_adv, shaped as x: misclassified where an attack succeeded, else the image itself.
    """
    x_adv = x.detach().clone()
    left = torch.arange(len(x), device=x.device)
    with attacking(model) as inner:
        for attack in attacks:
            if not len(left):
                break
            found = attack(x[left], y[left])
            # In float32: what is wrong by a hair in bf16 may be right, and is not done then.
            with torch.no_grad(), exact(x.device):
                broken = misclassified(forward_logits(inner, found), y[left])
            x_adv[left[broken]] = found[broken]
            left = left[~broken]
    return x_adv


class Best:
    """Each sample's strongest point so far: misclassified first, then the highest objective.

    ``first_wrong`` is the number of points a sample had been offered before the first that was
    misclassified, -1 if there was none: after how many steps an attack succeeded.

    Args:
        x: the clean images (N, ...).
        y: labels (N,).
        objective: per-sample, to be maximised.
        stop_when_wrong: no longer attack a sample once it is misclassified. The accuracy under
            attack is the same, and the cost falls with it. Under autocast, or in TF32, the sample
            must be misclassified clearly: by a hair in bf16 is often right in float32.
    """

    def __init__(
        self, x: Tensor, y: Tensor, objective: Objective, *, stop_when_wrong: bool = False
    ) -> None:
        self.x, self.y, self.objective = x, y, objective
        self.stop_when_wrong = stop_when_wrong
        self.x_adv = x.clone()
        self.values = torch.full((len(x),), float("-inf"), device=x.device)
        self.wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.done = self.wrong.clone()
        self.first_wrong = torch.full((len(x),), -1, device=x.device)
        self.offers = 0
        self.slack = rounding(x.device)

    def rows(self) -> Tensor:
        """Return the indices of the samples still to be attacked."""
        if self.stop_when_wrong:
            return (~self.done).nonzero().squeeze(1)
        return torch.arange(len(self.x), device=self.x.device)

    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        """Take the points ``x_adv`` of the samples ``rows`` where they beat the best so far."""
        values = self.objective(logits, self.y[rows]).to(self.values.dtype)
        wrong = misclassified(logits, self.y[rows])
        was_wrong = self.wrong[rows]
        better = (wrong & ~was_wrong) | ((wrong == was_wrong) & (values > self.values[rows]))
        taken = rows[better]
        self.x_adv[taken], self.values[taken] = x_adv[better], values[better]
        self.wrong[rows] = was_wrong | wrong
        self.first_wrong[rows[wrong & ~was_wrong]] = self.offers
        self.offers += 1
        if self.stop_when_wrong:
            clearly = margin(logits, self.y[rows]) > self.slack * logits.abs().amax(1)
            self.done[rows] |= wrong & clearly

    @torch.no_grad()
    def try_points(self, model: nn.Module, rows: Tensor, x_adv: Tensor) -> None:
        """Offer points that have not been through the model yet."""
        self.offer(rows, x_adv, forward_logits(model, x_adv))


@dataclass
class Ascent:
    """Steepest ascent inside the threat model: I-FGSM, MI-FGSM and PGD are settings of it.

    Args:
        threat: norm, radius and data range.
        steps: number of gradient steps.
        step_size: of one step, in pixel units.
        objective: per-sample, to be maximised.
        decay: None for plain steps; else MI-FGSM's momentum (Dong et al. 2018, eq. 6).
    """

    threat: ThreatModel
    steps: int
    step_size: float
    objective: Objective = log_odds
    decay: float | None = None

    def climb(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """Return the last iterate from ``start`` (N, ...) around ``x``: what training uses."""
        x_adv, momentum = start, None
        for _ in range(self.steps):
            grad, _, _ = input_gradient(model, x_adv, y, self.objective)
            momentum = self._direction(grad, momentum)
            x_adv = self.threat.ascend(x_adv, momentum, self.step_size, x)
        return x_adv

    def search(self, model: nn.Module, best: Best, radius: float | None = None) -> None:
        """Offer ``best`` every iterate from a random start of ``radius``: what judging uses.

        One forward pass more than ``climb``, for the last iterate.
        """
        rows = best.rows()
        x_adv, momentum = self.threat.random_start(best.x[rows], radius), None
        for _ in range(self.steps):
            grad, _, logits = input_gradient(model, x_adv, best.y[rows], self.objective)
            # A NaN would stay in the point from here on, and a broken point breaks the model.
            grad = grad.nan_to_num(0.0)
            best.offer(rows, x_adv, logits)
            if best.stop_when_wrong:
                done = best.done[rows]
                left = len(rows) - int(done.sum())
                if not left:
                    return
                if (kept := round_up(left, len(rows))) < len(rows):
                    # Those still right first; done ones fill up.
                    order = done.int().argsort(stable=True)[:kept]
                    rows, x_adv, grad = rows[order], x_adv[order], grad[order]
                    momentum = None if momentum is None else momentum[order]
            momentum = self._direction(grad, momentum)
            x_adv = self.threat.ascend(x_adv, momentum, self.step_size, best.x[rows])
        best.try_points(model, rows, x_adv)

    def _direction(self, grad: Tensor, momentum: Tensor | None) -> Tensor:
        if self.decay is None:
            return grad
        unit = l1_unit(grad)
        return unit if momentum is None else self.decay * momentum + unit
