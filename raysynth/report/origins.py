"""Tables of where images and numbers come from: fidelity, what the generator saw, cost, provenance.

Do not know how their numbers were made, nor HTML. Input: `ReportData`; output: `Table`s, or None where there is
nothing to tell.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from raysynth.report.data import ReportData
from raysynth.report.tables import Table, shown_or_withheld, table, text
from raysynth.report.words import count, interval, metric_words, number


def fidelity(data: ReportData) -> Table | None:
    """Distances beside their floor; columns that say the same in every row are said once, in the caption."""
    rows = [
        [text(r["class"]) if text(r["class"]) not in ("", "all") else "overall", metric_words(r["metric"]),
         shown_or_withheld(r["value"]), interval(r["ci_low"], r["ci_high"]), number(r["floor"]), count(r["n_real"]),
         count(r["n_synth"]), text(r["extractor"]), text(r["generator"]), text(r["note"])]
        for r in data.fidelity.to_dict("records")
    ]  # fmt: skip
    head = ["class", "metric", "synthetic", "interval", "floor", "real images", "synthetic images", "features",
            "generator", "note"]  # fmt: skip
    once = [c for c in ("features", "generator", "note") if len({r[head.index(c)] for r in rows}) == 1]
    said = "".join(f" {c.capitalize()}: {rows[0][head.index(c)]}." for c in once if rows[0][head.index(c)])
    kept = [i for i, c in enumerate(head) if c not in once]
    caption = "Synthetic against held-out real images. Floor: real against real at the same number of images."
    return table(
        "fidelity", caption + said, [head[i] for i in kept], [[r[i] for i in kept] for r in rows],
        ["metric", "features", "generator", "note"],
    )  # fmt: skip


def _duration(seconds: Any) -> str:
    if seconds is None or pd.isna(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds else "0 s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def cost(data: ReportData) -> Table | None:
    """Time, speed and price of every stage, with the sum."""
    rows = [
        [text(r["stage"]), text(r["arm"]), _duration(r["seconds"]), count(r["images"]), number(r["images_per_s"], 1),
         _duration(r["gpu_seconds"]), number(r["cost"], 2)]
        for r in data.cost.to_dict("records")
    ]  # fmt: skip
    if len(rows) > 1:
        total = data.cost[["seconds", "gpu_seconds", "cost"]].sum(min_count=1)
        rows.append(["total", "", _duration(total["seconds"]), "", "", _duration(total["gpu_seconds"]),
                     number(total["cost"], 2)])  # fmt: skip
    return table(
        "cost", "Cost of every stage; of training and rendering without their starts. What arms share counts once. "
        "Stages that ran side by side add up to more than the wall clock.",
        ["stage", "arm", "time", "images", "images/s", "GPU time", "cost"], rows, ["arm"],
    )  # fmt: skip


def generator_saw(data: ReportData) -> Table | None:
    """Real images behind each arm: given to the classifier, used to choose, and seen by the generator alone."""
    arms = data.arms
    used = arms[(arms["n_synth"] > 0) | (arms["n_unseen"] > 0) | (arms["strategy"] == "upper_bound")]
    rows = [
        [r["arm"], count(r["n_real"]), count(r["n_validation"]), count(r["n_real_generator"]), count(r["n_unseen"]),
         text(r["train_on"])]
        for r in used.to_dict("records")
    ]  # fmt: skip
    return table(
        "generator-saw", "Real images behind each arm with synthetic images, and behind the upper bound.",
        ["arm", "given to the classifier", "used for validation", "seen by the generator",
         "seen by the generator, not the classifier", "generator.train_on"], rows, ["generator.train_on"],
    )  # fmt: skip


def provenance(data: ReportData) -> Table | None:
    """Where every number comes from."""
    rows = [
        [text(r["stage"]), text(r["folder"]), text(r["digest"])[:8], text(r["git commit"])[:8],
         {True: "yes", False: "no"}.get(r["dirty"], text(r["dirty"])), _duration(r["seconds"]),
         _versions(r["versions"])]
        for r in data.provenance.to_dict("records")
    ]  # fmt: skip
    head = ["stage", "folder", "digest", "commit", "uncommitted changes", "time", "versions"]
    return table("provenance", "Artifacts behind this page.", head, rows,
                  ["folder", "digest", "commit", "uncommitted changes", "versions"])  # fmt: skip


def _versions(value: Any) -> str:
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else text(value)
