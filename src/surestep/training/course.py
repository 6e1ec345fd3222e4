"""What changes from step to step: learning rate, momentum, eps, averaging and AWP."""

from __future__ import annotations

from surestep.methods import Progress
from surestep.training.preparing import Job
from surestep.training.schedules import learning_rate, momentum, warm_up


def apply_schedules(job: Job, step: int) -> None:
    """Set everything for the next step, and tell the method how far training is."""
    config, steps = job.config, job.source.steps_per_epoch
    done = step / job.total
    lr = learning_rate(config.schedule, config.lr, done) * warm_up(step, config.warmup * steps)
    for group in job.optimizer.param_groups:
        group["lr"] = lr
        if "momentum" in group:
            group["momentum"] = momentum(config.schedule, config.momentum, done)
    progress = Progress(step, steps, job.total / steps, job.images, lr, job.labelled)
    job.method.progress = progress
    if config.eps_warmup:
        job.method.set_strength(job.strength * warm_up(step, config.eps_warmup * steps))
    job.take_step.averaging = progress.done >= (config.swa or 0)
    job.take_step.perturbing = step >= config.awp_from * steps
