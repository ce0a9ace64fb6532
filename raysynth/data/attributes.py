"""Attribute cells (sex, age, race, skin type, view ...) -> `attr_<name>` strings, null where unknown.

`age` is read in years, also as DICOM writes it (058Y, 018M, 004W), and gives `age_bin` beside it. Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa

UNKNOWN = frozenset({"", "unknown", "unk", "nan", "none", "null", "na", "n/a", "not available", "?"})
"""Cells, in lower case, that say nothing."""

YEARS_PER_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
OLDEST_YEARS = 120
"""Higher ages are typing errors (ChestX-ray14 has a patient of 411) and become unknown."""


def known(cell: str | None) -> str | None:
    """The cell without surrounding blanks, or None where it says nothing."""
    text = (cell or "").strip()
    return None if text.lower() in UNKNOWN else text


def age_years(cell: str | None) -> float | None:
    """Age in years, or None where the cell is no age."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD]?)", (known(cell) or "").upper())
    if not found:
        return None
    years = float(found[1]) * YEARS_PER_UNIT[found[2]]
    return years if years <= OLDEST_YEARS else None


def age_bin_names(cuts: Sequence[int]) -> list[str]:
    """Names of the bins between cut points, youngest first: `<18`, `18-39`, ..., `>=80`."""
    inner = [f"{low}-{high - 1}" for low, high in pairwise(cuts)]
    return [f"<{cuts[0]}", *inner, f">={cuts[-1]}"] if cuts else []


def age_bin(years: float | None, cuts: Sequence[int]) -> str | None:
    """The bin that `years` falls in; a cut point belongs to the bin above it."""
    if years is None or not cuts:
        return None
    return age_bin_names(cuts)[sum(years >= cut for cut in cuts)]


def attribute_columns(
    cells: dict[str, list[str | None]], age_bins: Sequence[int]
) -> tuple[dict[str, list[str | None]], list[str]]:
    """Cleaned attributes by name, `age_bin` after `age`, and notes about values that became unknown."""
    columns: dict[str, list[str | None]] = {}
    notes: list[str] = []
    for name, values in cells.items():
        if name != "age":
            columns[name] = [known(v) for v in values]
            continue
        years = [age_years(v) for v in values]
        columns["age"] = [None if y is None else f"{round(y, 2):g}" for y in years]
        if age_bins:
            columns["age_bin"] = [age_bin(y, age_bins) for y in years]
        lost = [v for v, y in zip(values, years) if y is None and known(v) is not None]
        if lost:
            notes.append(f"age: {len(lost)} values that are no age in years became unknown, such as {lost[0]!r}")
    return columns, notes


def categories(name: str, column: pa.ChunkedArray, age_bins: Sequence[int]) -> list[str]:
    """Distinct known values of an attribute: ages and age bins by age, others by name."""
    found = {v for v in column.unique().to_pylist() if v is not None}
    if name == "age":
        return sorted(found, key=float)
    if name == "age_bin":
        return [b for b in age_bin_names(age_bins) if b in found]
    return sorted(found)
