"""The twenty masking checks: each one function with a value, a threshold and its evidence.

A flag is a reason to look harder, not a verdict. The verdict rests on what the attacks that a flag
calls for then find, though some flags can withhold "robust" (verdict.py). The thresholds were set
on the models of benchmarks/audit_zoo.py, whose truth is known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from surestep.activations import straight_through_layers
from surestep.attacks import losses
from surestep.attacks.ascent import climb
from surestep.attacks.inputs import forward_logits
from surestep.attacks.outcomes import SAME, logit_distance, share_of
from surestep.attacks.white_box import pgd_step_size
from surestep.auditing._check import Measurement, masking_check, over
from surestep.auditing._subject import Subject
from surestep.auditing.binarization import binarization_rates
from surestep.auditing.finite_differences import CONTRADICTED, error_along, errors_across
from surestep.devices import finest
from surestep.evaluation import doubts, evaluate, suite, wilson_interval
from surestep.evaluation.adapt import seeds_of
from surestep.threat import Linf, per_sample

BETWEEN = 100
"""Number of points tried on the line from an image to its FGSM point."""
GAP = 0.08
"""Largest usual gap between PGD and all attacks with AutoAttack, as a share of the images."""
SOLVED = 0.8
"""Share of the binarization test's problems that a working attack solves."""
MISLED = 0.1
"""Share of images with a gradient that is wrong across it above which gradients count as wrong.

Measured at a relative error of ``CONTRADICTED``: no image of a trained model, robust or not; all of
one with a branch that is detached or quantised.
"""

C19 = "Carlini et al. 2019"
A18 = "Athalye et al. 2018"
AA = "Croce & Hein 2020, AutoAttack"
IOAF = "Pintor et al. 2022, indicators of attack failure"


@masking_check(
    1,
    "Deterministic forward",
    "normalised logits differ by > 1e-4, #right differs, relative logits differ by > 0.01 in other "
    "batches or with gradients on, or forward seeds a random generator",
    AA,
)
def deterministic_forward(s: Subject) -> Measurement:
    """Repeated passes, a pass in other batches and a pass with gradients on must all agree."""
    x, y = s.probe
    first, *repeated = [s.logits(x) for _ in range(3)]
    others = {
        "depends on the rest of the batch": doubts.regrouped(s.model, x, s.batch_size),
        "answers differently with gradients on": doubts.logits(
            s.model, x, s.batch_size, gradients=True
        ),
    }
    right = [int((out.argmax(1) == y).sum()) for out in (first, *repeated, *others.values())]
    distance = max(logit_distance(first, run) for run in repeated)
    if not distance <= SAME or len(set(right[:3])) > 1:
        signs = ["is random"]
    else:
        limit = doubts.rounding_of(s.model)
        signs = [name for name, run in others.items() if doubts.differ_on_many(first, run, limit)]
        distance = max([distance, *(logit_distance(first, others[name]) for name in signs)])
    if seeds := seeds_of(s.model):
        signs.append(f"seeds the random generator of {', '.join(seeds)} in its forward")
    said = f"the model {' and '.join(signs)}" if signs else "passes agree"
    return Measurement(bool(signs), distance, said, {"right": right})


@masking_check(
    2,
    "Logits, not probabilities",
    "outputs in [0, 1] that sum to 1 within 1e-5 (16-bit weights: .02)",
    AA,
)
def logits_not_probabilities(s: Subject) -> Measurement:
    """Probabilities saturate and their gradients with them."""
    out = s.logits(s.probe[0])
    off = (out.sum(1) - 1).abs().max().item()
    flag = doubts.are_probabilities(s.model, out)
    said = "the model returns probabilities" if flag else "the model returns logits"
    return Measurement(flag, off, said, {"min": out.min().item(), "max": out.max().item()})


@masking_check(
    3,
    "Vanishing gradients",
    "any image whose input gradient is zero, or NaN in a tenth",
    f"{AA}; {IOAF}",
)
def vanishing_gradients(s: Subject) -> Measurement:
    """Gradients of zero tell an attack nothing."""
    x, y = s.probe
    near = s.threat.random_start(x)
    kinds = {"ce": losses.cross_entropy, "log-odds": losses.log_odds, "margin": losses.margin}
    shares = {
        f"{name} at {where}": share_of(doubts.is_flat(s.gradient(z, y, objective)))
        for name, objective in kinds.items()
        for where, z in (("x", x), ("a random start", near))
    }
    worst = max(shares.values())
    flag = worst > 0
    said = f"no gradient on up to {worst:.0%} of the images" if flag else "all images have one"
    return Measurement(flag, worst, said, {"shares": shares})


@masking_check(
    4,
    "Broken gradients",
    "graph broken, NaN or Inf in gradients or logits, or gradients off by > half from finite "
    "differences, along them in the median or, along random directions, on surely > 10% of images",
    IOAF,
)
def broken_gradients(s: Subject) -> Measurement:
    """NaN stops an ascent; a detached layer or a wrong backward blinds every gradient attack."""
    x, y = s.probe
    near = s.threat.random_start(x)
    grad = torch.cat([s.gradient(x, y), s.gradient(near, y)]).flatten(1)
    out = torch.cat([s.logits(s.x), s.logits(near)])
    shares = {
        "gradients": share_of((~grad.isfinite()).any(1)),
        "logits": share_of((~out.isfinite()).any(1)),
    }
    error = error_along(s, near, y)
    contradicted = error is not None and error > CONTRADICTED
    # Layers with a straight-through gradient are attacked along it; weights of 16 bits round such
    # short steps away.
    unsuited = straight_through_layers(s.model) or doubts.rounding_of(s.model) > doubts.ROUNDED
    across = torch.tensor([]) if unsuited else errors_across(s, near, y)
    off = int((across > CONTRADICTED).sum())
    hidden = wilson_interval(off, len(across))[0] > MISLED
    worst = max(1.0 if s.detached or contradicted or hidden else 0.0, *shares.values())
    if s.detached:
        said = "the output does not depend on the input through autograd"
    elif contradicted:
        said = f"finite differences contradict the gradient, which is off by {error:.0%}"
    elif hidden:
        said = (
            f"along random directions finite differences contradict the gradient on {off} of "
            f"{len(across)} images"
        )
    elif worst:
        of_grads, of_logits = shares["gradients"], shares["logits"]
        said = f"NaN or Inf in {of_grads:.0%} of gradients, {of_logits:.1%} of logits"
    else:
        said = "all finite"
    evidence = {
        "detached": s.detached,
        "difference error": error,
        "off across": off,
        "looked at across": len(across),
        "contradicted": contradicted or hidden,
    }
    return Measurement(worst > 0, worst, said, {**shares, **evidence})


@masking_check(5, "Optimisation inside forward", "autograd called in forward", AA)
def optimisation_in_forward(s: Subject) -> Measurement:
    """A forward that itself follows gradients adapts to the attack."""
    calls = 0
    # What grad and backward both end in, however they were imported.
    engine = torch.autograd._engine_run_backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = counted
    try:
        with torch.enable_grad():
            forward_logits(s.model, s.x[:2])
    finally:
        torch.autograd._engine_run_backward = engine
    said = f"forward calls autograd {calls} times" if calls else "forward calls no autograd"
    return Measurement(calls > 0, float(calls), said)


@masking_check(
    6, "One step beats many", "accuracy under FGSM < under PGD, by > .005", f"{C19}; {A18}"
)
def one_step_beats_many(s: Subject) -> Measurement:
    """More steps must find at least as much; when one finds more, the gradients mislead."""
    fgsm, pgd = s.accuracy("fgsm"), s.accuracy(f"pgd-{s.budget.steps}")
    # The two are measured on the same images: half a point is five of a thousand.
    flag = over(pgd - fgsm, doubts.BEATEN)
    return Measurement(flag, pgd - fgsm, f"FGSM leaves {fgsm:.1%}, PGD {pgd:.1%}")


@masking_check(
    7,
    "Collapse",
    "FGSM leaves > half of clean accuracy and PGD > 20 points less",
    "Kim et al. 2021; Wong et al. 2020",
)
def collapse(s: Subject) -> Measurement:
    """Catastrophic overfitting: robust to the one-step attack only."""
    fgsm, pgd = s.accuracy("fgsm"), min(s.accuracy(n) for n in s.right if n.startswith("pgd"))
    flag = fgsm > 0.5 * s.accuracy("clean") and over(fgsm - pgd, 0.2)
    return Measurement(flag, fgsm - pgd, f"FGSM leaves {fgsm:.1%}, PGD {pgd:.1%}")


@masking_check(
    8,
    "Black-box beats white-box",
    "Square or transfer leaves less than gradients, by > .002, or breaks > .02 that they do not",
    f"{AA}; {A18}; {C19}",
)
def black_box_beats_white_box(s: Subject) -> Measurement:
    """An attack without gradients must not find what gradients cannot."""
    white, clean = s.white_box, s.right["clean"]
    # Of an attack that was run on survivors alone, what it broke itself.
    left = {n: clean & ~s.broke[n] for n in s.broke if n.startswith(("square", "transfer"))}
    black = {n: share_of(rows) for n, rows in left.items()}
    if not black:
        return Measurement(None, None, "no black-box attack was run")
    name = min(black, key=lambda n: black[n])
    best = share_of(white)
    only = {n: int((white & ~rows).sum()) for n, rows in left.items()}
    said = f"{name} leaves {black[name]:.1%}, gradient attacks {best:.1%}"
    evidence: dict[str, Any] = {"accuracy": black, "broken only by it": only}
    if s.agreement is not None:
        said += f"; the substitute answers as the model on {s.agreement:.0%} of the images"
        evidence["substitute agrees"] = s.agreement
    return Measurement(
        over(best - black[name], 0.002) or max(only.values()) > doubts.MISSED * len(white),
        best - black[name],
        said,
        evidence,
    )


@masking_check(
    9,
    "Random beats gradient",
    "random points break an image that gradients do not",
    f"{C19}; {A18}",
)
def random_beats_gradient(s: Subject) -> Measurement:
    """Random search in a ball finds next to nothing where gradients work."""
    left = s.right[f"noise-{s.budget.noise}"]
    value = share_of(s.white_box & ~left)
    said = (
        f"{s.budget.noise:,} random points leave {share_of(left):.1%}, gradients "
        f"{share_of(s.white_box):.1%}, {value:.1%} fall to random points alone"
    )
    return Measurement(value > 0, value, said)


@masking_check(
    10,
    "Sweep of eps",
    "accuracy grows with eps by > .02, is > .05 above chance at eps .5, or unbounded > 0",
    f"{C19}; {A18}",
)
def eps_sweep(s: Subject) -> Measurement:
    """A larger ball holds the smaller one; one without bounds holds every image."""
    x, y = s.probe
    span, linf = s.threat.span, isinstance(s.threat, Linf)
    top = span * (1 if linf else x[0].numel() ** 0.5)
    multiples = {s.threat.eps * k for k in (0.25, 0.5, 0.75, 1, 1.5)}
    if linf:
        multiples = {min(r, span) for r in multiples} | {span / 2}
    radii = sorted(multiples | {top})
    accuracy = []
    for radius in map(s.threat.with_eps, radii):
        found = evaluate(
            s.model,
            (x, y),
            radius,
            # Of a name, ``evaluate`` would add the BPDA variant.
            suite.parse_all(["pgd-50"], radius),
            batch_size=s.batch_size,
            seed=s.seed,
            precision=s.precision,
            doubt=False,
        )
        accuracy.append(found.worst_case_accuracy)
    rise = max(max(b - a for a, b in pairwise(accuracy)), 0.0)
    chance = s.y.bincount().max().item() / len(s.y)
    wide = [a for r, a in zip(radii, accuracy, strict=True) if linf and r >= span / 2]
    half = max(wide, default=0.0)
    flag = over(rise, 0.02) or over(half - chance, 0.05) or accuracy[-1] > 0
    said = f"accuracy without bounds {accuracy[-1]:.0%}, largest rise {rise:.1%}"
    evidence = {"eps": radii, "accuracy": accuracy, "n": len(x)}
    return Measurement(flag, accuracy[-1], said, evidence)


@masking_check(
    11,
    "Convergence",
    "twice the steps or restarts change accuracy by > .01, or loss still moves",
    f"{C19}; {IOAF}",
)
def convergence(s: Subject) -> Measurement:
    """An attack that still breaks new images has not converged."""
    x, y = s.probe
    steps = [5, 10, 25, 50, 100]
    size = pgd_step_size(s.threat.eps, 100)
    best = s.search(x, y, 100, size, stop_when_wrong=True)
    broken = [int(((best.first_wrong >= 0) & (best.first_wrong <= k)).sum()) for k in steps]
    by_step = [1 - b / len(x) for b in broken]
    left, by_restart = best.wrong.logical_not(), [by_step[-1]]
    for _ in range(2):
        if left.any():
            again = s.search(x[left], y[left], 50, 2 * size, stop_when_wrong=True)
            left[left.clone()] = ~again.wrong
        by_restart.append(share_of(left))
    moving = _late_movement(s)
    late, restart = by_step[-2] - by_step[-1], by_restart[0] - by_restart[1]
    flag = over(late, 0.01) or over(restart, 0.01) or moving > 0.05
    said = (
        f"steps 50 to 100 find {late:.1%} more, a restart {restart:.1%}; the loss still moves by "
        f"{moving:.0%} of its range"
    )
    return Measurement(
        flag,
        max(late, restart),
        said,
        {
            "steps": steps,
            "accuracy": by_step,
            "restarts": [1, 2, 3],
            "restart_accuracy": by_restart,
            "late_movement": moving,
        },
    )


def _late_movement(s: Subject) -> float:
    """Return how far the mean loss moves in the last 10 of 50 steps, as a share of its range."""
    course = s.pgd_course.losses
    last, whole = course[-10:], max(course) - min(course)
    return (max(last) - min(last)) / whole if whole > 0 else 0.0


@masking_check(
    12, "Silent success", "> 1% of images were broken on the way and right at the end", IOAF
)
def silent_success(s: Subject) -> Measurement:
    """An attack that returns its last iterate loses these; surestep's keep the best."""
    lost = share_of(s.pgd_course.ever_wrong & ~s.pgd_course.wrong)
    return Measurement(lost > 0.01, lost, f"{lost:.1%} were broken only on the way")


@masking_check(13, "Cross entropy against margin", "the margin attack leaves > .05 less", AA)
def losses_agree(s: Subject) -> Measurement:
    """Scaled or smoothed logits blind one loss and not the other."""
    steps = s.budget.steps
    ce, other = s.accuracy(f"pgd-{steps}"), s.accuracy(f"pgd-{steps}-margin")
    return Measurement(
        over(ce - other, 0.05), ce - other, f"cross entropy leaves {ce:.1%}, margin {other:.1%}"
    )


@masking_check(
    14,
    "Gradient alignment",
    "mean cosine of gradients at x and nearby < .2",
    "Andriushchenko & Flammarion 2020, GradAlign",
)
def gradient_alignment(s: Subject) -> Measurement:
    """Where the loss is locally linear the gradient is the same nearby."""
    x, y = s.probe
    here = s.gradient(x, y).flatten(1)
    near = s.gradient(s.threat.random_start(x), y).flatten(1)
    cosine = F.cosine_similarity(here, near).nan_to_num(0).mean().item()
    pgd = s.search(x, y, 10, pgd_step_size(s.threat.eps, 10)).x_adv - x
    to_pgd = F.cosine_similarity((s.fgsm(x, y) - x).flatten(1), pgd.flatten(1)).mean().item()
    said = f"cosine {cosine:.2f}; of the FGSM and PGD perturbations {to_pgd:.2f}"
    return Measurement(cosine < 0.2, cosine, said, {"fgsm_pgd": to_pgd})


@masking_check(
    15,
    "Local linearity",
    "error of linear interpolation > half the mean loss",
    "Abad Rocamora et al. 2024, ELLE",
)
def local_linearity(s: Subject) -> Measurement:
    """Between two points of the ball the loss should lie near its linear interpolation."""
    x, y = s.probe
    a, b = s.threat.random_start(x), s.threat.random_start(x)
    share = torch.rand(len(x), device=x.device)
    mixed = per_sample(share, x)
    at = [s.loss(p, y).to(finest(x.device)) for p in (a, b, (1 - mixed) * a + mixed * b)]
    error = (at[2] - (1 - share) * at[0] - share * at[1]).square().mean().item()
    scale = torch.stack(at).square().mean().item()
    value = 0.0 if scale == 0 else (error / scale) ** 0.5
    return Measurement(not value <= 0.5, value, f"relative error {value:.2f}", {"error": error})


@masking_check(
    16,
    "Abnormal examples",
    "the FGSM step lowers the loss of > 5% of images",
    "Lin et al. 2023, AAER",
)
def abnormal_examples(s: Subject) -> Measurement:
    """A step along the gradient that lowers the loss went over a ridge."""
    x, y = s.probe
    share = share_of(s.loss(s.fgsm(x, y), y) < s.loss(x, y))
    return Measurement(
        share > 0.05, share, f"on {share:.1%} of the images the step lowers the loss"
    )


@masking_check(
    17,
    "Distorted boundary",
    f"> 5% of images right at both ends are wrong at one of {BETWEEN} points between",
    "Kim et al. 2021",
)
def distorted_boundary(s: Subject) -> Measurement:
    """Between an image and its FGSM point, both right, lies another class."""
    x, y = s.probe
    end = s.fgsm(x, y)
    both = (s.logits(x).argmax(1) == y) & (s.logits(end).argmax(1) == y)
    if not both.any():
        return Measurement(False, 0.0, "FGSM leaves no image right", {"right at both ends": 0})
    left = both.nonzero().squeeze(1)
    for position in torch.linspace(0, 1, BETWEEN + 2).tolist()[1:-1]:
        between = x[left] + position * (end[left] - x[left])
        left = left[s.logits(between).argmax(1) == y[left]] if len(left) else left
    share = 1 - len(left) / int(both.sum())
    said = f"of {int(both.sum())} images right at both ends, {share:.1%} are wrong between"
    return Measurement(over(share, 0.05), share, said, {"right at both ends": int(both.sum())})


@masking_check(
    18,
    "The SAT properties",
    "loss at eps / 3 > .9 of the loss at eps, on images FGSM leaves right",
    "Vivek & Babu 2020, arXiv 2002.00614",
)
def sat_properties(s: Subject) -> Measurement:
    """What SAT-R1, R2 and R3 penalise: logits that disagree, a loss that does not grow."""
    x, y = s.probe
    step = s.fgsm_step(x, y)
    at_f = s.logits(s.threat.project(x + step, x))
    # The last iterate, as SAT-R1 has it, not the strongest; the image where a gradient is NaN.
    size = s.threat.eps / 10
    ifgsm = s.map(lambda a, b: climb(s.model, a, b, a, s.threat, 10, size), x, y)
    ifgsm = torch.where(ifgsm.isfinite(), ifgsm, x)
    alpha = s.threat.eps / 30
    noisy = s.threat.clip(x + s.threat.random_step(x, alpha))
    rfgsm = s.threat.project(s.fgsm(noisy, y), x)
    size = at_f.square().sum(1).mean().item() or 1.0
    distances = {
        "FGSM to I-FGSM": (at_f - s.logits(ifgsm)).square().sum(1).mean().item() / size,
        "FGSM to R-FGSM": (at_f - s.logits(rfgsm)).square().sum(1).mean().item() / size,
    }
    shares = [k / 10 for k in range(11)]
    kept = at_f.argmax(1) == y
    points = [s.loss(s.threat.project(x + share * step, x), y) for share in shares]
    course = [p.mean().item() for p in points]
    low = s.loss(s.threat.project(x + step / 3, x), y)
    held = points[-1][kept].mean().item() if kept.any() else float("nan")
    ratio = low[kept].mean().item() / held if kept.any() and held > 0 else 0.0
    said = (
        f"the loss at eps / 3 is {ratio:.2f} of that at eps; logits apart by "
        f"{distances['FGSM to I-FGSM']:.2f} (I-FGSM) and {distances['FGSM to R-FGSM']:.2f} (R-FGSM)"
    )
    return Measurement(ratio > 0.9, ratio, said, {"step": shares, "loss": course, **distances})


@masking_check(
    19,
    "Binarization test",
    "PGD solves < 80% of problems that have a solution, or random as many",
    "Zimmermann et al. 2022",
)
def binarization(s: Subject) -> Measurement:
    """A readout with a planted adversarial point: an attack that works must find one."""
    x, _ = s.probe
    some = x[: max(20, s.budget.probe // 5)]
    rates = binarization_rates(s.model, some, s.threat, s.batch_size)
    if rates is None:
        return Measurement(
            None, None, "no problem could be posed: points within the ball have the same features"
        )
    pgd, noise, posed = rates
    flag = pgd < SOLVED or pgd <= noise
    said = f"of {posed} posed problems PGD solves {pgd:.0%}, random points {noise:.0%}"
    return Measurement(flag, pgd, said, {"pgd": pgd, "random": noise, "posed": posed})


@masking_check(
    20,
    "Profile of gaps",
    "PGD over AutoAttack > 8 points, or PGD-10 over PGD > 3",
    "medians of the 186 runs of the FastAT benchmark, arXiv 2604.22853: 5.2 and 0.7 points",
)
def gap_profile(s: Subject) -> Measurement:
    """How much each stronger attack takes, against what is usual."""
    pgd, ten = s.accuracy(f"pgd-{s.budget.steps}"), s.accuracy("pgd-10")
    gaps = {"pgd-10 over pgd": ten - pgd}
    flag = over(ten - pgd, 0.03)
    if "autoattack" in s.right:  # run on what the others left, so its share includes theirs
        gaps["pgd over all with autoattack"] = pgd - share_of(s.survivors)
        flag |= over(gaps["pgd over all with autoattack"], GAP)
    said = ", ".join(f"{name} {100 * gap:.1f} points" for name, gap in gaps.items())
    return Measurement(flag, max(gaps.values()), said, gaps)
