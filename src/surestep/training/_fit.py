"""``fit``: train a model on data with a method."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.utils.data import DataLoader

from surestep import methods, processes
from surestep.attacks.lending import check_module, compiled_whole, unwrapped
from surestep.config import FitSettings, parse, read_yaml
from surestep.devices import pick_device
from surestep.errors import UserError, need
from surestep.evaluation import suite
from surestep.methods import Method, settle
from surestep.training.loaders import batch_size_of
from surestep.training.loop import Trainer
from surestep.training.preparing import prepare
from surestep.training.run_folder import RunFolder

_PATIENCE = timedelta(hours=6)
"""How long processes wait for one that evaluates in ``on_epoch``, or attacks more images; NCCL's
own ten minutes would end such a run. A process that already has its group keeps that one's."""


@dataclass
class FitResult:
    """The result of training.

    Attributes:
        model: the trained model with the selected weights, in eval mode.
        history: one row per epoch, as in ``metrics.jsonl``.
        best_epoch: the epoch (from 1) whose weights were selected.
        train_seconds: time spent in training steps, without validation.
        out: the run folder, if there is one.
        method: the run's copy of the method in its final state, with what it has learnt.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_epoch: int
    train_seconds: float
    out: Path | None
    method: Method


def fit(
    model: nn.Module,
    data: Any,
    method: Method,
    *,
    out: str | Path | None = None,
    validation: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    device: str | torch.device | None = None,
    workers: int = 0,
    steps_per_epoch: int | None = None,
    describe: Mapping[str, Any] | None = None,
    on_epoch: Callable[[dict[str, Any], nn.Module], object] | None = None,
    **settings: Any,
) -> FitResult:
    """Train a model with a method, validating by strong attacks on held-out images.

    After each epoch the held-out images are attacked, and the weights with the best worst-case
    accuracy are kept; test data never influence that choice. The random states of python, numpy
    and torch are seeded. Runs on several processes when started by ``torchrun`` or
    ``accelerate launch``.

    Args:
        model: returns logits (N, K) for images in the method's data range; is changed in place.
            A model in eval mode is put into train mode; in a model that is in train mode already,
            layers in eval mode stay so. A model from ``torch.compile`` is trained compiled, and
            the module inside it is returned.
        data: Images, a pair of tensors (x, y), a Dataset or a DataLoader. With several processes,
            each takes batches of a DataLoader's own size, whereas ``batch_size`` counts the
            images of all processes together.
        method: what a step minimises. A copy of it is trained with; see ``FitResult.method``.
        out: run folder for ``config.yaml``, ``environment.json``, ``metrics.jsonl``,
            ``model.safetensors`` and ``checkpoints/``; None writes nothing.
        validation: held-out data, of which at most ``val_images`` are attacked; by default a
            tenth of ``data``, at most as many. Images held out of a Dataset go through its
            transforms: pass ``validation`` if these are random. A DataLoader's generators are put
            back after each epoch, so that all epochs are judged on the same images.
        resume: continue from the newest checkpoint in ``out``. The result is bit-identical to
            that of an uninterrupted run with up to two processes, and the same to the last digits
            with more, unless their number, ``device`` or ``max_memory`` changes. (On a GPU, only
            with deterministic kernels: call ``torch.use_deterministic_algorithms(True)``, with
            CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment.)
        overwrite: delete what is in ``out`` first.
        quiet: show nothing.
        device: such as "cpu" or "cuda"; by default an accelerator if there is one.
        workers: processes that load the images of a Dataset; a DataLoader has its own.
        steps_per_epoch: batches per epoch of a DataLoader; required if it streams and has no
            length. Each epoch restarts the stream (``set_epoch`` tells its dataset the epoch);
            with several processes, each process's stream must yield its own part of the data.
        describe: entries to write to ``config.yaml`` before the settings, in place of the method's
            name, hyperparameters and threat model; must have ``method`` and ``params``.
        on_epoch: called in the first process after each epoch with its row of the history and the
            validated model (the weight average, if there is one) in eval mode; meant for loggers
            and early stopping. If it returns True, training ends as after the last epoch, and the
            row has the entry ``stopped``; a resume trains no further. If it raises, all processes
            end, and the run can be resumed; it is not called again for that epoch.
        settings: fields of ``surestep.config.FitSettings``: epochs, batch_size, optimizer, lr,
            schedule, augment, ema, val_attacks, ...; docs/settings.md has them all.

    Returns:
        The result; its model is ``model`` itself, or the module inside a compiled one.

    Raises:
        UserError: invalid settings or data, a run folder that exists already, a full disk.
        TrainingDiverged: the loss became NaN or infinite; the last good checkpoint is kept.
        KeyboardInterrupt: Ctrl-C; with ``out``, a checkpoint of the last step was written.
        SystemExit: SIGTERM (code 143); with ``out``, likewise.
    """
    _check_method(method, named=out is not None)
    check_module(model)
    _check_whole(model)
    config = parse(FitSettings, settings)
    if config.optimizer != "sgd" and "lr" not in settings:
        raise UserError(
            f"optimizer {config.optimizer!r} needs a learning rate of its own: give lr, such as "
            f"1e-3; the default, {config.lr:g}, is meant for sgd"
        )
    _check_arguments(out, workers, steps_per_epoch, describe, tensorboard=config.tensorboard)
    if compiled_whole(model):
        config = config.model_copy(update={"compile": True})
    # Settings that change a method change a copy of it, never the caller's.
    method = copy.deepcopy(method)
    config = config.model_copy(update=settle(method, config))
    if config.val_images:
        suite.parse_all(config.val_attacks, method.threat)
    run = RunFolder.plan(out, resume=resume, overwrite=overwrite)
    target = pick_device(device)
    accelerator = _accelerator(target, run if config.tensorboard else None)
    if device is None and processes.world_size() > 1:
        target = accelerator.device
    if isinstance(data, DataLoader) and (size := batch_size_of(data)):
        recorded = _batch_size_recorded(size, config, run if resume else None, settings)
        config = config.model_copy(update={"batch_size": recorded})
    described = describe or _description(method)
    notes: list[str] = []
    if run and resume:
        config = run.as_begun(config)
        notes += run.check_same({**described, **config.model_dump(mode="json")})
    job = prepare(
        model,
        data,
        method,
        config,
        accelerator,
        target,
        validation=validation,
        workers=workers,
        steps_per_epoch=steps_per_epoch,
    )
    # Only now is everything checked: a mistake must not cost an old run.
    processes.barrier(target)
    with ExitStack() as held:

        def take_folder() -> list[str]:
            """Make the run folder, or go on with it; return how its environment differs."""
            if run is None:
                return []
            if not resume:
                run.make({**described, **job.config.model_dump(mode="json")}, overwrite=overwrite)
            held.enter_context(run.held())
            return run.note_environment()

        notes += [
            f"results may differ in the last digits: {difference}"
            for difference in processes.by_first(take_folder)
        ]
        trainer = Trainer(job, run, quiet=quiet, on_epoch=on_epoch)
        at = trainer.train(resume=resume, notes=notes)
    place = run.folder if run else None
    return FitResult(job.model, at.history, at.best_epoch, at.train_seconds, place, job.method)


def _check_method(method: Any, *, named: bool) -> None:
    """Refuse what is not a method or, where it is to be ``named``, has no name."""
    if not isinstance(method, Method):
        raise UserError(
            f"{method!r} is not a method: give one such as "
            "surestep.methods.get('sat-r2')(surestep.Linf(0.3))"
        )
    if named and not methods.is_registered(method):
        raise UserError(
            f"a run folder names its method, but {type(method).__name__} has no name: put "
            '@surestep.methods.register("my-name") above its @dataclass, or leave out out'
        )


def _check_arguments(
    out: str | Path | None,
    workers: int,
    steps_per_epoch: int | None,
    describe: Mapping[str, Any] | None,
    *,
    tensorboard: bool,
) -> None:
    """Refuse arguments of ``fit`` that are wrong whatever the model and the data are."""
    if workers < 0:
        raise UserError(f"workers {workers}: give 0 or more")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise UserError(f"steps_per_epoch {steps_per_epoch}: give 1 or more")
    if describe and not {"method", "params"} <= describe.keys():
        raise UserError("describe needs the entries method and params, by which a run is resumed")
    if tensorboard:
        if out is None:
            raise UserError("tensorboard=True needs a run folder to write to: give out=...")
        need("tensorboard", "tensorboard=True", "surestep[tensorboard]")


def _description(method: Method) -> dict[str, Any]:
    """Return what ``config.yaml`` says of a method and its threat model."""
    threat = method.threat
    return {
        "method": method.slug,
        "params": method.params(),
        "norm": threat.to_dict()["norm"],
        "eps": float(threat.eps),
        "bounds": list(threat.bounds),
        "margin": float(method.margin),
    }


def _check_whole(model: nn.Module) -> None:
    """Refuse a model that is wrapped for several processes, or whose weights are not all here."""
    if unwrapped(model) is not model:
        raise UserError("the model is wrapped in DistributedDataParallel: give the module inside")
    # Recognised by their names: importing torch's sharding takes long.
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise UserError(
            "the model is wrapped in FullyShardedDataParallel: give the module before it is "
            "wrapped, since fit itself trains it on several processes, by DistributedDataParallel"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor).__name__ == "DTensor":
            raise UserError(
                f"the model's {name} is a DTensor, as after fully_shard: give the model before it "
                "is sharded, since fit itself trains it on several processes, by "
                "DistributedDataParallel"
            )
        if tensor.is_meta:
            raise UserError(
                f"the model's {name} is on the meta device, where it has no values: call "
                "model.to_empty(device='cpu') and initialise or load its weights"
            )


def _batch_size_recorded(
    size: int, config: FitSettings, begun: RunFolder | None, given: Mapping[str, Any]
) -> int:
    """Return the batch size to record for a DataLoader with ``size`` images in each process.

    Args:
        size: images per batch of the DataLoader.
        config: the settings.
        begun: the run to resume, if any, which keeps what it recorded: another number of
            processes is refused with reasons later, as its checkpoints tell what it had.
        given: the settings that the caller gave.

    Raises:
        UserError: the caller gave another batch size.
    """
    count = processes.world_size()
    if "batch_size" in given and config.batch_size != size * count:
        raise UserError(
            f"batch_size {config.batch_size} has no effect: the DataLoader has its own, {size}"
            f"{' in each process' if count > 1 else ''}; leave it out"
        )
    recorded = read_yaml(begun.config) if begun else {}
    return recorded.get("batch_size", size * count)


def _accelerator(device: torch.device, logged: RunFolder | None) -> Accelerator:
    """Return the accelerator of a run on this device, ``logged`` to TensorBoard in its folder."""
    # Without accelerators, several processes find each other only with cpu=True. A single process
    # chooses the device for each run: it may train on a GPU first and on the CPU afterwards.
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name, "1")) > 1 for name in names)  # as Accelerate does
    options: dict[str, Any] = {"cpu": several and device.type == "cpu"}
    if not AcceleratorState._shared_state:
        # Override the precision and compilation of a launcher's configuration. Once the process
        # has an Accelerator, these can no longer be changed.
        options |= {"mixed_precision": "no", "dynamo_backend": "no"}
        options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=_PATIENCE)]
    if logged is not None:
        options |= {"log_with": "tensorboard", "project_dir": logged.folder}
    try:
        return Accelerator(**options)
    except NotImplementedError as e:  # NCCL with GPUs that lack what it uses by default
        raise UserError(" ".join(str(e).split())) from e
    except ValueError as e:  # a process has only one Accelerator state
        raise UserError(
            f"this process already has an Accelerator with other settings "
            f"({' '.join(str(e).split())}): train in a new process"
        ) from e
