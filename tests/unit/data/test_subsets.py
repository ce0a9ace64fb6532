"""The classifier's and the generator's real images: patient-safe, nested, seeded, never held out."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment, Generator, TrainingSet
from raysynth.data.subsets import generator_rows, real_subset


def image_table(
    rows: int = 300, classes: int = 3, per_patient: int = 3, multi: bool = False, seed: int = 0
) -> pa.Table:
    """A table like ingest's: patients of up to `per_patient` images, patient-safe splits."""
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, rows // per_patient, rows)
    names = [f"c{i}" for i in range(classes)]
    if multi:
        labels = (rng.random((rows, classes)) < [0.5 / (i + 1) for i in range(classes)]).astype(np.int8)
    else:
        labels = np.eye(classes, dtype=np.int8)[rng.integers(0, classes, rows)]
    return pa.table({
        "image_id": [f"i{i:05d}" for i in range(rows)],
        "split": [("train", "train", "train", "val", "test")[p % 5] for p in patient],
        "patient_id": [f"p{p}" for p in patient],
        **{f"label_{n}": labels[:, j] for j, n in enumerate(names)},
        "attr_sex": [("F", "M", None)[p % 3] for p in patient],
    })  # fmt: skip


def column(table: pa.Table, ids: list[str], name: str) -> list:
    rows = {r["image_id"]: r[name] for r in table.select(["image_id", name]).to_pylist()}
    return [rows[i] for i in ids]


@given(n=st.integers(1, 30), seed=st.integers(0, 5), shuffle=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_n_per_class_is_exact_nested_and_blind_to_row_order(n: int, seed: int, shuffle: int) -> None:
    table = image_table()
    small = real_subset(table, TrainingSet(n_per_class=n, seed=seed))
    large = real_subset(table, TrainingSet(n_per_class=n + 7, seed=seed))
    assert set(small) < set(large)
    assert set(column(table, small, "split")) == {"train"}
    assert [sum(column(table, small, f"label_c{c}")) for c in range(3)] == [n] * 3
    other = table.take(np.random.default_rng(shuffle).permutation(table.num_rows))
    assert real_subset(other, TrainingSet(n_per_class=n, seed=seed)) == small


def test_another_seed_is_another_subset() -> None:
    table = image_table()
    one, other = (real_subset(table, TrainingSet(n_per_class=10, seed=s)) for s in (0, 1))
    assert one != other


@given(small=st.floats(0.02, 0.9), step=st.floats(0, 0.1), multi=st.booleans())
@settings(max_examples=25, deadline=None)
def test_fraction_is_nested_and_keeps_shares(small: float, step: float, multi: bool) -> None:
    table = image_table(multi=multi)
    train = table.filter(pa.compute.field("split") == "train")
    one = real_subset(table, TrainingSet(fraction=small))
    assert set(one) <= set(real_subset(table, TrainingSet(fraction=small + step)))
    assert abs(len(one) - small * train.num_rows) <= 4
    assert set(real_subset(table, TrainingSet(fraction=1.0))) == set(train["image_id"].to_pylist())


def test_findings_have_at_least_n_positives_and_images_without_any() -> None:
    table = image_table(multi=True)
    ids = real_subset(table, TrainingSet(n_per_class=10))
    labels = np.array([column(table, ids, f"label_c{c}") for c in range(3)])
    assert (labels.sum(axis=1) >= 10).all()
    assert (labels.sum(axis=0) == 0).sum() == 10
    assert set(ids) < set(real_subset(table, TrainingSet(n_per_class=15)))


def test_patients_stay_whole_but_for_the_last_of_a_class() -> None:
    table = image_table(classes=2)
    classes = dict(zip(table["patient_id"].to_pylist(), table["label_c0"].to_pylist()))
    # One class a patient, as with lesions.
    c0 = [classes[p] for p in table["patient_id"].to_pylist()]
    table = table.set_column(3, "label_c0", pa.array(c0, pa.int8()))
    table = table.set_column(4, "label_c1", pa.array([1 - c for c in c0], pa.int8()))
    ids = real_subset(table, TrainingSet(n_per_class=20))
    inside, everywhere = Counter(column(table, ids, "patient_id")), Counter(table["patient_id"].to_pylist())
    assert sum(inside[p] != everywhere[p] for p in inside) <= 2


def test_too_few_images_name_the_class_and_the_most_possible() -> None:
    with pytest.raises(DataError, match=r"n_per_class: got 500, must be at most \d+, the train images of c"):
        real_subset(image_table(), TrainingSet(n_per_class=500))


def experiment(train_on: str, **training_set: float) -> Experiment:
    e = Experiment(name="t", training_set=TrainingSet(**training_set))  # type: ignore[arg-type]
    return dataclasses.replace(e, generator=Generator(train_on=train_on))  # type: ignore[arg-type]


def test_generator_rows_follow_train_on() -> None:
    table = image_table()
    subset = generator_rows(table, experiment("classifier_subset", n_per_class=10))
    assert subset == real_subset(table, TrainingSet(n_per_class=10))
    train = generator_rows(table, experiment("train", n_per_class=10))
    donor = generator_rows(table, experiment("donor", n_per_class=10))
    assert set(column(table, train, "split")) == {"train"}
    assert set(donor) < set(train)
    patients = [set(column(table, ids, "patient_id")) for ids in (subset, donor)]
    assert not patients[0] & patients[1]
    # Every train patient outside the subset is a donor.
    assert patients[0] | patients[1] == set(column(table, train, "patient_id"))


def test_donors_have_no_picture_that_the_subset_has() -> None:
    table = image_table()
    subset = real_subset(table, TrainingSet(n_per_class=10))
    donors = generator_rows(table, experiment("donor", n_per_class=10))
    pixels = dict(zip(table["image_id"].to_pylist(), map(str, range(table.num_rows))))
    pixels[donors[0]] = pixels[subset[0]]
    shared = table.append_column("pixel_sha256", pa.array(list(pixels.values())))
    left = generator_rows(shared, experiment("donor", n_per_class=10))
    gone = set(column(table, donors[:1], "patient_id"))
    assert left == [i for i, p in zip(donors, column(table, donors, "patient_id")) if p not in gone]


def test_donor_needs_patients_outside_the_subset() -> None:
    with pytest.raises(DataError, match=r"generator.train_on: got 'donor'.*n_per_class"):
        generator_rows(image_table(), experiment("donor"))


def test_a_patient_in_two_splits_is_refused() -> None:
    table = image_table()
    split = table["split"].to_pylist()
    first = split.index("train")
    split[first] = "test"
    leaking = table.set_column(1, "split", pa.array(split))
    for train_on in ("train", "donor", "classifier_subset"):
        with pytest.raises(DataError, match=f"such as {table['patient_id'][first].as_py()}"):
            generator_rows(leaking, experiment(train_on, n_per_class=5))


def test_images_without_a_patient_are_their_own() -> None:
    table = image_table()
    alone = table.set_column(2, "patient_id", pa.nulls(table.num_rows, pa.string()))
    subset = generator_rows(alone, experiment("classifier_subset", n_per_class=10))
    donor = generator_rows(alone, experiment("donor", n_per_class=10))
    train = generator_rows(alone, experiment("train"))
    assert sorted([*subset, *donor]) == train
