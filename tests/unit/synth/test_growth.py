"""Why a set grows, in words: what `generate` says before it renders."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from raysynth.core.config import build_experiment
from raysynth.data.plans import build_plan
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.growth import growth, unwanted
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.verify import repair, verify
from raysynth.synth.wanted import Wanted
from raysynth.synth.waves import missing
from tests.engine import image_table, keys_of, render_all, synthetic_set, wanted_rows

PLAN = build_experiment({"name": "t", "data": {"kind": "digits"}, "plan": {"replicas": 3}})


@pytest.fixture
def store(tmp_path: Path) -> SyntheticSet:
    """A finished set of 12 source images, 3 rows each."""
    made = synthetic_set(str(tmp_path))
    render_all(made, wanted_rows(), FakeRenderer())
    return made


def words(store: SyntheticSet, wanted: Wanted, retry_failed: bool = False) -> str:
    ledger = Ledger(store)
    return growth(ledger, wanted, missing(ledger, wanted, retry_failed)).words()


def planned(table: pa.Table) -> Wanted:
    return Wanted.of(build_plan(table, PLAN))


def test_first_rows(tmp_path: Path) -> None:
    assert words(synthetic_set(str(tmp_path)), wanted_rows()) == "first rows"


def test_more_replicas_and_new_sources_are_told_apart(store: SyntheticSet) -> None:
    assert words(store, wanted_rows(replicas=5)) == "24 more replicas"
    assert words(store, wanted_rows(n=20)) == "24 of 8 new source images"
    assert words(store, wanted_rows(n=20, replicas=4)) == "12 more replicas, 32 of 8 new source images"


def test_rows_that_were_lost_change_no_annotation(tmp_path: Path) -> None:
    """Also where they were the only rows of their sources."""
    store, one = synthetic_set(str(tmp_path)), wanted_rows(replicas=1)
    render_all(store, one, FakeRenderer())
    store.storage.delete(store.file(store.marker(0)["part"]))  # type: ignore[index]
    repair(store, verify(store, one))
    assert words(store, wanted_rows(replicas=2)) == "12 more replicas, 8 again that failed or were lost"


def test_a_new_class_is_named(store: SyntheticSet) -> None:
    table = image_table(14)
    new = pa.array([0] * 12 + [1, 1], pa.int8())
    assert words(store, planned(table.append_column("label_c", new))) == "6 of 2 new source images; new: c"


def test_a_changed_annotation_is_no_new_image(store: SyntheticSet) -> None:
    table = image_table()
    sex = ["M", *table["attr_sex"].to_pylist()[1:]]
    sex[1] = "M"
    changed = table.set_column(table.schema.get_field_index("attr_sex"), "attr_sex", pa.array(sex))
    wanted = planned(changed)
    assert words(store, wanted) == "3 of 1 source images whose annotation changed"
    assert unwanted(Ledger(store), wanted) == 3  # the old ones stay


def test_rows_that_failed_or_were_lost_are_said_to_be_rendered_again(tmp_path: Path) -> None:
    store, wanted = synthetic_set(str(tmp_path)), wanted_rows()
    render_all(store, wanted, FakeRenderer(broken=tuple(keys_of(wanted)[:2])), workers=2)
    assert not missing(Ledger(store), wanted).any()
    assert words(store, wanted, retry_failed=True) == "2 again that failed or were lost"
    store.create_json("void/00000.json", {"why": "test"})
    assert words(store, wanted_rows(replicas=4)) == "12 more replicas, 8 again that failed or were lost"


def test_rows_of_other_plans_are_counted_and_stay(store: SyntheticSet) -> None:
    assert unwanted(Ledger(store), wanted_rows(n=4, replicas=2)) == 36 - 8
    assert unwanted(Ledger(store), wanted_rows(replicas=9)) == 0
