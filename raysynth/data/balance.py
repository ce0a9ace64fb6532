"""Cells of labels x attributes: which real images are in each, how many synthetic ones each gets.

A cell is one combination of the categories of `plan.over`. Cells are those that real images show: a target
for any other is refused with the nearest one that exists, and no cell is ever the product of marginals. An
image is in no cell if one of its categories is unknown: a null attribute; under policy `ignore`, a finding that
is uncertain or not annotated; a `label` where nothing is positive and such a finding may be.

Input: real images as an Arrow table (core.schemas); output: counts by cell, and the joint table of a plan
against the real images. Does not know row keys, ranks or storage.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import DataError
from raysynth.core.experiment import Labels
from raysynth.core.schemas import ATTRIBUTE, attribute_names, label_names
from raysynth.data.strata import UNKNOWN, primary_label, used_labels


@dataclass(frozen=True)
class Cells:
    """Real images by cell of `over`."""

    over: list[str]
    categories: list[list[str]]
    """Category names of each column of `over`."""
    codes: np.ndarray
    """(C, len(over)) int64 category of each observed cell, in category order."""
    of_image: np.ndarray
    """(N,) int64 cell of each real image, -1 for none."""

    def name(self, cell: int) -> str:
        """Such as `label=pneumonia,sex=F`."""
        return ",".join(f"{c}={k[i]}" for c, k, i in zip(self.over, self.categories, self.codes[cell]))

    @property
    def images(self) -> np.ndarray:
        """(C,) real images in each cell."""
        return np.bincount(self.of_image[self.of_image >= 0], minlength=len(self.codes))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`Did you mean x?` for the known word nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"Did you mean {near[0]}?" if near else ""


def cells_of(real: pa.Table, over: Sequence[str], labels: Labels) -> Cells:
    """The observed cells of `real`.

    Args:
        over: `label` (the class; with findings, the image's rarest one or `none`), findings (`1` or `0`),
            attributes.

    Raises:
        DataError: a column that is not there, or no image has all of them known.
    """
    columns = [_categories(real, f"plan.over[{i}]", name, labels) for i, name in enumerate(over)]
    codes = np.stack([c for c, _ in columns], axis=1)
    known = (codes >= 0).all(axis=1)
    if not known.any():
        raise DataError("plan.over", list(over), "columns that some real image has all known")
    observed, inverse = np.unique(codes[known], axis=0, return_inverse=True)
    of_image = np.full(len(codes), -1, dtype=np.int64)
    of_image[known] = inverse.ravel()
    return Cells(list(over), [names for _, names in columns], observed, of_image)


def _categories(real: pa.Table, key: str, name: str, labels: Labels) -> tuple[np.ndarray, list[str]]:
    findings, attributes = label_names(real.schema), attribute_names(real.schema)
    if name == "label":
        codes, names = primary_label(real, labels.policy)
        return np.where(codes == len(names) - 1, -1, codes), names[:-1]
    if name in findings:
        return used_labels(real, labels.policy)[:, findings.index(name)].astype(np.int64), ["0", "1"]
    if name in attributes and name != "age":
        values = real[ATTRIBUTE + name].combine_chunks()
        names = sorted(v for v in values.unique().to_pylist() if v is not None)
        at = pc.index_in(values, value_set=pa.array(names, pa.string()))
        # index_in finds no null in the set, so an unknown value stays null here.
        return at.fill_null(-1).to_numpy().astype(np.int64), names
    known = ["label", *findings, *(a for a in attributes if a != "age")]
    remedy = "Balance over age_bin (data.age_bins)." if name == "age" else did_you_mean(name, known)
    raise DataError(key, name, f"one of {', '.join(known)}", remedy)


def target_counts(cells: Cells, n: int, targets: dict[str, float], kind: str = "single") -> np.ndarray:
    """Synthetic images of each cell, (C,) int64 with sum n.

    A target names some or all columns and is spread equally over its cells; cells that no target names share
    the rest equally. Values all within [0, 1] are shares of n, else whole numbers are counts.

    Raises:
        DataError: unknown column or category, a combination without a real image, a cell under two targets,
        or
            targets that do not add up to n.
    """
    groups: list[tuple[np.ndarray, float]] = []
    owner: dict[int, str] = {}
    shares = all(0 <= v <= 1 for v in targets.values())
    for key, value in targets.items():
        full = f"plan.targets.{key}"
        if value < 0 or (not shares and value != int(value)):
            raise DataError(full, value, "a share in [0, 1] or a whole number, like all the others")
        matched = _matching(cells, full, key, value, kind)
        for cell in matched:
            if int(cell) in owner:
                raise DataError(
                    full, value, f"about cells that {owner[int(cell)]} is not about",
                    f"Both say how many {cells.name(int(cell))} there are.",
                )  # fmt: skip
            owner[int(cell)] = key
        groups.append((matched, value * n if shares else value))
    rest = np.array([c for c in range(len(cells.codes)) if c not in owner], dtype=np.int64)
    named = sum(amount for _, amount in groups)
    left = n - named
    if left < -1e-9 * n or (not len(rest) and abs(left) > 1e-9 * n):
        total = named / n if shares else int(named)
        fit = "at most " if len(rest) else ""
        raise DataError(
            "plan.targets", f"targets that add up to {total:g}",
            f"{fit}{1 if shares else f'plan.n ({n})'}",
            f"Scale each by {n / max(named, 1e-9):.6g}{'' if shares else f', or set plan.n={int(named)}'}.",
        )  # fmt: skip
    groups.append((rest, max(0.0, left)))
    counts = np.zeros(len(cells.codes), dtype=np.int64)
    for (members, _), amount in zip(groups, _apportion([a for _, a in groups], n)):
        if len(members):
            each, more = divmod(int(amount), len(members))
            counts[members] = each
            counts[members[:more]] += 1
    return counts


def _matching(cells: Cells, full: str, key: str, value: float, kind: str) -> np.ndarray:
    """Cells of a target such as `label=pneumonia,sex=F`."""
    wanted: dict[int, int] = {}
    for word in key.split(","):
        column, sign, category = (part.strip() for part in word.partition("="))
        if not sign or column not in cells.over:
            raise DataError(
                full, word, f"column=category with a column of plan.over ({', '.join(cells.over)})",
                did_you_mean(column, cells.over),
            )  # fmt: skip
        at = cells.over.index(column)
        if at in wanted:
            raise DataError(full, key, f"one category of {column}", "An image has one; write two targets.")
        names = cells.categories[at]
        if category not in names:
            raise DataError(
                full, f"{column}={category}", f"a category among the real images ({', '.join(names)})",
                did_you_mean(category, names),
            )  # fmt: skip
        wanted[at] = names.index(category)
    agree = sum((cells.codes[:, at] == code).astype(np.int64) for at, code in wanted.items())
    matched = np.flatnonzero(agree == len(wanted))
    if not len(matched) and value > 0:
        nearest = int(np.lexsort((-cells.images, -np.asarray(agree)))[0])
        two = kind == "single" and _two_classes(cells, wanted)
        why = " A single-label image has one class." if two else ""
        raise DataError(
            full, value, "about a combination that at least one real image shows",
            f"The nearest is {cells.name(nearest)} ({cells.images[nearest]} images).{why}",
        )  # fmt: skip
    return matched


def _two_classes(cells: Cells, wanted: dict[int, int]) -> bool:
    return sum(cells.categories[at] == ["0", "1"] and code == 1 for at, code in wanted.items()) > 1


def _apportion(amounts: Sequence[float], n: int) -> np.ndarray:
    """Whole numbers with sum n nearest to `amounts`: largest remainders, earlier ones first."""
    exact = np.asarray(amounts, dtype=np.float64)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    remainder = np.round(exact - whole, 9)
    whole[np.argsort(-remainder, kind="stable")[: n - int(whole.sum())]] += 1
    return whole


def joint_table(plan: pa.Table, real: pa.Table, over: Sequence[str], labels: Labels) -> pa.Table:
    """Synthetic against real images by cell: what a plan changes about who has what.

    Args:
        plan: rows of the plan, or those selected.
        real: the plan's real images.
        over: columns, as `plan.over`.

    Returns:
        one row a cell: a string column a name of `over`, then `real`, `real_share`, `synthetic`,
        `synthetic_share`, `sources` (real images used) and `max_replicas` (most synthetic images of one of
        them). Last, where there are any, the images in no cell as `unknown`: shares always add up to 1.
    """
    cells = cells_of(real, over, labels)
    source = pc.index_in(plan["source_image_id"], value_set=real["image_id"]).to_numpy()
    used = np.bincount(source, minlength=real.num_rows)
    c = len(cells.codes)
    rows = c + int((cells.of_image < 0).any())
    cell = np.where(cells.of_image < 0, c, cells.of_image)
    images = np.bincount(cell, minlength=rows)
    synthetic, sources, most = (np.zeros(rows, np.int64) for _ in range(3))
    np.add.at(synthetic, cell, used)
    np.add.at(sources, cell, used > 0)
    np.maximum.at(most, cell, used)
    unknown = [UNKNOWN] * (rows - c)
    return pa.table({
        **{n: [cells.categories[i][k] for k in cells.codes[:, i]] + unknown for i, n in enumerate(cells.over)},
        "real": images, "real_share": np.round(images / max(1, real.num_rows), 6),
        "synthetic": synthetic, "synthetic_share": np.round(synthetic / max(1, plan.num_rows), 6),
        "sources": sources, "max_replicas": most,
    })  # fmt: skip
