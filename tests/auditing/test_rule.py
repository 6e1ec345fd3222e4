"""The rule that turns an audit's numbers and flags into a verdict: arithmetic only."""

from __future__ import annotations

import pytest
from constructed import flagged

from surestep.auditing import CHECKS
from surestep.auditing.verdict import AuditNumbers, decide
from surestep.evaluation import wilson_interval

COLLAPSE = [flagged("collapse")]


def said_of(
    found,
    n=1000,
    *,
    claims=(0.94, 0.91),
    clean=0.98,
    chance=0.1,
    checks=(),
    missed=0,
    alone=None,
    budget="quick",
):
    """Return verdict and sentence where ``found`` of n images withstand everything."""
    interval = wilson_interval(round(found * n), n)
    named = dict(zip(("fgsm", "pgd-10"), claims, strict=True))
    numbers = AuditNumbers(clean, named, found, interval, chance, missed, n, alone)
    return decide(numbers, list(checks), budget)


@pytest.mark.parametrize(
    ("fgsm", "pgd", "found", "verdict"),
    [
        (0.98, 0.00, 0.00, "pseudo-robust"),
        (0.98, 0.90, 0.10, "pseudo-robust"),
        (0.94, 0.91, 0.86, "robust"),
        (0.94, 0.80, 0.60, "robust"),
        (0.30, 0.00, 0.00, "not robust"),
        (0.10, 0.60, 0.05, "pseudo-robust"),
        (0.50, 0.40, 0.31, "robust"),
        (0.30, 0.25, 0.245, "inconclusive"),
        # 20% under PGD-10 is near chance, which is no claim.
        (0.30, 0.20, 0.02, "not robust"),
    ],
)
def test_the_rule(fgsm, pgd, found, verdict):
    said, sentence = said_of(found, claims=(fgsm, pgd), checks=COLLAPSE)
    assert said == verdict
    assert f"{found:.1%}" in sentence


def test_where_one_class_is_most_of_the_images_the_floor_is_explained():
    claims = {"claims": (0.75, 0.75), "clean": 1.0, "chance": 0.9}
    assert said_of(0.75, **claims)[0] == "not robust"
    said = "withstand all attacks, fewer than an answer that never changes gets right (90.0%), "
    assert said in said_of(0.75, **claims)[1]
    assert "never changes" not in said_of(0.05, chance=0.1)[1]


@pytest.mark.parametrize(
    ("found", "n", "verdict", "words"),
    [
        # Half of the claim is 0.47.
        (0.48, 50, "robust", ""),
        (0.44, 50, "inconclusive", "about half of what the model claims"),
        (0.44, 5000, "pseudo-robust", ""),
        (0.20, 50, "pseudo-robust", ""),
    ],
)
def test_half_of_the_claim_on_few_images(found, n, verdict, words):
    """Two images fewer must not turn an honest model into a masked one."""
    said, sentence = said_of(found, n, checks=COLLAPSE)
    assert said == verdict
    assert words in sentence


@pytest.mark.parametrize(
    ("clean", "chance", "found", "verdict"),
    [
        # Floors of 0.151, 0.076, 0.02, 0.56: what is left counts by what the model knows.
        (0.44, 0.1, 0.24, "robust"),
        (0.44, 0.1, 0.15, "inconclusive"),
        (0.44, 0.1, 0.11, "not robust"),
        (0.48, 0.005, 0.16, "robust"),
        (0.10, 0.005, 0.06, "robust"),
        (0.48, 0.005, 0.05, "not robust"),
        (0.90, 0.5, 0.70, "robust"),
        (0.90, 0.5, 0.50, "not robust"),
        # Itself near chance: twice, or 0.575.
        (0.20, 0.1, 0.20, "inconclusive"),
        (0.01, 0.005, 0.01, "inconclusive"),
        (0.57, 0.5, 0.57, "inconclusive"),
        (0.58, 0.5, 0.57, "robust"),
    ],
)
def test_the_floor_follows_what_the_model_knows(clean, chance, found, verdict):
    said, sentence = said_of(found, clean=clean, chance=chance, claims=(found, found))
    assert said == verdict
    assert ("near chance" in sentence) is (clean <= 2 * chance and clean < 0.575)


@pytest.mark.parametrize(
    ("found", "n", "verdict"),
    # The floor is 0.232.
    [(0.225, 40, "inconclusive"), (0.225, 40_000, "not robust"), (0.0, 25, "not robust"),
     (0.30, 40, "inconclusive"), (0.30, 40_000, "robust")],
)  # fmt: skip
def test_the_floor_on_few_images(found, n, verdict):
    said, sentence = said_of(found, n, claims=(0.4, 0.3))
    assert said == verdict
    assert ("--n" in sentence) == (verdict == "inconclusive")


def test_a_claim_that_fails_where_no_check_flags_is_not_called_masked():
    """Attacked far beyond the radius that it was trained for, say."""
    assert said_of(0.02, claims=(0.6, 0.5))[0] == "not robust"
    assert said_of(0.02, claims=(0.6, 0.5), checks=COLLAPSE)[0] == "pseudo-robust"


HINT = flagged("eps-sweep", hints=True)
"""Of a check whose flag is a sign beside that of a suspect gradient alone."""


@pytest.mark.parametrize(
    ("checks", "found", "verdict"),
    [
        # Flags that sound models have, too, on an image or two: weak, but nothing hides.
        ([flagged("vanishing-gradients"), flagged("random-beats-gradient")], 0.1, "no"),
        ([flagged("convergence"), flagged("gap-profile"), flagged("binarization")], 0.1, "no"),
        ([HINT], 0.1, "no"),
        # Where much is left the gap is the sign.
        ([flagged("convergence")], 0.4, "pseudo"),
        ([flagged("losses-agree")], 0.1, "pseudo"),
        ([flagged("gap-profile", masks=True)], 0.1, "pseudo"),
        ([flagged("random-beats-gradient", blind=True)], 0.1, "pseudo"),
        ([HINT, flagged("binarization")], 0.1, "pseudo"),
    ],
)
def test_only_a_sign_of_masking_makes_a_failed_claim_a_pretence(checks, found, verdict):
    said, _ = said_of(found, claims=(0.4, 0.9), checks=checks)
    assert said == {"no": "not robust", "pseudo": "pseudo-robust"}[verdict]


def test_flags_that_count_by_themselves():
    """Which explain a failed claim, and which give weight to what an unbounded attack leaves."""

    def given(verdict, found, *more, **rest):
        return {
            check.name
            for check in CHECKS
            if said_of(found, checks=[flagged(check.name), *more], **rest)[0] == verdict
        }

    assert given("pseudo-robust", 0.1, claims=(0.4, 0.9)) == {
        "deterministic-forward",
        "logits-not-probabilities",
        "optimisation-in-forward",
        "collapse",
        "losses-agree",
        "abnormal-examples",
        "distorted-boundary",
    }
    assert given("inconclusive", 0.86, HINT) == {
        "vanishing-gradients",
        "broken-gradients",
        "abnormal-examples",
        "binarization",
    }


def test_the_claim_that_is_quoted_is_the_one_that_counts():
    """44% under FGSM is less than half of 90% and no defence, so that PGD-10's 30% is at stake."""
    verdict, sentence = said_of(0.05, claims=(0.44, 0.30), clean=0.9, checks=COLLAPSE)
    assert verdict == "pseudo-robust"
    assert "30.0% under PGD-10" in sentence


@pytest.mark.parametrize(
    ("missed", "verdict"),
    [(0, "robust"), (25, "robust"), (40, "inconclusive")],  # perhaps 2% of a thousand, and surely
)
def test_images_that_only_gradient_free_attacks_break(missed, verdict):
    """Whether a check flagged or not: some were broken after the checks."""
    said, text = said_of(0.86, missed=missed)
    assert said == verdict
    assert ("fall only to gradient-free attacks" in text) is (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("checks", "signs"),
    [
        ([], ""),
        ([flagged("vanishing-gradients"), flagged("convergence")], ""),
        ([flagged("convergence"), flagged("binarization", blind=True)], "binarization"),
        ([flagged("a", blind=True), flagged("b", blind=True)], "a, b"),
        ([HINT], ""),
        ([HINT, flagged("convergence")], ""),
        ([HINT, flagged("abnormal-examples")], "eps-sweep"),
        ([flagged("abnormal-examples", blind=True)], "abnormal-examples"),
    ],
)
def test_what_gradients_cannot_judge_is_not_called_robust(checks, signs):
    for budget, advice in (("quick", "--budget standard"), ("thorough", "an attack written for")):
        said, text = said_of(0.86, checks=checks, budget=budget)
        assert said == ("inconclusive" if signs else "robust")
        assert (f"gradient attacks are blind here ({signs}): {advice}" in text) is bool(signs)


def test_blind_attacks_that_break_a_model_all_the_same_have_broken_it():
    assert said_of(0.1, claims=(0.2, 0.2), checks=[flagged("a", blind=True)])[0] == "not robust"


@pytest.mark.parametrize(
    ("found", "alone", "verdict"),
    [
        # Half of the claim is 0.47, the floor 0.232.
        (0.40, 0.80, "inconclusive"),
        (0.40, 0.45, "pseudo-robust"),
        (0.40, None, "pseudo-robust"),
        (0.86, 0.90, "robust"),
    ],
)
def test_a_random_model_is_not_called_masked_for_the_number_of_attacks(found, alone, verdict):
    said, text = said_of(found, alone=alone, checks=[flagged("deterministic-forward")])
    assert said == verdict
    assert ("Audit the mean of many passes" in text) is (verdict == "inconclusive")


@pytest.mark.parametrize(
    ("alone", "verdict"), [(0.30, "inconclusive"), (0.20, "not robust"), (None, "not robust")]
)
def test_nor_undefended(alone, verdict):
    assert said_of(0.1, alone=alone, claims=(0.2, 0.2))[0] == verdict


def test_a_model_hardly_better_than_guessing_is_not_judged():
    """Right on 20% of clean images where chance is 10%."""
    assert said_of(0.1, claims=(0.1, 0.1), clean=0.2)[0] == "inconclusive"
    assert said_of(0.1, claims=(0.1, 0.1), clean=0.3)[0] == "not robust"
