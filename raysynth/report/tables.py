"""Tables of the page, ready to be set: words in cells, shades where a table is also a heat map.

Do not know how their numbers were made, nor HTML. Input: `ReportData`; output: `Table`s, or None where there is
nothing to tell. Where images and numbers come from is in `origins`, every table in full in `downloads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from raysynth.report.data import MACRO, ReportData
from raysynth.report.panels import DARKEST, multilabel
from raysynth.report.words import (
    count,
    group_words,
    higher_is_better,
    interval,
    is_shown,
    metric_words,
    number,
    p_words,
)

WITHHELD = "withheld"
MOST_CONTRASTS = 60


@dataclass(frozen=True)
class Cell:
    """One cell; `shade` is the opacity of its ground, 0 to `DARKEST`, None without."""

    text: str
    shade: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    key: str
    caption: str
    head: list[str]
    rows: list[list[Cell]]
    words: frozenset[int] = field(default_factory=frozenset)
    """Columns of words, which stand left; numbers stand right."""


def table(
    key: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()
) -> Table | None:
    """A table of words; None without rows. `words`: heads of the columns that stand left."""
    cells = [[Cell(str(c)) for c in row] for row in rows]
    left = frozenset({0, *(head.index(w) for w in words if w in head)})
    return Table(key, caption, list(head), cells, left) if rows else None


def text(value: Any) -> str:
    """A cell of words; empty where there is nothing."""
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return ", ".join(map(str, value))
    return "" if value is None or pd.isna(value) else str(value)


def arms(data: ReportData) -> Table | None:
    """How each arm did in the headline metric, and the images behind it."""
    values = data.averages(metric=data.metric, test_set=data.test_set, subgroup="").set_index("arm")
    rows = []
    for name in data.arm_names:
        arm = data.arm(name)
        there: dict[Any, Any] = values.loc[name].to_dict() if name in values.index else {}
        rows.append([
            name, shown_or_withheld(there["value"]) if there else "not evaluated", number(there.get("sd")),
            interval(there.get("ci_low"), there.get("ci_high")), count(there.get("runs")), count(arm.get("n_real")),
            count(arm.get("n_synth")), number(arm.get("ratio"), 2).removesuffix(".00"), count(there.get("n")),
            count(there.get("n_patients")),
        ])  # fmt: skip
    metric = metric_words(data.metric)
    part = {str(f).removeprefix(MACRO) for f in values["finding"]} - {""}
    averaged = " averaged over the findings" if data.is_averaged(data.metric) else ""
    without = f"{', '.join(sorted(part))} (too few cases)" if part else ""
    head = ["arm", metric, "sd over runs", "interval", "runs", "real images", "synthetic images", "ratio",
            "test images", "test patients"]  # fmt: skip
    return table(
        "arms", f"Every arm on the test set “{data.test_set}”: {metric}{averaged}{without}, mean over "
        "the runs. The interval, the mean of the runs’ limits, covers the choice of test patients, not training.",
        head, rows,
    )  # fmt: skip


def recipes(data: ReportData) -> Table | None:
    """How each arm was trained."""
    rows = [
        [r["arm"], text(r["strategy"]), _steps(r), count(r["batch_size"]), count(r["n_validation"]),
         text(r["seeds"]), text(r["architecture"]), text(r["init"]), text(r["changes"])]
        for r in data.arms.to_dict("records")
    ]  # fmt: skip
    head = ["arm", "strategy", "optimizer steps", "batch", "validation images", "seeds", "architecture", "start",
            "what differs"]  # fmt: skip
    return table("recipes", "Training of every arm. Optimizer steps times batch is its compute.", head, rows,
                  ["strategy", "what differs", "architecture", "start"])  # fmt: skip


def _steps(arm: dict[str, Any]) -> str:
    """`600`; `30 to 45 of 60` where early stopping ended a seed."""
    least, most, budget = (count(arm[k]) for k in ("gradient_steps", "most_steps", "step_budget"))
    return (least if least == most else f"{least} to {most}") + (f" of {budget}" if least != budget else "")


def _shaded(
    key: str, caption: str, corner: str, values: pd.DataFrame, across: bool, lower: Sequence[str] = ()
) -> Table:
    """A heat map of `values`; each column (or, `across`, the whole) is shaded from its worst to its best value."""
    numbers = values.to_numpy(float)
    known = np.isfinite(numbers)
    filled = np.where(known, numbers, 0.0)
    axis = None if across else 0
    low = np.min(np.where(known, numbers, np.inf), axis=axis, keepdims=True)
    high = np.max(np.where(known, numbers, -np.inf), axis=axis, keepdims=True)
    span = np.where(np.isfinite(high - low) & (high > low), high - low, np.inf)
    share = (filled - np.where(np.isfinite(low), low, 0)) / span
    flipped = np.array([c in lower for c in values.columns])
    share = np.where(flipped & np.isfinite(span), 1 - share, share)
    rows = [
        [Cell(str(name)), *(
            Cell(number(v), round(DARKEST * float(s), 2)) if k else Cell(WITHHELD) for v, s, k in zip(row, shade, there)
        )]
        for name, row, shade, there in zip(values.index, numbers, share, known)
    ]  # fmt: skip
    return Table(key, caption, [corner, *map(str, values.columns)], rows, frozenset({0}))


def metrics_by_arm(data: ReportData, test_set: str) -> Table | None:
    """Heat map of arms by metrics on one test set."""
    summary = data.averages(test_set=test_set, subgroup="")
    if not len(summary):
        return None
    wide = summary.pivot(index="arm", columns="metric", values="value")
    wide = wide.reindex(
        index=[a for a in data.arm_names if a in wide.index], columns=list(dict.fromkeys(summary["metric"]))
    )
    lower = [metric_words(m) for m in wide.columns if not higher_is_better(m)]
    wide.columns = pd.Index([metric_words(m) for m in wide.columns])
    note = "The stronger the shade, the better within its column; a shade is no test."
    note += f" Lower is better for {', '.join(lower)}." if lower else ""
    return _shaded(
        f"heat-{data.test_sets.index(test_set)}", f"Test set “{test_set}”: metrics averaged over the findings, mean "
        f"over the runs. {note}", "arm", wide, False, lower,
    )  # fmt: skip


def findings_by_arm(data: ReportData) -> Table | None:
    """Heat map of findings (or classes) by arms in the headline metric."""
    summary = data.summary(metric=data.metric, test_set=data.test_set, subgroup="")
    summary = summary[~summary["finding"].astype(str).str.startswith(MACRO)]
    if not len(summary):
        return None
    wide = summary.pivot(index="finding", columns="arm", values="value")
    positives = summary.groupby("finding")["n_pos"].max()
    wide = wide.reindex(
        index=list(dict.fromkeys(summary["finding"])), columns=[a for a in data.arm_names if a in wide.columns]
    )
    wide.index = pd.Index([f"{f} ({count(positives[f])})" for f in wide.index])
    direction = f"The stronger the shade, the {'higher' if higher_is_better(data.metric) else 'lower'}."
    lower = [] if higher_is_better(data.metric) else list(wide.columns)
    return _shaded(
        "findings", f"{metric_words(data.metric)} of each finding on the test set “{data.test_set}”, with its number "
        f"of positives; mean over the runs. {direction}", "finding (positives)", wide, True, lower,
    )  # fmt: skip


def contrasts(data: ReportData, test_set: str) -> Table | None:
    """Paired differences over the findings' average on one test set, the primary one first."""
    rows = data.contrasts(test_set=test_set, subgroup="")
    rows = rows.sort_values("primary", ascending=False, kind="stable", key=lambda c: c.fillna(False).astype(bool))
    cells = []
    for row in rows.head(MOST_CONTRASTS).to_dict("records"):
        primary = bool(row["primary"]) and not pd.isna(row["primary"])
        known = not pd.isna(row["difference"])
        verdict = "shown" if is_shown(row, data.confidence, "p" if primary else "p_holm") else "not shown"
        cells.append([
            f"{row['arm']} − {row['against']}" + (" (primary)" if primary else ""), metric_words(row["metric"]),
            number(row["difference"], sign=True) if known else WITHHELD,
            interval(row["ci_low"], row["ci_high"], sign=True), verdict if known else "-", p_words(row["p"]),
            "-" if primary else p_words(row["p_holm"]), number(row["minimum_detectable_difference"]),
            count(row["n"]), count(row["n_patients"]), count(row["seeds"]),
        ])  # fmt: skip
    hidden = len(rows) - len(cells)
    key = data.test_sets.index(test_set) if test_set in data.test_sets else "other"
    return table(
        f"contrasts-{key}", f"Paired differences on the test set “{test_set}”, averaged over the findings. All but a "
        "primary one are exploratory, and “shown” is after Holm’s correction."
        + (f" {hidden:,} more are in comparisons.csv." if hidden > 0 else ""),
        ["contrast", "metric", "difference", "interval", "verdict", "p", "p, Holm", "minimum detectable", "images",
         "patients", "seeds"], cells, ["metric"],
    )  # fmt: skip


def subgroups(data: ReportData) -> list[Table]:
    """The headline metric and the underdiagnosis rate of each subgroup, a table a metric; withheld cells say so."""
    averages = data.averages(metric=data.metric, test_set=data.test_set)
    averages = averages[averages["subgroup"] != ""]
    tables = [_by_subgroup(data, data.metric, averages, pd.DataFrame())] if len(averages) else []
    for metric in [m for m in dict.fromkeys(data.metrics["metric"]) if m.endswith("diagnosis")]:
        rates = data.summary(metric=metric, test_set=data.test_set)
        gaps = data.summary(metric=f"{metric}_gap", test_set=data.test_set, subgroup="")
        tables += [_by_subgroup(data, metric, rates, gaps)] if len(rates) else []
    return tables


def _by_subgroup(data: ReportData, metric: str, values: pd.DataFrame, gaps: pd.DataFrame) -> Table:
    arms = [a for a in data.arm_names if a in set(values["arm"])]
    rows = []
    for group, mine in values.groupby("subgroup", sort=False):
        by_arm = mine.set_index("arm")["value"]
        # An average over fewer findings in this group says which are left out.
        part = {str(f).removeprefix(MACRO) for f in mine["finding"] if str(f).startswith(f"{MACRO} ")}
        rows.append([group_words(str(group)) + "".join(sorted(part)), count(mine["n"].max()),
                     count(mine["n_patients"].max()), *(shown_or_withheld(by_arm.get(a)) for a in arms)])  # fmt: skip
    if len(gaps):
        by_arm = gaps.set_index("arm")["value"]
        rows.append(["largest gap between groups", "", "", *(shown_or_withheld(by_arm.get(a)) for a in arms)])
    better = "higher" if higher_is_better(metric) else "lower"
    words = metric_words(metric)
    found = table(
        f"subgroups-{metric}", f"{words[0].upper()}{words[1:]} by subgroup on the test set “{data.test_set}”, mean "
        f"over the runs; {better} is better. Withheld: too few cases.", ["subgroup", "images", "patients", *arms], rows,
    )  # fmt: skip
    assert found is not None
    return found


def shown_or_withheld(value: Any) -> str:
    """A metric, or the word for one that is not told."""
    return WITHHELD if value is None or pd.isna(value) else number(value)


def confusion_tables(data: ReportData) -> list[Table]:
    """Counts of each finding, where an image can have several."""
    tables = []
    for i, (arm, (counts, names)) in enumerate(data.confusion.items()):
        stacked = multilabel(counts, names)
        if stacked is None:
            continue
        rows = []
        for name, ((tn, fp), (fn, tp)) in zip(names, stacked):
            shares = [number(a / b) if b else WITHHELD for a, b in ((tp, tp + fn), (tn, tn + fp))]
            rows.append([name, *map(count, (tp, fn, fp, tn)), *shares])
        head = ["finding", "true positive", "false negative", "false positive", "true negative", "sensitivity",
                "specificity"]  # fmt: skip
        found = table(f"confusion-{i}", f"{arm}: counts summed over the seeds, at the frozen thresholds.", head, rows)
        tables += [found] if found else []
    return tables
