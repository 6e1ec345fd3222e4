"""``fit``: from a model, data and a method to a trained model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn

from surestep.attacks.lending import compiled_whole, unwrapped
from surestep.config import FitSettings, parse
from surestep.devices import pick_device
from surestep.errors import UserError, need
from surestep.evaluation import suite
from surestep.methods import Method, settle
from surestep.training.loop import Trainer
from surestep.training.preparing import prepare
from surestep.training.run_folder import RunFolder


@dataclass
class FitResult:
    """What training gave.

    Attributes:
        model: the trained model, the selected weights loaded, in eval mode.
        history: one row an epoch, as in ``metrics.jsonl``.
        best_epoch: the epoch (from 1) whose weights were selected.
        train_seconds: time spent in training steps, without validation.
        out: the run folder, if there is one.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_epoch: int
    train_seconds: float
    out: Path | None


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
    device: str | None = None,
    workers: int = 0,
    steps_per_epoch: int | None = None,
    describe: Mapping[str, Any] | None = None,
    on_epoch: Callable[[dict[str, Any], nn.Module], None] | None = None,
    **settings: Any,
) -> FitResult:
    """Train a model with a method, validating by strong attacks on held-out images.

    After each epoch the held-out images are attacked, and the weights with the best worst case
    are kept; never are they chosen on test data. The random state of python, numpy and torch is
    seeded. Runs on several processes when started by ``torchrun`` or ``accelerate launch``.

    Args:
        model: returns logits (N, K) for images in the method's data range; is changed in place,
            and put into train mode, but for layers in eval mode of one that is in train mode
            already. One that ``torch.compile`` returned is trained as it is, and
            the module inside it kept.
        data: Images, a pair of tensors (x, y), a Dataset or a DataLoader. Of several processes
            each takes batches of a DataLoader's own size; ``batch_size`` is of all together.
        method: what a step minimises.
        out: run folder for ``config.yaml``, ``environment.json``, ``metrics.jsonl``,
            ``model.safetensors`` and ``checkpoints/``; None writes nothing.
        validation: held-out data; by default a tenth of ``data``, at most ``val_images``. Taken
            from a Dataset they go through its transforms: give them here if those are random.
        resume: go on from the newest checkpoint in ``out``; the result is bit-identical to that
            of a run that was never stopped, unless it goes on with another number of processes.
            (On a GPU as far as its kernels are: see ``torch.use_deterministic_algorithms``.)
        overwrite: delete what is in ``out`` first.
        quiet: show nothing.
        device: such as "cpu" or "cuda"; by default the best there is.
        workers: processes that load the images of a Dataset; a DataLoader has its own.
        steps_per_epoch: batches of an epoch of a DataLoader that streams, and has no length. Each
            epoch begins the stream anew (``set_epoch`` tells its dataset which).
        describe: written to ``config.yaml`` before the settings.
        on_epoch: called in the first process after each epoch with its row of the history and the
            model that was judged (the average, if there is one), in eval mode: for loggers.
        settings: of ``surestep.config.FitSettings``: epochs, batch_size, lr, schedule, ...

    Returns:
        The result; its model is ``model`` itself, of a compiled one the module inside.

    Raises:
        UserError: invalid settings or data, a run folder that exists already, a full disk.
        TrainingDiverged: the loss became NaN or infinite; the last good checkpoint is kept.
        KeyboardInterrupt: Ctrl-C; with ``out``, a checkpoint of the last step was written.
        SystemExit: SIGTERM (code 143); with ``out``, likewise.
    """
    if not isinstance(method, Method):
        raise UserError(
            f"{method!r} is not a method: give one such as "
            "surestep.methods.get('sat-r2')(surestep.Linf(0.3))"
        )
    if unwrapped(model) is not model:
        raise UserError("the model is wrapped in DistributedDataParallel: give the module inside")
    config = parse(FitSettings, settings)
    if compiled_whole(model):
        config = config.model_copy(update={"compile": True})
    # Settings that change a method change a copy of it, never the caller's.
    method = copy.deepcopy(method)
    config = config.model_copy(update=settle(method, config))
    if config.val_images:
        suite.parse_all(config.val_attacks, method.threat)
    run = RunFolder.plan(out, resume=resume, overwrite=overwrite)
    target = pick_device(device)
    accelerator = _accelerator(target, run, tensorboard=config.tensorboard)
    if device is None and accelerator.num_processes > 1:
        target = accelerator.device
    threat = method.threat
    describe = describe or {
        "method": method.slug,
        "params": method.params(),
        "norm": threat.to_dict()["norm"],
        "eps": float(threat.eps),
    }
    if run and resume:
        config = run.as_begun(config)
        run.check_same({**describe, **config.model_dump(mode="json")})
    if workers < 0:
        raise UserError(f"workers {workers}: give 0 or more")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise UserError(f"steps_per_epoch {steps_per_epoch}: give 1 or more")
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
    accelerator.wait_for_everyone()
    own = run if accelerator.is_main_process else None
    with ExitStack() as folder:
        differences: list[str] = []
        trouble: UserError | None = None
        if own:
            try:
                if not resume:
                    own.make(
                        {**describe, **job.config.model_dump(mode="json")}, overwrite=overwrite
                    )
                folder.enter_context(own.held())
                differences = own.note_environment()
            except UserError as e:
                trouble = e
        # The others would wait for a process that has left.
        (trouble,) = broadcast_object_list([trouble])
        if trouble:
            raise trouble
        trainer = Trainer(job, run, quiet=quiet, on_epoch=on_epoch)
        at = trainer.train(resume=resume, differences=differences)
    return FitResult(
        job.model, at.history, at.best_epoch, at.train_seconds, run.folder if run else None
    )


def _accelerator(device: torch.device, run: RunFolder | None, *, tensorboard: bool) -> Accelerator:
    # On a machine without accelerators, several processes find each other only when told cpu. One
    # process alone is told where to run with each run, and may train on a GPU and then on the CPU.
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name, "1")) > 1 for name in names)  # as Accelerate asks
    options: dict[str, Any] = {"cpu": several and device.type == "cpu"}
    if not AcceleratorState._shared_state:
        # What a launcher's configuration says of precision and compilation is not to be followed.
        # Where the process has an Accelerator already, there is no other to be had.
        options |= {"mixed_precision": "no", "dynamo_backend": "no"}
    if not tensorboard:
        return _one_device(options)
    if run is None:
        raise UserError("tensorboard=True needs a run folder to write to: give out=...")
    need("tensorboard", "tensorboard=True", "surestep[tensorboard]")
    return _one_device({**options, "log_with": "tensorboard", "project_dir": run.folder})


def _one_device(options: dict[str, Any]) -> Accelerator:
    try:
        return Accelerator(**options)
    except ValueError as e:  # its state is one for the process
        raise UserError(
            f"this process has an Accelerator for something else ({' '.join(str(e).split())}): "
            "train in a new process"
        ) from e
