"""Stratified train / val / test splits that never part a unit (a patient, and patients who share a picture).

Iterative stratification (Sechidis, Tsoumakas & Vlahavas 2011, algorithm 1) over units with their label counts: the
rarest label left is dealt out first, each unit to the split that most wants that label. Right for single labels too.
Splits that the data fixes are kept. Knows no files and no pixels.
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
    units: np.ndarray, patients: Sequence[str], fixed: Sequence[str | None], positives: np.ndarray, split: Split
) -> Assignment:
    """A split for every image.

    A unit with a fixed split takes its other images along. The rest is dealt to train and to the splits that the data
    does not fix; where the data fixes train but lacks val or test, those are carved from train, in the same
    proportion to train as they would have had.

    Args:
        units: (N,) unit of each image.
        patients: patient of each image, for messages and a fixed order.
        fixed: train, val, test or null per image.
        positives: (N, L) bool, labels that are present.
        split: fractions, seed and what to do with a unit in two fixed splits.

    Raises:
        DataError: a unit is in two fixed splits and `split.on_conflict` is `refuse`.
    """
    _, units = np.unique(units, return_inverse=True)
    n_units = int(units.max()) + 1 if len(units) else 0
    code = np.array([SPLITS.index(f) if f else -1 for f in fixed], np.int64)
    unit_split, conflicts = _fixed_units(units, n_units, patients, code, split)

    name = {int(u): p for u, p in sorted(zip(units, patients), key=lambda pair: pair[1], reverse=True)}
    order = np.array(sorted(range(n_units), key=lambda u: name[u]), np.int64)  # row order must not matter
    kept = np.array([i not in conflicts for i in range(len(units))], bool)
    counts = _unit_counts(units[kept], n_units, positives[kept])

    share = {"train": 1 - split.val - split.test, "val": split.val, "test": split.test}
    present = {SPLITS[s] for s in np.unique(unit_split) if s >= 0}
    open_splits = ["train", *(s for s in SPLITS[1:] if s not in present and share[s] > 0)]
    weights = np.array([share[s] for s in open_splits]) / sum(share[s] for s in open_splits)
    pool = unit_split < 0
    train = unit_split == 0
    carve = len(open_splits) > 1 and train.any()
    if carve and counts[pool, -1].sum() < (1 - weights[0]) * counts[pool | train, -1].sum():
        pool, train = pool | train, np.zeros_like(train)
    else:
        carve = False
    members = order[pool[order]]
    if len(members):
        wanted = _wanted(counts[members], counts[train].sum(axis=0), weights)
        chosen = stratify(counts[members], wanted, split.seed)
        unit_split[members] = [SPLITS.index(open_splits[c]) for c in chosen]
    names = [SPLITS[s] for s in unit_split[units]]
    return Assignment(names, conflicts, open_splits[1:] if carve else [])


def _fixed_units(
    units: np.ndarray, n_units: int, patients: Sequence[str], code: np.ndarray, split: Split
) -> tuple[np.ndarray, dict[int, str]]:
    """The fixed split of each unit (-1: none): of two, the most held-out one, test before val before train."""
    unit_split = np.full(n_units, -1, np.int64)
    np.maximum.at(unit_split, units, code)
    conflicts: dict[int, str] = {}
    for i in map(int, np.flatnonzero((code >= 0) & (code != unit_split[units]))):
        held, other = SPLITS[unit_split[units[i]]], SPLITS[code[i]]
        conflicts[i] = f"patient {patients[i]!r} is in two fixed splits, {other} and {held}"
    if conflicts and split.on_conflict == "refuse":
        raise DataError(
            "data.columns.split", f"{next(iter(conflicts.values()))}; {len(conflicts)} images in all",
            "one split a patient (patients with an identical image count as one)",
            "Correct the column, leave it out to have the data split here, or set data.split.on_conflict: quarantine "
            "to keep each such patient's most held-out split and leave the other images out.",
        )  # fmt: skip
    return unit_split, conflicts


def _unit_counts(units: np.ndarray, n_units: int, positives: np.ndarray) -> np.ndarray:
    """(U, L + 2): images a label, images without any label (a stratum of its own), images in all."""
    columns = np.concatenate(
        [positives, ~positives.any(axis=1, keepdims=True), np.ones((len(positives), 1), bool)], axis=1
    )
    counts = np.zeros((n_units, columns.shape[1]), np.int64)
    np.add.at(counts, units, columns)
    return counts


def _wanted(counts: np.ndarray, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(S, L) images each subset should get from `counts`, when train holds `kept` already."""
    wanted = weights[:, None] * (counts.sum(axis=0) + kept)[None]
    # A rare label rounds to nothing in a small split; one image there is worth more than its share in train.
    enough = (counts > 0).sum(axis=0) >= len(weights)
    scarce = enough & (wanted[1:] < 1)
    wanted[1:][scarce] = 1.0
    wanted[0] = counts.sum(axis=0) + kept - wanted[1:].sum(axis=0)
    wanted[0] -= kept
    return wanted


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
