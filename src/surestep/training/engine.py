"""The step of the training loop, and the engine that makes it fast."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from surestep import processes
from surestep.attacks.lending import attacking, buffers_kept, device_of, uncompiled, unwrapped
from surestep.data import augment
from surestep.devices import autocast, has_bf16, keep_freed_memory
from surestep.errors import UserError, look_up, unknown_name
from surestep.methods import Method, StepResult
from surestep.randomness import forked_rng
from surestep.training.averaging import WeightAverage
from surestep.training.awp import perturbed_weights

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Engine:
    """How a step is computed; never what it computes.

    Attributes:
        precision: dtype of the forward passes; any but float32 uses autocast.
        channels_last: memory format of images and convolution weights.
        tuned: raise glibc's thresholds for returning memory to the system.
    """

    precision: torch.dtype = torch.float32
    channels_last: bool = False
    tuned: bool = False

    @classmethod
    def choose(
        cls, name: str = "auto", precision: str = "auto", device: torch.device | str = "cpu"
    ) -> Engine:
        """Choose the engine for a device.

        Args:
            name: "fast" (channels_last except on mps, autocast to bf16 where the hardware
                multiplies it, tuned allocator), "reference" (float32, contiguous), or "auto",
                which means "fast" here; ``fit`` times both (``pick_engine``).
            precision: "fp32", "bf16" or "fp16" override what the name implies.
            device: where the step will run.

        Raises:
            UserError: an unknown name or precision.
        """
        if name not in ("auto", "fast", "reference"):
            raise unknown_name("engine", name, ("auto", "fast", "reference"))
        if precision not in ("auto", *PRECISIONS):
            raise unknown_name("precision", precision, ("auto", *PRECISIONS))
        fast = name != "reference"
        if precision != "auto":
            dtype = PRECISIONS[precision]
        else:
            bf16 = fast and has_bf16(torch.device(device))
            dtype = torch.bfloat16 if bf16 else torch.float32
        # On mps batch norm's gradients are wrong in channels_last: pytorch/pytorch#175189.
        last = fast and torch.device(device).type != "mps"
        return cls(dtype, channels_last=last, tuned=fast)

    @property
    def precision_name(self) -> str:
        """The precision's name in the settings, such as "bf16"."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.precision)

    def place(self, model: nn.Module) -> nn.Module:
        """Bring a model's weights into the engine's memory format, in place."""
        if self.tuned:
            keep_freed_memory()
        if self.channels_last:
            # Tensor by tensor: Module.to fails on weights of 3-D convolutions.
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.to(memory_format=torch.channels_last)
        return model

    def suited(self, model: nn.Module, shape: torch.Size) -> Engine:
        """Return this engine, without channels_last if the model fails on images in that format.

        A model that flattens with ``view``, be it in train mode only, accepts only contiguous
        images.

        Args:
            model: on its device, placed by this engine; made contiguous again if it fails. If it
                is in train mode, both modes are tried.
            shape: shape of one image.
        """
        if not self.channels_last or len(shape) != 3:
            return self
        device = device_of(model)
        model = uncompiled(unwrapped(model))
        x = self.place_images(torch.zeros(2, *shape, device=device))
        try:
            for train_mode in (False, True) if model.training else (False,):
                with (
                    attacking(model, train_mode=train_mode) as inner,
                    forked_rng(device),
                    torch.no_grad(),
                    self.autocast(device),
                ):
                    inner(x)
        except Exception:  # whatever else is wrong, the step itself will tell
            # torch's own stubs leave this overload out.
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            return replace(self, channels_last=False)
        return self

    def place_images(self, x: Tensor) -> Tensor:
        """Bring images into the engine's memory format."""
        if self.channels_last and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def autocast(self, device: torch.device) -> Any:
        """Return the autocast context of a forward pass."""
        return autocast(device, self.precision)


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give optimizer state its parameter's strides: fused kernels walk tensors in memory order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start SGD's momentum buffers at zero, which changes no value.

    Otherwise fused SGD allocates them uninitialised and fills them in its first step. If that
    step is dropped because gradients overflow, the next one adds to uninitialised memory.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


class TrainStep:
    """One training step, called as ``step(x, y)``; see ``make_step``.

    Attributes:
        averaging: whether the weight average, if there is one, takes the step's weights in.
        perturbing: whether the step perturbs the weights, if ``awp`` is set.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        *,
        clip_grad: float | None = None,
        average: WeightAverage | None = None,
        awp: float | None = None,
    ) -> None:
        self.model, self.method, self.optimizer, self.engine = model, method, optimizer, engine
        self.clip_grad, self.average, self.awp = clip_grad, average, awp
        self.averaging = self.perturbing = True
        self.device = device_of(model)
        # Only float16's exponent range is too small for unscaled gradients.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=engine.precision == torch.float16
        )
        if self.scaler.is_enabled():
            _begin_momentum(optimizer)
        self._first = True

    def _suit_first_batch(self, x: Tensor) -> None:
        """Drop channels_last if the model cannot run on the first images in that format."""
        self._first = False
        suited = self.engine.suited(self.model, x.shape[1:])
        if suited is not self.engine:
            self.engine = suited
            match_layout(self.optimizer)

    def __call__(
        self, x: Tensor, y: Tensor, index: Tensor | None = None, draw: augment.Draw | None = None
    ) -> StepResult:
        """Take one step on images x (N, ...) in the data range with labels y (N,).

        Does not wait for the device, except on the first batch, which is checked, and in NuAT.
        """
        if self._first:
            self._suit_first_batch(x)
        if isinstance(self.model, DistributedDataParallel):
            # Before the attack, which must see the batch statistics that the update begins with.
            processes.broadcast_first(list(self.model.buffers()))
        x = self.engine.place_images(x)
        awp = self.awp if self.perturbing else None
        # AWP's first pass only finds the perturbation: its loss and batch statistics do not count.
        uncounted = nullcontext() if awp is None else buffers_kept(self.model)
        # One autocast context: attack and update share the cast weights.
        with uncounted, self.engine.autocast(self.device):
            update = self.method.prepare(self.model, x, y, index, draw)
            result = self.method.take(self.model, update)
        self._backward(result)
        if awp is not None:
            with perturbed_weights(self.model, awp):
                with self.engine.autocast(self.device):
                    result = self.method.take(self.model, update)
                self._backward(result)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.averaging:
            self.average.update(unwrapped(self.model))
        return result._replace(loss=result.loss.detach())

    def _backward(self, result: StepResult) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(result.loss).backward()


def make_step(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    engine: str | Engine = "auto",
    *,
    clip_grad: float | None = None,
    average: WeightAverage | None = None,
    awp: float | None = None,
) -> TrainStep:
    """Return the step exactly as the training loop takes it, called as ``step(x, y)``.

    Args:
        model: in train mode, on its device; wrapped in DistributedDataParallel or not. Its
            weights are brought into the engine's memory format.
        method: what the step minimises.
        optimizer: over the model's parameters.
        engine: "fast", "reference", an ``Engine``, or "auto", which means "fast" here: only
            ``fit`` has enough steps to time both.
        clip_grad: largest norm of the weight gradient.
        average: weight average to update after each step.
        awp: relative size of an adversarial weight perturbation (``training/awp.py``).

    Raises:
        UserError: unknown engine, or a model without parameters.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UserError("the model has no parameters to train")
    if isinstance(engine, str):
        engine = Engine.choose(engine, device=parameter.device)
    engine.place(model)
    match_layout(optimizer)
    return TrainStep(
        model, method, optimizer, engine, clip_grad=clip_grad, average=average, awp=awp
    )


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Build an optimizer by name: "sgd", "adam" or "adamw".

    Raises:
        UserError: an unknown name, or no parameters.
    """
    parameters = list(parameters)
    kind = look_up("optimizer", name, OPTIMIZERS)
    if not any(p.requires_grad for p in parameters):
        raise UserError("the model has no parameters to train (all of them frozen?)")
    # The fused kernels, for floating point only, update all tensors in one pass over memory.
    options: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "fused": all(
            p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters
        ),
    }
    if name == "sgd":
        options["momentum"] = momentum
    return kind(parameters, **options)
