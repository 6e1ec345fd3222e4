"""Prepare a run: build and check everything before the first step, and write nothing."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from surestep import processes
from surestep.attacks.inputs import check_inputs, check_labels, count_classes
from surestep.attacks.lending import compiled_whole, device_of, uncompiled
from surestep.attacks.outcomes import share_of
from surestep.config import FitSettings
from surestep.data import Images, as_pixels
from surestep.devices import memory_for, move
from surestep.errors import UserError
from surestep.evaluation import Adapted
from surestep.methods import Method
from surestep.methods._dropout import check_dropout
from surestep.randomness import seed_everything, seed_of
from surestep.threat import ThreatModel
from surestep.training.averaging import WeightAverage
from surestep.training.engine import Engine, TrainStep, make_optimizer, make_step
from surestep.training.holding_out import split
from surestep.training.loaders import (
    batch_size_of,
    first_item_as_batch,
    is_stream,
    with_workers_of_a_run,
)
from surestep.training.memory import Frugal, fit_into, images_within
from surestep.training.picking import MIN_STEPS, Pick, pick_engine
from surestep.training.source import Replayed, Source, make_source
from surestep.weights import Signature

MOST_JUDGED = 500
"""Maximum number of images that validation attacks at a time."""
ROOM_TO_JUDGE = 2**30
"""Bytes of activations that an attack of validation may take even if a step takes less."""
_MOST_GROWTH = 16
"""How many times as many images as a step validation may attack at a time."""


@dataclass(frozen=True)
class Guard:
    """Turns errors of a step that have a known cause into one clear line.

    Attributes:
        model: the network, whose parameters an error may name.
        size: the setting that gives the number of images per step, in words.
        limit: the memory limit in GiB, if one is set.
        more: what else takes memory, in words, to end the advice.
    """

    model: nn.Module
    size: str
    limit: float | None
    more: str = ""

    @contextmanager
    def __call__(self, where: str, images: int) -> Iterator[None]:
        """Explain what fails in the block: ``where`` names it, ``images`` is its batch size."""
        less = f"max_memory ({self.limit:g})" if self.limit else "set max_memory, in GiB"
        try:
            with memory_for(
                f"{where}, of {images} images", f"lower {self.size}, or {less}{self.more}"
            ):
                yield
        except RuntimeError as e:
            # Recognised by its module: importing the compiler takes seconds.
            if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise _compiler_error(e) from e
            if "device-side assert" in str(e):
                raise UserError(
                    f"{where}, of {images} images, stopped on the GPU: a label is probably outside "
                    "0 to K - 1 (in a DataLoader only those of the first batch are checked); "
                    "continue in a new process"
                ) from e
            if unused := re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(e)):
                names = [n for n, p in self.model.named_parameters() if p.requires_grad]
                which = ", ".join(names[int(k)] for k in unused[1].split()[:5])
                raise UserError(
                    "several processes need every trainable parameter to affect the logits, but "
                    f"these do not: {which}; freeze them with requires_grad_(False)"
                ) from e
            raise
        except ValueError as e:
            if "more than 1 value per channel" in str(e):
                raise UserError(
                    f"{where}, of {images} image{'s' * (images != 1)}, leaves batch norm a single "
                    f"value per channel, which it cannot normalise: choose another {self.size}, "
                    "or give a DataLoader drop_last=True"
                ) from e
            raise


def _compiler_error(error: RuntimeError) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"torch.compile fails here, leave compile out: {reason}")


@dataclass(frozen=True)
class Job:
    """A prepared run: everything that the training loop needs.

    Attributes:
        model: the network itself, on its device, in train mode.
        method: what a step minimises; the run's own copy.
        threat: the method's threat model at full eps, to which the method itself may warm up.
        strength: the method's strength at full eps: 1, unless the user has set another.
        config: the settings, with the engine and the precision that were picked.
        accelerator: has the trackers to log to.
        device: the device of this process.
        source: the source of batches.
        held_out: validation data, or None.
        images: number of training images in memory; 0 for a Dataset or a DataLoader.
        own_batches: whether the data are a DataLoader, whose batches count for each process.
        loader_batch: images that all processes take in a step from a DataLoader; 0 if unknown.
        labelled: share of the training images that have a label.
        signature: classes and image shape to store with the weights, if known.
        total: number of steps of the whole run.
        eval_batch_size: images that validation attacks at a time: as many as fit in training, or
            in ``ROOM_TO_JUDGE`` if that is more and there is no limit.
        guard: explains what fails in a step.
        pick: the result of timing the engines, if they were timed.
        average: the weight average, if one is configured.
        optimizer: over the model's parameters.
        take_step: takes a training step.
    """

    model: nn.Module
    method: Method
    threat: ThreatModel
    strength: float
    config: FitSettings
    accelerator: Accelerator
    device: torch.device
    source: Source
    held_out: Any
    images: int
    own_batches: bool
    loader_batch: int
    labelled: float
    signature: Signature | None
    total: int
    eval_batch_size: int
    guard: Guard
    pick: Pick | None
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    take_step: TrainStep

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and kept: the weight average, if there is one by now."""
        return self.average.model if self.average and self.average.updates else self.model


def prepare(
    model: nn.Module,
    data: Any,
    method: Method,
    config: FitSettings,
    accelerator: Accelerator,
    device: torch.device,
    *,
    validation: Any,
    workers: int,
    steps_per_epoch: int | None,
) -> Job:
    """Build everything that a run needs, and check its inputs.

    Seeds the random state; moves the model to the device and into the engine's memory format.

    Args:
        model: see ``fit``.
        data: see ``fit``.
        method: the run's own copy, which training changes, with the settings that concern it
            already applied (``methods.settle``).
        config: the settings, each already validated by itself.
        accelerator: divides a DataLoader among the processes.
        device: the device of this process.
        validation: see ``fit``.
        workers: see ``fit``.
        steps_per_epoch: see ``fit``.

    Raises:
        UserError: settings exclude each other, or training cannot use the data or the model.
    """
    _check_together(config, method)
    # The first process uses the run's seed; the others a hash, to avoid the seeds of other runs.
    rank = processes.rank()
    seed_everything(seed_of("process", config.seed, rank) if rank else config.seed)
    train, held_out = split(data, validation, config.val_images, config.seed)
    held_out = with_workers_of_a_run(held_out)
    in_memory = train if isinstance(train, Images) else None
    _check_data(method, in_memory, train, held_out)
    with memory_for("moving the data", "give memory-mapped arrays or a DataLoader"):
        source = make_source(
            train,
            config,
            device,
            # Batches are moved by the source, without waiting for the device.
            shard=functools.partial(accelerator.prepare_data_loader, device_placement=False),
            workers=workers,
            bounds=method.threat.bounds,
            steps=steps_per_epoch,
        )
    if method.replays > 1:
        source = Replayed(source, method.replays)
    total = _count_steps(source, config)
    # Check this before the first collective call (the engine trial), in which processes that
    # disagree would hang.
    processes.check_alike("training steps", total, device)
    for what, part in (("training", None if is_stream(train) else train), ("held-out", held_out)):
        processes.check_alike(f"{what} images (or batches)", _length_of(part), device)
    batch, size = _batch_of(train, config)
    module = uncompiled(model)
    _check_state(module)
    module.to(device)
    if not module.training:  # otherwise keep layers that the user has put into eval mode
        module.train()
    shape = _shape_taken(module, method, train, held_out, device)
    guard = Guard(module, size, config.max_memory, _remembered(method, in_memory))
    pick = None
    if shape and _worth_timing(config, module, in_memory, total):
        pick = _pick(module, method, shape, batch, config, guard)
    engine, config = _place(module, shape, pick, config, device)
    average = WeightAverage(module, config.ema) if config.ema or config.swa else None
    optimizer = make_optimizer(
        config.optimizer,
        module.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    step_model = module
    if config.compile:
        # Only for the step: validation batches shrink, and each size would be compiled anew.
        step_model = model if compiled_whole(model) else _compile(module)
    if config.max_memory:
        # Weight-sized tensors beyond those of plain SGD: Adam's second moments, the average, AWP's
        # saved weights.
        # Several processes exchange their gradients in buckets, which hold a copy.
        kept = (config.optimizer != "sgd", average, config.awp, processes.world_size() > 1)
        copies = sum(map(bool, kept))
        step_model = fit_into(module, method, engine, shape, batch, config.max_memory, copies)
    most = method.peak_images(batch)
    if isinstance(step_model, Frugal):
        most = min(most, step_model.images)
    roomy = held_out is not None and not config.max_memory
    eval_batch_size = _images_to_judge(most, module, engine, shape if roomy else None)
    if processes.world_size() > 1:
        step_model = _wrap_ddp(step_model, device)
    return Job(
        model=module,
        method=method,
        threat=method.threat,
        strength=method.strength,
        config=config,
        accelerator=accelerator,
        device=device,
        source=source,
        held_out=held_out,
        images=0 if in_memory is None else len(in_memory),
        own_batches=isinstance(train, DataLoader),
        loader_batch=_loader_batch(train),
        labelled=1.0 if in_memory is None else share_of(in_memory.y >= 0),
        signature=None
        if in_memory is None
        else Signature(in_memory.classes, in_memory.image_shape),
        total=total,
        eval_batch_size=eval_batch_size,
        guard=guard,
        pick=pick,
        average=average,
        optimizer=optimizer,
        take_step=make_step(
            step_model,
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
            f"compile and max_memory ({config.max_memory:g}) do not go together: "
            "recomputed passes are not compiled; leave one of them out"
        )
    if config.compile and (method.dropout or method.second_order):
        why = "changes its dropout at each step" if method.dropout else "differentiates gradients"
        raise UserError(f"{method.slug} {why}, which cannot be compiled: leave compile out")
    if config.max_memory and (method.dropout or method.second_order):
        why = "drops activations" if method.dropout else "differentiates gradients"
        raise UserError(
            f"{method.slug} {why}, which cannot be recomputed: leave max_memory "
            f"({config.max_memory:g}) out"
        )
    if config.precision == "fp16" and method.second_order:
        raise UserError(
            f"{method.slug} differentiates gradients, which underflow or overflow in precision "
            "fp16: use bf16 or fp32"
        )
    if config.awp_from and config.awp is None:
        raise UserError(f"awp_from ({config.awp_from:g}) sets when awp begins: give awp, too")
    if config.ema and config.swa:
        raise UserError(
            f"ema ({config.ema:g}) and swa ({config.swa:g}) both average the weights: "
            "leave one of them out"
        )


def _check_data(method: Method, in_memory: Images | None, train: Any, held_out: Any) -> None:
    """Refuse data that the threat model or the method cannot take."""
    bounds = method.threat.bounds
    if bounds != (0.0, 1.0) and any(isinstance(part, Images) for part in (train, held_out)):
        raise UserError(
            f"images in memory are pixels in [0, 1], but the threat model's data range is "
            f"{bounds}: leave bounds out, or give data and validation as loaders"
        )
    if method.needs_index and in_memory is None:
        raise UserError(
            f"{method.slug} needs each image's position in the data set: give images in memory, "
            "a pair of tensors (x, y), instead of a Dataset or DataLoader"
        )


def _check_state(model: nn.Module) -> None:
    """Refuse a model whose state holds more than tensors: a file of weights could not hold it."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the model's state has {name}, a {type(value).__name__}, but only tensors can be "
                "saved as weights: let get_extra_state return a tensor"
            )


def _count_steps(source: Source, config: FitSettings) -> int:
    """Return the number of steps of the whole run.

    Raises:
        UserError: there is no step to take.
    """
    steps = source.steps_per_epoch
    if not steps:
        raise UserError("there is no batch to train on: the data hold fewer images than one batch")
    total = round(steps * config.epochs)
    if not total:
        raise UserError(
            f"{config.epochs:g} epochs of {steps} steps are less than one step: give more epochs"
        )
    return total


def _length_of(data: Any) -> int:
    """Return the number of images, or of a DataLoader's batches; 0 if it is not known."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return 0


def _loader_batch(train: Any) -> int:
    """Return the images that all processes take in a step from a DataLoader; 0 if unknown."""
    known = batch_size_of(train) if isinstance(train, DataLoader) else None
    return (known or 0) * processes.world_size()


def _batch_of(train: Any, config: FitSettings) -> tuple[int, str]:
    """Return the images per step in this process, and the setting that gives them, in words."""
    if isinstance(train, DataLoader) and (size := batch_size_of(train)):
        return size, f"the DataLoader's batch_size ({size})"
    batch = math.ceil(config.batch_size / processes.world_size())
    return batch, f"batch_size ({config.batch_size})"


def _remembered(method: Method, images: Images | None) -> str:
    """Describe what a method keeps for each image, which a smaller batch does not reduce."""
    if images is None or not method.remembers_images:
        return ""
    gibibytes = 4 * len(images) * math.prod(images.image_shape) / 2**30
    return (
        f"; {method.slug} keeps a perturbation for each of {len(images):,} images, "
        f"{gibibytes:.2g} GiB or more"
    )


def _shape_taken(
    model: nn.Module, method: Method, train: Any, held_out: Any, device: torch.device
) -> torch.Size | None:
    """Return the shape of a training image, once the model takes the data and the dropout.

    Returns:
        The shape; None if no image can be read.

    Raises:
        UserError: the model does not.
    """
    check_dropout(model, method.dropout)  # later, --overwrite would have deleted the old run
    shape = _checked_shape(train, model, method, device, unlabelled=method.takes_unlabelled)
    if held_out is not None:
        # Validation wraps the model like this for a Dataset or DataLoader.
        eval_model = model if isinstance(held_out, Images) else Adapted(model)
        _checked_shape(held_out, eval_model, method, device, unlabelled=False)
    return shape


def _checked_shape(
    data: Any, model: nn.Module, method: Method, device: torch.device, *, unlabelled: bool
) -> torch.Size | None:
    """Return the shape of an image, once the data are checked.

    All labels of in-memory Images are; of a Dataset or DataLoader, one item is.

    Returns:
        The shape; None if no item can be read.

    Raises:
        UserError: the data cannot be used for training or validation.
    """
    if isinstance(data, Images):
        one = data.pixels(slice(0, 1)).to(device)
        check_labels(data.y, count_classes(model, one), unlabelled=unlabelled)
        return one.shape[1:]
    batch = first_item_as_batch(data)
    if batch is None:
        return None
    x, y = (move(part, device) for part in batch)
    x = as_pixels(x, method.threat.bounds)
    check_inputs(model, x, y, method.threat, unlabelled=unlabelled)
    return x.shape[1:]


def _worth_timing(
    config: FitSettings, model: nn.Module, in_memory: Images | None, total: int
) -> bool:
    """Tell whether to time the engines.

    Not with a memory limit, where there is no room for trials and little to choose, and not if the
    model has SyncBatchNorm, which would wait for the other processes.

    Args:
        config: the settings.
        model: the network.
        in_memory: the training images; None for a Dataset or a DataLoader, which are not timed.
        total: steps of the whole run.
    """
    return (
        config.engine == "auto"
        and not config.max_memory
        and in_memory is not None
        and total >= MIN_STEPS
        and not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    )


def _pick(
    model: nn.Module,
    method: Method,
    shape: torch.Size,
    batch: int,
    config: FitSettings,
    guard: Guard,
) -> Pick | None:
    """Time the engines in the first process, and return the fastest to all processes.

    Returns None if the model cannot be copied.

    Raises:
        UserError: in all processes, the trial failed, such as for lack of memory.
    """

    def time_them() -> Pick | None:
        with guard("the trial of engines", batch):
            return pick_engine(model, method, shape, batch, config.precision)

    return processes.by_first(time_them)


def _place(
    model: nn.Module,
    shape: torch.Size | None,
    pick: Pick | None,
    config: FitSettings,
    device: torch.device,
) -> tuple[Engine, FitSettings]:
    """Bring the network into its engine's memory format; return engine and settings naming it.

    A resumed run uses these settings, since another machine might choose differently.
    """
    if pick:
        picked = {"engine": pick.engine, "precision": pick.precision}
        config = config.model_copy(update=picked)
    elif config.engine == "auto":  # which means "fast" where none is timed
        config = config.model_copy(update={"engine": "fast"})
    engine = Engine.choose(config.engine, config.precision, device)
    engine.place(model)
    if shape:
        engine = engine.suited(model, shape)
    return engine, config.model_copy(update={"precision": engine.precision_name})


def _images_to_judge(most: int, model: nn.Module, engine: Engine, shape: torch.Size | None) -> int:
    """Return the images that validation attacks at a time, the same in each process.

    Args:
        most: images in the largest pass of a step.
        model: the network.
        engine: how it is run.
        shape: of an image, to find out how many more than ``most`` there is room for; else None.
    """
    if shape:
        # Small batches of an attack would leave the device idle. The bound is for models that
        # hide what they keep.
        room = images_within(ROOM_TO_JUDGE, model, engine, shape)
        most = max(most, min(room, _MOST_GROWTH * most))
    # All processes make equally many collective calls.
    return processes.all_min(min(MOST_JUDGED, most), device_of(model))


def _compile(module: nn.Module) -> nn.Module:
    """Compile a module.

    Raises:
        UserError: torch cannot, such as on a Python version that it does not know yet.
    """
    try:
        return cast(nn.Module, torch.compile(module))
    except RuntimeError as e:
        raise _compiler_error(e) from e


def _wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network in DistributedDataParallel, which averages its gradients over the processes.

    Accelerate's ``prepare_model`` names the GPU by the local rank, which fails where the launcher
    shows each process its own GPU only: that one is number 0 in all of them.
    """
    own = [device.index] if device.type == "cuda" else None
    # The step itself synchronises the buffers, before the attack. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    options: dict[str, Any] = {name: False}
    if "batched_grad_copy" in known:  # fewer kernels: gradients are new tensors in each step
        options["batched_grad_copy"] = True
    return DistributedDataParallel(model, device_ids=own, **options)
