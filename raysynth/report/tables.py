"""Tables of the page, ready to be set: words in cells, shades where a table is also a heat map.

Do not know how their numbers were made, nor HTML. Input: `ReportData`; output: `Table`s, or None where there is
nothing to tell; and every table in full as CSV.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from raysynth.report.data import MACRO, ReportData
from raysynth.report.panels import DARKEST, multilabel
from raysynth.report.words import count, higher_is_better, interval, is_shown, metric_words, number, p_words

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


def _table(key: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> (
    Table | None
):
    cells = [[Cell(str(c)) for c in row] for row in rows]
    left = frozenset({0, *(head.index(w) for w in words if w in head)})
    return Table(key, caption, list(head), cells, left) if rows else None


def _whole(row: dict[Any, Any], column: str) -> str:
    return count(row.get(column))


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return ", ".join(map(str, value))
    return "" if value is None or pd.isna(value) else str(value)


def arms(data: ReportData) -> Table | None:
    """What each arm was and how it did in the headline metric."""
    values = data.averages(metric=data.metric, test_set=data.test_set, subgroup="").set_index("arm")
    rows = []
    for name in data.arm_names:
        arm = data.arm(name)
        there: dict[Any, Any] = values.loc[name].to_dict() if name in values.index else {}
        value = "not evaluated" if not there else WITHHELD if pd.isna(there["value"]) else number(there["value"])
        rows.append([
            name, value, number(there.get("sd")), interval(there.get("ci_low"), there.get("ci_high")),
            count(there.get("runs")), count(there.get("n")), count(there.get("n_patients")), _text(arm.get("strategy")),
            number(arm.get("ratio"), 2).removesuffix(".00"), _whole(arm, "n_real"), _whole(arm, "n_synth"),
            _whole(arm, "n_validation"), _whole(arm, "gradient_steps"), _whole(arm, "batch_size"),
            _text(arm.get("architecture")), _text(arm.get("init")), _text(arm.get("changes")),
        ])  # fmt: skip
    metric = metric_words(data.metric)
    head = ["arm", metric, "sd over runs", "interval", "runs", "test images", "test patients", "strategy", "ratio",
            "real", "synthetic", "validation", "steps", "batch", "architecture", "start", "what differs"]  # fmt: skip
    return _table(
        "arms", f"Every arm on the test set “{data.test_set}”: {metric} averaged over the findings, mean over the runs, "
        "with the mean limits of their intervals over resampled test patients.", head, rows,
        ["strategy", "architecture", "start", "what differs"],
    )  # fmt: skip


def _shaded(key: str, caption: str, corner: str, values: pd.DataFrame, across: bool, lower: Sequence[str] = ()) -> Table:
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
    note = f" Lower is better for {', '.join(lower)}." if lower else ""
    return _shaded(
        f"heat-{data.test_sets.index(test_set)}", f"Test set “{test_set}”: metrics averaged over the findings, mean over "
        f"the runs. Darker is better within a column; a shade is no test.{note}", "arm", wide, False, lower,
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
    direction = "Darker is higher." if higher_is_better(data.metric) else "Darker is lower, which is better."
    lower = [] if higher_is_better(data.metric) else list(wide.columns)
    return _shaded(
        "findings", f"{metric_words(data.metric)} of each finding on the test set “{data.test_set}”, with its number of "
        f"positives; mean over the runs. {direction}", "finding (positives)", wide, True, lower,
    )  # fmt: skip


def contrasts(data: ReportData) -> Table | None:
    """Paired differences over the findings' average, all metrics and test sets, the primary one first."""
    rows = data.contrasts(subgroup="")
    rows = rows.sort_values("primary", ascending=False, kind="stable", key=lambda c: c.fillna(False).astype(bool))
    cells = []
    for row in rows.head(MOST_CONTRASTS).to_dict("records"):
        primary = bool(row["primary"]) and not pd.isna(row["primary"])
        difference = WITHHELD if pd.isna(row["difference"]) else number(row["difference"], sign=True)
        verdict = "shown" if is_shown(row, data.confidence, "p" if primary else "p_holm") else "not shown"
        cells.append([
            f"{row['arm']} − {row['against']}" + (" (primary)" if primary else ""), metric_words(row["metric"]),
            row["test_set"], difference, interval(row["ci_low"], row["ci_high"], sign=True),
            p_words(row["p"]), p_words(row["p_holm"]), verdict, number(row["minimum_detectable_difference"]),
            count(row["n"]), count(row["n_patients"]), count(row["seeds"]),
        ])  # fmt: skip
    hidden = len(rows) - len(cells)
    return _table(
        "contrasts", "Paired differences, averaged over the findings. All but the primary one are exploratory; “shown” "
        "means after Holm’s correction." + (f" {hidden:,} more are in comparisons.csv." if hidden > 0 else ""),
        ["contrast", "metric", "test set", "difference", "interval", "test", "Holm", "verdict",
         "minimum detectable", "images", "patients", "seeds"], cells, ["metric", "test set", "verdict"],
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
        rows.append([str(group or "everyone") + "".join(sorted(part)), count(mine["n"].max()),
                     count(mine["n_patients"].max()), *(_withheld(by_arm.get(a)) for a in arms)])  # fmt: skip
    if len(gaps):
        by_arm = gaps.set_index("arm")["value"]
        rows.append(["largest gap between groups", "", "", *(_withheld(by_arm.get(a)) for a in arms)])
    better = "higher" if higher_is_better(metric) else "lower"
    words = metric_words(metric)
    table = _table(
        f"subgroups-{metric}", f"{words[0].upper()}{words[1:]} by subgroup on the test set “{data.test_set}”, mean over "
        f"the runs; {better} is better. Withheld: too few cases.", ["subgroup", "images", "patients", *arms], rows,
    )  # fmt: skip
    assert table is not None
    return table


def _withheld(value: Any) -> str:
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
        table = _table(f"confusion-{i}", f"{arm}: counts summed over the seeds, at the frozen thresholds.", head, rows)
        tables += [table] if table else []
    return tables


def fidelity(data: ReportData) -> Table | None:
    """Distances beside their floor."""
    rows = [
        [_text(r["class"]) if _text(r["class"]) not in ("", "all") else "overall", metric_words(r["metric"]),
         number(r["value"]) if not pd.isna(r["value"]) else WITHHELD, interval(r["ci_low"], r["ci_high"]),
         number(r["floor"]), count(r["n_real"]), count(r["n_synth"]), _text(r["extractor"]), _text(r["generator"]),
         _text(r["note"])]
        for r in data.fidelity.to_dict("records")
    ]  # fmt: skip
    head = ["class", "metric", "synthetic", "interval", "floor", "real images", "synthetic images", "features",
            "generator", "note"]  # fmt: skip
    return _table(
        "fidelity", "Synthetic against held-out real images. Floor: real against real at the same number of images.",
        head, rows, ["metric", "features", "generator", "note"],
    )  # fmt: skip


def _duration(seconds: Any) -> str:
    if seconds is None or pd.isna(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def cost(data: ReportData) -> Table | None:
    """Time, speed and price of every stage, with the sum."""
    table = data.cost
    records = table.to_dict("records")
    rows = [
        [_text(r["stage"]), _text(r["arm"]), _duration(r["seconds"]), count(r["images"]), number(r["images_per_s"], 1),
         _duration(r["gpu_seconds"]), number(r["cost"], 2)]
        for r in records
    ]  # fmt: skip
    if len(rows) > 1:
        total = table[["seconds", "gpu_seconds", "cost"]].sum(min_count=1)
        rows.append(["total", "", _duration(total["seconds"]), "", "", _duration(total["gpu_seconds"]),
                     number(total["cost"], 2)])  # fmt: skip
    return _table(
        "cost", "Cost of every stage; stages that ran side by side add up to more than the wall clock.",
        ["stage", "arm", "time", "images", "images/s", "GPU time", "cost"], rows, ["arm"],
    )  # fmt: skip


def generator_saw(data: ReportData) -> Table | None:
    """Real images behind each arm: given to the classifier, used to choose, and seen by the generator alone."""
    used = data.arms[(data.arms["n_synth"] > 0) | (data.arms["n_unseen"] > 0) | (data.arms["strategy"] == "upper_bound")]
    rows = [
        [r["arm"], _whole(r, "n_real"), _whole(r, "n_validation"), _whole(r, "n_real_generator"), _whole(r, "n_unseen"),
         _text(r["train_on"])]
        for r in used.to_dict("records")
    ]  # fmt: skip
    return _table(
        "generator-saw", "Real images behind each arm with synthetic images, and behind the upper bound.",
        ["arm", "given to the classifier", "used for validation", "seen by the generator",
         "seen by the generator, not the classifier", "generator.train_on"], rows, ["generator.train_on"],
    )  # fmt: skip


def provenance(data: ReportData) -> Table | None:
    """Where every number comes from."""
    rows = [
        [_text(r["stage"]), _text(r["folder"]), _text(r["digest"])[:12], _text(r["git commit"])[:12],
         {True: "yes", False: "no"}.get(r["dirty"], _text(r["dirty"])), _duration(r["seconds"]), _versions(r["versions"])]
        for r in data.provenance.to_dict("records")
    ]  # fmt: skip
    head = ["stage", "folder", "digest", "commit", "uncommitted changes", "time", "versions"]
    return _table("provenance", "Artifacts behind this page.", head, rows,
                  ["folder", "digest", "commit", "uncommitted changes", "versions"])  # fmt: skip


def _versions(value: Any) -> str:
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else _text(value)


def write_tables(data: ReportData) -> dict[str, bytes]:
    """File name -> CSV of every table of the data, whole, and of what the page derives from them.

    Numbers have all their digits; a missing or withheld one is empty.
    """
    tables = {**data.tables(), "summary": data.summary(), "confusion": _confusion_rows(data)}
    return {f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items() if len(table)}


def _confusion_rows(data: ReportData) -> pd.DataFrame:
    """Long form: finding is empty for a matrix of classes; true and predicted are 0 or 1 within a finding."""
    rows = []
    for arm, (counts, names) in data.confusion.items():
        stacked = multilabel(counts, names)
        tables = {"": np.asarray(counts)} if stacked is None else dict(zip(names, stacked))
        for finding, matrix in tables.items():
            labels = names if stacked is None else [0, 1]
            rows += [(arm, finding, labels[i], labels[j], v) for (i, j), v in np.ndenumerate(matrix)]
    return pd.DataFrame(rows, columns=["arm", "finding", "true", "predicted", "count"])
