"""Figures of the result: the ratio curve, forest plots of paired differences, and fidelity beside its floor.

Do not know how their numbers were made. Input: `ReportData`; output: `Drawing`s, or None where there is nothing to
draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator

from raysynth.report.data import ReportData
from raysynth.report.drawing import (  # fmt: skip
    INK,
    MUTED,
    Drawing,
    IntervalRow,
    canvas,
    interval_rows,
    row_height,
    series,
    svg_of,
    wrapped,
)
from raysynth.report.words import group_words, higher_is_better, interval, is_shown, metric_words, number, plural

MOST_ROWS = 30
"""Rows of a forest plot; the rest is in its table."""
REFERENCES = {"real": "real images alone", "upper_bound": "upper bound"}
VARIES = {
    "n_real_generator": "generator of {:,.0f} real images", "guidance_scale": "guidance {:g}",
    "sampling_steps": "{:g} sampling steps", "architecture": "{}", "init": "{}", "n_real": "{:,.0f} real images",
    "generator_id": "generator {:.12}",
}  # fmt: skip
"""Columns that tell two ratio curves of one strategy apart, and what they are called."""


def ratio_curve(data: ReportData) -> Drawing | None:
    """The headline metric against the supplementation ratio: a line a strategy (and generator, subset ...)."""
    values = data.averages(metric=data.metric, test_set=data.test_set, subgroup="").dropna(subset="value")
    arms = data.arms[["arm", "strategy", "ratio"]].merge(values, on="arm").reset_index(drop=True)
    drawn = arms[(arms["ratio"] > 0) & ~arms["strategy"].isin(REFERENCES)]
    if not len(drawn):
        return None
    groups = drawn.groupby(_lines(data, drawn), sort=False)
    asked = (data.primary or {}).get("arm")  # its line comes first
    lines = {n: g.sort_values("ratio") for n, g in sorted(groups, key=lambda group: asked not in list(group[1]["arm"]))}
    metric, ratios = metric_words(data.metric), sorted(drawn["ratio"].unique())
    references = [(w, r) for s, w in REFERENCES.items() if len(r := _reference(data, arms[arms["strategy"] == s])) == 1]
    with canvas(300 + 14 * (len(lines) + 2)) as figure:
        axes = figure.subplots()
        for i, (words, reference) in enumerate(references):
            row, colour = reference.iloc[0], (INK, MUTED)[i % 2]
            axes.axhspan(row["ci_low"], row["ci_high"], color=colour, alpha=0.10, linewidth=0)
            axes.axhline(row["value"], color=colour, linestyle=(0, (6, 3)) if i else "-", linewidth=1.2, label=words)
        spread = np.linspace(-1, 1, len(lines)) if len(lines) > 1 else np.zeros(1)
        for i, (name, rows) in enumerate(lines.items()):
            # Lines at the same ratios stand a little apart, so that their intervals can be told apart.
            x = rows["ratio"] * (1 + 0.03 * spread[i])
            style = series(i)
            axes.plot(x, rows["value"], label=wrapped(name, 44), **style)
            axes.vlines(x, rows["ci_low"], rows["ci_high"], color=style["color"], linewidth=1.4)
        if ratios[-1] / ratios[0] > 4:
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ratios))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ratios, [f"{r:.3g}" for r in ratios])
        if len(ratios) == 1:
            axes.set_xlim(ratios[0] * 0.5, ratios[0] * 1.5)
        axes.set(xlabel="synthetic (or repeated) images per real image", ylabel=f"{metric}, mean over seeds")
        figure.legend(loc="outside upper left")
        svg = svg_of(figure, "ratio-curve")
    said = [
        f"{name}: " + ", ".join(f"{number(r.value)} at {r.ratio:g}" for r in rows.itertuples())
        for name, rows in lines.items()
    ]
    said += [f"{w}: {number(r['value'].iloc[0])}" for w, r in references]
    return Drawing(
        "ratio-curve", svg, f"{metric} by synthetic images per real image. {'; '.join(said)}.",
        f"{metric} on the test set “{data.test_set}” by the number of images added per real image. Points: means over "
        "the seeds; bars and bands: mean limits of the runs’ intervals over resampled test patients.",
    )  # fmt: skip


def _reference(data: ReportData, arms: pd.DataFrame) -> pd.DataFrame:
    """Of several arms trained on real images alone, the one that the primary contrast is against; else none is it."""
    named = arms[arms["arm"] == (data.primary or {}).get("against")]
    return named if len(arms) > 1 and len(named) else arms


def _lines(data: ReportData, drawn: pd.DataFrame) -> pd.Series:
    """The line of each arm: its strategy and whatever else differs among the arms drawn."""
    first = data.metrics.drop_duplicates("arm").set_index("arm")[list(VARIES)].reindex(drawn["arm"])
    first = first.set_index(drawn.index)
    names = drawn["strategy"].astype(str)
    told = False
    for column, words in VARIES.items():
        # A generator is named only where nothing else tells it from another; arms without synthetic images have none.
        if first[column].nunique() > 1 and not (column == "generator_id" and told):
            told = True
            named = first[column].map(lambda v, words=words: ", " + words.format(v), na_action="ignore")
            names = names + named.fillna("").astype(str)
    return names


def forest(data: ReportData, test_set: str) -> Drawing | None:
    """Paired differences of the headline metric on one test set, the primary contrast marked."""
    rows = data.contrasts(metric=data.metric, test_set=test_set, subgroup="")
    return _forest(data, rows, f"forest-{_slug(data, test_set)}", test_set, data.metric, "contrast")


def subgroup_forest(data: ReportData) -> Drawing | None:
    """The primary contrast in every subgroup."""
    if data.primary is None:
        return None
    rows = data.contrasts(**data.primary)
    rows = rows[rows["subgroup"].fillna("") != ""]
    return _forest(data, rows, "forest-subgroups", data.test_set, data.metric, "subgroup")


def _slug(data: ReportData, test_set: str) -> str:
    return str(data.test_sets.index(test_set)) if test_set in data.test_sets else "other"


def _forest(data: ReportData, rows: pd.DataFrame, key: str, test_set: str, metric: str, by: str) -> Drawing | None:
    known = rows.dropna(subset="difference")
    if not len(known):
        return None
    primary = known["primary"].fillna(False).astype(bool) & (by == "contrast")
    known = known.assign(marked=primary).sort_values("marked", ascending=False, kind="stable")
    shown, words, better = known.head(MOST_ROWS), metric_words(metric), higher_is_better(metric)
    same = shown["against"].nunique() == 1
    lines: list[IntervalRow] = []
    said: list[str] = []
    for row in shown.to_dict("records"):
        name = row["arm"] if same else f"{row['arm']} vs {row['against']}"
        name = group_words(row["subgroup"]) if by == "subgroup" else name
        filled = is_shown(row, data.confidence, "p" if row["marked"] else "p_holm")
        size = number(row["difference"], sign=True)
        lines.append((name, f"{size} ({interval(row['ci_low'], row['ci_high'])})", row["difference"], row["ci_low"],
                      row["ci_high"], row["marked"], filled))  # fmt: skip
        said.append(f"{name} {size}{', primary' if row['marked'] else ''}{', differs from 0' if filled else ''}")
    with canvas(60 + row_height(lines) * len(lines)) as figure:
        interval_rows(figure, lines, f"difference in {words} ({'right' if better else 'left'} of 0 is better)")
        svg = svg_of(figure, key)
    against = f" against “{shown['against'].iloc[0]}”" if same else ""
    arm = f" of “{shown['arm'].iloc[0]}”" if by == "subgroup" else ""
    caption = (
        f"Paired differences in {words}{arm}{against} on the test set “{test_set}”"
        f"{', by subgroup' if by == 'subgroup' else ''}, with {100 * data.confidence:g} % intervals. "
        + ("Diamond: the primary contrast, judged on its own. " if shown["marked"].any() else "")
        + "Filled: differs from 0"
        + (" after Holm’s correction" if (~shown["marked"]).any() else "") + "; hollow: not shown to differ."
    )  # fmt: skip
    hidden = len(known) - len(shown)
    caption += f" {plural(hidden, 'further row')} in the table." if hidden else ""
    caption += f" {plural(len(rows) - len(known), 'row')} withheld." if len(rows) > len(known) else ""
    return Drawing(key, svg, f"Differences in {words}{arm}{against}: {'; '.join(said)}.", caption)


def fidelity(data: ReportData) -> list[Drawing]:
    """Each distance, overall and by class, beside what real images score against real ones."""
    table = data.fidelity.dropna(subset="value")
    drawings = []
    keys = ["extractor", "metric", "synthetic_set"]
    for i, ((extractor, metric, _), rows) in enumerate(table.groupby(keys, sort=False, dropna=False)):
        rows = rows.head(MOST_ROWS)
        words = metric_words(str(metric))
        lines = [_distance(r) for r in rows.to_dict("records")]
        with canvas(60 + row_height(lines) * len(lines)) as figure:
            axes = interval_rows(figure, lines, words, zero=None)
            for y, floor in zip(range(len(rows) - 1, -1, -1), rows["floor"]):
                axes.plot([floor], [y], marker="|", color=MUTED, markersize=14, markeredgewidth=2.5)
            svg = svg_of(figure, f"fidelity-{i}")
        which = rows["generator"].dropna()
        source = f" of {which.iloc[0]}" if len(which) and table["synthetic_set"].nunique() > 1 else ""
        title = words[0].upper() + words[1:]
        said = "; ".join(
            f"{_class(r.row_class)} {number(r.value)} against a floor of {number(r.floor)}"
            for r in rows.rename(columns={"class": "row_class"}).itertuples()
        )
        drawings.append(Drawing(
            f"fidelity-{i}", svg, f"{title} ({extractor} features){source}: {said}.",
            f"{title} of synthetic{source} against held-out real images, {extractor} features. Circle: synthetic, with "
            "its interval where there is one; upright bar: real against real at the same number of images, the best "
            "that can be had.",
        ))  # fmt: skip
    return drawings


def _class(name: Any) -> str:
    return "overall" if pd.isna(name) or name in ("", "all") else str(name)


def _distance(row: dict[Any, Any]) -> IntervalRow:
    words = f"{number(row['value'])} (floor {number(row['floor'])})"
    return _class(row["class"]), words, row["value"], row["ci_low"], row["ci_high"], False, True
