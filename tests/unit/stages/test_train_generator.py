"""Which images may reach the generator, and what its identity is made of; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError
from raysynth.core.storage import open_storage
from raysynth.stages.train_generator import generator_artifact, training_rows
from tests.digits import digit_artifact

TABLE = pa.table({
    "image_id": ["a", "b", "c", "d"], "split": ["train", "train", "val", "test"], "patient_id": ["p", "q", "r", "q"],
})  # fmt: skip


def test_train_rows_pass() -> None:
    assert training_rows(TABLE, ["a"])["image_id"].to_pylist() == ["a"]


@pytest.mark.parametrize(("ids", "named"), [
    (["a", "c"], "c of patient r"), (["d"], "d of patient q"), (["b"], "b of patient q"), (["zz"], "zz"),
])  # fmt: skip
def test_no_held_out_image_nor_patient_passes(ids: list[str], named: str) -> None:
    with pytest.raises(DataError, match=named):
        training_rows(TABLE, ids)


@pytest.mark.parametrize(("change", "same"), [
    ({"compute": {"train_workers": 2, "checkpoint_every": 7, "train_accumulation": 4}}, True),
    ({"plan": {"replicas": 3}}, True),
    ({"sampling": {"steps": 9}}, True),
    ({"training_set": {"n_per_class": 3}}, True),
    ({"generator": {"steps": 9}}, False),
    ({"generator": {"batch_size": 32}}, False),
    ({"generator": {"precision": "bf16"}}, False),
    ({"generator": {"train_on": "classifier_subset"}}, False),
])  # fmt: skip
def test_what_trains_another_generator(change: dict[str, Any], same: bool, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage, 20)
    base: dict[str, Any] = {
        "name": "d", "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "generator": {"train_on": "train"},
    }  # fmt: skip
    changed = base | {k: base.get(k, {}) | v for k, v in change.items()}
    before, after = (generator_artifact(build_experiment(c), storage, images).fp for c in (base, changed))
    assert (before == after) == same


def test_the_subset_is_part_of_a_generator_that_depends_on_it(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage, 20)
    made = [
        build_experiment({"name": "d", "data": {"kind": "digits"}, "training_set": {"n_per_class": n}}) for n in (1, 2)
    ]
    assert len({generator_artifact(e, storage, images).fp for e in made}) == 2
