"""Raw annotations -> `label_<class>` columns, and what an uncertain or missing one means at use.

Ingest keeps every annotation as it was made: 1 present, 0 absent, -1 uncertain, null not annotated. The policy per
finding (ignore, zeros, ones; U-Ignore, U-Zeros and U-Ones of Irvin 2019, 1901.07031) is applied when labels are used,
never when they are stored. Knows no files and no images.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysynth.core.errors import DataError
from raysynth.core.experiment import Labels
from raysynth.core.schemas import LABEL, label_names

FINDING_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}


@dataclass(frozen=True)
class Annotations:
    """Labels of N rows over the vocabulary."""

    classes: list[str]
    values: np.ndarray
    """(N, L) float32: 1, 0, -1 uncertain, NaN not annotated."""
    bad: dict[int, str]
    """Row -> why its annotation cannot be read."""


def parse_names(cells: Sequence[str | None], labels: Labels) -> Annotations:
    """Class names in one column: one name a cell (single) or several joined by `labels.separator` (multi).

    A multi-label cell annotates every class of the vocabulary: named ones 1, the others 0; an empty one annotates none.
    Where `labels.classes` is empty, the vocabulary is the sorted names found.
    """
    multi = labels.kind == "multi"
    named: list[list[str]] = []
    for cell in cells:
        words = (cell or "").split(labels.separator) if multi else [cell or ""]
        named.append([w.strip() for w in words if w.strip()])
    classes = list(labels.classes) or sorted({word for words in named for word in words})
    column = {name: i for i, name in enumerate(classes)}
    values = np.full((len(named), len(classes)), np.nan, np.float32)
    bad: dict[int, str] = {}
    for row, words in enumerate(named):
        outside = [w for w in words if w not in column]
        if outside:
            bad[row] = _outside(outside[0], classes)
        elif words:
            values[row] = 0
            values[row, [column[w] for w in words]] = 1
        elif not multi:
            bad[row] = "no label"
    return Annotations(classes, values, bad)


def _outside(word: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, classes, n=1)
    return f"label {word!r} is not in data.labels.classes" + (f" (near {near[0]!r})" if near else "")


def parse_findings(columns: Mapping[str, Sequence[str | None]], labels: Labels) -> Annotations:
    """One column a finding, holding 1, 0, -1 (uncertain) or nothing.

    Raises:
        DataError: `labels.classes` names a finding that no column is mapped to.
    """
    classes = list(labels.classes) or list(columns)
    for i, name in enumerate(classes):
        if name not in columns:
            raise DataError(
                f"data.labels.classes[{i}]", name, f"one of data.columns.findings ({', '.join(columns)})",
                f"Map its column: data.columns.findings.{name}.",
            )  # fmt: skip
    rows = len(next(iter(columns.values()), []))
    values = np.full((rows, len(classes)), np.nan, np.float32)
    bad: dict[int, str] = {}
    for j, name in enumerate(classes):
        for row, cell in enumerate(columns[name]):
            if cell is None or not cell.strip():
                continue
            value = FINDING_VALUES.get(cell.strip())
            if value is None:
                bad.setdefault(row, f"finding {name!r} is {cell!r}, not 1, 0, -1 or empty")
            else:
                values[row, j] = value
    return Annotations(classes, values, bad)


def check_policy(labels: Labels, classes: Sequence[str]) -> None:
    """Raises DataError where a policy names no class of the vocabulary."""
    for name in labels.policy:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            raise DataError(
                f"data.labels.policy.{name}", name, f"one of the classes ({', '.join(classes)})",
                f"Did you mean {near[0]}?" if near else "",
            )  # fmt: skip


def label_columns(classes: Sequence[str], values: np.ndarray) -> dict[str, pa.Array]:
    """(N, L) annotations -> `label_<class>` int8 columns with nulls."""
    missing = np.isnan(values)
    whole = np.where(missing, 0, values).astype(np.int8)
    return {LABEL + name: pa.array(whole[:, j], mask=missing[:, j]) for j, name in enumerate(classes)}


def label_array(table: pa.Table, classes: Sequence[str] | None = None) -> np.ndarray:
    """`label_<class>` columns of a table -> (N, L) float32: 1, 0, -1, NaN where null."""
    names = label_names(table.schema) if classes is None else classes
    values = np.full((table.num_rows, len(names)), np.nan, np.float32)
    for j, name in enumerate(names):
        values[:, j] = table[LABEL + name].cast(pa.float32()).to_numpy(zero_copy_only=False)
    return values


def apply_policy(
    labels: np.ndarray, policy: Mapping[str, str], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What training and evaluation see of raw annotations.

    Args:
        labels: (N, L) float: 1, 0, -1 uncertain, NaN not annotated.
        policy: finding -> `ignore` (default), `zeros` or `ones`, for both uncertain and missing annotations.
        classes: names of the L columns.

    Returns:
        values (N, L) float32 in {0, 1} and mask (N, L) bool, False where the entry must be ignored (its value is 0).
    """
    known = labels >= 0  # False for -1 and NaN alike
    values = np.where(known, labels, 0).astype(np.float32)
    mask = known.copy()
    for j, name in enumerate(classes):
        choice = policy.get(name, "ignore")
        if choice != "ignore":
            values[~known[:, j], j] = 1.0 if choice == "ones" else 0.0
            mask[:, j] = True
    return values, mask
