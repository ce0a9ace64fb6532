"""Training sets: what each strategy is made of, exact and nested ratios, never a held-out patient."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.errors import ConfigError, DataError
from raysynth.core.evidence import Classifier, Pretrain, TrainingSet
from raysynth.core.experiment import Data, Experiment, Generator, Labels, Plan
from raysynth.core.schemas import members_schema
from raysynth.data.plans import build_plan
from raysynth.data.subsets import generator_rows, real_subset
from raysynth.data.training_sets import Chosen, choose, validation_ids
from tests.unit.data.test_subsets import column, image_table

TABLE = image_table(400)
FEW = settings(max_examples=20, deadline=None)


def experiment(strategy: str = "mix", kind: str = "single", **sections: Any) -> Experiment:
    training_set = {"n_per_class": 10, **sections.pop("training_set", {})}
    training_set["pretrain"] = Pretrain(**training_set.pop("pretrain", {}))
    data = Data(kind="digits", labels=Labels(kind=kind, **sections.pop("labels", {})))  # type: ignore[arg-type]
    return Experiment(
        name="t", data=data, classifier=Classifier(steps=101), plan=Plan(**sections.pop("plan", {})),
        training_set=TrainingSet(strategy=strategy, **training_set), generator=Generator(**sections),  # type: ignore[arg-type]
    )  # fmt: skip


def chosen(e: Experiment, table: pa.Table = TABLE) -> Chosen:
    return choose(e, table, build_plan(table, e))


def ids(found: Chosen, phase: int = 0, source: str | None = None) -> list[str]:
    rows = found.members.filter(pc.field("phase") == phase)
    return (rows if source is None else rows.filter(pc.field("source") == source))["id"].to_pylist()


def subset_of(e: Experiment, table: pa.Table = TABLE) -> list[str]:
    return real_subset(table, e.training_set, e.data.labels.policy)


def ranked(e: Experiment, table: pa.Table = TABLE) -> list[str]:
    return build_plan(table, e)["row_key"].to_pylist()


def test_members_of_every_strategy() -> None:
    def of(strategy: str, **training_set: Any) -> tuple[Chosen, list[str], list[str]]:
        e = experiment(strategy, training_set=training_set)
        found = chosen(e)
        assert found.members.schema == members_schema()
        assert sum(found.phase_steps) == 101
        return found, subset_of(e), ranked(e)

    real, subset, _ = of("real")
    assert ids(real) == subset
    assert (real.n_real, real.n_synth) == (30, 0)
    synthetic, _, keys = of("synthetic", ratio=2)
    assert ids(synthetic) == keys[:60]
    assert (synthetic.n_real, synthetic.n_synth) == (0, 60)
    mix, _, _ = of("mix", n_synth=45)
    assert ids(mix, source="real") == subset
    assert ids(mix, source="synthetic") == keys[:45]
    pretrain, _, _ = of("pretrain")
    assert ids(pretrain) == keys
    assert ids(pretrain, 1) == subset
    assert set(pretrain.members["source"].to_pylist()) == {"real", "synthetic"}
    two, _, _ = of("real_real", pretrain={"step_share": 0.3})
    assert ids(two) == ids(two, 1) == subset
    assert two.phase_steps == [30, 71]
    assert (two.n_real, two.n_synth) == (30, 0)
    for found in (real, synthetic, mix):
        assert found.phase_steps == [101]
        assert set(found.members["phase"].to_pylist()) == {0}


def test_strategies_without_synthetic_images_need_none() -> None:
    for strategy in ("real", "real_real", "duplicate", "upper_bound"):
        assert choose(experiment(strategy), TABLE, None).n_synth == 0
    with pytest.raises(DataError, match=r"training_set.strategy: got 'mix'"):
        choose(experiment("mix"), TABLE, None)


def test_the_upper_bound_has_what_the_generator_saw() -> None:
    e = experiment("upper_bound", train_on="donor")
    found = choose(e, TABLE, None)
    assert set(ids(found)) == {*subset_of(e), *generator_rows(TABLE, e)}
    assert found.n_real == len(ids(found)) > 100
    assert not found.notes
    [note] = choose(experiment("upper_bound"), TABLE, None).notes
    assert "upper bound is `real`" in note


@FEW
@given(ratio=st.floats(0.05, 12), more=st.floats(0, 2), multi=st.booleans(), seed=st.integers(0, 3))
def test_duplicates_are_exact_nested_and_shared_out(ratio: float, more: float, multi: bool, seed: int) -> None:
    table = image_table(300, multi=multi)

    def multiset(r: float) -> Counter[str]:
        e = experiment("duplicate", "multi" if multi else "single", training_set={"ratio": r}, plan={"seed": seed})
        found = choose(e, table, None)
        assert found.n_synth == 0
        return Counter(ids(found))

    small, large = multiset(ratio), multiset(ratio + more)
    n_real = len(small)
    assert sum(small.values()) == n_real + int(np.ceil(round(ratio * n_real, 6)))
    assert small <= large
    assert max(small.values()) - min(small.values()) <= 1
    if not multi:
        counts = [sum(n for i, n in small.items() if column(table, [i], f"label_c{c}") == [1]) for c in range(3)]
        assert max(counts) - min(counts) <= 1


def test_duplicates_follow_the_plan_of_the_mix() -> None:
    plan = {"kind": "balanced", "n": 60, "over": ["label"], "targets": {"label=c0": 40}}
    e = experiment("duplicate", plan=plan, training_set={"n_per_class": 12})
    extra = Counter(ids(choose(e, TABLE, None))) - Counter(subset_of(e))
    assert extra == Counter(build_plan(TABLE, e)["source_image_id"].to_pylist())
    assert sum(column(TABLE, list(extra.elements()), "label_c0")) == 40


@FEW
@given(ratio=st.floats(0.05, 5), more=st.floats(0, 5))
def test_a_larger_ratio_contains_the_smaller(ratio: float, more: float) -> None:
    small, large = (chosen(experiment(training_set={"ratio": r})) for r in (ratio, ratio + more))
    assert small.n_synth == int(np.ceil(round(ratio * 30, 6)))
    one, other = ids(small, source="synthetic"), ids(large, source="synthetic")
    assert other[: len(one)] == one
    assert ids(small, source="real") == ids(large, source="real")


def test_a_quota_limits_the_classes_it_names() -> None:
    e = experiment(training_set={"quota": {"c1": 4}}, plan={"replicas": 2})
    found = chosen(e)
    plan = build_plan(TABLE, e)
    rows = plan.filter(pc.is_in(plan["row_key"], value_set=pa.array(ids(found, source="synthetic"))))
    assert [pc.sum(rows[f"label_c{c}"]).as_py() for c in range(3)] == [20, 4, 20]


def test_failed_rows_are_missing_not_replaced() -> None:
    e = experiment(training_set={"ratio": 1})
    plan = build_plan(TABLE, e)
    found = choose(e, TABLE, plan.filter(pc.field("rank") >= 3))
    assert ids(found, source="synthetic") == ranked(e)[3:30]
    assert (found.n_synth, found.n_missing) == (27, 3)
    assert found.notes == ["3 of 30 selected synthetic images were not rendered"]
    with pytest.raises(DataError, match="none of 30 selected"):
        choose(e, TABLE, plan.filter(pc.field("rank") >= 30))
    # A quota counts failed rows too.
    limited = experiment(training_set={"quota": {"c1": 4}})
    key = next(r["row_key"] for r in plan.to_pylist() if r["label_c1"])
    assert choose(limited, TABLE, plan.filter(pc.field("row_key") != key)).n_missing == 1


def test_more_than_was_planned_is_refused() -> None:
    balanced = {"kind": "balanced", "n": 60, "over": ["label"]}
    with pytest.raises(DataError, match=r"training_set.ratio: got 3.*at most 2 .*Raise plan.n"):
        chosen(experiment(training_set={"ratio": 3}, plan=balanced))
    with pytest.raises(DataError, match=r"training_set.n_synth: got 500.*Raise plan.replicas"):
        chosen(experiment(training_set={"n_synth": 500}))
    with pytest.raises(DataError, match=r"training_set.n_synth: got 50, must be at most the 30 rows that plan selects"):
        chosen(experiment(training_set={"n_synth": 50}, plan={"ratio": 1}))
    with pytest.raises(DataError, match=r"training_set.quota.c9"):
        chosen(experiment(training_set={"quota": {"c9": 5}}))


def test_order_of_rows_does_not_matter() -> None:
    e = experiment(training_set={"ratio": 2, "validation": "scaled"})
    plan, first = build_plan(TABLE, e), chosen(e)
    rng = np.random.default_rng(0)
    again = choose(e, TABLE.take(rng.permutation(TABLE.num_rows)), plan.take(rng.permutation(plan.num_rows)))
    assert again.members.equals(first.members)
    assert again.ids_digest == first.ids_digest
    other = chosen(experiment(training_set={"ratio": 2.1, "validation": "scaled"}))
    assert other.ids_digest != first.ids_digest
    assert chosen(experiment(training_set={"ratio": 2})).ids_digest != first.ids_digest


def test_permuted_labels_keep_their_histogram_and_leave_their_images() -> None:
    e = experiment("permuted", training_set={"ratio": 5})
    found = chosen(e)
    rows = found.members.to_pylist()
    synthetic = [r for r in rows if r["source"] == "synthetic"]
    assert all(r["id"] == r["labels_from"] for r in rows if r["source"] == "real")
    assert sorted(r["id"] for r in synthetic) == sorted(r["labels_from"] for r in synthetic)
    plan = build_plan(TABLE, e)
    label = {k: tuple(v) for k, *v in zip(*(plan[n].to_pylist() for n in ("row_key", "label_c0", "label_c1")))}
    same = sum(label[r["id"]] == label[r["labels_from"]] for r in synthetic)
    assert abs(same / len(synthetic) - 1 / 3) < 0.15  # three classes, 150 images
    assert chosen(e).members.equals(found.members)
    other = chosen(experiment("permuted", training_set={"ratio": 5, "seed": 1}))
    assert ids(other) != ids(found)


@pytest.mark.parametrize("strategy", ["real", "mix", "duplicate", "upper_bound", "pretrain"])
def test_no_member_rests_on_a_held_out_patient(strategy: str) -> None:
    e = experiment(strategy, train_on="train")
    found, plan = chosen(e), build_plan(TABLE, e)
    source = dict(zip(plan["row_key"].to_pylist(), plan["source_image_id"].to_pylist()))
    images = [source.get(i, i) for i in found.members["id"].to_pylist()]
    held_out = set(TABLE.filter(pc.field("split") != "train")["patient_id"].to_pylist())
    assert not held_out & set(column(TABLE, images, "patient_id"))
    assert set(column(TABLE, found.validation, "split")) == {"val"}


def test_a_synthetic_row_from_elsewhere_is_refused() -> None:
    e = experiment()
    plan = build_plan(TABLE, e)
    for name, value in (("split", "val"), ("source_image_id", "i99999"), ("row_key", "0" * 32)):
        at = plan.schema.get_field_index(name)
        values = plan[name].to_pylist()
        leaking = plan.set_column(at, name, pa.array([*values[:-1], value], pa.string()))
        with pytest.raises(DataError, match="synthetic set: got 'row"):
            choose(e, TABLE, leaking)
    donors = experiment(training_set={"n_per_class": 20})
    with pytest.raises(DataError, match="classifier's real subset"):
        choose(e, TABLE, build_plan(TABLE, donors))


def test_a_patient_in_two_splits_is_refused() -> None:
    split = TABLE["split"].to_pylist()
    split[split.index("train")] = "test"
    with pytest.raises(DataError, match="patients in two splits"):
        chosen(experiment("real"), TABLE.set_column(1, "split", pa.array(split)))


def without(table: pa.Table, name: str, split: str, value: int = 1) -> pa.Table:
    return table.filter(~((pc.field("split") == split) & (pc.field(name) == value)))


def test_a_class_that_nothing_teaches_is_named() -> None:
    table = without(TABLE, "label_c1", "train")
    every: dict[str, Any] = {"n_per_class": None}
    with pytest.raises(DataError, match="no positive image of c1"):
        chosen(experiment("real", training_set=every), table)
    with pytest.raises(DataError, match="no positive image of c2"):
        chosen(experiment("synthetic", training_set={"quota": {"c2": 0}}))
    # Fine-tuning teaches what pretraining lacks.
    found = chosen(experiment("pretrain", training_set={"quota": {"c2": 0}}))
    assert found.notes == ["training stage 1 has no positive image of c2"]


def test_a_finding_never_annotated_as_absent_needs_a_policy() -> None:
    table = image_table(multi=True)
    at = table.schema.get_field_index("label_c0")
    only = table.set_column(at, "label_c0", pc.if_else(pc.equal(table["label_c0"], 1), pa.scalar(1, pa.int8()), None))
    every: dict[str, Any] = {"n_per_class": None}
    with pytest.raises(DataError, match=r"no negative image of c0.*policy"):
        chosen(experiment("real", "multi", training_set=every), only)
    assert chosen(experiment("real", "multi", training_set=every, labels={"policy": {"c0": "zeros"}}), only).n_real


def test_validation_that_judges_nothing_is_refused() -> None:
    e = experiment("real")
    with pytest.raises(DataError, match=r"data.split.val: got '0 validation images"):
        chosen(e, TABLE.filter(pc.field("split") != "val"))
    one_class = without(without(TABLE, "label_c0", "val"), "label_c1", "val")
    with pytest.raises(DataError, match=r"validation images \(c2 \d+\)"):
        chosen(e, one_class)
    [note] = chosen(e, without(TABLE, "label_c1", "val")).notes
    assert "validation lacks positive or negative images of c1" in note


@FEW
@given(n=st.integers(1, 60), more=st.integers(0, 10), multi=st.booleans(), fraction=st.booleans())
def test_scaled_validation_is_nested_and_keeps_every_class(n: int, more: int, multi: bool, fraction: bool) -> None:
    table = image_table(900, multi=multi)

    def scaled(k: int) -> tuple[list[str], list[str]]:
        size = {"fraction": k / 70} if fraction else {"n_per_class": k}
        t = TrainingSet(validation="scaled", **size)
        subset = real_subset(table, t)
        return subset, validation_ids(table, t, subset)

    (subset, small), (_, large) = scaled(n), scaled(n + more)
    assert set(small) <= set(large)
    assert set(column(table, small, "split")) == {"val"}
    labels = np.array([column(table, small, f"label_c{c}") for c in range(3)])
    assert labels.any(axis=1).all()
    assert (labels == 0).any(axis=1).all()
    if not multi:
        for c in range(3):
            share = sum(column(table, subset, f"label_c{c}")) / _count(table, "train", c)
            whole = _count(table, "val", c)
            assert labels[c].sum() == max(1, round(share * whole))


def _count(table: pa.Table, split: str, c: int) -> int:
    return table.filter((pc.field("split") == split) & (pc.field(f"label_c{c}") == 1)).num_rows


def test_scaled_validation_is_all_of_it_with_all_of_the_train_split_and_seeded() -> None:
    every = TABLE.filter(pc.field("split") == "val")["image_id"].to_pylist()
    whole = TrainingSet(validation="scaled")
    assert validation_ids(TABLE, whole, real_subset(TABLE, whole)) == sorted(every)
    assert validation_ids(TABLE, TrainingSet(n_per_class=5), []) == sorted(every)
    drawn = []
    for seed in (0, 1):
        t = TrainingSet(n_per_class=10, validation="scaled", seed=seed)
        drawn.append(validation_ids(TABLE, t, real_subset(TABLE, t)))
    assert drawn[0] != drawn[1]


def test_a_classifier_section_is_needed() -> None:
    with pytest.raises(ConfigError, match="classifier"):
        choose(dataclasses.replace(experiment("real"), classifier=None), TABLE, None)
