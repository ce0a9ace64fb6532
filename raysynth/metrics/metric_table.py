"""Metric tables: one classifier's predictions -> rows of value, interval and counts, and confusion matrices.

Input: predictions (core.schemas.predictions_schema) and frozen thresholds. Output: the columns of
`core.schemas.metric_schema` that follow from them; the stage adds which run and arm it was. What each row means is in
`metrics.estimates`. Knows no arms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.metrics import confusion_matrix, multilabel_confusion_matrix

from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.core.schemas import metric_schema
from raysynth.metrics.bootstrap import interval
from raysynth.metrics.discrimination import classes_of
from raysynth.metrics.estimates import Estimate, estimate
from raysynth.metrics.samples import Sample, groups, read_sample

COLUMNS = (
    "test_set", "site", "finding", "subgroup", "metric", "threshold", "threshold_rule", "value", "ci_low", "ci_high",
    "n", "n_pos", "n_patients",
)  # fmt: skip
SCHEMA = pa.schema([metric_schema().field(name) for name in COLUMNS])


def evaluate(
    predictions: pa.Table,
    thresholds: Mapping[str, float],
    evaluation: Evaluation,
    kind: str,
    threshold_rule: str | None = None,
) -> pa.Table:
    """Every metric of every finding, macro and subgroup, in long form.

    Args:
        predictions: table of `core.schemas.predictions_schema`; several test sets are judged one after another.
        thresholds: finding -> threshold, chosen on real validation (`metrics.thresholds`).
        kind: `single` or `multi` (data.labels.kind).
        threshold_rule: what to call the rule behind `thresholds`; None: `evaluation.threshold_rule`.

    Returns:
        The columns `COLUMNS`. `value` is null below `evaluation.min_positives` positives or negatives; `ci_low` and
        `ci_high` are null with it, with one patient, and where more than 5 % of the resamplings were degenerate.
        `site` is that of all images of the row, empty where there are several.

    Raises:
        DataError: predictions that cannot be judged, a finding or attribute that is not there, no threshold.
    """
    tables = []
    for name in sorted(set(predictions["test_set"].to_pylist())):
        sample = read_sample(predictions.filter(pc.equal(predictions["test_set"], name)), kind)
        rows = groups(sample, evaluation.subgroups)
        found = estimate(sample, thresholds, evaluation, kind, rows, threshold_rule=threshold_rule)
        tables.append(as_table(sample, found, evaluation.confidence))
    if not tables:
        raise DataError("predictions", "no images", "a table of at least one image")
    return pa.concat_tables(tables)


def as_table(sample: Sample, estimates: Iterable[Estimate], confidence: float) -> pa.Table:
    """Estimates of one sample as rows of the metric table."""
    rows = []
    for e in estimates:
        low, high = interval(e.draws, confidence)[:2] if e.n_patients > 1 else (None, None)
        rows.append({
            "test_set": sample.test_set, "site": _site(sample, e.subgroup), "finding": e.finding,
            "subgroup": e.subgroup, "metric": e.metric, "threshold": e.threshold, "threshold_rule": e.threshold_rule,
            "value": e.value, "ci_low": low, "ci_high": high, "n": e.n, "n_pos": e.n_pos, "n_patients": e.n_patients,
        })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _site(sample: Sample, subgroup: str) -> str:
    return subgroup.removeprefix("site=") if subgroup.startswith("site=") else sample.one_site


def confusion(predictions: pa.Table, thresholds: Mapping[str, float], kind: str) -> tuple[np.ndarray, list[str]]:
    """Confusion counts of one test set, as scikit-learn lays them out.

    Returns:
        The counts, and the names of the K classes. single: (K, K) int64, true class by row, argmax by column;
        thresholds are not used. multi: (K, 2, 2) int64, `[[tn, fp], [fn, tp]]` of each finding at its threshold,
        over the images whose truth is known.

    Raises:
        DataError: predictions that cannot be judged.
    """
    sample = read_sample(predictions, kind)
    if kind == "single":
        true, called = classes_of(sample.truth, sample.prob)
        return confusion_matrix(true, called, labels=range(len(sample.names))), sample.names
    counts = []
    for j, name in enumerate(sample.names):
        known = sample.truth[:, j] >= 0
        called = sample.prob[known, j] >= thresholds[name]
        counts.append(multilabel_confusion_matrix(sample.truth[known, j] == 1, called, labels=[True])[0])
    return np.stack(counts), sample.names
