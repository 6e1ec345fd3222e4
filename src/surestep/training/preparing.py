"""A run before its first step: everything is built and checked here, and nothing is written."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader

from surestep import files, processes
from surestep.attacks.core import share_of
from surestep.attacks.inputs import check_inputs, check_labels, count_classes
from surestep.attacks.lending import compiled_whole, seed_everything, uncompiled
from surestep.config import FitSettings
from surestep.data import Images, as_pixels, seed_of
from surestep.devices import memory_for
from surestep.errors import UserError
from surestep.evaluation import Adapted
from surestep.methods import Method
from surestep.methods._dropout import dropping
from surestep.threat import ThreatModel
from surestep.training.averaging import WeightAverage
from surestep.training.engine import Engine, TrainStep, make_optimizer, make_step
from surestep.training.holding_out import split
from surestep.training.memory import Frugal, fit_into
from surestep.training.picking import MIN_STEPS, Pick, pick_engine
from surestep.training.source import Replayed, Source, first_of, make_source

MOST = 500
"""Most images that validation attacks at a time."""


@dataclass(frozen=True)
class Guard:
    """Turns what the compiler cannot do, and memory that is full, into one clear line.

    Attributes:
        model: the network, whose parameters a line may name.
        size: how the user gave the number of images of a step.
        limit: of memory in GiB, if one was given.
        more: what else takes memory, in words.
    """

    model: nn.Module
    size: str
    limit: float | None
    more: str = ""

    @contextmanager
    def __call__(self, where: str, images: int) -> Iterator[None]:
        """Explain what fails meanwhile, in ``where`` of so many images."""
        less = f"max_memory ({self.limit:g})" if self.limit else "set max_memory, in GiB"
        try:
            with memory_for(
                f"{where}, of {images} images", f"lower {self.size}, or {less}{self.more}"
            ):
                yield
        except RuntimeError as e:
            # Known by its module: importing the compiler takes seconds.
            if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = str(e).strip().splitlines()[0]
                raise UserError(f"torch.compile fails here, leave compile out: {reason}") from e
            if unused := re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(e)):
                names = [n for n, p in self.model.named_parameters() if p.requires_grad]
                which = ", ".join(names[int(k)] for k in unused[1].split()[:5])
                raise UserError(
                    "several processes need every trainable parameter to affect the logits, "
                    f"unused here: {which}; freeze them with requires_grad_(False)"
                ) from e
            raise


@dataclass(frozen=True)
class Job:
    """A run that is ready: what trains what, on what.

    Attributes:
        model: the network itself, on its device, in train mode.
        method: what a step minimises; the run's own.
        threat: the method's, with all of eps: its own may grow to that.
        config: the settings, with the engine and the precision that were picked.
        accelerator: the processes of the run.
        device: of this process.
        source: of batches.
        held_out: data for validation; None for none.
        images: in memory; 0 of a Dataset or a DataLoader.
        labelled: share of the images that have a label.
        signature: what the weights are to say of the data, where that is known.
        total: steps of the whole run.
        batch: images of a step, of this process.
        judged_at_once: images that validation attacks at a time: what fits in training fits there.
        guard: explains what fails in a step.
        pick: what the trial of engines found, if there was one.
        engine: how a step is computed.
        average: of the weights, if one is asked for.
        optimizer: over the model's parameters.
        take_step: the step.
    """

    model: nn.Module
    method: Method
    threat: ThreatModel
    config: FitSettings
    accelerator: Accelerator
    device: torch.device
    source: Source
    held_out: Any
    images: int
    labelled: float
    signature: files.Signature | None
    total: int
    batch: int
    judged_at_once: int
    guard: Guard
    pick: Pick | None
    engine: Engine
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    take_step: TrainStep

    @property
    def judged(self) -> nn.Module:
        """The weights that are validated and kept: the average, if there is one by now."""
        return self.average.model if self.average and self.average.updates else self.model


def prepare(
    model: nn.Module,
    data: Any,
    method: Method,
    config: FitSettings,
    accelerator: Accelerator,
    device: torch.device,
    *,
    validation: Any = None,
    workers: int = 0,
    steps_per_epoch: int | None = None,
) -> Job:
    """Build everything that a run needs, and look at what it is given.

    Seeds the random state; moves the model and brings it into the engine's layout.

    Args:
        model: see ``fit``.
        data: see ``fit``.
        method: the run's own, which its course changes, with what the settings say of it
            (``methods.settle``).
        config: the settings, checked one by one.
        accelerator: the processes of the run.
        device: of this process.
        validation: see ``fit``.
        workers: see ``fit``.
        steps_per_epoch: see ``fit``.

    Raises:
        UserError: settings that exclude each other, data or a model that cannot be trained on.
    """
    _check_together(config, method)
    # The first process has the run's own seed; a hash keeps the others from other runs'.
    rank = accelerator.process_index
    seed_everything(seed_of("process", config.seed, rank) if rank else config.seed)
    train, held_out = split(data, validation, config.val_images, config.seed)
    inside = train if isinstance(train, Images) else None
    _check_data(method, inside, train, held_out)
    loading = {"workers": workers, "steps": steps_per_epoch}
    source = _open(train, config, method, accelerator, device, loading)
    total = _count_steps(source, method, config)
    batch, size = _batch_of(train, config, accelerator)
    bare = uncompiled(model)
    bare.to(device)
    if not bare.training:  # one that is keeps the layers that the user has put in eval mode
        bare.train()
    # Checked now: later the old run that --overwrite names would be gone already.
    with dropping(bare, method.dropout):
        pass
    shape = _look_at(train, bare, method, device, unlabelled=method.takes_unlabelled)
    if held_out is not None:
        # A Dataset's as validation takes them.
        judged = bare if isinstance(held_out, Images) else Adapted(bare)
        _look_at(held_out, judged, method, device, unlabelled=False)
    guard = Guard(bare, size, config.max_memory, _remembered(method, inside))
    pick = None
    # Where memory is short there is none for trials, and little to choose.
    if inside is not None and total >= MIN_STEPS and not config.max_memory:
        with guard("the trial of engines", batch):
            pick = _pick(bare, method, torch.Size(inside.image_shape), batch, config, accelerator)
    engine, config = _place(bare, shape, pick, config, device)
    average = WeightAverage(bare, config.ema) if config.ema or config.swa else None
    optimizer = make_optimizer(
        config.optimizer,
        bare.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    stepped, judged_at_once = bare, min(MOST, method.peak_images(batch))
    if config.compile:
        # The step's network alone: batches of validation shrink, and each size is compiled.
        stepped = model if compiled_whole(model) else cast(nn.Module, torch.compile(bare))
    if config.max_memory:
        stepped = _in_parts(bare, method, engine, shape, batch, config.max_memory)
        if isinstance(stepped, Frugal):
            judged_at_once = min(judged_at_once, stepped.images)
    # The same in each process, so that all make equally many collective calls.
    judged_at_once = -processes.largest(-judged_at_once, device)
    if accelerator.num_processes > 1:
        # In a single process it would add nothing but autocast.
        stepped = accelerator.prepare_model(stepped, device_placement=False)
    return Job(
        model=bare,
        method=method,
        threat=method.threat,
        config=config,
        accelerator=accelerator,
        device=device,
        source=Replayed(source, method.replays) if method.replays > 1 else source,
        held_out=held_out,
        images=0 if inside is None else len(inside),
        labelled=1.0 if inside is None else share_of(inside.y >= 0),
        signature=None if inside is None else files.Signature(inside.classes, inside.image_shape),
        total=total,
        batch=batch,
        judged_at_once=judged_at_once,
        guard=guard,
        pick=pick,
        engine=engine,
        average=average,
        optimizer=optimizer,
        take_step=make_step(
            stepped,
            method,
            optimizer,
            engine,
            clip_grad=config.clip_grad,
            average=average,
            awp=config.awp,
        ),
    )


def _check_together(config: FitSettings, method: Method) -> None:
    """Refuse settings that exclude each other."""
    if config.compile and config.max_memory:
        raise UserError(
            f"compile and max_memory ({config.max_memory:g}) do not go together: what is "
            "computed twice is not compiled; leave one of them out"
        )
    if config.compile and (method.dropout or method.second_order):
        why = "changes its dropout at each step" if method.dropout else "differentiates gradients"
        raise UserError(f"{method.slug} {why}, which cannot be compiled: leave compile out")
    if config.max_memory and (method.dropout or method.second_order):
        why = "drops activations" if method.dropout else "differentiates gradients"
        raise UserError(
            f"{method.slug} {why}, which cannot be computed a second time: leave max_memory "
            f"({config.max_memory:g}) out"
        )
    if config.precision == "fp16" and method.second_order:
        raise UserError(
            f"{method.slug} differentiates gradients, which underflow or overflow in precision "
            "fp16: take bf16 or fp32"
        )
    if config.awp_from and config.awp is None:
        raise UserError(f"awp_from ({config.awp_from:g}) says when awp begins: give awp, too")
    if config.ema and config.swa:
        raise UserError(
            f"ema ({config.ema:g}) and swa ({config.swa:g}) both average the weights: "
            "leave one of them out"
        )


def _check_data(method: Method, inside: Images | None, train: Any, held_out: Any) -> None:
    """Refuse data that the threat model or the method cannot take."""
    bounds = method.threat.bounds
    if bounds != (0.0, 1.0) and any(isinstance(part, Images) for part in (train, held_out)):
        raise UserError(
            f"images in memory are pixels in [0, 1], the threat model's data range is "
            f"{bounds}: leave bounds out, or give data and validation as loaders"
        )
    if method.needs_index and inside is None:
        raise UserError(
            f"{method.slug} keeps a perturbation for each image: give images in memory, a "
            "pair of tensors (x, y), instead of a Dataset or DataLoader"
        )


def _open(
    train: Any,
    config: FitSettings,
    method: Method,
    accelerator: Accelerator,
    device: torch.device,
    loading: dict[str, Any],
) -> Source:
    """Return the source of batches."""
    # Batches are moved by the source, without waiting for the device.
    sharing = functools.partial(accelerator.prepare_data_loader, device_placement=False)
    with memory_for("moving the data", "give memory-mapped arrays or a DataLoader"):
        return make_source(
            train,
            batch_size=config.batch_size,
            seed=config.seed,
            augmentation=config.augment,
            device=device,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            prepare=sharing,
            bounds=method.threat.bounds,
            **loading,
        )


def _count_steps(source: Source, method: Method, config: FitSettings) -> int:
    """Return the number of steps of the whole run.

    Raises:
        UserError: there is none.
    """
    steps = source.steps_per_epoch
    if not steps:
        raise UserError("there is no batch to train on: the data hold fewer images than one batch")
    total = round(method.replays * steps * config.epochs)
    if not total:
        raise UserError(
            f"{config.epochs:g} epochs of {steps} steps are less than one step: give more epochs"
        )
    return total


def _batch_of(train: Any, config: FitSettings, accelerator: Accelerator) -> tuple[int, str]:
    """Return the images of a step of this process, and how the user gave their number."""
    if isinstance(train, DataLoader) and train.batch_size:
        return train.batch_size, f"the DataLoader's batch_size ({train.batch_size})"
    batch = math.ceil(config.batch_size / accelerator.num_processes)
    return batch, f"batch_size ({config.batch_size})"


def _remembered(method: Method, images: Images | None) -> str:
    """Say what a method keeps of each image, which no smaller batch makes less."""
    if images is None or not method.remembers_images:
        return ""
    gibibytes = 4 * len(images) * math.prod(images.image_shape) / 2**30
    return (
        f"; {method.slug} keeps a perturbation for each of {len(images):,} images, "
        f"{gibibytes:.2g} GiB or more"
    )


def _look_at(
    data: Any, model: nn.Module, method: Method, device: torch.device, *, unlabelled: bool
) -> torch.Size | None:
    """Check all labels of Images, where the method looks at a batch's only; of others an item.

    Returns:
        The shape of an image, where there is one to look at.

    Raises:
        UserError: they cannot be trained, or judged, on.
    """
    if isinstance(data, Images):
        one = data.pixels(slice(0, 1)).to(device)
        check_labels(data.y, count_classes(model, one), unlabelled=unlabelled)
        return one.shape[1:]
    batch = first_of(data)
    if batch is None:
        return None
    x, y = (part.to(device) for part in batch)
    x = as_pixels(x, method.threat.bounds)
    check_inputs(model, x, y, method.threat, unlabelled=unlabelled)
    return x.shape[1:]


def _pick(
    model: nn.Module,
    method: Method,
    shape: torch.Size,
    batch: int,
    config: FitSettings,
    accelerator: Accelerator,
) -> Pick | None:
    """Return the fastest engine, measured in the first process, for all; None where one is named.

    Nor is one looked for where batch norm waits for the other processes, which do not try.
    """
    waits = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    if config.engine != "auto" or waits:
        return None
    picks: list[Pick | None] = [None]
    if accelerator.is_main_process:
        picks = [pick_engine(model, method, shape, batch, config.precision)]
    return broadcast_object_list(picks)[0]


def _place(
    model: nn.Module,
    shape: torch.Size | None,
    pick: Pick | None,
    config: FitSettings,
    device: torch.device,
) -> tuple[Engine, FitSettings]:
    """Bring the network into its engine's layout; return the engine and settings that name it.

    They are what a run goes on with, where another machine's choice may be another.
    """
    if pick:
        picked = {"engine": pick.engine, "precision": pick.precision}
        config = config.model_copy(update=picked)
    engine = Engine.choose(config.engine, config.precision, device)
    engine.place(model)
    if shape:
        engine = engine.suited(model, shape)
    return engine, config.model_copy(update={"precision": engine.precision_name})


def _in_parts(
    model: nn.Module,
    method: Method,
    engine: Engine,
    shape: torch.Size | None,
    batch: int,
    limit: float,
) -> nn.Module:
    """Return the network in parts that are computed twice, so that a step fits into the limit."""
    if shape is None:
        raise UserError(
            f"max_memory ({limit:g}) needs the shape of an image, which these data do not "
            "tell: give a Dataset whose items are pairs of tensors, or a smaller batch "
            "instead"
        )
    return fit_into(model, method, engine, shape, batch, limit)
