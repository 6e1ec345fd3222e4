"""Charts for notebooks and reports: plain dicts in, Altair charts out.

Except for the loss surface, charts contain data and encodings but no colours. Those come from the
page, the notebook or ``save_chart``, so that one chart works in light and dark schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surestep.errors import UserError
from surestep.report._needs import need
from surestep.report._read import Row, number, pairs, some, stated
from surestep.report.columns import COSTS
from surestep.verdicts import INCONCLUSIVE, NOT_ROBUST, PSEUDO, ROBUST

if TYPE_CHECKING:
    import altair as alt

WIDTH, HEIGHT = 440, 260
WORST = "worst case"
VERDICTS = [INCONCLUSIVE, PSEUDO, ROBUST, NOT_ROBUST, "not audited"]
_METRIC_NAMES = {"adv_accuracy": "training batches", "val_worst_case": WORST}


def accuracy_by_eps(source: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> alt.LayerChart:
    """Draw accuracy against eps.

    Args:
        source: the ``curve`` of an evaluation, or the evidence {"eps", "accuracy"} of the eps
            sweep.

    Raises:
        UserError: the source is empty.
    """
    if isinstance(source, Mapping):
        found = pairs(source["eps"], source["accuracy"])
        rows = [{"x": x, "accuracy": y, "attack": "pgd-50"} for x, y in found]
    else:
        rows = []
        for point in source:
            eps, accuracies = number(point["eps"]), named_accuracies(point)
            rows += [{"x": eps, "accuracy": v, "attack": k} for k, v in accuracies.items()]
    return _lines(some(rows, "the curve"), "eps", "accuracy", share=True)


def accuracy_by_step(source: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> alt.LayerChart:
    """Draw the accuracy after each step of iterative attacks.

    Args:
        source: the ``attacks`` of an evaluation, or the evidence {"steps", "accuracy"} of the
            convergence check.

    Raises:
        UserError: no attack has steps.
    """
    if isinstance(source, Mapping):
        found = pairs(source["steps"], source["accuracy"])
        rows = [{"x": x, "accuracy": y, "attack": "pgd"} for x, y in found]
    else:
        rows = [
            {"x": step, "accuracy": number(accuracy), "attack": attack["name"]}
            for attack in source
            for step, accuracy in enumerate(attack.get("by_step") or ())
        ]
    return _lines(some(rows, "the accuracy by step"), "attack steps", "accuracy", share=True)


def accuracy_by_restart(evidence: Mapping[str, Any]) -> alt.LayerChart:
    """Draw the accuracy after each restart.

    Args:
        evidence: {"restarts", "restart_accuracy"} of the convergence check.

    Raises:
        UserError: the evidence is empty.
    """
    found = pairs(evidence["restarts"], evidence["restart_accuracy"])
    rows = [{"x": x, "accuracy": y, "attack": "pgd"} for x, y in found]
    return _lines(some(rows, "the accuracy by restart"), "restarts", "accuracy", share=True)


def loss_along_fgsm(source: Mapping[str, Any]) -> alt.LayerChart:
    """Draw the loss along the FGSM direction, from the image to the full step.

    Args:
        source: {"step", "loss"}: shares of eps and the mean cross entropy at each, as in the
            evidence of the check "The SAT properties"; or a dict of such dicts by model name. Each
            of several losses is divided by its maximum.

    Raises:
        UserError: the source is empty.
    """
    by_model = {"this model": source} if "loss" in source else source
    rows = []
    for name, one in by_model.items():
        points = pairs(one["step"], one["loss"])
        # The shape is what matters; losses of different models rarely have the same scale.
        largest = max((y for _, y in points if y is not None), default=0.0) or 1.0
        size = largest if len(by_model) > 1 else 1.0
        rows += [
            {"x": x, "loss": None if y is None else y / size, "model": name} for x, y in points
        ]
    title = "step along the FGSM direction (share of eps)"
    value = "loss / its maximum" if len(by_model) > 1 else "loss"
    return _lines(some(rows, "the loss"), title, "loss", by="model", title=value)


def along_fgsm(surface: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean loss along the FGSM direction of a surface, for ``loss_along_fgsm``."""
    shares = surface["shares"]
    middle = surface["mean"][len(shares) // 2]
    ahead = [(s, v) for s, v in zip(shares, middle, strict=True) if s >= 0]
    return {"step": [s for s, _ in ahead], "loss": [v for _, v in ahead]}


def loss_surface(surface: Mapping[str, Any]) -> alt.VConcatChart:
    """Draw the loss around images as a heat map, with a cross-section that follows the pointer.

    A menu switches between the mean and single images. The chart below the map shows the loss along
    the FGSM direction, at the pointer's position along the random direction.

    Args:
        surface: one of the ``surfaces`` of ``gather``.
    """
    alt = need("altair")
    shares = [float(s) for s in surface["shares"]]
    grids = {f"mean of {surface['n']} images": surface["mean"]}
    for i, one in enumerate(surface.get("samples", ()), 1):
        grids[f"image {i} (label {one['label']})"] = one["loss"]
    half = round((shares[1] - shares[0]) / 2, 4)
    rows = [
        {"of": of, "f": f, "r": r, "loss": number(loss)}
        for of, grid in enumerate(grids.values())
        for r, line in zip(shares, grid, strict=True)
        for f, loss in zip(shares, line, strict=True)
    ]
    menu = alt.binding_select(options=list(range(len(grids))), labels=list(grids), name="Loss of ")
    shown = alt.param(name="shown", value=0, bind=menu)
    row = alt.selection_point(
        name="row",
        fields=["r"],
        on="pointerover",
        clear=False,
        value=[{"r": 0}],
    )
    # A "nice" domain would leave an empty margin; the outer cells extend by half a step instead.
    span = alt.Scale(domain=[shares[0] - half, shares[-1] + half], nice=False)
    ticks = alt.Axis(values=[-1, -0.5, 0, 0.5, 1], grid=False)
    tips = [
        alt.Tooltip("f:Q", title="FGSM direction", format="+.1f"),
        alt.Tooltip("r:Q", title="random direction", format="+.1f"),
        alt.Tooltip("loss:Q", title="loss", format=".3f"),
    ]
    base = alt.Chart().transform_filter("datum.of == shown")
    cells = (
        base.transform_calculate(
            f0=f"datum.f - {half}",
            f1=f"datum.f + {half}",
            r0=f"datum.r - {half}",
            r1=f"datum.r + {half}",
        )
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("f0:Q", title=None, scale=span, axis=ticks),
            x2="f1:Q",
            y=alt.Y("r0:Q", title="random direction", scale=span, axis=ticks),
            y2="r1:Q",
            color=alt.Color(
                "loss:Q",
                title="loss",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=8),
            ),
            tooltip=tips,
        )
        .add_params(row, shown)
    )
    # The line across the map: where the cross-section below is taken.
    chosen = base.transform_filter(row)
    cut = chosen.transform_filter("datum.f == 0").mark_rule(strokeWidth=1.5, color="white")
    cut = cut.encode(y=alt.Y("r:Q", title="random direction"))
    map_ = alt.layer(cells, cut).properties(width=WIDTH - 120, height=WIDTH - 160)
    line = (
        chosen.mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("f:Q", title="FGSM direction (share of eps)", scale=span, axis=ticks),
            y=alt.Y("loss:Q", title="loss on this line", scale=alt.Scale(zero=True)),
            tooltip=tips,
        )
        .properties(width=WIDTH - 120, height=110)
    )
    both = alt.vconcat(map_, line, spacing=14).resolve_scale(color="independent")
    return _with(both, rows)


def training_curves(history: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Draw the accuracies of ``metrics.jsonl``: on training batches and on held-out images.

    Args:
        history: the rows, one per epoch.

    Raises:
        UserError: there is no row, or none with an accuracy.
    """
    history = some(history, "the history")
    columns = [
        k
        for k in _columns(history)
        if k == "adv_accuracy" or (k.startswith("val_") and k not in ("val_n", "val_seconds"))
    ]
    rows = _history(history, columns, "accuracy")
    return _lines(some(rows, "the accuracies of the history"), "epoch", "accuracy", share=True)


def training_losses(history: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Draw the loss of ``metrics.jsonl`` and its terms.

    Args:
        history: the rows, one per epoch.

    Raises:
        UserError: there is no row, or none with a loss.
    """
    history = some(history, "the history")
    others = ("epoch", "step", "lr", "adv_accuracy", "images_per_second", "train_seconds")
    columns = [k for k in _columns(history) if k not in others and not k.startswith("val_")]
    rows = _history(history, columns, "loss", by="term")
    return _lines(some(rows, "the losses of the history"), "epoch", "loss", by="term")


def pareto(rows: Sequence[Mapping[str, Any]], cost: str = "") -> alt.LayerChart:
    """Draw worst-case accuracy against the cost of training, one point per method.

    Args:
        rows: the rows of a comparison.
        cost: "passes" (per image), "seconds" (of training) or "peak_memory_mb"; by default passes
            if all rows have it.

    Raises:
        UserError: no row has both numbers, or ``cost`` is unknown.
    """
    alt = need("altair")
    cost, points = priced(rows, cost)
    points = some(points, f"worst case and {cost} of the comparison")
    prices = [point["cost"] for point in points]
    # PGD may cost ten times as much as the others, which would overlap on a linear axis.
    kind: Row = {"domain": [0, 1.1 * max(prices)]}
    if max(prices) > 4 * min(prices):
        kind = {"type": "log", "nice": False, "padding": 28}
    # All verdicts in the scale, so that each has the same colour in every chart.
    verdicts = alt.Scale(domain=VERDICTS)
    present = [v for v in VERDICTS if any(point["verdict"] == v for point in points)]
    legend = alt.Legend(values=present)
    base = alt.Chart().encode(
        x=alt.X(
            "cost:Q",
            title=COSTS[cost],
            scale=alt.Scale(**kind),
            axis=alt.Axis(grid=False, format="~g"),
        ),
        color=alt.Color("verdict:N", title=None, scale=verdicts, legend=legend),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("accuracy:Q", title="worst case", format=".1%"),
            alt.Tooltip("cost:Q", title=COSTS[cost], format=".3~g"),
            alt.Tooltip("verdict:N"),
        ],
    )
    y = alt.Y("accuracy:Q", title="worst-case accuracy", scale=alt.Scale(domain=[0, 1]))
    axis = alt.Axis(format="%")
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", axis=axis), y2="high:Q")
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        y=y, shape=alt.Shape("verdict:N", title=None, scale=verdicts, legend=legend)
    )
    names = base.mark_text(dy=-12, fontSize=12).encode(y=y, text="method:N")
    chart = alt.layer(bars, dots, names).properties(width=WIDTH, height=HEIGHT + 40)
    return _with(chart, points)


def priced(rows: Sequence[Mapping[str, Any]], cost: str = "") -> tuple[str, list[Row]]:
    """Return the cost that ``pareto`` draws, and its points: rows with worst case and cost.

    Raises:
        UserError: ``cost`` is unknown.
    """
    if not cost:
        known = all(stated(row.get("passes"))[0] is not None for row in rows)
        cost = "passes" if known else "seconds"
    if cost not in COSTS:
        raise UserError(f"unknown cost {cost!r}: known are {', '.join(COSTS)}")
    points: list[Row] = []
    for row in rows:
        worst, spread, _ = stated(row.get("worst_case_accuracy"))
        price, _, _ = stated(row.get(cost))
        if worst is not None and price is not None and price > 0:
            point = {"method": row["method"], "cost": price, "accuracy": worst}
            spread = spread or 0.0
            point |= {"low": max(0.0, worst - spread), "high": min(1.0, worst + spread)}
            points.append(point | {"verdict": row.get("verdict") or "not audited"})
    return cost, points


def named_accuracies(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies of an evaluation by name: clean, the attacks, the worst case."""
    return {
        "clean": evaluation["clean_accuracy"],
        **evaluation["robust_accuracy"],
        WORST: evaluation["worst_case_accuracy"],
    }


def _columns(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of a history in the order in which they appear."""
    return list(dict.fromkeys(k for row in history for k in row))


def _history(
    history: Sequence[Mapping[str, Any]], columns: Sequence[str], value: str, by: str = "attack"
) -> list[Row]:
    return [
        {
            "x": row.get("epoch"),
            value: number(row[column]),
            by: _METRIC_NAMES.get(column, column.removeprefix("val_")),
        }
        for column in columns
        for row in history
        if number(row.get(column)) is not None
    ]


_FEW = 5  # whole numbers: up to so many, each gets a tick
_WIDE = 8
"""Ratio of the largest to the smallest x above which the axis is logarithmic."""


def _lines(
    rows: list[Row],
    x: str,
    value: str,
    *,
    by: str = "attack",
    share: bool = False,
    title: str | None = None,
) -> alt.LayerChart:
    """Draw one line per series, with a point at each value that shows it on hover.

    Args:
        rows: with "x", ``value`` and the series' name under ``by``.
        x: title of the x axis.
        value: the column of the value.
        by: the column of the series' name.
        share: the value is a share, to be drawn from 0 to 100%.
        title: title of the value's axis; by default the column's name.
    """
    alt = need("altair")
    series = list(dict.fromkeys(row[by] for row in rows))
    whole = all(float(row["x"]).is_integer() for row in rows if row["x"] is not None)
    scale = alt.Scale(domain=[0, 1]) if share else alt.Scale(zero=True)
    axis = alt.Axis(format="%") if share else alt.Axis()
    known = [float(row["x"]) for row in rows if row["x"] is not None]
    # A sweep up to the whole data range would have all other points at its left edge.
    kind = "log" if known and 0 < _WIDE * min(known) < max(known) and not whole else "linear"
    ticks: dict[str, Any] = {}
    if whole:  # no ticks between whole steps, restarts or epochs
        ticks = {"tickMinStep": 1, "format": "d"}
        if len(set(known)) <= _FEW:
            ticks["values"] = sorted(set(known))
    # One line needs no legend.
    legend = alt.Legend(title=None) if len(series) > 1 else None
    base = alt.Chart().encode(
        x=alt.X(
            "x:Q",
            title=x,
            scale=alt.Scale(type=kind, nice=False, zero=False, padding=8),
            axis=alt.Axis(grid=False, **ticks),
        ),
        y=alt.Y(f"{value}:Q", title=title or value, scale=scale, axis=axis),
        color=alt.Color(f"{by}:N", sort=series, scale=alt.Scale(domain=series), legend=legend),
    )
    line = base.mark_line(strokeWidth=2, clip=True)
    # Points are small enough for a line of a hundred steps; wide invisible rings catch the pointer.
    dense = len({row["x"] for row in rows}) > 40
    dots = base.mark_point(filled=True, size=8 if dense else 32, opacity=1, clip=False)
    tips = [
        alt.Tooltip(f"{by}:N"),
        alt.Tooltip("x:Q", title=x, format=".4~g"),
        alt.Tooltip(f"{value}:Q", format=".1%" if share else ".4~g"),
    ]
    rings = base.mark_point(filled=True, size=180, opacity=0).encode(tooltip=tips)
    chart = alt.layer(line, dots, rings).properties(width=WIDTH, height=HEIGHT)
    return _with(chart, rows)


def _with(chart: Any, rows: list[Row]) -> Any:
    """Attach the data to a finished chart; earlier, Altair would check every row for each part."""
    chart.data = need("altair").Data(values=rows)
    return chart
