"""Harden a run: MeanSparse, written to a run folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surestep import data, files, posthoc
from surestep.clock import each_minute
from surestep.data import Images
from surestep.errors import UserError
from surestep.evaluation import Evaluation, evaluate, suite
from surestep.runs._load import load
from surestep.runs._models import in_class_order_of
from surestep.runs._parts import from_anywhere, load_data
from surestep.training.run_folder import RunFolder
from surestep.weights import read_signature, save_weights


def harden(
    folder: str | Path,
    out: str | Path,
    *,
    thresholds: Sequence[float] = posthoc.THRESHOLDS,
    attacks: Sequence[str] | None = None,
    n_search: int | None = None,
    n: int | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 500,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Harden a run with MeanSparse and write the result to a new run folder.

    Args:
        folder: folder of the trained run.
        out: folder of the hardened run.
        thresholds: thresholds to try on validation images; see ``surestep.posthoc.harden``.
        attacks: names of the attacks, both for the search and for the evaluation; by default
            ``posthoc.ATTACKS`` and ``posthoc.JUDGES``. Transfer attacks are crafted on the original
            model.
        n_search: use only the first ``n_search`` validation images.
        n: evaluate on the first ``n`` images only.
        split: evaluate on images of "test" or "validation". The threshold is chosen on validation
            images, so that the results on them are optimistic.
        seed: seed of the attacks.
        batch_size: batch size of the attacks.
        device: where to run; by default the best available.
        overwrite: replace ``out`` if it exists.
        progress: called with each row of the search.
        tell: called with a line on what is being done, also in a long evaluation.

    Returns:
        The threshold, the rows of its search, the split, the evaluations before and after, and how
        many of the images were saved and lost: a net gain of only a few is noise.

    Raises:
        UserError: ``folder`` is not a run folder, is hardened already or does not know all classes
            of its data, or ``out`` exists.
    """
    run = load(folder, device)
    if run.config.mean_sparse is not None:
        raise UserError(f"{folder} is hardened already: take the run it was made from")
    if Path(out).resolve() == Path(folder).resolve():
        raise UserError(f"{out} is the run itself, which is kept: give another --out")
    hardened = RunFolder.plan(out, overwrite=overwrite)
    assert hardened is not None
    files.make_folder(hardened.folder.parent)  # fails before the work rather than after it
    data.check_judged(split)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}

    def labelled(part: str, count: int | None) -> Images:
        found = load_data(run.config, part, count)
        ordered = in_class_order_of(str(folder), run.classes, found)
        if ordered is not found:
            tell(f"the {part} labels are renumbered to the class order of {folder}, by class name")
        return ordered

    # Missing data and misspelt attacks are reported before the search, which may take hours.
    images = labelled(split, n)
    judges = attacks or posthoc.JUDGES
    suite.parse_all(judges, run.threat, [run.model])
    found = posthoc.harden(
        run.model,
        load_data(run.config, "train"),
        labelled("validation", n_search),
        run.threat,
        thresholds=thresholds,
        attacks=attacks or posthoc.ATTACKS,
        n=None,  # all that were loaded
        progress=progress,
        tell=tell,
        **options,
    )

    def judge(model: nn.Module, told: str) -> Evaluation:
        tell(f"attacking {split} images {told} hardening")
        more: dict[str, Any] = {**options, "sources": [run.model]}
        return evaluate(model, images, run.threat, judges, tell=each_minute(tell), **more)

    before, after = judge(run.model, "before"), judge(found.model, "after")
    withstood_before, withstood_after = (one.right["worst case"] for one in (before, after))
    config = from_anywhere(run.config).model_copy(update={"mean_sparse": found.threshold})
    hardened.make(config.model_dump(mode="json"), overwrite=overwrite)
    try:
        save_weights(hardened.weights, found.model, read_signature(run.weights))
    except BaseException:  # such as a full disk: settings alone are not a run
        shutil.rmtree(hardened.folder, ignore_errors=True)
        raise
    return {
        "threshold": found.threshold,
        "search": found.search,
        "split": split,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "saved": int((withstood_after & ~withstood_before).sum()),
        "lost": int((withstood_before & ~withstood_after).sum()),
    }
