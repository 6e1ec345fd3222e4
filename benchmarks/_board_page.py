"""The leaderboard's page: aggregate CSV rows into lines; write a table, a sentence and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surestep.evaluation.result import share_interval

DIVERGED = "diverged"
"""Verdict of a row whose loss became NaN; such a row counts in no mean."""
BESIDE_OTHER_WORK = "2026-11-29T17"
"""Rows of this time and later, without an estimate of their own, were measured beside other work
and took up to 40% longer than others of their kind."""
RULE_CHANGED = "2026-11-29T10:31"
"""Audits before (UTC) said "not robust" whatever a model's clean accuracy, and more had to be left
(commit 2bdf446)."""
NAMED = ("sat-r1", "sat-r2", "sat-r3", "fgsm", "rs-fgsm", "n-fgsm", "pgd", "trades", "free")
"""Entries that the plot labels even if they are not on the front."""

_OTHER = "best other method"

Means = dict[str, Any]


def means(
    found: list[dict[str, str]], outdated: Callable[[dict[str, str]], bool] = lambda _: False
) -> list[Means]:
    """Return one line per entry, the best worst case first; time is relative to standard training.

    Times are divided by those of standard training: as estimated in the row's own process, or, in
    older rows, of the standard rows of the same board, radius and kind of machine. Rows without
    either count for accuracy only, as do those that were measured beside other work. Of rows with
    the same radius and seed the last one counts, and one that is ``outdated`` only where an entry
    has no others.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for one in found:
        groups.setdefault(one["entry"], []).append(one)
    plain: dict[str, list[float]] = {}
    for one in groups.get("standard", ()):
        plain.setdefault(one["machine"], []).append(float(one["train_seconds"]))
    lines = []
    for entry, measured in groups.items():
        current = [r for r in measured if not outdated(r)]
        latest = list({(r["eps"], r["seed"]): r for r in current or measured}.values())
        mine = [r for r in latest if r["verdict"] != DIVERGED]
        if not mine:
            continue
        worst = [100 * float(r["worst_case"]) for r in mine]
        verdicts = [_verdict(r) for r in latest]
        ratios = [ratio for r in mine if (ratio := _ratio(r, plain))]
        lines.append(
            {
                "entry": entry,
                "seeds": len(mine),
                "passes": float(mine[0]["passes"]),
                "ratio": statistics.mean(ratios) if ratios else math.nan,
                **{
                    key: statistics.mean(100 * float(r[key]) for r in mine)
                    for key in ("clean", "fgsm", "found")
                },
                "worst": statistics.mean(worst),
                "spread": statistics.stdev(worst) if len(worst) > 1 else None,
                "verdict": ", ".join(
                    f"{v} ({verdicts.count(v)})" if len(set(verdicts)) > 1 else v
                    for v in dict.fromkeys(verdicts)
                ),
                "masked": "pseudo-robust" in verdicts,
                "outdated": not current,
                # Whether it may be named as the best.
                "sound": bool(current) and "pseudo-robust" not in verdicts,
            }
        )
    return sorted(lines, key=lambda line: -line["worst"])


def _verdict(row: dict[str, str]) -> str:
    """Return a row's verdict; marked if today's rule, which asks for less, might say another."""
    earlier = row["date"] < RULE_CHANGED and row["verdict"] == "not robust"
    if earlier:
        # At least this much counts as guessing today, whatever the largest class.
        guessing = 0.15 * float(row["clean"])
        high = share_interval(float(row["found"]), int(row["audit_n"]))[1]
        return "not robust ‡" if high > guessing else "not robust"
    return row["verdict"]


def _ratio(row: dict[str, str], plain: Mapping[str, Sequence[float]]) -> float | None:
    """Return a row's time relative to standard training; None if that is unknown."""
    if row.get("standard_seconds"):
        return float(row["train_seconds"]) / float(row["standard_seconds"])
    if row["machine"] not in plain or row["date"] >= BESIDE_OTHER_WORK:
        return None
    return float(row["train_seconds"]) / statistics.mean(plain[row["machine"]])


def table(lines: list[Means]) -> str:
    """Return the lines as a Markdown table; masked entries are marked."""
    text = (
        "| method | seeds | passes | time / standard | clean | FGSM | worst case | audit found | "
        "verdict |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    for line in lines:
        spread = "" if line["spread"] is None else f" ± {line['spread']:.1f}"
        ratio = "" if math.isnan(line["ratio"]) else f"{line['ratio']:.2f}"
        name = f"~~{line['entry']}~~ masked" if line["masked"] else line["entry"]
        name += " †" if line["outdated"] else ""
        text += (
            f"| {name} | {line['seeds']} | {line['passes']:.3g} | {ratio} | "
            f"{line['clean']:.1f} | {line['fgsm']:.1f} | {line['worst']:.1f}{spread} | "
            f"{line['found']:.0f} | {line['verdict']} |\n"
        )
    return text


def against(lines: list[Means]) -> str:
    """Name the best SAT methods, alone and with parts, and their distance to the best other one."""
    sound = [line for line in lines if line["sound"]]
    sat = [line for line in sound if line["entry"].startswith("sat-")]
    groups = {
        "Best SAT entry without additions": [line for line in sat if " " not in line["entry"]],
        "with additions": [line for line in sat if " " in line["entry"]],
        _OTHER: [line for line in sound if line not in sat],
    }
    best = {name: group[0] for name, group in groups.items() if group}
    if _OTHER not in best or len(best) == 1:
        return ""
    text = "; ".join(
        f"{name}: **{line['entry']}**, {line['worst']:.1f}"
        + ("" if math.isnan(line["ratio"]) else f" at {line['ratio']:.2f} times the time")
        for name, line in best.items()
    )
    lead = sat[0]["worst"] - best[_OTHER]["worst"]
    beside = "above" if lead >= 0 else "below"
    return f"{text}. The best SAT entry is {abs(lead):.1f} points {beside} it.\n\n"


def plot(lines: list[Means], path: Path) -> None:
    """Plot worst case against time, with the Pareto front.

    Only methods on the front and those in ``NAMED`` are labelled; the table has all.
    """
    import altair as alt

    kinds = ("not masked", "masked in a seed")
    shown = [
        line for line in lines if not math.isnan(line["ratio"]) and line["entry"] != "standard"
    ]
    front: list[Means] = []
    for line in sorted(shown, key=lambda line: (line["ratio"], -line["worst"])):
        if line["sound"] and line["worst"] > (front[-1]["worst"] if front else -1):
            front.append(line)
    data = [
        {
            **{"time": line["ratio"], "worst": line["worst"], "kind": kinds[line["masked"]]},
            "front": line in front,
            "name": line["entry"] if line in front or line["entry"] in NAMED else "",
        }
        for line in shown
    ]
    x = alt.X("time:Q", scale=alt.Scale(type="log"), title="training time / standard training")
    stretched = alt.Scale(domain=(0, 100), type="pow", exponent=2)
    y = alt.Y("worst:Q", scale=stretched, title="worst case, %")
    colors = alt.Scale(domain=kinds, range=["#4c78a8", "#e45756"])
    base = alt.Chart(alt.Data(values=data)).encode(x, y)
    points = base.mark_point(filled=True, size=50, opacity=0.9).encode(
        alt.Color("kind:N", title=None, scale=colors)
    )
    names = base.mark_text(align="left", dx=6, dy=-5, fontSize=9).encode(text="name:N")
    steps = (
        base.transform_filter("datum.front")
        .mark_line(strokeDash=[4, 3], color="gray", interpolate="step-after")
        .encode(order="time:Q")
    )
    (steps + points + names).properties(width=760, height=560).save(str(path))


def write(
    found: list[dict[str, str]],
    page: Path,
    boards: Mapping[str, Sequence[float]],
    outdated: Callable[[dict[str, str]], bool] = lambda _: False,
) -> None:
    """Write the page with its tables, and for each table a plot beside the page.

    Args:
        found: rows of the CSV.
        page: the file to write.
        boards: the radii of each board, by the board's name.
        outdated: tells a row of a method that has changed since.
    """
    parts = [(Path(__file__).parent / "leaderboard.head.md").read_text("utf-8")]
    for name, radii in boards.items():
        for eps in radii:
            mine = [r for r in found if r["board"] == name and abs(float(r["eps"]) - eps) < 1e-3]
            if not mine:
                continue
            lines = means(mine, outdated)
            radius = f"{eps:g}" if eps > 0.1 else f"{round(255 * eps)}/255"
            figure = page.with_name(f"leaderboard-{name}-{round(255 * eps)}.svg")
            plot(lines, figure)
            parts.append(f"## {name}, eps {radius}\n\n{against(lines)}{table(lines)}")
            parts.append(f"![{name}]({figure.name})\n")
    page.write_text("\n".join(parts), "utf-8")
