"""Plans: keys that last, ranks whose prefixes keep the shares, balanced targets out of real images only."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.errors import DataError
from raysynth.core.experiment import Experiment, Labels, Plan, TrainingSet
from raysynth.core.schemas import plan_schema
from raysynth.data.plans import build_plan, plan_sources, select
from raysynth.data.strata import interleave
from tests.unit.data.test_subsets import image_table


def experiment(kind: str = "single", training_set: dict | None = None, **plan: Any) -> Experiment:
    e = Experiment(name="t", plan=Plan(**plan), training_set=TrainingSet(**(training_set or {})))
    return dataclasses.replace(e, data=dataclasses.replace(e.data, labels=Labels(kind=kind)))  # type: ignore[arg-type]


def keys(plan: pa.Table) -> set[str]:
    return set(plan["row_key"].to_pylist())


def by_key(plan: pa.Table) -> list[dict]:
    return sorted(plan.to_pylist(), key=lambda r: r["row_key"])


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_every_prefix_keeps_every_share_to_less_than_a_row(counts: list[int]) -> None:
    places, total = interleave(counts), sum(counts)
    assert np.bincount(places, minlength=len(counts)).tolist() == counts
    so_far = np.cumsum(np.eye(len(counts))[places], axis=0)
    fair = np.outer(np.arange(1, total + 1), counts) / max(1, total)
    assert total == 0 or np.abs(so_far - fair).max() < 1


def test_a_long_tail_is_not_bunched() -> None:
    # 100 classes of one image beside one of 100: by (j + 1/2) / m, 50 of the large one would come first.
    places = interleave([100] + [1] * 100)
    assert abs((places[:50] == 0).sum() - 25) <= 1


@given(
    rows=st.integers(60, 150), classes=st.integers(2, 5), multi=st.booleans(), replicas=st.integers(1, 4),
    seed=st.integers(0, 9), shuffle=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_replicate(rows: int, classes: int, multi: bool, replicas: int, seed: int, shuffle: int) -> None:
    table = image_table(rows, classes, multi=multi, seed=seed)
    e = experiment("multi" if multi else "single", replicas=replicas, seed=seed)
    plan = build_plan(table, e)
    sources = plan_sources(table, e)
    n = sources.num_rows
    assert plan.schema == plan_schema([f"c{i}" for i in range(classes)], ["sex"])
    assert plan.num_rows == len(keys(plan)) == n * replicas
    assert plan["rank"].to_pylist() == list(range(n * replicas))
    assert plan["replica"].to_pylist() == [r for r in range(replicas) for _ in range(n)]
    assert set(plan["split"].to_pylist()) == {"train"}
    # Labels and attributes are the source's own.
    source = sources.take(pc.index_in(plan["source_image_id"], value_set=sources["image_id"]))
    for name in [f"label_c{i}" for i in range(classes)] + ["attr_sex"]:
        assert plan[name].to_pylist() == source[name].to_pylist()
    # A replica round's prefixes keep the shares: each class and the rarest finding to less than one row.
    labels = np.array([plan[f"label_c{i}"].to_pylist()[:n] for i in range(classes)])
    fair = np.outer(labels.sum(axis=1), np.arange(1, n + 1)) / n
    off = np.abs(np.cumsum(labels, axis=1) - fair).max(axis=1)
    rarity = labels.sum(axis=1).argsort(kind="stable").argsort()
    assert (off < (2 * rarity + 1 if multi else 1)).all()
    # The order of the table's rows does not matter.
    other = table.take(np.random.default_rng(shuffle).permutation(rows))
    assert build_plan(other, e).equals(plan)


@given(ratio=st.floats(0, 3), more=st.floats(0, 1), quota=st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_selections_are_nested(ratio: float, more: float, quota: int) -> None:
    plan = build_plan(image_table(classes=3, multi=True), experiment("multi", replicas=4))
    n = plan.num_rows // 4
    small, large = (select(plan, n, Plan(ratio=r)) for r in (ratio, ratio + more))
    assert not (small & ~large).any()
    assert small.sum() == np.ceil(round(ratio * n, 6))
    small, large = (select(plan, n, Plan(quota={"c0": q, "c2": q})) for q in (quota, quota + 3))
    assert not (small & ~large).any()
    for name in ("c0", "c2"):
        assert pc.sum(plan.filter(pa.array(small))[f"label_{name}"]).as_py() <= quota


def test_selection_counts() -> None:
    plan = build_plan(image_table(), experiment(replicas=2))
    n = plan.num_rows // 2
    assert select(plan, n, Plan()).all()
    assert select(plan, n, Plan(n_synth=7)).nonzero()[0].tolist() == list(range(7))
    # Whole ratios are whole replicas, as in the Synthetically Enhanced recipe.
    assert (select(plan, n, Plan(ratio=1)) == (plan["replica"].to_numpy() < 1)).all()
    assert select(plan, 30, Plan(ratio=0.1)).sum() == 3
    quota = plan.filter(pa.array(select(plan, n, Plan(quota={"c1": 4}))))
    assert pc.sum(quota["label_c1"]).as_py() == 4
    assert pc.sum(quota["label_c0"]) == pc.sum(plan["label_c0"])


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Plan(ratio=3), r"plan.ratio: got 3, must be at most 2 \(\d+ rows.*Raise plan.replicas"),
        (Plan(n_synth=10**6), r"plan.n_synth: got 1000000, must be at most \d+"),
        (Plan(quota={"c11": 3}), r"plan.quota.c11: .* Did you mean c1\?"),
        (Plan(quota={"c1": -3}), r"plan.quota.c1: got -3, must be >= 0"),
    ],
)
def test_selections_that_cannot_be(wanted: Plan, text: str) -> None:
    plan = build_plan(image_table(), experiment(replicas=2))
    with pytest.raises(DataError, match=text):
        select(plan, plan.num_rows // 2, wanted)


def test_what_changes_row_keys() -> None:
    table = image_table()
    three = build_plan(table, experiment(replicas=3))
    # More replicas and another seed keep keys; so does one more image for all images but itself.
    assert keys(three) < keys(build_plan(table, experiment(replicas=10)))
    reseeded = build_plan(table, experiment(replicas=3, seed=1))
    assert keys(reseeded) == keys(three)
    assert reseeded["row_key"] != three["row_key"]
    new = table.slice(0, 1)
    for at, (name, value) in enumerate({"image_id": "new", "split": "train", "patient_id": "pn"}.items()):
        new = new.set_column(at, name, pa.array([value]))
    grown = build_plan(pa.concat_tables([table, new]), experiment(replicas=3))
    assert len(keys(grown) - keys(three)) == 3
    assert keys(three) < keys(grown)
    # A changed label or attribute of an image is another picture; an unknown one added changes nothing.
    sex = ["F" if v == "M" else v for v in table["attr_sex"].to_pylist()]
    table_of_women = table.set_column(table.num_columns - 1, "attr_sex", pa.array(sex))
    swapped = build_plan(table_of_women, experiment(replicas=3))
    men = {r["row_key"] for r in three.to_pylist() if r["attr_sex"] == "M"}
    assert keys(three) - keys(swapped) == men
    wider = table.append_column("attr_view", pa.nulls(table.num_rows, pa.string()))
    assert keys(build_plan(wider, experiment(replicas=3))) == keys(three)


def test_a_key_is_what_it_was_in_the_first_release() -> None:
    """Golden: if this fails, every stored synthetic set would be rendered again."""
    table = pa.table({
        "image_id": ["a"], "split": ["train"], "patient_id": ["p"],
        "label_x": pa.array([1], pa.int8()), "attr_sex": ["F"],
    })  # fmt: skip
    plan = build_plan(table, experiment(replicas=1))
    assert plan["row_key"].to_pylist() == ["618e503a35dbd5963b8662c474ff9342"]


def test_sources_are_the_real_subset_of_the_train_split() -> None:
    table = image_table()
    plan = build_plan(table, experiment(training_set={"n_per_class": 5}, replicas=2))
    assert plan.num_rows == 30
    splits = dict(zip(table["image_id"].to_pylist(), table["split"].to_pylist()))
    assert {splits[i] for i in plan["source_image_id"].to_pylist()} == {"train"}
