"""Every metric of every group of images, with its bootstrap values: what metric tables, comparisons and fairness read.

Macro averages are plain means over a fixed set of findings (`evaluation.findings`, or all). Where one of them is
withheld, `macro` is withheld too, and a row named `macro without X, Y` averages the others: averages over different
sets never share a name, so they cannot be compared by accident. Which findings are withheld depends on the true
labels alone, so the arms of one test set always agree.

In single-label data `accuracy` and `balanced_accuracy` belong to the argmax over all classes (threshold rule
`argmax`), not to a threshold, and stand beside the macro rows; in multi-label data they are means over findings.
Of two classes, one's AUROC is the other's: it is given for the last of the two only, and the macro is that number
(its other metrics still average both classes as positive).

Knows nothing of tables or files. An interval covers the drawing of test patients, not the training seed; see
`metrics.comparisons` for both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.metrics.bootstrap import Resampling
from raysynth.metrics.discrimination import AT_THRESHOLD, MULTI_METRICS, Argmax, OneVsRest, metrics_of
from raysynth.metrics.samples import Sample, fixed_set

MACRO = "macro"
WITHOUT = MACRO + " without "
ARGMAX = "argmax"
ARGMAX_RECALL = "argmax recall"


@dataclass(frozen=True)
class Estimate:
    """One metric of one finding in one group."""

    subgroup: str
    finding: str
    metric: str
    threshold: float | None
    """Of the metrics that have one, of a single finding."""
    threshold_rule: str
    """Empty for metrics without threshold."""
    value: float | None
    """None where withheld."""
    draws: np.ndarray
    """(B,) values in the resamplings, NaN where not defined; empty where withheld."""
    n: int
    """Images whose truth is known; of a macro, images of the group with any known finding."""
    n_pos: int | None
    """Positives; None for macros."""
    n_patients: int


def estimate(
    sample: Sample,
    thresholds: Mapping[str, float],
    evaluation: Evaluation,
    kind: str,
    groups: Mapping[str, np.ndarray],
    metrics: Collection[str] | None = None,
    findings: Sequence[str] | None = None,
    threshold_rule: str | None = None,
) -> list[Estimate]:
    """Estimates of a sample, group after group: findings, then macros.

    Args:
        thresholds: finding -> threshold, frozen.
        kind: `single` or `multi`.
        groups: name -> rows, as of `metrics.samples.groups`.
        metrics: these only; None: all there are.
        findings: these only, and no macro; None: all, and the macros.
        threshold_rule: how the thresholds were chosen; None: `evaluation.threshold_rule`.

    Raises:
        DataError: a finding without threshold.
    """
    fixed = fixed_set(sample, evaluation.findings)
    own = [m for m in metrics_of(kind) if metrics is None or m in metrics]
    whole = [m for m in MULTI_METRICS if kind == "single" and (metrics is None or m in metrics)]
    rule = evaluation.threshold_rule if threshold_rule is None else threshold_rule
    for name in sample.names:
        if name not in thresholds:
            raise DataError(f"thresholds[{name}]", None, f"a threshold for each of {', '.join(sample.names)}")
    asked = list(findings) if findings is not None else list(sample.names)
    by_argmax = bool(whole) and findings is None
    cells, argmaxes = _prepare(sample, thresholds, evaluation, groups, asked if own else [], by_argmax)

    pieces: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for weights in Resampling(sample.patient, evaluation.bootstraps, evaluation.seed).chunks():
        for (group, finding), cell in cells.items():
            for metric, drawn in cell.weighted(weights, own).items():
                pieces.setdefault((group, finding, metric), []).append(drawn)
        for group, argmax in argmaxes.items():
            accuracy, recalls = argmax.weighted(weights)
            pieces.setdefault((group, "", "accuracy"), []).append(accuracy)
            for name, recall in zip(sample.names, recalls):
                pieces.setdefault((group, name, ARGMAX_RECALL), []).append(recall)
    values = {key: np.concatenate(parts) for key, parts in pieces.items()}

    found: list[Estimate] = []
    for group, rows in groups.items():
        for name in asked:
            mirrored = findings is None and kind == "single" and len(sample.names) == 2 and name == sample.names[0]
            shown = [m for m in own if m != "auroc" or not mirrored]
            found += _finding(sample, group, rows, name, shown, thresholds[name], rule, values)
        if findings is None:
            found += _macros(sample, group, rows, fixed, own, whole, rule, values, evaluation.min_positives)
    return found


def _prepare(
    sample: Sample, thresholds: Mapping[str, float], evaluation: Evaluation, groups: Mapping[str, np.ndarray],
    asked: Sequence[str], argmax: bool,
) -> tuple[dict[tuple[str, str], OneVsRest], dict[str, Argmax]]:  # fmt: skip
    """What can be estimated at all: cells and groups with enough images."""
    cells, argmaxes = {}, {}
    for group, rows in groups.items():
        for name in asked:
            if enough(sample, rows, name, evaluation.min_positives):
                j = sample.names.index(name)
                cells[group, name] = OneVsRest(sample.truth[:, j], sample.prob[:, j], rows, thresholds[name])
        if argmax and len(rows):
            argmaxes[group] = Argmax(sample.truth, sample.prob, rows)
    return cells, argmaxes


def enough(sample: Sample, rows: np.ndarray, finding: str, least: int) -> bool:
    """Whether a group has `least` positives and `least` negatives of a finding."""
    truth = sample.truth[rows, sample.names.index(finding)]
    return min(int((truth == 1).sum()), int((truth == 0).sum())) >= least


def _finding(
    sample: Sample, group: str, rows: np.ndarray, name: str, metrics: Sequence[str], threshold: float, rule: str,
    values: Mapping[tuple[str, str, str], np.ndarray],
) -> list[Estimate]:  # fmt: skip
    truth = sample.truth[rows, sample.names.index(name)]
    known = rows[truth >= 0]
    found = []
    for metric in metrics:
        cut = metric in AT_THRESHOLD
        value, draws = _split(values.get((group, name, metric)))
        found.append(Estimate(
            group, name, metric, threshold if cut else None, rule if cut else "", value, draws,
            len(known), int((truth == 1).sum()), len(np.unique(sample.patient[known])),
        ))  # fmt: skip
    return found


def _macros(
    sample: Sample, group: str, rows: np.ndarray, fixed: Sequence[str], own: Sequence[str], whole: Sequence[str],
    rule: str, values: Mapping[tuple[str, str, str], np.ndarray], least: int,
) -> list[Estimate]:  # fmt: skip
    columns = [sample.names.index(f) for f in fixed]
    out = [f for f in fixed if not enough(sample, rows, f, least)]
    kept = [f for f in fixed if f not in out]

    def row(finding: str, metric: str, rule: str, seen: np.ndarray, draws: np.ndarray | None) -> Estimate:
        patients = len(np.unique(sample.patient[seen]))
        return Estimate(group, finding, metric, None, rule, *_split(draws), len(seen), None, patients)

    known = rows[(sample.truth[rows][:, columns] >= 0).any(axis=1)]
    classed = rows[(sample.truth[rows] == 1).any(axis=1)]
    found = []
    for metric in (*own, *(m for m in whole if m == "balanced_accuracy")):
        by_class = metric in whole
        part = ARGMAX_RECALL if by_class else metric
        how = ARGMAX if by_class else rule if metric in AT_THRESHOLD else ""
        mean = np.mean([values[group, f, part] for f in kept], axis=0) if kept else None
        found.append(row(MACRO, metric, how, classed if by_class else known, None if out else mean))
        if out and kept:
            name = WITHOUT + ", ".join(out)
            found.append(row(name, metric, how, classed if by_class else known, mean))
    if "accuracy" in whole:
        accuracy = values.get((group, "", "accuracy")) if len(classed) >= least else None
        found.append(row(MACRO, "accuracy", ARGMAX, classed, accuracy))
    return found


def _split(values: np.ndarray | None) -> tuple[float | None, np.ndarray]:
    """First column the sample itself, the others the resamplings."""
    return (None, np.empty(0)) if values is None else (float(values[0]), values[1:])
