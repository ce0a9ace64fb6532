"""Balanced plans: targets over labels and attributes, out of real combinations, and the joint table that shows them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysynth.core.errors import DataError
from raysynth.core.evidence import TrainingSet
from raysynth.core.experiment import Experiment, Labels, Plan
from raysynth.data.balance import cells_of, joint_table, target_counts
from raysynth.data.plans import build_plan, plan_sources, select
from raysynth.data.strata import interleave
from raysynth.data.subsets import real_subset
from tests.unit.data.test_plans import experiment, keys
from tests.unit.data.test_subsets import image_table


def balanced(n: int, over: list[str], targets: dict[str, float], kind: str = "single") -> Experiment:
    e = experiment(kind)
    return dataclasses.replace(e, plan=Plan(kind="balanced", n=n, over=over, targets=targets))


def test_balanced_targets() -> None:
    table = image_table()
    shares = build_plan(table, balanced(200, ["label", "sex"], {"label=c0": 0.5, "label=c1,sex=F": 0.2}))
    count = lambda **want: sum(all(r[k] == v for k, v in want.items()) for r in shares.to_pylist())  # noqa: E731
    assert count(label_c0=1) == 100
    assert count(label_c0=1, attr_sex="F") == 50
    assert count(label_c1=1, attr_sex="F") == 40
    # The three cells that no target names share the rest equally.
    rest = [("label_c1", "M"), ("label_c2", "F"), ("label_c2", "M")]
    assert [count(**{label: 1, "attr_sex": sex}) for label, sex in rest] == [20] * 3
    counts = build_plan(table, balanced(100, ["label"], {"label=c2": 90}))
    assert [pc.sum(counts[f"label_c{i}"]).as_py() for i in range(3)] == [5, 5, 90]


def test_balanced_findings_are_real_label_vectors() -> None:
    table = image_table(multi=True, classes=4)
    e = balanced(400, ["c3"], {"c3=1": 0.5}, "multi")
    plan = build_plan(table, e)
    assert pc.sum(plan["label_c3"]).as_py() == 200
    names = [f"label_c{i}" for i in range(4)]
    vectors = lambda t: {tuple(r.values()) for r in t.select(names).to_pylist()}  # noqa: E731
    assert vectors(plan) <= vectors(plan_sources(table, e))


def test_uncertain_findings_follow_their_policy() -> None:
    table = image_table(multi=True)
    raw = table["label_c0"].to_pylist()
    raw[:100] = [-1] * 50 + [None] * 50
    table = table.set_column(table.schema.get_field_index("label_c0"), "label_c0", pa.array(raw, pa.int8()))
    images = {}
    for policy in ("ignore", "zeros", "ones"):
        cells = cells_of(table, ["c0"], Labels(kind="multi", policy={"c0": policy}))
        images[policy] = cells.images
    assert images["ignore"].sum() == 200
    assert (images["zeros"] - images["ignore"]).tolist() == [100, 0]
    assert (images["ones"] - images["ignore"]).tolist() == [0, 100]


def uncertain() -> pa.Table:
    """One image a row, findings a and b: two of a, one of b, one of neither, four where a is not known."""
    rows = [(1, 0), (1, 0), (0, 1), (0, 0), (-1, 0), (None, 0), (-1, 0), (None, 0)]
    return pa.table({
        "image_id": [f"i{i}" for i in range(8)], "split": ["train"] * 8, "patient_id": [f"p{i}" for i in range(8)],
        **{f"label_{n}": pa.array([r[j] for r in rows], pa.int8()) for j, n in enumerate("ab")},
    })  # fmt: skip


def test_an_image_that_may_have_a_finding_is_not_counted_as_having_none() -> None:
    table = uncertain()
    images = {}
    for policy in ("ignore", "zeros", "ones"):
        cells = cells_of(table, ["label"], Labels(kind="multi", policy={"a": policy}))
        images[policy] = {cells.name(i): int(n) for i, n in enumerate(cells.images)}
    assert images["ignore"] == {"label=a": 2, "label=b": 1, "label=none": 1}
    assert images["zeros"] == {"label=a": 2, "label=b": 1, "label=none": 5}
    assert images["ones"] == {"label=a": 6, "label=b": 1, "label=none": 1}


def test_subsets_orders_and_quotas_follow_the_policy() -> None:
    table = uncertain()
    of = lambda n, **policy: real_subset(table, TrainingSet(n_per_class=n), policy)  # noqa: E731
    assert set(of(1)) & {"i4", "i5", "i6", "i7"} == set(), "an unknown image is none of those without findings"
    assert len(of(1, a="zeros")) == 3
    with pytest.raises(DataError, match="n_per_class"):
        real_subset(table.slice(3), TrainingSet(n_per_class=1), {"a": "ones"})
    for policy, most in (("ignore", 8), ("ones", 4)):
        e = experiment("multi", replicas=1)
        e = dataclasses.replace(e, data=dataclasses.replace(e.data, labels=Labels("multi", policy={"a": policy})))
        plan = build_plan(table, e)
        assert select(plan, 8, Plan(quota={"a": 2}), e.data.labels.policy).sum() == most
        # Every half of the plan has half of the images that may have a.
        known = [r["label_a"] in (0, 1) for r in plan.slice(0, 4).to_pylist()]
        assert sum(known) == 2


def test_joint_table_accounts_for_images_in_no_cell() -> None:
    table = uncertain()
    e = experiment("multi", replicas=3)
    joint = joint_table(build_plan(table, e), table, ["label"], e.data.labels).to_pylist()
    assert [(r["label"], r["real"], r["synthetic"]) for r in joint] == [
        ("a", 2, 6), ("b", 1, 3), ("none", 1, 3), ("unknown", 4, 12),
    ]  # fmt: skip
    assert sum(r["real_share"] for r in joint) == pytest.approx(1)


def without_women_of_c2(table: pa.Table) -> pa.Table:
    return table.filter((pc.field("label_c2") != 1) | (pc.field("attr_sex") != "F"))


@pytest.mark.parametrize(
    ("over", "targets", "text"),
    [
        (["label", "sex"], {"label=c2,sex=F": 0.3}, r"label=c2,sex=F: .*nearest is label=c\d,sex="),
        (["label", "sx"], {}, r"plan.over\[1\]: got 'sx'.*Did you mean sex\?"),
        (["label", "age"], {}, "Balance over age_bin"),
        (["label"], {"lable=c1": 0.3}, r"Did you mean label\?"),
        (["label"], {"label=c11": 0.3}, r"Did you mean c1\?"),
        (["label"], {"label": 0.3}, "column=category"),
        (["label"], {"label=c0,label=c1": 0.3}, "one category of label"),
        (["c0", "c1"], {"c0=1,c1=1": 0.3}, "A single-label image has one class"),
        (["label"], {"label=c0": 0.7, "label=c1": 0.7}, r"to 1.4', must be at most 1\. Scale each by 0.714"),
        (["label"], {"label=c0": 0.2, "label=c1": 0.2, "label=c2": 0.2}, r"to 0.6', must be 1\. Scale"),
        (["label"], {"label=c0": 80, "label=c1": 80}, r"add up to 160.*plan.n \(100\).*set plan.n=160"),
        (["label"], {"label=c0": 0.5, "label=c1": 30}, "like all the others"),
        (["label"], {"label=c0": -1}, "like all the others"),
        (["label", "sex"], {"label=c0": 0.5, "sex=F": 0.3}, "Both say how many label=c0,sex=F"),
    ],
)  # fmt: skip
def test_contradictions_name_the_way_out(over: list[str], targets: dict[str, float], text: str) -> None:
    table = without_women_of_c2(image_table())
    table = table.append_column("attr_age", pa.array(["40"] * table.num_rows))
    with pytest.raises(DataError, match=text):
        build_plan(table, balanced(100, over, targets))


def test_cells_without_a_real_image_get_nothing() -> None:
    table = without_women_of_c2(image_table())
    cells = cells_of(table, ["label", "sex"], Labels())
    assert len(cells.codes) == 5
    assert target_counts(cells, 102, {}).tolist() == [21, 21, 20, 20, 20]


def test_joint_table_shows_plan_against_real() -> None:
    table = image_table()
    e = balanced(90, ["label"], {"label=c0": 80})
    plan, sources = build_plan(table, e), plan_sources(table, e)
    joint = joint_table(plan, sources, ["label"], e.data.labels).to_pylist()
    assert [r["label"] for r in joint] == ["c0", "c1", "c2"]
    assert [r["synthetic"] for r in joint] == [80, 5, 5]
    assert [r["real"] for r in joint] == [pc.sum(sources[f"label_c{i}"]).as_py() for i in range(3)]
    assert joint[0]["max_replicas"] == -(-80 // joint[0]["real"])
    assert joint[1]["sources"] == 5
    assert sum(r["synthetic_share"] for r in joint) == pytest.approx(1, abs=1e-5)


def test_a_million_balanced_rows() -> None:
    counts = [2_001 + 13 * i for i in range(150)] + [501_700]
    places = interleave(counts)
    assert np.bincount(places).tolist() == counts
    shares = np.cumsum(places == 150) / np.arange(1, len(places) + 1)
    assert abs(shares[1000:] - counts[150] / sum(counts)).max() < 1e-3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["replicate", "balanced"])
def test_a_million_rows_in_seconds(kind: str) -> None:
    table = image_table(rows=20_000, classes=10)
    e = experiment(replicas=100) if kind == "replicate" else balanced(1_000_000, ["label", "sex"], {})
    plan = build_plan(table, e)
    assert plan.num_rows >= 1_000_000
    assert pc.count_distinct(plan["row_key"]).as_py() == plan.num_rows
    assert np.array_equal(np.sort(plan["rank"].to_numpy()), np.arange(plan.num_rows))


def test_balanced_shares_keys_with_replicate_and_goes_round_its_sources() -> None:
    table = image_table()
    plan = build_plan(table, balanced(600, ["label", "sex"], {}))
    assert plan.num_rows == len(keys(plan)) == 600
    cells = plan.group_by(["label_c0", "label_c1", "attr_sex"]).aggregate([("row_key", "count")])
    assert cells["row_key_count"].to_pylist() == [100] * 6
    replicas = max(plan["replica"].to_pylist()) + 1
    assert keys(plan) < keys(build_plan(table, experiment(replicas=replicas)))
    # No source is used again before every source of its cell was.
    used: dict[tuple, dict[str, int]] = {}
    for r in plan.to_pylist():
        cell = used.setdefault((r["label_c0"], r["label_c1"], r["attr_sex"]), {})
        assert r["replica"] == cell.get(r["source_image_id"], 0)
        cell[r["source_image_id"]] = r["replica"] + 1
    assert all(max(c.values()) - min(c.values()) <= 1 for c in used.values())
    # Every prefix is balanced.
    assert len({(r["label_c0"], r["label_c1"], r["attr_sex"]) for r in plan.slice(0, 6).to_pylist()}) == 6
