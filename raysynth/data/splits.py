"""Stratified train / val / test splits that never part a unit (a patient, and patients who share a picture).

Iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011, algorithm 1) over units with their label counts: the
rarest label left is dealt out first, each unit to the split that most wants that label. Right for single labels too.
Splits that the data fixes are kept, and so are those of an earlier image table, so that data may grow without a
patient changing sides. Knows no files and no pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysynth.core.errors import DataError
from raysynth.core.experiment import Split

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Assignment:
    """Split of every image, and the images left out because their patient was in two fixed splits."""

    split: list[str]
    conflicts: dict[int, str]
    """Image -> reason (only with `on_conflict: quarantine`)."""
    carved: list[str]
    """Splits that the data did not have and that were taken from its fixed train images."""


def stratify(counts: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Deals units to subsets by iterative stratification.

    Args:
        counts: (U, L) images of each label in each unit; units without any count fill up last.
        wanted: (S, L + 1) images of each label that each subset should get; the last column is images in all.
        seed: breaks ties and orders units of one size.

    Returns:
        (U,) subset numbers.
    """
    rng = np.random.default_rng(seed)
    labels = counts.shape[1] - 1
    chosen = np.full(len(counts), -1, np.int64)
    want = [list(map(float, row)) for row in wanted]
    shuffled = rng.permutation(len(counts))
    tie = rng.random(len(counts))
    remaining = counts.astype(float)
    while True:
        left = (chosen < 0)[:, None] & (counts[:, :labels] > 0)
        totals = np.where(left.any(axis=0), (remaining[:, :labels] * left).sum(axis=0), np.inf)
        if not np.isfinite(totals).any():
            break
        rarest = int(np.argmin(totals))
        _deal(shuffled[left[shuffled, rarest]], rarest, counts, want, tie, chosen)
    _deal(shuffled[chosen[shuffled] < 0], labels, counts, want, tie, chosen)
    return chosen


def _deal(
    units: np.ndarray, label: int, counts: np.ndarray, want: list[list[float]], tie: np.ndarray, chosen: np.ndarray
) -> None:
    """Gives each of `units` to the subset that most wants `label`, largest units first so that small ones even out."""
    total = len(want[0]) - 1
    for unit in units[np.argsort(-counts[units, label], kind="stable")]:
        keys = [(round(row[label], 9), round(row[total], 9)) for row in want]
        best = max(keys)
        tied = [s for s, key in enumerate(keys) if key == best]
        subset = tied[int(tie[unit] * len(tied))]
        chosen[unit] = subset
        row = want[subset]
        for j in np.flatnonzero(counts[unit]):
            row[j] -= float(counts[unit, j])


def assign_splits(
    units: np.ndarray, patients: Sequence[str], fixed: Sequence[str | None], positives: np.ndarray, split: Split,
    earlier: Sequence[str | None] | None = None,
) -> Assignment:
    """A split for every image.

    A unit with a fixed or an earlier split takes its other images along. The rest is dealt to train and to the splits
    that the data does not fix, so that these approach their shares of all images; where the data fixes train but lacks
    val or test, those are carved from train, in the same proportion to train as they would have had.

    Args:
        units: (N,) unit of each image.
        patients: patient of each image, for messages and a fixed order.
        fixed: train, val, test or null per image.
        positives: (N, L) bool, labels that are present.
        split: fractions, seed and what to do with a unit in two fixed splits.
        earlier: as `data.earlier.earlier_splits`; these never change.

    Raises:
        DataError: a unit is in two fixed or earlier splits and `split.on_conflict` is `refuse`.
    """  # fmt: skip
    _, units = np.unique(units, return_inverse=True)
    n_units = int(units.max()) + 1 if len(units) else 0
    code, before = _codes(fixed), _codes(earlier or [None] * len(units))
    kept = _highest(units, n_units, before)
    # What an earlier ingest carved from the data's train images does not contradict the data.
    carved = (code == 0) & (kept[units] > 0) & ~np.isin(kept[units], code)
    code = np.where(carved, -1, code)
    by_data = _highest(units, n_units, code)
    unit_split = np.maximum(by_data, kept)
    conflicts = _conflicts(units, unit_split, patients, (code, before), split)

    name = {int(u): p for u, p in sorted(zip(units, patients), key=lambda pair: pair[1], reverse=True)}
    order = np.array(sorted(range(n_units), key=lambda u: name[u]), np.int64)  # row order must not matter
    usable = np.array([i not in conflicts for i in range(len(units))], bool)
    counts = _unit_counts(units[usable], n_units, positives[usable])

    share = {"train": 1 - split.val - split.test, "val": split.val, "test": split.test}
    present = {SPLITS[s] for s in np.unique(by_data) if s >= 0}
    open_splits = ["train", *(s for s in SPLITS[1:] if s not in present and share[s] > 0)]
    weights = np.array([share[s] for s in open_splits]) / sum(share[s] for s in open_splits)
    held = np.stack([unit_split == SPLITS.index(s) for s in open_splits])
    pool, movable = unit_split < 0, (by_data == 0) & (kept < 0)
    lacking = weights * counts[pool | held.any(axis=0), -1].sum() - held @ counts[:, -1]
    carve = len(open_splits) > 1 and movable.any() and counts[pool, -1].sum() < lacking[1:].clip(0).sum()
    if carve:
        pool, held = pool | movable, held & ~movable
    members = order[pool[order]]
    if len(members):
        wanted = _wanted(counts[members], held @ counts, weights)
        chosen = stratify(counts[members], wanted, split.seed)
        unit_split[members] = [SPLITS.index(open_splits[c]) for c in chosen]
    names = [SPLITS[s] for s in unit_split[units]]
    return Assignment(names, conflicts, open_splits[1:] if carve else [])


def _codes(splits: Sequence[str | None]) -> np.ndarray:
    return np.array([SPLITS.index(s) if s else -1 for s in splits], np.int64)


def _highest(units: np.ndarray, n_units: int, code: np.ndarray) -> np.ndarray:
    """The split of each unit (-1: none): of two, the most held-out one, test before val before train."""
    found = np.full(n_units, -1, np.int64)
    np.maximum.at(found, units, code)
    return found


def _conflicts(
    units: np.ndarray, unit_split: np.ndarray, patients: Sequence[str], codes: Sequence[np.ndarray], split: Split
) -> dict[int, str]:
    """Images whose unit has a more held-out split than their own, by the data or by the earlier table."""
    conflicts: dict[int, str] = {}
    for code, key, word in zip(codes, ("data.columns.split", "data.split.keep"), ("fixed", "earlier")):
        for i in map(int, np.flatnonzero((code >= 0) & (code != unit_split[units]))):
            held, other = SPLITS[unit_split[units[i]]], SPLITS[code[i]]
            why = f"patient {patients[i]!r} is in two {word} splits, {other} and {held}"
            conflicts.setdefault(i, why)
        if conflicts and split.on_conflict == "refuse":
            raise DataError(
                key, f"{next(iter(conflicts.values()))}; {len(conflicts)} images in all",
                "one split a patient (patients with an identical image count as one)",
                "Correct the column or the patients, leave the key out to have the data split here, or set "
                "data.split.on_conflict: quarantine to keep each such patient's most held-out split and leave the "
                "other images out.",
            )  # fmt: skip
    return conflicts


def _unit_counts(units: np.ndarray, n_units: int, positives: np.ndarray) -> np.ndarray:
    """(U, L + 2): images a label, images without any label (a stratum of its own), images in all."""
    columns = np.concatenate(
        [positives, ~positives.any(axis=1, keepdims=True), np.ones((len(positives), 1), bool)], axis=1
    )
    counts = np.zeros((n_units, columns.shape[1]), np.int64)
    np.add.at(counts, units, columns)
    return counts


def _wanted(counts: np.ndarray, held: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(S, L) images each subset should get from `counts` (U, L), when it holds `held` (S, L) already."""
    whole = counts.sum(axis=0) + held.sum(axis=0)
    wanted = weights[:, None] * whole
    # A rare label rounds to nothing in a small split; one image there is worth more than its share in train.
    enough = (counts > 0).sum(axis=0) >= len(weights)
    scarce = enough & (wanted[1:] < 1)
    wanted[1:][scarce] = 1.0
    wanted[0] = whole - wanted[1:].sum(axis=0)
    return wanted - held


def require_every_split(
    kind: str, classes: Sequence[str], positives: np.ndarray, assigned: Sequence[str], fixed: Sequence[str | None]
) -> list[str]:
    """Classes that a split lacks: refused where one class an image was dealt here, else said.

    A finding too rare for every split can still be trained on, and a split that the data fixes is the user's choice.

    Args:
        positives: (N, L) bool.
        assigned: split of each image.
        fixed: split the data gave, or null.

    Returns:
        one sentence a class and split.

    Raises:
        DataError: single-label data lacks a class in a split made here.
    """
    notes = []
    given, made = set(fixed), np.array(assigned)
    for name in (s for s in SPLITS if s in set(assigned)):
        for j in map(int, np.flatnonzero(~positives[made == name].any(axis=0))):
            if kind == "single" and name not in given:
                raise DataError(
                    "data.labels.classes", f"{classes[j]}: no image in {name}, {int(positives[:, j].sum())} in all",
                    "classes with enough patients for every split", "Add images of it, join it with another class, "
                    "or set data.split.val or data.split.test to 0.",
                )  # fmt: skip
            notes.append(f"{classes[j]} has no image in {name}")
    return notes
