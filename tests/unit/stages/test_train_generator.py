"""Which images may reach the generator, and what its identity is made of; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import open_storage
from raysynth.data.subsets import real_subset
from raysynth.stages.train_generator import (
    generator_artifact,
    per_class,
    sharing_workers,
    train_generator,
    training_rows,
)
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
    ({"generator": {"preset": "tiny", "base_channels": 32, "channel_multipliers": [1, 2, 2], "res_blocks": 1,
                    "attention_resolutions": [8], "heads": 2}}, True),
    ({"generator": {"preset": "small"}}, False),
    ({"data": {"labels": {"policy": {"3": "zeros"}}}}, False),
    ({"data": {"labels": {"policy": {"3": "ignore"}}}}, True),
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


@pytest.mark.parametrize(("conditions", "named"), [
    (["label"], r"label: got '0', must be a class the generator has seen: 1, 2.*train_on"),
    (["sex"], r"attr_sex: got 'F', must be a category the generator has seen: M.*train_on"),
])  # fmt: skip
def test_what_the_generator_would_never_see_is_refused_before_training(
    conditions: list[str], named: str, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path))
    # Of 0 and of F only the classifier's two images are in the train split.
    images = digit_artifact(storage, 120)
    table = from_parquet(storage.get(images.file("table.parquet"))).to_pylist()
    e = build_experiment({
        "name": "d", "training_set": {"n_per_class": 2}, "generator": {"train_on": "donor", "conditions": conditions},
        "data": {"kind": "digits", "columns": {"attributes": {"sex": "sex"}}},
    })  # fmt: skip
    subset = set(real_subset(pa.Table.from_pylist(table), e.training_set))
    for row in table:
        donor = row["image_id"] not in subset
        if donor and (row["label_0"] == 1 if conditions == ["label"] else row["attr_sex"] == "F"):
            row["split"] = "test"
    images.put("table.parquet", to_parquet(pa.Table.from_pylist(table)))
    with pytest.raises(DataError, match=named):
        train_generator(e, storage, images)


def test_a_policy_of_no_class_is_refused(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    e = build_experiment({"name": "d", "data": {"kind": "digits", "labels": {"policy": {"13": "ones"}}}})
    with pytest.raises(DataError, match=r"data.labels.policy.13"):
        train_generator(e, storage, digit_artifact(storage, 120))


@pytest.mark.parametrize(("batch", "room", "workers"), [
    (64, 1, 1), (64, 3, 2), (64, 5, 4), (64, 6, 4), (64, 7, 4), (64, 8, 8), (144, 5, 4), (144, 7, 6), (7, 6, 1),
    (4, 100, 4), (64, 0, 1), (0, 4, 1),
])  # fmt: skip
def test_any_number_of_gpus_shares_the_batch(batch: int, room: int, workers: int) -> None:
    assert sharing_workers(batch, room) == workers


def test_images_per_class_as_text() -> None:
    rows = pa.table({"label_a": [1, 0, -1, None], "label_b": pa.array([None] * 4, pa.int8())})
    assert per_class(rows, ["a", "b"]) == "a 1, b 0"
