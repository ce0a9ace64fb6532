"""A predictions table as arrays, checked once, and the groups of its images.

Input: tables of `core.schemas.predictions_schema`, one test set each. Rows are put in the order of their image ids
and patients are numbered in the order of theirs, so that nothing below depends on the order of a table's rows and two
classifiers' predictions of the same images line up. Knows no metric.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysynth.core.errors import DataError
from raysynth.core.schemas import PROBABILITY, TRUE, attribute_names
from raysynth.data.balance import did_you_mean
from raysynth.data.predictions import arrays, judged

MAX_GROUPS = 20
"""`*` passes over an attribute with more values than this: an accession number or an exact age makes no groups."""


@dataclass(frozen=True)
class Sample:
    """N images of one test set, K findings, and what one classifier said of them.

    Single-label images of no class that the classifier knows are not among them.
    """

    test_set: str
    image_ids: list[str]
    names: list[str]
    """Findings or classes, in column order."""
    truth: np.ndarray
    """(N, K) int8: 1, 0, or -1 where not known."""
    prob: np.ndarray
    """(N, K) float64 in [0, 1]."""
    patient: np.ndarray
    """(N,) int64 patient numbers from 0; an image without a patient is one of its own."""
    site: list[str | None]
    attributes: dict[str, list[str | None]]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def one_site(self) -> str:
        """The site of every image, empty where there are several."""
        found = {s for s in self.site if s}
        return next(iter(found)) if len(found) == 1 else ""


def read_sample(predictions: pa.Table, kind: str) -> Sample:
    """Arrays of one test set's predictions.

    Args:
        predictions: table of `core.schemas.predictions_schema`.
        kind: `single` or `multi`.

    Raises:
        DataError: no images, several test sets, an image twice, a probability that is none, or (single) an image
            that is not of exactly one class.
    """
    names = [n.removeprefix(TRUE) for n in predictions.column_names if n.startswith(TRUE)]
    sets = sorted(set(predictions["test_set"].to_pylist()))
    if len(sets) != 1:
        raise DataError("test_set", sets, "one test set in a predictions table", "Filter the table by test_set.")
    if kind == "single":
        predictions = predictions.filter(pa.array(judged(predictions)))
    table = predictions.sort_by("image_id")
    ids = table["image_id"].to_pylist()
    twice = next((a for a, b in itertools.pairwise(ids) if a == b), None)
    if twice is not None:
        raise DataError("image_id", twice, "in a predictions table once")
    truth, prob = arrays(table, names)
    truth = np.nan_to_num(truth, nan=-1).astype(np.int8)
    # A softmax in float32 adds up to 1 within a few 1e-7.
    if not ((prob >= 0) & (prob <= 1 + 1e-6)).all():
        row, column = np.argwhere(~((prob >= 0) & (prob <= 1 + 1e-6)))[0]
        raise DataError(
            PROBABILITY + names[column], float(prob[row, column]), "a probability", f"Image {ids[row]}."
        )  # fmt: skip
    wrong = np.flatnonzero((truth == 1).sum(axis=1) != 1)
    if kind == "single" and len(wrong):
        raise DataError(TRUE + "*", ids[wrong[0]], "images of exactly one class each", "data.labels.kind: multi?")
    # An image's own id must not meet a patient of the same name.
    owners = [f"p {p}" if p is not None else f"i {i}" for p, i in zip(table["patient_id"].to_pylist(), ids)]
    patient = np.unique(np.asarray(owners), return_inverse=True)[1].astype(np.int64)
    attributes = {n: table[f"attr_{n}"].to_pylist() for n in attribute_names(table.schema)}
    return Sample(sets[0], ids, names, truth, prob, patient, table["site"].to_pylist(), attributes)


def fixed_set(sample: Sample, wanted: Sequence[str]) -> list[str]:
    """Findings of the macro averages: `evaluation.findings`, or all. Raises DataError for one that is not there."""
    require_known("evaluation.findings", wanted, sample.names)
    return list(dict.fromkeys(wanted)) or list(sample.names)


def require_known(key: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises DataError for the first of `wanted`, the list under `key`, that is not known."""
    for i, name in enumerate(wanted):
        if name not in known:
            raise DataError(f"{key}[{i}]", name, f"one of {', '.join(known)}", did_you_mean(name, known))


def groups(sample: Sample, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of every subgroup: `attribute=value` -> sorted row numbers; everyone is the empty name, and first.

    Args:
        wanted: attributes, `site`, or `*` for all of them (`evaluation.subgroups`). Ages are judged by their bins
            where there are any; `site` gives groups where there are several. Images whose value is not known are in
            no group of that attribute; a test set without an attribute has no groups of it.
    """
    everyone = {"": np.arange(len(sample))}
    return everyone | {n: rows for found in _by_attribute(sample, wanted).values() for n, rows in found.items()}


def intersections(sample: Sample, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows of every pair of groups of different attributes, such as `age_bin=18-39 & sex=F`; empty ones left out."""
    found = {}
    for one, other in itertools.combinations(_by_attribute(sample, wanted).values(), 2):
        for (a, rows), (b, others) in itertools.product(one.items(), other.items()):
            both = np.intersect1d(rows, others)
            if len(both):
                found[f"{a} & {b}"] = both
    return found


def _by_attribute(sample: Sample, wanted: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    columns: Mapping[str, list[str | None]] = sample.attributes | {"site": sample.site}
    names: list[str] = []
    for name in wanted:
        if name == "*":
            names += [n for n, column in columns.items() if len(set(column)) <= MAX_GROUPS or _binned(n, columns)]
        elif name in columns:
            names.append(name)
    found = {}
    for name in dict.fromkeys("age_bin" if _binned(n, columns) else n for n in names):
        column = np.asarray([v or "" for v in columns[name]], dtype=object)
        values = sorted({v for v in column if v})
        if name != "site" or len(values) > 1:
            found[name] = {f"{name}={v}": np.flatnonzero(column == v) for v in values}
    return found


def _binned(name: str, columns: Mapping[str, object]) -> bool:
    return name == "age" and "age_bin" in columns
