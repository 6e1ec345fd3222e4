"""The training loop. There is one, for all methods; one process is its simplest case."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surestep import files
from surestep.attacks.core import (
    attacking,
    check_inputs,
    check_labels,
    compiled_whole,
    count_classes,
    forked_rng,
    share_of,
    uncompiled,
)
from surestep.config import FitSettings, parse
from surestep.data import Images, as_pixels, seed_of
from surestep.devices import memory_for, pick_device
from surestep.errors import UserError
from surestep.evaluation import Adapted, Evaluation, evaluate, suite
from surestep.methods import Method, Progress, StepResult, settle
from surestep.methods._dropout import dropping
from surestep.training import checkpoint
from surestep.training.averaging import WeightAverage
from surestep.training.engine import Engine, make_optimizer, make_step, match_layout
from surestep.training.memory import fit_into
from surestep.training.picking import MIN_STEPS, Pick, pick_engine
from surestep.training.progress import Display
from surestep.training.run_folder import RunFolder
from surestep.training.schedules import learning_rate, momentum, warm_up
from surestep.training.source import (
    Batch,
    LoaderSource,
    Replayed,
    Source,
    first_of,
    image_shape,
    make_source,
    split,
)
from surestep.training.state import RunState, Sums
from surestep.training.stopping import Asked, StopRequest

VALIDATED = 500
"""Most images that validation attacks at a time."""

COLLAPSE = 0.20
"""Fall of robust accuracy between two epochs that counts as collapse (Kim et al. 2021)."""


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


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
            and put into train mode. One that ``torch.compile`` returned is trained as it is, and
            the module inside it kept.
        data: Images, a pair of tensors (x, y), a Dataset or a DataLoader. Of several processes
            each takes batches of a DataLoader's own size; ``batch_size`` is of all together.
        method: what a step minimises.
        out: run folder for ``config.yaml``, ``environment.json``, ``metrics.jsonl``,
            ``model.safetensors`` and ``checkpoints/``; None writes nothing.
        validation: held-out data; by default a tenth of ``data``, at most ``val_images``. Those of
            a Dataset come through its own transforms: give them here where these are random.
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
            f"{method!r} is no method: give surestep.methods.get('sat-r2')(surestep.Linf(0.3)), say"
        )
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
    loading = {"workers": workers, "steps": steps_per_epoch}
    trainer = _Trainer(
        model, data, method, config, accelerator, target, run, validation, quiet, loading, on_epoch
    )
    # Only now is everything checked: a mistake must not cost an old run.
    accelerator.wait_for_everyone()
    own = run if accelerator.is_main_process else None
    if own and not resume:
        own.make({**describe, **trainer.config.model_dump(mode="json")}, overwrite=overwrite)
    with own.held() if own else nullcontext():
        differences = own.note_environment() if own else []
        accelerator.wait_for_everyone()
        return trainer.train(resume=resume, differences=differences)


def _accelerator(device: torch.device, run: RunFolder | None, *, tensorboard: bool) -> Accelerator:
    # On a machine without accelerators, several processes find each other only when told cpu.
    options: dict[str, Any] = {"cpu": device.type == "cpu"}
    if not AcceleratorState._shared_state:
        # What a launcher's configuration says of precision and compilation is not to be followed.
        # Where the process has an Accelerator already, there is no other to be had.
        options |= {"mixed_precision": "no", "dynamo_backend": "no"}
    if not tensorboard:
        return _one_device(options)
    if run is None:
        raise UserError("tensorboard=True needs a run folder to write to: give out=...")
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("TensorBoard is not installed: pip install 'surestep[tensorboard]'")
    return _one_device({**options, "log_with": "tensorboard", "project_dir": run.folder})


def _one_device(options: dict[str, Any]) -> Accelerator:
    try:
        return Accelerator(**options)
    except ValueError as e:  # its state is one for the process
        raise UserError(
            f"this process has an Accelerator for something else ({' '.join(str(e).split())}): "
            "train in a new process"
        ) from e


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
    if config.awp_from and config.awp is None:
        raise UserError(f"awp_from ({config.awp_from:g}) says when awp begins: give awp, too")
    if config.ema and config.swa:
        raise UserError(
            f"ema ({config.ema:g}) and swa ({config.swa:g}) both average the weights: "
            "leave one of them out"
        )


class _Trainer:
    """One run: the loop, and the state that a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        method: Method,
        config: FitSettings,
        accelerator: Accelerator,
        device: torch.device,
        run: RunFolder | None,
        validation: Any,
        quiet: bool,
        loading: dict[str, Any],
        on_epoch: Callable[[dict[str, Any], nn.Module], None] | None,
    ) -> None:
        _check_together(config, method)
        # The first process has the run's own seed; a hash keeps the others from other runs'.
        rank = accelerator.process_index
        checkpoint.seed_everything(seed_of("process", config.seed, rank) if rank else config.seed)
        self.model, self.method, self.config = uncompiled(model), method, config
        # Validation attacks with all of eps from the first epoch on.
        self.threat = method.threat
        self.accelerator, self.device, self.run = accelerator, device, run
        self.quiet = quiet or not accelerator.is_main_process
        self.on_epoch = on_epoch if accelerator.is_main_process else None
        train, self.held_out = split(data, validation, config.val_images, config.seed)
        self.images = len(train) if isinstance(train, Images) else 0
        self.labelled = share_of(train.y >= 0) if isinstance(train, Images) else 1.0
        inside = isinstance(train, Images)
        self.signature = files.Signature(train.classes, train.image_shape) if inside else None
        self.source = self._open(train, loading)
        self.total = self._count_steps()
        # Images of a step, of this process.
        self.share = math.ceil(config.batch_size / accelerator.num_processes)
        self.size = f"batch_size ({config.batch_size})"
        if isinstance(train, DataLoader) and train.batch_size:
            self.share = train.batch_size
            self.size = f"the DataLoader's batch_size ({train.batch_size})"
        self.model.to(device).train()
        # What cannot be trained must not be found out when an old run has made room for it.
        with dropping(self.model, method.dropout):
            pass
        self._look_at(train)
        if self.held_out is not None:
            self._look_at(self.held_out)
        self.pick = self._try_engines(train) if isinstance(train, Images) else None
        if method.replays > 1:
            self.source = Replayed(self.source, method.replays)
        shape = image_shape(train)
        self.engine = self._lay_out(shape)
        self.average = None
        if config.ema or config.swa:
            self.average = WeightAverage(self.model, config.ema)
        self._best: dict[str, Tensor] = {}
        self.optimizer = make_optimizer(
            config.optimizer,
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.take_step = make_step(
            self._wrapped(model, shape),
            method,
            self.optimizer,
            self.engine,
            clip_grad=config.clip_grad,
            average=self.average,
            awp=config.awp,
        )
        self.at = RunState()
        self.stop = StopRequest()

    def _open(self, train: Any, loading: dict[str, Any]) -> Source:
        """Return the source of batches.

        Raises:
            UserError: data that the threat model or the method cannot take.
        """
        inside = any(isinstance(part, Images) for part in (train, self.held_out))
        if inside and self.threat.bounds != (0.0, 1.0):
            raise UserError(
                f"images in memory are pixels in [0, 1], the threat model's data range is "
                f"{self.threat.bounds}: leave bounds out, or give data and validation as loaders"
            )
        if self.method.remembers and not self.images:
            raise UserError(
                f"{self.method.slug} keeps a perturbation for each image: give images in memory, a "
                "pair of tensors (x, y), instead of a Dataset or DataLoader"
            )
        # Batches are moved by the source, without waiting for the device.
        prepare = functools.partial(self.accelerator.prepare_data_loader, device_placement=False)
        with memory_for("moving the data", "give memory-mapped arrays or a DataLoader"):
            return make_source(
                train,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                augmentation=self.config.augment,
                device=self.device,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                prepare=prepare,
                bounds=self.threat.bounds,
                **loading,
            )

    def _count_steps(self) -> int:
        """Return the number of steps of the whole run.

        Raises:
            UserError: there is none.
        """
        steps = self.source.steps_per_epoch
        if not steps:
            raise UserError("there is no batch to train on: the data hold fewer images than one")
        total = round(self.method.replays * steps * self.config.epochs)
        if not total:
            raise UserError(
                f"{self.config.epochs:g} epochs of {steps} steps are less than one: give more "
                "epochs"
            )
        return total

    def _look_at(self, data: Any) -> None:
        """Check all labels of Images, where the method looks at a batch's only; of others an item.

        Raises:
            UserError: they cannot be trained, or judged, on.
        """
        unlabelled = self.method.without_labels and data is not self.held_out
        if isinstance(data, Images):
            one = data.pixels(slice(0, 1)).to(self.device)
            check_labels(data.y, count_classes(self.model, one), unlabelled=unlabelled)
        elif batch := first_of(data):
            x, y = (part.to(self.device) for part in batch)
            x = as_pixels(x, self.threat.bounds)
            # As validation takes them.
            model = Adapted(self.model) if data is self.held_out else self.model
            check_inputs(model, x, y, self.threat, unlabelled=unlabelled)

    def _try_engines(self, train: Images) -> Pick | None:
        """Pick the fastest engine, where that pays."""
        # Where memory is short there is none for trials, and little to choose.
        if self.config.engine != "auto" or self.total < MIN_STEPS or self.config.max_memory:
            return None
        with self._one_line("the trial of engines", self.share):
            return self._pick_engine(torch.Size(train.image_shape))

    def _lay_out(self, shape: torch.Size | None) -> Engine:
        """Bring the model's weights into the layout of the engine, and return it."""
        engine = Engine.choose(self.config.engine, self.config.precision, self.device)
        engine.place(self.model)
        if shape:
            engine = engine.suited(self.model, shape)
        # What a run goes on with, where another machine's choice may be another.
        self.config = self.config.model_copy(update={"precision": engine.precision_name})
        return engine

    def _wrapped(self, given: nn.Module, shape: torch.Size | None) -> nn.Module:
        """Return the network as the step calls it: compiled, in parts, of several processes."""
        stepped, limit = self.model, self.config.max_memory
        if self.config.compile:
            # The step's network alone: batches of validation shrink, and each size is compiled.
            whole = compiled_whole(given)
            stepped = given if whole else cast(nn.Module, torch.compile(stepped))
        if limit:
            if shape is None:
                raise UserError(
                    f"max_memory ({limit:g}) needs the shape of an image, which these data do not "
                    "tell: give a Dataset whose items are pairs of tensors, or a smaller batch "
                    "instead"
                )
            stepped = fit_into(self.model, self.method, self.engine, shape, self.share, limit)
        if self.accelerator.num_processes > 1:
            # Alone it would only add autocast that it was told of.
            stepped = self.accelerator.prepare_model(stepped, device_placement=False)
        return stepped

    def _pick_engine(self, shape: torch.Size) -> Pick | None:
        """Set the fastest engine, measured in the first process, in the settings of all."""
        picks: list[Pick | None] = [None]
        if self.accelerator.is_main_process:
            picks = [pick_engine(self.model, self.method, shape, self.share, self.config.precision)]
        (pick,) = broadcast_object_list(picks)
        if not pick:
            return None
        chosen = {"engine": pick.engine, "precision": pick.precision}
        self.config = self.config.model_copy(update=chosen)
        return pick

    @property
    def judged(self) -> nn.Module:
        """The weights that are validated and kept: the average, if there is one by now."""
        return self.average.model if self.average and self.average.updates else self.model

    def train(self, *, resume: bool, differences: list[str]) -> FitResult:
        """Train to the end; ``differences`` are to where a resumed run was begun."""
        if self.config.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        with Display(self.total, quiet=self.quiet) as self.display:
            if self.pick:
                self.display.say(str(self.pick))
            for difference in differences:
                self.display.say(f"results may differ in the last digits: {difference}")
            restored = self._restore() if resume else None
            # Without a folder there is nothing to go on from: signals do what they always do.
            with self.stop.heard() if self.run else nullcontext():
                while self.at.epoch < math.ceil(self.total / self.source.steps_per_epoch):
                    self._epoch(restored)
                    restored = None
        self._finish()
        if self.stop.number:  # heard when there was nothing left to stop
            self.stop.leave()
        return FitResult(
            self.model,
            self.at.history,
            self.at.best_epoch,
            self.at.train_seconds,
            self.run.folder if self.run else None,
        )

    def _epoch(self, restored: dict[str, Any] | None) -> None:
        """Train one epoch (from a checkpoint within it: the rest of it), validate, save."""
        steps = self.source.steps_per_epoch
        # All of an epoch's steps are done where a run was stopped while it was validated.
        skip = self.at.step - steps * self.at.epoch
        # The last epoch may be a part of one.
        left = min(steps - skip, self.total - self.at.step)
        sums = Sums(self.device)
        if restored:
            parts = restored["sums"]
            # Checkpoints of older versions have the first process's alone.
            parts = parts if isinstance(parts, list) else [parts]
            sums.load_state_dict(parts[min(self.accelerator.process_index, len(parts) - 1)])
        self._began = time.perf_counter() - self.at.train_seconds
        for x, y, index in self._batches(skip, left, restored):
            self._set_course(self._set_rates())
            result = self._step(x, y, index)
            self.at.step += 1
            # Of images without a label there is nothing to be right about.
            hits = (result.logits.argmax(1) == y).float().mean() / self.labelled
            values = {"loss": result.loss, **result.terms, "adv_accuracy": hits}
            sums.add(self.at.step, len(x), values)
            if self.display.due():
                self._show(sums)
            self._pause(sums)
        self._check_finite(sums, weights=True)
        self._share_buffers()
        speed = self._speed(sums)
        self.at.epoch += 1
        row = {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **sums.means_of_all(),
            "images_per_second": speed,
            "train_seconds": self.at.train_seconds,
        }
        random_state = self._random_state()
        try:
            self._validate(row)
        except (Asked, UserError) as e:
            # A resume begins with the validation. With an error a process may be alone.
            if isinstance(e, Asked) or self.accelerator.num_processes == 1:
                self.at.epoch -= 1
                self._set_random_state(random_state)
                self._save(sums)
            if isinstance(e, Asked):
                self._leave()
            raise
        self._record(row)

    def _pause(self, sums: Sums) -> None:
        """Write a checkpoint within the epoch if one is due, and stop there if that is asked."""
        every, step = self.config.checkpoint_every, self.at.step
        within = step % self.source.steps_per_epoch and step < self.total
        due = every and step % every == 0 and within
        stops = self.run is not None and self.stop.after(step, self.device)
        if not (due or stops):
            return
        self._check_finite(sums, weights=True)
        self._share_buffers()
        self._speed(sums)
        self._save(sums)
        # Writing is no training.
        self._began = time.perf_counter() - self.at.train_seconds
        if stops:
            self._leave()

    def _speed(self, sums: Sums) -> float:
        """Take the time, and return the images a second of this epoch so far."""
        self.at.train_seconds = time.perf_counter() - self._began
        before = self.at.history[-1]["train_seconds"] if self.at.history else 0.0
        return sums.images * self.accelerator.num_processes / (self.at.train_seconds - before)

    def _batches(self, skip: int, left: int, restored: dict[str, Any] | None) -> Iterator[Batch]:
        """Return so many batches of the epoch; from a checkpoint within it, those after it."""
        states = restored["rng"] if restored else gather_object([self._random_state()])
        # A loader draws its order when an epoch begins, so its beginning is restored first.
        self.epoch_rng = restored.get("epoch_rng", states) if restored and skip else states
        if restored:
            self._set_random_states(self.epoch_rng)
        batches = self.source.epoch(self.at.epoch, skip) if left else iter(())
        if restored and skip:
            self._set_random_states(states)
        return itertools.islice(batches, left)

    def _leave(self) -> NoReturn:
        assert self.run is not None
        self.display.say(
            f"stopped at step {self.at.step} of {self.total}: {self.run.folder} is saved"
        )
        self._end()
        self.stop.leave()

    def _step(self, x: Tensor, y: Tensor, index: Tensor | None) -> StepResult:
        draw = None
        if self.method.remembers:
            draw = self.source.draw(self.at.epoch, self.at.step % self.source.steps_per_epoch)
        with self._one_line(f"step {self.at.step + 1}", len(x)):
            return self.take_step(x, y, index, draw)

    @contextmanager
    def _one_line(self, where: str, images: int) -> Iterator[None]:
        """Turn what the compiler cannot do, and memory that is full, into one clear line."""
        limit = self.config.max_memory
        less = f"max_memory ({limit:g})" if limit else "set max_memory, in GiB"
        advice = f"lower {self.size}, or {less}"
        try:
            with memory_for(f"{where}, of {images} images", advice):
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
                    f"several processes cannot train a model of which parameters take no part in "
                    f"the logits: {which}; freeze them with requires_grad_(False)"
                ) from e
            raise

    def _set_rates(self) -> float:
        """Set learning rate and momentum of the step to come; return the former."""
        name, done = self.config.schedule, self.at.step / self.total
        lr = learning_rate(name, self.config.lr, done) * self._warmed_up(self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "momentum" in group:
                group["momentum"] = momentum(name, self.config.momentum, done)
        return lr

    def _set_course(self, lr: float) -> None:
        """Tell the method where training is, and with what share of eps to attack."""
        steps = self.source.steps_per_epoch
        self.method.progress = Progress(
            self.at.step, steps, self.total / steps, self.images, lr, self.labelled
        )
        if self.config.eps_warmup:
            self.method.set_strength(self._warmed_up(self.config.eps_warmup))
        self.take_step.averaging = self.method.progress.done >= (self.config.swa or 0)
        self.take_step.perturbing = self.at.step >= self.config.awp_from * steps

    def _warmed_up(self, epochs: float) -> float:
        return warm_up(self.at.step, epochs * self.source.steps_per_epoch)

    def _show(self, sums: Sums) -> None:
        self._check_finite(sums)
        means, speed = sums.means(), self._speed(sums)
        robust = f"  robust {self.at.last_robust:.1%}" if self.at.last_robust >= 0 else ""
        parts = "  ".join(f"{k} {v:.3f}" for k, v in means.items() if k != "adv_accuracy")
        epoch = f"epoch {self.at.epoch + 1}/{math.ceil(self.config.epochs)}"
        self.display.step(self.at.step, epoch, f"{parts}{robust}  {speed:,.0f} img/s")

    def _check_finite(self, sums: Sums, *, weights: bool = False) -> None:
        """Stop if a loss was not finite, or the weights no longer are."""
        bad = int(sums.bad_step)
        if bad < 0 and weights:
            finite = [p.detach().isfinite().all() for p in self.model.parameters()]
            bad = -1 if bool(torch.stack(finite).all()) else self.at.step
        if bad < 0:
            return
        kept = checkpoint.found(self.run.checkpoints) if self.run else []
        where = f"last good checkpoint: {kept[-1]}" if kept else "no checkpoint was written yet"
        epoch = (bad - 1) // self.source.steps_per_epoch + 1
        raise TrainingDiverged(
            f"the loss became NaN or infinite at step {bad} (epoch {epoch}); {where}: lower lr "
            f"({self.config.lr:g}), set clip_grad, or use precision fp32"
        )

    def _validate(self, row: dict[str, Any]) -> None:
        """Attack the held-out images, watch for collapse, and keep the best weights."""
        if self.held_out is None:
            self.at.best_epoch = self.at.epoch
            return
        with self.stop.at_once():
            found = self._attack_held_out()
        row["val_n"] = found.n
        row["val_clean"] = found.clean_accuracy
        row |= {f"val_{name}": value for name, value in found.robust_accuracy.items()}
        # Kernels may round apart: all processes must select the weights of the same epoch.
        (score,) = broadcast_object_list([found.worst_case_accuracy])
        row["val_worst_case"] = score
        row["val_seconds"] = found.seconds
        one_step = found.robust_accuracy.get("fgsm", score)
        fell = self.at.last_robust - score > COLLAPSE
        masked = one_step - score > max(COLLAPSE, one_step / 2)
        if fell or masked:
            row["collapse"] = True
            self.display.say(
                f"warning: gradient masking after epoch {self.at.epoch}: accuracy under FGSM is "
                f"{one_step:.1%}, under the strongest attack {score:.1%}"
                + (f" (it was {self.at.last_robust:.1%})" if fell else ""),
                "yellow",
            )
        self.at.last_robust = score
        if self.config.select == "last" or score > self.at.best_score:
            self.at.best_epoch, self.at.best_score = self.at.epoch, score

    def _attack_held_out(self) -> Evaluation:
        return evaluate(
            self.judged,
            self.held_out,
            self.threat,
            self.config.val_attacks,
            n=self.config.val_images,
            # What fits in training fits here.
            batch_size=min(VALIDATED, self.share),
            seed=self.config.seed,
            precision=self.engine.precision,
            progress=lambda *_: self.stop.together(self.device),
        )

    def _record(self, row: dict[str, Any]) -> None:
        """Write the epoch's row, then the weights if they are the best, then the checkpoint."""
        self.at.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=self.at.step)
        robust = f"  robust {row['val_worst_case']:.1%}" if "val_worst_case" in row else ""
        clean = f"  clean {row['val_clean']:.1%}" if "val_clean" in row else ""
        epochs = math.ceil(self.config.epochs)
        self.display.say(
            f"epoch {self.at.epoch}/{epochs}  loss {row['loss']:.4f}{clean}{robust}"
            f"  {row['images_per_second']:,.0f} img/s"
        )
        if self.run and self.accelerator.is_main_process:
            rows = "".join(json.dumps(r) + "\n" for r in self.at.history)
            files.write_atomically(self.run.metrics, rows)
            if self.at.best_epoch == self.at.epoch:
                files.save_weights(self.run.weights, self.judged, self.signature)
        if self.at.best_epoch == self.at.epoch:
            self._best = {} if self.run else _copy(self.judged.state_dict())
        self._save(Sums(self.device))
        if self.on_epoch:
            # What a logger draws, or sets, training must not miss.
            with attacking(self.judged) as model, forked_rng(self.device):
                self.on_epoch(dict(row), model)

    def _save(self, sums: Sums) -> None:
        """Write a checkpoint of everything the rest of the run depends on."""
        if self.run is None:
            return
        states = gather_object([self._random_state()])
        parts = gather_object([sums.state_dict()])
        # In every process: what each has of a batch is gathered.
        method = self.method.state_dict()
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.run.checkpoints,
                self.at.step,
                {
                    "progress": asdict(self.at),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.take_step.scaler.state_dict(),
                    "average": self.average.state_dict() if self.average else None,
                    "method": method,
                    "sums": parts,
                    "rng": states,
                    "epoch_rng": self.epoch_rng,
                    "steps_per_epoch": self.source.steps_per_epoch,
                },
            )

    def _share_buffers(self) -> None:
        """Give every process the batch statistics of the first, whose weights are kept."""
        if self.accelerator.num_processes > 1:
            for module in dict.fromkeys((self.model, self.judged)):
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def _loader_generators(self) -> list[torch.Generator]:
        source = self.source.source if isinstance(self.source, Replayed) else self.source
        return source.generators() if isinstance(source, LoaderSource) else []

    def _random_state(self) -> dict[str, Any]:
        loader = [generator.get_state() for generator in self._loader_generators()]
        return {**checkpoint.rng_state(self.device), "loader": loader}

    def _set_random_states(self, states: list[dict[str, Any]]) -> None:
        """Restore this process's; one that the run did not have draws numbers of its own."""
        rank = self.accelerator.process_index
        if rank < len(states):
            self._set_random_state(states[rank])
        else:
            checkpoint.seed_everything(seed_of("process", self.config.seed, rank, self.at.step))

    def _set_random_state(self, state: dict[str, Any]) -> None:
        checkpoint.set_rng_state(state, self.device)
        for generator, value in zip(self._loader_generators(), state["loader"], strict=True):
            generator.set_state(value)

    def _restore(self) -> dict[str, Any] | None:
        """Load the newest checkpoint, but for what the epoch itself restores; return it."""
        assert self.run is not None
        state = checkpoint.load_newest(self.run.checkpoints, self.display.say)
        if state is None:
            rows = self.run.history()
            if self.run.ended(self.config.epochs):
                self.at = self._ended(rows)
                return None
            if len(rows) > 1:
                raise UserError(
                    f"cannot resume {self.run.folder}: it has {len(rows)} epochs and no "
                    f"checkpoint; train it anew with --config {self.run.config}, another --out"
                )
            return None
        self._check_steps(len(state["rng"]), state.get("steps_per_epoch"))
        self.at = RunState(**state["progress"])
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"cannot resume {self.run.folder} with another model: {reason}") from e
        self.optimizer.load_state_dict(state["optimizer"])
        match_layout(self.optimizer)
        self.take_step.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.method.load_state_dict(state["method"])
        self.display.say(f"resuming {self.run.folder} at step {self.at.step} of {self.total}")
        return state

    def _check_steps(self, begun: int, steps: int | None) -> None:
        """Let a run go on with another number of processes where its steps stay what they were."""
        assert self.run is not None
        now, expected = self.accelerator.num_processes, self.source.steps_per_epoch
        if begun == now:
            if steps not in (None, expected):  # older checkpoints do not say
                raise UserError(
                    f"{self.run.folder} has epochs of {steps} steps, these data give {expected}: "
                    "resume with the data and the batch size that it was begun with"
                )
            return
        if not self.images:
            raise UserError(
                f"{self.run.folder} was run on {begun} processes, this is {now}, which share a "
                "Dataset or DataLoader out otherwise: resume with the same number"
            )
        self.display.say(
            f"results differ from an uninterrupted run's: it was begun with {begun} processes and "
            f"goes on with {now}, which draw other random numbers"
        )

    def _ended(self, rows: list[dict[str, Any]]) -> RunState:
        """Return the progress of a run that is done and whose checkpoints were removed."""
        scores = [row.get("val_worst_case", 0.0) for row in rows]
        last = self.config.select == "last" or "val_worst_case" not in rows[-1]
        return RunState(
            step=self.total,
            epoch=len(rows),
            best_epoch=len(rows) if last else 1 + scores.index(max(scores)),
            train_seconds=rows[-1]["train_seconds"],
            history=rows,
        )

    def _end(self) -> None:
        """Wait until the first process has written what it writes: a launcher ends all with one."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _finish(self) -> None:
        """Leave the selected weights in the model."""
        self._end()
        if self.run:
            files.load_weights(self.run.weights, self.model)
        else:
            self.model.load_state_dict(self._best)
        self.model.eval()


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}
