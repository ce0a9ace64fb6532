"""Splits: invariant 7 (no patient in two splits), stratification, fixed splits."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.errors import DataError
from raysynth.core.experiment import Split
from raysynth.data.earlier import earlier_splits, kept_note
from raysynth.data.grouping import patients_and_units
from raysynth.data.splits import SPLITS, Assignment, assign_splits, require_every_split, stratify

IMAGES = st.lists(
    st.tuples(
        st.integers(0, 12),  # patient
        st.integers(0, 25),  # picture
        st.sampled_from([None, None, None, *SPLITS]),
        st.lists(st.booleans(), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=60,
)


def assign(
    patients: list[str], positives: np.ndarray, split: Split | None = None, fixed: list[str | None] | None = None
) -> Assignment:
    units = np.unique(patients, return_inverse=True)[1]
    return assign_splits(units, patients, fixed or [None] * len(patients), positives, split or Split())


@given(IMAGES, st.floats(0, 0.45), st.floats(0, 0.45), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_no_patient_and_no_picture_is_in_two_splits(
    images: list[tuple[int, int, str | None, list[bool]]], val: float, test: float, seed: int
) -> None:
    patients, units = patients_and_units(
        [str(i) for i in range(len(images))], [f"p{p}" for p, *_ in images], [str(x) for _, x, *_ in images], None, 0
    )
    fixed = [f for _, _, f, _ in images]
    positives = np.array([labels for *_, labels in images])
    got = assign_splits(units, patients, fixed, positives, Split(val, test, seed, on_conflict="quarantine"))
    where: dict[str, set[str]] = {}
    for i, (split, patient) in enumerate(zip(got.split, patients)):
        assert split in SPLITS
        if i in got.conflicts:
            continue
        where.setdefault(patient, set()).add(split)
        where.setdefault(f"picture {images[i][1]}", set()).add(split)
        if fixed[i] and fixed[i] != "train":
            assert split == fixed[i]
        if fixed[i] == "train" and not got.carved:
            assert split == "train"
    assert all(len(splits) == 1 for splits in where.values())
    # The same images in another order go to the same splits.
    turn = np.random.default_rng(seed).permutation(len(images))
    again = assign_splits(
        units[turn], [patients[i] for i in turn], [fixed[i] for i in turn], positives[turn],
        Split(val, test, seed, on_conflict="quarantine"),
    )  # fmt: skip
    assert again.split == [got.split[i] for i in turn]
    assert {int(turn[i]) for i in again.conflicts} == set(got.conflicts)


def columns(path: Path, *names: str) -> list[list[str]]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [[row[name] for row in rows] for name in names]


def shares(assigned: list[str], positives: np.ndarray) -> dict[str, np.ndarray]:
    where = np.array(assigned)
    return {name: positives[where == name].sum(axis=0) / positives.sum(axis=0) for name in SPLITS}


def test_long_tailed_classes_of_real_lesions(shared_data: Path) -> None:
    lesions, dx = columns(shared_data / "ham10000" / "metadata.csv", "lesion_id", "dx")
    positives = np.array(dx)[:, None] == np.unique(dx)
    found = shares(assign(lesions, positives).split, positives)
    for name, share in zip(SPLITS, (0.6, 0.15, 0.25)):
        # df, the rarest, has 115 images of 73 lesions.
        assert np.abs(found[name] - share).max() < 0.015


def test_findings_of_real_films(shared_data: Path) -> None:
    patients, findings = columns(shared_data / "nih_cxr_256" / "metadata.csv", "patient_id", "findings")
    names = sorted({f for cell in findings for f in cell.split("|")} - {"Hernia"})  # three films of one patient
    positives = np.array([[n in cell.split("|") for n in names] for cell in findings])
    got = assign(patients, positives)
    found = shares(got.split, positives)
    common = positives.sum(axis=0) >= 50
    for name, share in zip(SPLITS, (0.6, 0.15, 0.25)):
        assert np.abs(found[name] - share)[common].max() < 0.02
        assert (found[name] > 0).all()
    assert not require_every_split("multi", names, positives, got.split, [])


def test_seed_gives_another_split_of_the_same_quality() -> None:
    patients = [f"p{i}" for i in range(400)]
    positives = np.arange(400)[:, None] % 4 == np.arange(4)
    first, second = (assign(patients, positives, Split(seed=s)) for s in (0, 1))
    assert first.split == assign(patients, positives, Split(seed=0)).split
    assert first.split != second.split
    assert (shares(first.split, positives)["test"] == shares(second.split, positives)["test"]).all()


def test_images_without_a_positive_are_spread_too() -> None:
    positives = np.zeros((1000, 2), bool)
    positives[:50, 0] = True
    got = np.array(assign([f"p{i:04d}" for i in range(1000)], positives).split)
    assert abs((got[50:] == "val").mean() - 0.15) < 0.01


def test_a_class_of_three_patients_is_in_every_split() -> None:
    positives = np.zeros((300, 2), bool)
    positives[:3, 0] = True
    positives[3:, 1] = True
    got = assign([f"p{i:03d}" for i in range(300)], positives)
    assert sorted(got.split[:3]) == ["test", "train", "val"]


def test_a_class_of_two_patients_is_refused_or_said() -> None:
    positives = np.zeros((300, 2), bool)
    positives[:2, 0] = True
    positives[2:, 1] = True
    got = assign([f"p{i:03d}" for i in range(300)], positives)
    with pytest.raises(DataError, match=r"data\.labels\.classes: got 'rare: no image in (val|test), 2 in all'"):
        require_every_split("single", ["rare", "b"], positives, got.split, [None])
    assert len(require_every_split("multi", ["rare", "b"], positives, got.split, [None])) == 1
    # A test set that the data fixes is the user's choice.
    given = ["train"] * 250 + ["test"] * 50
    assert require_every_split("single", ["rare", "b"], positives, given, [*given]) == ["rare has no image in test"]


def test_val_is_carved_from_train_where_the_data_fixes_train_and_test() -> None:
    patients = [f"p{i // 2}" for i in range(1000)]
    positives = np.arange(1000)[:, None] % 2 == np.arange(2)
    fixed = ["test" if i >= 800 else "train" for i in range(1000)]
    got = assign(patients, positives, fixed=[*fixed])
    assert got.carved == ["val"]
    assert got.split[800:] == ["test"] * 200
    assert got.split[:800].count("val") == 160  # 0.15 / (0.15 + 0.60) of 800
    assert not set(got.split[:800]) - {"train", "val"}


def test_a_patients_other_images_follow_its_fixed_split() -> None:
    got = assign(["a", "a", "b", "c"], np.ones((4, 1), bool), fixed=["test", None, "val", "train"])
    assert got.split == ["test", "test", "val", "train"]


def test_images_without_split_go_where_the_data_fixes_none() -> None:
    # The published test set stays as it is.
    patients = [f"p{i:03d}" for i in range(500)]
    fixed = ["test" if i < 100 else None for i in range(500)]
    got = assign(patients, np.ones((500, 1), bool), fixed=[*fixed])
    assert got.split.count("test") == 100
    assert got.split.count("val") == 80
    assert not got.carved


def test_patient_in_two_fixed_splits_is_refused() -> None:
    message = r"data\.columns\.split: got .*patient 'a' is in two fixed splits, train and test"
    with pytest.raises(DataError, match=message):
        assign(["a", "b", "a"], np.ones((3, 1), bool), fixed=["train", "train", "test"])


def test_patient_in_two_fixed_splits_keeps_the_most_held_out_one() -> None:
    fixed: list[str | None] = ["train", "train", "test", None]
    got = assign(["a", "b", "a", "a"], np.ones((4, 1), bool), Split(val=0, on_conflict="quarantine"), fixed)
    assert got.conflicts == {0: "patient 'a' is in two fixed splits, train and test"}
    assert got.split[1:] == ["train", "test", "test"]


def test_no_val_and_no_test_can_be_asked_for() -> None:
    got = assign([f"p{i}" for i in range(20)], np.ones((20, 1), bool), Split(val=0, test=0))
    assert set(got.split) == {"train"}


def test_stratify_gives_each_subset_what_it_wants() -> None:
    counts = np.array([[1, 0, 1]] * 60 + [[0, 1, 1]] * 40)
    chosen = stratify(counts, np.outer([0.5, 0.5], counts.sum(axis=0)), seed=3)
    assert [counts[chosen == s].sum(axis=0).tolist() for s in (0, 1)] == [[30, 20, 50]] * 2


@pytest.mark.timeout(60)  # 1.4 s on an idle core; hours where the work grows with the square of patients
def test_a_hundred_thousand_patients_take_seconds() -> None:
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 100_000, 200_000)
    positives = rng.random((200_000, 14)) < np.geomspace(0.3, 0.0002, 14)
    got = assign_splits(owner, [f"p{o}" for o in owner], [None] * 200_000, positives, Split())
    assert np.abs(shares(got.split, positives)["val"] - 0.15)[:10].max() < 0.005


def table_of(ids: list[str], patients: list[str], split: list[str]) -> pa.Table:
    pixels = [f"x{i}" for i in ids]
    return pa.table({"image_id": ids, "patient_id": patients, "pixel_sha256": pixels, "split": split})


def grown(more: int = 60, seed: int = 0) -> tuple[list[str], list[str], np.ndarray, pa.Table]:
    """Image ids, patients and labels of 100 + `more` images, two a patient, and the table of the first 100."""
    n = 100 + more
    ids, patients = [f"i{k:03d}" for k in range(n)], [f"p{k // 2:03d}" for k in range(n)]
    positives = np.stack([np.arange(n) // 2 % 4 == j for j in range(4)], axis=1)
    first = assign(patients[:100], positives[:100], Split(seed=seed))
    return ids, patients, positives, table_of(ids[:100], patients[:100], first.split)


def test_earlier_patients_stay_and_new_ones_bring_the_fractions_nearer() -> None:
    ids, patients, positives, table = grown()
    pixels = [f"x{i}" for i in ids]
    earlier = earlier_splits(table, ids, pixels, patients)
    assert earlier == [*table["split"].to_pylist(), *[None] * 60]
    units = np.unique(patients, return_inverse=True)[1]
    # Another seed would give another split of everything, were it not for the earlier one.
    got = assign_splits(units, patients, [None] * 160, positives, Split(seed=1), earlier)
    assert got.split[:100] == table["split"].to_pylist()
    assert {s: got.split.count(s) for s in SPLITS} == pytest.approx({"train": 96, "val": 24, "test": 40}, abs=4)
    # Each split has its share of every class, also of one that is new: class 3 was in no earlier image.
    for share in shares(got.split, positives).values():
        assert share.max() - share.min() < 0.12


def test_a_new_class_reaches_every_split() -> None:
    ids, patients, positives, table = grown()
    positives = np.concatenate([positives, np.arange(160)[:, None] >= 140], axis=1)
    earlier = earlier_splits(table, ids, [f"x{i}" for i in ids], patients)
    units = np.unique(patients, return_inverse=True)[1]
    got = assign_splits(units, patients, [None] * 160, positives, Split(), earlier)
    assert all(share[4] > 0 for share in shares(got.split, positives).values())


def test_an_image_is_known_by_id_pixels_or_patient() -> None:
    table = table_of(["a", "b", "c"], ["p", "q", "r"], ["test", "val", "train"])
    ids, pixels, patients = ["a", "new name", "new image", "new"], ["other", "xb", "y", "z"], ["s", "t", "r", "u"]
    assert earlier_splits(table, ids, pixels, patients) == ["test", "val", "train", None]
    assert earlier_splits(table, ids, pixels, None) == ["test", "val", None, None]
    assert kept_note(table, ["a", "new name"], ["test", "val"]).endswith("0 are new, 2 of the earlier ones are gone")


def test_patients_of_two_earlier_splits_who_turn_out_to_be_one() -> None:
    patients, positives = ["p", "p", "p"], np.ones((3, 1), bool)
    with pytest.raises(DataError, match=r"data.split.keep: got \"patient 'p' is in two earlier splits, train and test"):
        assign_splits(np.zeros(3, int), patients, [None] * 3, positives, Split(), ["train", "test", None])
    lenient = Split(on_conflict="quarantine")
    got = assign_splits(np.zeros(3, int), patients, [None] * 3, positives, lenient, ["train", "test", None])
    assert got.split == ["test"] * 3
    assert set(got.conflicts) == {0}  # the new image stays, in test


def test_a_column_that_moves_an_earlier_patient_is_refused_but_not_what_was_carved() -> None:
    positives = np.ones((4, 1), bool)
    with pytest.raises(DataError, match=r"data.split.keep: .*'p1' is in two earlier splits, train and test"):
        assign_splits(
            np.arange(4), [f"p{i}" for i in range(4)], ["train", "test", "train", "val"], positives, Split(),
            ["train", "train", None, None],
        )  # fmt: skip
    patients = [f"p{i}" for i in range(40)]
    fixed: list[str | None] = ["train"] * 40
    first = assign_splits(np.arange(20), patients[:20], fixed[:20], np.ones((20, 1), bool), Split())
    got = assign_splits(
        np.arange(40), patients, fixed, np.ones((40, 1), bool), Split(), [*first.split, *[None] * 20]
    )
    assert got.split[:20] == first.split
    assert not got.conflicts
    assert [got.split.count(s) for s in SPLITS] == [24, 6, 10]


@given(IMAGES, IMAGES, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_growth_moves_nobody_and_parts_nobody(
    before: list[tuple[int, int, str | None, list[bool]]], added: list[tuple[int, int, str | None, list[bool]]],
    seed: int,
) -> None:
    rules = Split(seed=seed, on_conflict="quarantine")

    def run(images: list, earlier: list[str | None] | None) -> tuple[Assignment, list[str]]:
        patients, units = patients_and_units(
            [str(i) for i in range(len(images))], [f"p{p}" for p, *_ in images], [str(x) for _, x, *_ in images],
            None, 0,
        )  # fmt: skip
        labels = np.array([labels for *_, labels in images])
        return assign_splits(units, patients, [None] * len(images), labels, rules, earlier), patients

    first, _ = run(before, None)
    second, patients = run([*before, *added], [*first.split, *[None] * len(added)])
    where: dict[str, set[str]] = {}
    for i, (split, patient) in enumerate(zip(second.split, patients)):
        if i in second.conflicts:
            continue
        where.setdefault(patient, set()).add(split)
        assert i >= len(before) or split == first.split[i]
    assert all(len(splits) == 1 for splits in where.values())
