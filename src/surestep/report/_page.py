"""Renders a report as a page: prepares the texts and numbers that the template lays out."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surestep.files import plain
from surestep.report import _evidence, charts
from surestep.report._needs import need
from surestep.report._plots import Plot, plots
from surestep.report._read import number, stated
from surestep.report._save import VEGA_LITE
from surestep.report.columns import COLUMNS, COSTS
from surestep.verdicts import INCONCLUSIVE, NOT_ROBUST, PSEUDO, ROBUST

if TYPE_CHECKING:
    from surestep.report._report import Report

_VERDICTS = {ROBUST: "good", PSEUDO: "bad", NOT_ROBUST: "bad", INCONCLUSIVE: "unsure"}
_STATUSES = ("flagged", "passed", "skipped")
_CLASSES = 30  # most rows of the per-class table


def render(report: Report) -> str:
    """Return the page of a report.

    Raises:
        UserError: a package is missing.
    """
    jinja2 = need("jinja2")
    drawn = plots(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("surestep.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "span": span, "figure": figure}
    names = ("comparison", "curves", "surfaces", "training")
    sections = {name: [p for p in drawn if p.section == name] for name in names}
    return environment.get_template("page.html.jinja").render(
        title=str(report.title),
        verdict=_verdict(report),
        tiles=_tiles(report),
        setting=_setting(report),
        tables=_attack_tables(report),
        plots=sections,
        examples=[_example(e, report.classes) for e in report.examples],
        audit=report.audit,
        checks=_checks(report),
        per_class=_per_class(report),
        class_count=len((report.evaluation or {}).get("per_class") or ()),
        comparison=_comparison(report),
        costs=_costs(report),
        command=report.command or _first(report, "command") or "",
        versions=report.versions or _first(report, "versions") or {},
        seeds=report.seeds or _seeds(report),
        config={k: _evidence.text(v) for k, v in report.config.items()},
        specs=_script({p.name: _spec(p) for p in drawn}),
        bundle=_bundle() if drawn else "",
    )


def percent(share: Any) -> str:
    """Format a share as a percentage."""
    value = number(share)
    return "–" if value is None else f"{100 * value:.1f}%"


def span(interval: Sequence[float] | None) -> str:
    """Format a 95% interval of a share, in percent."""
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}" if interval else ""


def _interval(share: Any, n: int) -> tuple[float, float] | None:
    """Return the 95% interval of a share of n images; None if there is no share."""
    from surestep.evaluation import share_interval

    value = number(share)
    return None if value is None else share_interval(value, n)


def figure(value: Any) -> str:
    """Format a number with four significant digits, or as an integer from 1000 up."""
    found = number(value)
    if found is None:
        return "–" if value is None else str(value)
    if abs(found) >= 1000:
        return f"{found:,.0f}"
    return f"{found:.4g}"


def _verdict(report: Report) -> dict[str, str] | None:
    if report.audit is not None:
        verdict = str(report.audit["verdict"])
        sentence = str(report.audit["sentence"])
        kind = _VERDICTS.get(verdict, "unsure")
        return {"name": verdict, "kind": kind, "sentence": sentence}
    if report.evaluation is not None:
        worst = percent(report.evaluation["worst_case_accuracy"])
        count = len(report.evaluation["robust_accuracy"])
        n = report.evaluation["n"]
        attacks = "one attack" if count == 1 else f"all {count} attacks"
        left = number(report.evaluation.get("worst_case_accuracy"))
        doubts = report.evaluation.get("doubts") if left else ()
        high = f"It may be too high: {'; '.join(doubts)}. " if doubts else ""
        sentence = (
            f"{worst} of {n:,} images remain correctly classified under {attacks}. {high}"
            "No audit was run, so it is unknown whether gradients are masked."
        )
        return {"name": "not audited", "kind": "unsure", "sentence": sentence}
    held_out = [r for r in report.history or () if number(r.get("val_worst_case")) is not None]
    if held_out:
        last = report.config.get("select") == "last"
        kept = held_out[-1] if last else max(held_out, key=lambda r: r["val_worst_case"])
        n = kept.get("val_n")
        interval = f" (95% interval {span(_interval(kept['val_worst_case'], n))})" if n else ""
        sentence = (
            f"In the {'last' if last else 'best'} epoch ({kept.get('epoch')}), "
            f"{percent(kept['val_worst_case'])}{interval} of {f'{n:,} ' if n else ''}held-out "
            "images remain correctly classified under the attacks of the validation. The model has "
            "not been judged on test data yet."
        )
        return {"name": "not judged", "kind": "unsure", "sentence": sentence}
    return None


def _tiles(report: Report) -> list[dict[str, str]]:
    """Return the key numbers shown beside the verdict: label, value, note."""
    tiles = []
    source = report.evaluation or report.audit
    if source is None:
        return []
    tiles.append(("Clean accuracy", percent(source["clean_accuracy"]), ""))
    if report.audit is not None:
        n = report.audit["n"]
        # The page states the evaluation's number of images.
        of = f"of {n:,} images" if n != source["n"] else ""
        if claims := report.audit["claims"]:
            name, value = max(claims.items(), key=lambda item: number(item[1]) or 0.0)
            notes = [f"under {name} alone", of]
            tiles.append(("A weak report claims", percent(value), _joined(notes)))
        found = percent(report.audit["found_accuracy"])
        interval = span(report.audit.get("found_interval"))
        by = report.audit.get("found_by")
        notes = [interval, f"most broken by {by}" if by else "", of]
        tiles.append(("This audit finds", found, _joined(notes)))
        flagged = sum(c.get("status") == "flagged" for c in report.checks)
        tiles.append(("Checks flagged", f"{flagged} of {len(report.checks)}", ""))
    if report.evaluation is not None:
        worst = percent(report.evaluation["worst_case_accuracy"])
        interval = span(report.evaluation["intervals"].get("worst case"))
        note = f"95% interval {interval}" if interval else ""
        tiles.append(("Worst case of all attacks", worst, note))
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in tiles]


def _joined(notes: Sequence[str]) -> str:
    return " · ".join(filter(None, notes))


def _setting(report: Report) -> list[str]:
    """Return what was measured on: threat model, pixel range, data, images, budget."""
    source = report.evaluation or report.audit
    if source is None:
        return []
    threat = source["threat"]
    low, high = threat.get("bounds", (0, 1))
    words = [
        f"{threat['norm']} eps {threat['eps']:.4g}",
        f"pixels in [{low:g}, {high:g}]",
        f"{source['n']:,} images",
    ]
    if source.get("dataset"):
        words.insert(2, f"{source['dataset']}, {source.get('split', 'test')} split")
    if report.audit is not None and report.audit.get("budget"):
        words.append(f"{report.audit['budget']} budget")
    return words


def _attack_tables(report: Report) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    if report.evaluation is not None:
        tables.append({"title": "Evaluation", "rows": _evaluated(report.evaluation)})
    audit = report.audit or {}
    found = audit.get("attacks") or {}
    if found:
        late = {step.get("name") for step in audit.get("escalation") or ()}
        rows = [
            _attack_row(
                name,
                accuracy,
                _interval(accuracy, audit["n"]),
                scope="survivors" if name in late else None,
            )
            for name, accuracy in found.items()
        ]
        tables.append({"title": "Attacks of the audit", "rows": rows})
    for table in tables:
        table["timed"] = any(row["seconds"] is not None for row in table["rows"])
    return tables


def _evaluated(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    intervals = evaluation["intervals"]
    seconds = evaluation.get("attack_seconds") or {}
    scopes = {a.get("name"): a.get("scope") for a in evaluation.get("attacks") or ()}
    return [
        _attack_row(name, accuracy, intervals.get(name), seconds.get(name), scopes.get(name))
        for name, accuracy in charts.named_accuracies(evaluation).items()
    ]


def _attack_row(
    name: str,
    accuracy: Any,
    interval: Sequence[float] | None = None,
    seconds: float | None = None,
    scope: str | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": number(accuracy),
        "interval": interval,
        "seconds": seconds,
        "note": "cumulative" if scope == "survivors" else "",
        "strong": name == charts.WORST,
    }


def _example(example: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    def name(key: str) -> str:
        label = example[key]
        return str(classes[label]) if 0 <= label < len(classes) else str(label)

    return {
        **example,
        "label": name("label"),
        "clean_name": name("clean_prediction"),
        "adversarial_name": name("adversarial_prediction"),
        "broken": example["adversarial_prediction"] != example["label"],
    }


def _checks(report: Report) -> list[dict[str, Any]]:
    """Return the checks grouped by status, the flagged ones first."""
    groups = []
    for status in _STATUSES:
        checks = [
            {
                "number": check.get("number"),
                "title": check["title"],
                "value": "" if check.get("value") is None else figure(check["value"]),
                "threshold": check.get("threshold") or "",
                "sentence": check.get("sentence") or "",
                "source": check.get("source") or "",
                "evidence": _evidence.parts(check.get("evidence") or {}),
            }
            for check in report.checks
            if check["status"] == status
        ]
        if checks:
            groups.append({"status": status, "checks": checks})
    return groups


def _per_class(report: Report) -> list[dict[str, Any]]:
    """Return the classes or, if there are many, those with the lowest worst case."""
    rows = (report.evaluation or {}).get("per_class") or ()
    if len(rows) > _CLASSES:
        rows = sorted(rows, key=lambda r: number(r.get("worst_case_accuracy")) or 0.0)[:_CLASSES]
    named = []
    for row in rows:
        label = row["label"]
        name = report.classes[label] if label < len(report.classes) else str(label)
        named.append({**row, "name": name})
    return named


def _comparison(report: Report) -> dict[str, Any] | None:
    rows = report.comparison
    if not rows:
        return None
    columns = [c for c in COLUMNS if any(stated(r.get(c))[0] is not None for r in rows)]
    # Only of the worst case: under FGSM a masked model would lead.
    best = max((stated(r.get("worst_case_accuracy"))[0] or 0.0 for r in rows), default=0.0)
    counts = {n for row in rows for c in columns if (n := stated(row.get(c))[2]) is not None}
    body = [
        {
            "method": row["method"],
            "verdict": row.get("verdict_text") or row.get("verdict") or "",
            "kind": _VERDICTS.get(str(row.get("verdict")), "unsure"),
            "cells": [_cell(row.get(c), c, best) for c in columns],
        }
        for row in rows
    ]
    titles = [COLUMNS[c][0].upper() + COLUMNS[c][1:] for c in columns]
    seeds = [len(row.get("seeds") or ()) for row in rows]
    if len(set(seeds)) > 1:
        titles = ["Seeds", *titles]
        for row, n in zip(body, seeds, strict=True):
            row["cells"].insert(0, {"text": str(n) if n else "–", "spread": "", "best": False})
    note = ""
    if max(counts, default=1) > 1:
        over = f"{counts.pop()} seeds" if len(counts) == 1 else "the seeds"
        note = f"Mean ± standard deviation over {over}."
    return {"columns": titles, "rows": body, "note": note, "notes": list(report.notes)}


def _cell(value: Any, column: str, best: float) -> dict[str, Any]:
    mean, deviation, _ = stated(value)
    if mean is None:
        return {"text": "–", "spread": "", "best": False}
    if column in COSTS:
        text, spread = figure(mean), "" if deviation is None else f"± {figure(deviation)}"
    else:
        text = f"{100 * mean:.1f}"
        spread = "" if deviation is None else f"± {100 * deviation:.1f}"
    return {
        "text": text,
        "spread": spread,
        "best": column == "worst_case_accuracy" and mean == best,
    }


def _costs(report: Report) -> dict[str, str]:
    costs = {}
    if report.history:
        last = report.history[-1]
        for key, name in (("train_seconds", "Training"), ("images_per_second", "Throughput")):
            if (value := number(last.get(key))) is not None:
                unit = "s" if key == "train_seconds" else "images/s"
                costs[name] = f"{figure(value)} {unit}"
        costs["Epochs"] = str(len(report.history))
    for name, source in (("Evaluation", report.evaluation), ("Audit", report.audit)):
        if source is not None and (value := number(source.get("seconds"))) is not None:
            costs[name] = f"{figure(value)} s"
    return costs


def _seeds(report: Report) -> dict[str, Any]:
    given = (
        ("training", report.config.get("seed")),
        ("evaluation", (report.evaluation or {}).get("seed")),
        ("audit", (report.audit or {}).get("seed")),
    )
    return {name: seed for name, seed in given if seed is not None}


def _first(report: Report, key: str) -> Any:
    return (report.evaluation or {}).get(key) or (report.audit or {}).get(key)


def _spec(plot: Plot) -> dict[str, Any]:
    # Not validated: the charts are ours, and their tests validate them.
    spec = plot.chart.to_dict(validate=False)
    # The page's own colours and fonts replace Altair's.
    spec.pop("config", None)
    if "vconcat" not in spec:
        spec["width"] = "container"
    return {"title": plot.title, "spec": plain(spec)}


def _script(value: Any) -> Any:
    """Return JSON that is safe inside <script>: no text in it can close the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return need("markupsafe").Markup(text.replace("<", "\\u003c"))


@functools.cache
def _bundle() -> Any:
    """Return Vega, Vega-Lite and vega-embed as one script whose only global is ``vegaEmbed``."""
    code = need("vl_convert").javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    code = code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return need("markupsafe").Markup(code)
