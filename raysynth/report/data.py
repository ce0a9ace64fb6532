"""What the page is made of: tables of numbers already computed, filled by the stage or by hand.

Does not know how a number was made, nor how it will look. Input: pandas tables with the columns named in `COLUMNS`;
output: the same, checked, with the arms in one order and the metric table summed up over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from raysynth.core.errors import DataError
from raysynth.core.schemas import metric_schema

COLUMNS: dict[str, tuple[str, ...]] = {
    "metrics": tuple(metric_schema().names),
    "comparisons": (
        "arm", "against", "metric", "test_set", "finding", "subgroup", "difference", "ci_low", "ci_high", "p",
        "p_holm", "seeds", "n", "n_patients", "minimum_detectable_difference", "primary",
    ),
    "curves": ("arm", "seed", "step", "phase", "loss", "val_loss", "val_metric", "monitor"),
    "reliability": ("arm", "finding", "bin_low", "bin_high", "predicted", "observed", "n"),
    "fidelity": (
        "generator_id", "synthetic_set", "extractor", "class", "metric", "value", "floor", "ci_low", "ci_high",
        "n_real", "n_synth", "note", "generator",
    ),
    "cost": ("stage", "arm", "seconds", "images", "images_per_s", "gpu_seconds", "cost"),
    "arms": (
        "arm", "strategy", "ratio", "n_real", "n_synth", "n_validation", "n_real_generator", "train_on", "n_unseen",
        "gradient_steps", "most_steps", "step_budget", "batch_size", "architecture", "init", "seeds", "changes",
    ),
    "provenance": ("stage", "folder", "digest", "git commit", "dirty", "versions", "seconds"),
}  # fmt: skip
"""Columns of each table, in order. A table may hold more; an empty one needs none."""

MACRO = "macro"
"""The finding of an average over the fixed set of findings; `macro without X, Y` where some are withheld."""

SEEDS = {
    "seed_classifier": "training seeds", "seed_subset": "real subsets", "seed_generator": "generator seeds",
}  # fmt: skip
"""What a run may repeat, and the word for it; all trials share one split."""


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. Parts that are missing are left out of the page, which then says less."""

    name: str
    """The experiment's."""
    created: str
    """ISO date."""
    experiment_yaml: str = ""
    """The resolved experiment."""
    metrics: pd.DataFrame = field(default_factory=pd.DataFrame)
    """`core.schemas.metric_schema`: every trial, test set, finding and subgroup; `value` NaN where withheld."""
    comparisons: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Paired differences, `arm` minus `against`, averaged over the seeds."""
    confusion: dict[str, tuple[np.ndarray, list[str]]] = field(default_factory=dict)
    """Arm -> counts summed over the seeds, and class names. (K, K), true class by predicted class; or, with several
    labels an image, (F, 2, 2) or (2F, 2): [[TN, FP], [FN, TP]] of each finding."""
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Training: losses and the monitored validation metric by optimizer step; NaN where not measured."""
    reliability: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Mean predicted probability and observed frequency by bin."""
    fidelity: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Distances of synthetic from held-out real images beside the real-against-real floor; `class` `all` or empty is
    overall."""
    cost: pd.DataFrame = field(default_factory=pd.DataFrame)
    arms: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row an arm, in the order to be shown; `n_unseen`: real images that the generator saw and the classifier did
    not; `gradient_steps` and `most_steps`: the fewest and most optimizer steps that one of its seeds took, of
    `step_budget`; `changes`: in words."""
    provenance: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: list[str] = field(default_factory=list)
    """Sentences: quarantined images, licences, withheld metrics."""
    sheets: list[tuple[str, bytes]] = field(default_factory=list)
    """Caption and PNG bytes of each contact sheet."""
    primary: dict[str, str] | None = None
    """arm, against, metric, test_set of the one confirmatory contrast."""
    confidence: float = 0.95
    """Of every interval; 1 minus it is the level of every test."""

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            table = getattr(self, name)
            missing = [c for c in columns if c not in table.columns]
            if missing and len(table):
                raise DataError(f"report.{name}", list(table.columns), f"a table with {', '.join(missing)}")
            if missing:
                object.__setattr__(self, name, pd.DataFrame({c: [] for c in columns}))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def metric(self) -> str:
        """The metric that is shown where only one is: the primary one, else AUROC, else the first there is."""
        there = list(dict.fromkeys(self.metrics["metric"]))
        asked = (self.primary or {}).get("metric", "auroc")
        return asked if asked in there or not there else there[0]

    @property
    def test_set(self) -> str:
        """The test set that is shown where only one is."""
        there = self.test_sets
        asked = (self.primary or {}).get("test_set", "test")
        return asked if asked in there or not there else there[0]

    @property
    def test_sets(self) -> list[str]:
        """All test sets, in order of appearance."""
        return list(dict.fromkeys(self.metrics["test_set"]))

    def is_averaged(self, metric: str) -> bool:
        """Whether a metric is an average over findings; the accuracy of one class of many is of all images at once."""
        return bool(self.metrics.loc[self.metrics["metric"] == metric, "finding"].nunique() > 1)

    @property
    def arm_names(self) -> list[str]:
        """Arms in the order to be shown."""
        return list(dict.fromkeys([*self.arms["arm"], *self.metrics["arm"]]))

    @property
    def repeated(self) -> dict[str, int]:
        """What the trials of an arm repeat -> how often, such as {"training seeds": 3}."""
        return self.repeated_by(self.arm_names)

    def repeated_by(self, arms: Sequence[str]) -> dict[str, int]:
        """`repeated` of these arms; of the one that repeats most, where they differ."""
        own = self.metrics[self.metrics["arm"].isin(arms)].groupby("arm")
        counts = {word: own[column].nunique().max() for column, word in SEEDS.items()}
        return {word: int(n) for word, n in counts.items() if n > 1}

    def arm(self, name: str) -> dict[str, Any]:
        """The row of an arm; empty where the table of arms does not have it."""
        rows = self.arms[self.arms["arm"] == name]
        return {str(k): v for k, v in rows.iloc[0].items()} if len(rows) else {}

    def with_strategy(self, strategy: str) -> list[str]:
        """Arms of one strategy."""
        return list(self.arms.loc[self.arms["strategy"] == strategy, "arm"])

    def summary(self, **where: str) -> pd.DataFrame:
        """The metric table averaged over runs, one row for each arm, test set, finding, subgroup and metric.

        Args:
            where: column = value, such as `metric="auroc", subgroup=""`.

        Returns:
            arm, test_set, finding, subgroup, metric; value (mean), sd (over runs; NaN for one), ci_low and ci_high
            (means of the runs' limits: what the choice of test patients does to a typical run), n, n_pos,
            n_patients, runs. `value` is NaN where every run withheld it.
        """
        rows = _matching(self.metrics, where)
        rows = rows.assign(subgroup=rows["subgroup"].fillna(""))
        keys = ["arm", "test_set", "finding", "subgroup", "metric"]
        groups = rows.groupby(keys, sort=False, dropna=False)
        table = groups.agg(
            value=("value", "mean"), sd=("value", "std"), ci_low=("ci_low", "mean"), ci_high=("ci_high", "mean"),
            n=("n", "max"), n_pos=("n_pos", "max"), n_patients=("n_patients", "max"), runs=("value", "count"),
        ).reset_index()  # fmt: skip
        rank = {name: i for i, name in enumerate(self.arm_names)}
        return table.sort_values("arm", key=lambda c: c.map(rank), kind="stable", ignore_index=True)

    def averages(self, **where: str) -> pd.DataFrame:
        """`summary` of the averages over findings alone. Where an average is withheld because one of its findings is,
        the average `macro without ...` stands in its place and says so in `finding`."""
        table = self.summary(**where)
        table = table[_is_average(table["finding"])]
        table = table.assign(_withheld=table["value"].isna(), _part=table["finding"] != MACRO)
        table = table.sort_values(["_withheld", "_part"], kind="stable").drop_duplicates(
            ["arm", "test_set", "subgroup", "metric"]
        )
        return table.sort_index().drop(columns=["_withheld", "_part"]).reset_index(drop=True)

    def contrasts(self, **where: str) -> pd.DataFrame:
        """Rows of `comparisons` of averages over findings that match, in order."""
        rows = _matching(self.comparisons, where)
        return rows[_is_average(rows["finding"])].reset_index(drop=True)


def _matching(rows: pd.DataFrame, where: dict[str, str]) -> pd.DataFrame:
    for column, value in where.items():
        rows = rows[rows[column].fillna("").eq(value)]
    return rows


def _is_average(findings: pd.Series) -> pd.Series:
    words = findings.astype(str)
    return (words == MACRO) | words.str.startswith(f"{MACRO} without ")
