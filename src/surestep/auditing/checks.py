"""The masking checks: each one function with a value, a threshold and its evidence.

A flag is a reason to look harder, not a verdict. The verdict rests on what the attacks that a flag
calls for then find, though a check can withhold "robust" where it shows that gradient attacks are
blind. The thresholds were set on the models of benchmarks/audit_zoo.py, whose truth is known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from surestep.evaluation import doubts, evaluate, share_interval, suite
from surestep.evaluation.adapt import seeds_of
from surestep.evaluation.result import at_least
from surestep.threat import Linf, per_sample

BETWEEN = 100
"""Number of points tried on the line from an image to its FGSM point."""
BLIND = 0.1
"""Share of images without a gradient above which surviving gradient attacks says little."""
UNBOUNDED = 0.05
"""Share of images above which the failure of an unbounded attack counts by itself."""
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
    flags_when=f"normalised logits differ by > {SAME:g}, #right differs, relative logits differ by "
    f"> {doubts.ROUNDED:g} in other batches or with gradients on, or forward seeds a random "
    "generator",
    source=AA,
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
    flags_when="outputs in [0, 1] that sum to 1 within 1e-5 (16-bit weights: 0.02)",
    source=AA,
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
    flags_when="any image whose input gradient is zero, or NaN in a tenth",
    source=f"{AA}; {IOAF}",
)
def vanishing_gradients(s: Subject) -> Measurement:
    """Gradients of zero tell an attack nothing."""
    x, y = s.probe
    places = {"x": x, "a random start": s.threat.random_start(x)}
    kinds = {"ce": losses.cross_entropy, "log-odds": losses.log_odds, "margin": losses.margin}
    shares = {
        f"{name} at {where}": share_of(doubts.is_flat(s.gradient(z, y, objective)))
        for name, objective in kinds.items()
        for where, z in places.items()
    }
    worst = max(shares.values())
    # Of the three, log-odds vanish last.
    lost = max(shares[f"log-odds at {where}"] for where in places)
    return Measurement(
        worst > 0,
        worst,
        f"no gradient on up to {worst:.0%} of the images" if worst else "all images have one",
        {"shares": shares},
        blind=lost > BLIND,
        sign=f"no gradient on {lost:.0%} of the images",
    )


@masking_check(
    4,
    "Broken gradients",
    flags_when="graph broken, NaN or Inf in gradients or logits, or gradients off by > "
    f"{CONTRADICTED:.0%} from finite differences, along them in the median or, along random "
    f"directions, on surely > {MISLED:.0%} of images",
    source=IOAF,
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
    hidden = at_least(off, len(across)) > MISLED
    blind = s.detached or contradicted or hidden
    worst = max(float(blind), *shares.values())
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
    evidence: dict[str, Any] = {
        **shares,
        "detached": s.detached,
        "difference error": error,
        "off across": off,
        "looked at across": len(across),
        "contradicted": contradicted or hidden,
    }
    # NaN gradients are no sign: an attack is blind on their images alone, which check 3 counts.
    return Measurement(worst > 0, worst, said, evidence, blind=blind)


@masking_check(5, "Optimisation inside forward", flags_when="autograd called in forward", source=AA)
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
    6,
    "One step beats many",
    flags_when=f"accuracy under FGSM < under PGD, by > {doubts.BEATEN:g}",
    source=f"{C19}; {A18}",
)
def one_step_beats_many(s: Subject) -> Measurement:
    """More steps must find at least as much; when one finds more, the gradients mislead."""
    fgsm, pgd = s.accuracy("fgsm"), s.accuracy(s.budget.pgd)
    # The two are measured on the same images: half a point is five of a thousand.
    flag = over(pgd - fgsm, doubts.BEATEN)
    blind = flag and round((pgd - fgsm) * len(s.x)) >= doubts.BY_CHANCE
    return Measurement(flag, pgd - fgsm, f"FGSM leaves {fgsm:.1%}, PGD {pgd:.1%}", blind=blind)


@masking_check(
    7,
    "Collapse",
    flags_when="FGSM leaves > half of clean accuracy and PGD > 20 points less",
    source="Kim et al. 2021; Wong et al. 2020",
)
def collapse(s: Subject) -> Measurement:
    """Catastrophic overfitting: robust to the one-step attack only."""
    fgsm, pgd = s.accuracy("fgsm"), min(s.accuracy(n) for n in s.right if n.startswith("pgd"))
    flag = fgsm > 0.5 * s.accuracy("clean") and over(fgsm - pgd, 0.2)
    return Measurement(flag, fgsm - pgd, f"FGSM leaves {fgsm:.1%}, PGD {pgd:.1%}")


@masking_check(
    8,
    "Black-box beats white-box",
    flags_when="Square or transfer leaves less than gradients, by > 0.002, or breaks > "
    f"{doubts.MISSED:g} that they do not",
    source=f"{AA}; {A18}; {C19}",
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
    flags_when="random points break an image that gradients do not",
    source=f"{C19}; {A18}",
)
def random_beats_gradient(s: Subject) -> Measurement:
    """Random search in a ball finds next to nothing where gradients work."""
    left = s.right[s.budget.random_points]
    alone = s.white_box & ~left
    value = share_of(alone)
    said = (
        f"{s.budget.noise:,} random points leave {share_of(left):.1%}, gradients "
        f"{share_of(s.white_box):.1%}, {value:.1%} fall to random points alone"
    )
    return Measurement(value > 0, value, said, blind=int(alone.sum()) >= doubts.BY_CHANCE)


@masking_check(
    10,
    "Sweep of eps",
    flags_when="accuracy grows with eps by > 0.02, is > 0.05 above chance at eps 0.5, or unbounded "
    "> 0",
    source=f"{C19}; {A18}",
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
    surely, _ = share_interval(accuracy[-1], len(x))
    return Measurement(
        flag,
        accuracy[-1],
        f"accuracy without bounds {accuracy[-1]:.0%}, largest rise {rise:.1%}",
        {"eps": radii, "accuracy": accuracy, "n": len(x)},
        blind=surely > UNBOUNDED,
        hints=surely > doubts.MISSED,
    )


@masking_check(
    11,
    "Convergence",
    flags_when="twice the steps or restarts change accuracy by > 0.01, or loss still moves",
    source=f"{C19}; {IOAF}",
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
    """Return how far the mean loss moves over PGD's last ten points, as a share of its range."""
    course = s.pgd_course.losses
    last, whole = course[-10:], max(course) - min(course)
    return (max(last) - min(last)) / whole if whole > 0 else 0.0


@masking_check(
    12,
    "Silent success",
    flags_when="> 1% of images were broken on the way and right at the end",
    source=IOAF,
)
def silent_success(s: Subject) -> Measurement:
    """An attack that returns its last iterate loses these; surestep's keep the best."""
    lost = share_of(s.pgd_course.ever_wrong & ~s.pgd_course.wrong)
    return Measurement(lost > 0.01, lost, f"{lost:.1%} were broken only on the way")


@masking_check(
    13,
    "Cross entropy against margin",
    flags_when="the margin attack leaves > 0.05 less",
    source=AA,
)
def losses_agree(s: Subject) -> Measurement:
    """Scaled or smoothed logits blind one loss and not the other."""
    ce, other = s.accuracy(s.budget.pgd), s.accuracy(s.budget.pgd_margin)
    return Measurement(
        over(ce - other, 0.05), ce - other, f"cross entropy leaves {ce:.1%}, margin {other:.1%}"
    )


@masking_check(
    14,
    "Gradient alignment",
    flags_when="mean cosine of gradients at x and nearby < 0.2",
    source="Andriushchenko & Flammarion 2020, GradAlign",
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
    flags_when="error of linear interpolation > half the loss, root mean square of both",
    source="Abad Rocamora et al. 2024, ELLE",
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
    flags_when="the FGSM step lowers the loss of > 5% of images",
    source="Lin et al. 2023, AAER",
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
    flags_when=f"> 5% of images right at both ends are wrong at one of {BETWEEN} points between",
    source="Kim et al. 2021",
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
    flags_when="loss at eps / 3 > 0.9 of the loss at eps, on images FGSM leaves right",
    source="Vivek & Babu 2020, arXiv 2002.00614",
)
def sat_properties(s: Subject) -> Measurement:
    """What SAT-R1, R2 and R3 penalise: logits that disagree, a loss that does not grow."""
    x, y = s.probe
    step = s.fgsm_step(x, y)

    def along(share: float) -> Tensor:
        return s.threat.project(x + share * step, x)

    at_fgsm = s.logits(along(1))
    # SAT-R3: the loss grows along the step, on images that FGSM leaves right.
    shares = [k / 10 for k in range(11)]
    course = [s.loss(along(share), y) for share in shares]
    kept = at_fgsm.argmax(1) == y
    early, late = s.loss(along(1 / 3), y)[kept], course[-1][kept]
    ratio = (early.mean() / late.mean()).item() if late.sum() > 0 else 0.0

    # SAT-R1 and SAT-R2: I-FGSM and R-FGSM lead to the same logits.
    scale = at_fgsm.square().sum(1).mean().item() or 1.0

    def apart(point: Tensor) -> float:
        return (at_fgsm - s.logits(point)).square().sum(1).mean().item() / scale

    to_i, to_r = apart(_i_fgsm_end(s, x, y)), apart(_r_fgsm_point(s, x, y))
    said = (
        f"the loss at eps / 3 is {ratio:.2f} of that at eps; logits apart by {to_i:.2f} (I-FGSM) "
        f"and {to_r:.2f} (R-FGSM)"
    )
    means = [at.mean().item() for at in course]
    evidence = {"step": shares, "loss": means, "FGSM to I-FGSM": to_i, "FGSM to R-FGSM": to_r}
    return Measurement(ratio > 0.9, ratio, said, evidence)


def _i_fgsm_end(s: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return I-FGSM's last iterate, as SAT-R1 has it; the image where a gradient is NaN."""
    size = s.threat.eps / 10
    end = s.map(lambda a, b: climb(s.model, a, b, a, s.threat, steps=10, size=size), x, y)
    return torch.where(end.isfinite(), end, x)


def _r_fgsm_point(s: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return FGSM's point from beside the image, as SAT-R2 has it."""
    noisy = s.threat.clip(x + s.threat.random_step(x, s.threat.eps / 30))
    return s.threat.project(s.fgsm(noisy, y), x)


@masking_check(
    19,
    "Binarization test",
    flags_when=f"PGD solves < {SOLVED:.0%} of problems that have a solution, or random as many",
    source="Zimmermann et al. 2022",
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
    _, at_best = share_interval(pgd, posed)
    return Measurement(
        pgd < SOLVED or pgd <= noise,
        pgd,
        f"of {posed} posed problems PGD solves {pgd:.0%}, random points {noise:.0%}",
        {"pgd": pgd, "random": noise, "posed": posed},
        # Surely fewer than a working attack solves, and no more than random points do. Three
        # problems or fewer say nothing.
        blind=posed > doubts.BY_CHANCE and at_best < SOLVED and pgd <= noise,
    )


@masking_check(
    20,
    "Profile of gaps",
    flags_when=f"PGD over all with AutoAttack > {100 * GAP:g} points, or PGD-10 over PGD > 3",
    source="medians of the 186 runs of the FastAT benchmark, arXiv 2604.22853: 5.2 and 0.7 points",
)
def gap_profile(s: Subject) -> Measurement:
    """How much each stronger attack takes, against what is usual."""
    pgd, ten = s.accuracy(s.budget.pgd), s.accuracy("pgd-10")
    gaps, wide = {"pgd-10 over pgd": ten - pgd}, False
    if "autoattack" in s.right:  # run on what the others left, so its share includes theirs
        gaps["pgd over all with autoattack"] = gap = pgd - share_of(s.survivors)
        wide = over(gap, GAP)
    said = ", ".join(f"{name} {100 * gap:.1f} points" for name, gap in gaps.items())
    # In weak models, too, PGD-10 often leaves more than PGD; a wide gap to AutoAttack is rare.
    return Measurement(wide or over(ten - pgd, 0.03), max(gaps.values()), said, gaps, masks=wide)
