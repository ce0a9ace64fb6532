"""Who is called healthy although ill: the false positive rate of "No Finding" by group.

Seyyed-Kalantari et al., "Underdiagnosis bias of artificial intelligence algorithms applied to chest radiographs in
under-served patient populations" (Nature Medicine 27, 2021). Groups are those of the attributes and of every pair of
them (intersections); the gap is the largest rate minus the smallest:

    rate(g) = P(called "No Finding" | some finding, g)          gap = max_g rate(g) - min_g rate(g)

A maximum minus a minimum is never below zero and rises with the number of groups and with noise: its bootstrap
interval is shifted upwards, and a gap is worth comparing only with another arm's on the same images and groups.
Input and output are as of `metrics.metric_table`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from raysynth.core.evidence import Evaluation
from raysynth.metrics.bootstrap import Resampling
from raysynth.metrics.discrimination import OneVsRest
from raysynth.metrics.estimates import Estimate
from raysynth.metrics.metric_table import SCHEMA, as_table
from raysynth.metrics.samples import groups, intersections, read_sample

RATE, GAP = "underdiagnosis", "underdiagnosis_gap"
HEALTHY = frozenset({"nofinding", "normal", "nf"})


def healthy_finding(names: Sequence[str]) -> str | None:
    """The finding that says that nothing was found ("No Finding", "Normal", "NF"), if there is one."""
    return next((n for n in names if re.sub(r"[^a-z]", "", n.lower()) in HEALTHY), None)


def underdiagnosis(
    predictions: pa.Table, thresholds: Mapping[str, float], evaluation: Evaluation, kind: str
) -> pa.Table:
    """Rows of the metrics `underdiagnosis` (everyone, each group, each pair) and `underdiagnosis_gap`.

    `n` counts the images of the group whose truth is known, `n_pos` the healthy ones. A rate is withheld below
    `evaluation.min_positives` ill images and its group then left out of the gap, which is over the groups and pairs
    that are shown; the gap is withheld below two of them. No rows where no finding says that nothing was found.

    Args:
        predictions: one test set's, as of `core.schemas.predictions_schema`.

    Raises:
        DataError: predictions that cannot be judged, or an attribute that is not there.
    """
    sample = read_sample(predictions, kind)
    name = healthy_finding(sample.names)
    if name is None:
        return SCHEMA.empty_table()
    truth, prob = (a[:, sample.names.index(name)] for a in (sample.truth, sample.prob))
    found = groups(sample, evaluation.subgroups) | intersections(sample, evaluation.subgroups)
    cells = {
        group: OneVsRest(truth, prob, rows, thresholds[name])
        for group, rows in found.items()
        if (truth[rows] == 0).sum() >= evaluation.min_positives
    }
    chunks = [
        np.stack([1 - c.weighted(weights, ["specificity"])["specificity"] for c in cells.values()])
        for weights in Resampling(sample.patient, evaluation.bootstraps, evaluation.seed).chunks()
        if cells
    ]
    rates = dict(zip(cells, np.concatenate(chunks, axis=1))) if cells else {}

    def row(group: str, metric: str, values: np.ndarray | None) -> Estimate:
        known = found[group][truth[found[group]] >= 0]
        value, draws = (None, np.empty(0)) if values is None else (float(values[0]), values[1:])
        return Estimate(
            group, name, metric, thresholds[name], evaluation.threshold_rule, value, draws,
            len(known), int((truth[known] == 1).sum()), len(np.unique(sample.patient[known])),
        )  # fmt: skip

    rows = [row(group, RATE, rates.get(group)) for group in found]
    by_group = np.array([values for group, values in rates.items() if group])
    gap = np.ptp(by_group, axis=0) if len(by_group) > 1 else None
    return as_table(sample, [*rows, row("", GAP, gap)], evaluation.confidence)
