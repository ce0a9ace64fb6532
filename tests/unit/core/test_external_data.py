"""External test sets: what they take over from `data`, what they may lack, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raysynth.core.config import external_data, keys_of_test_set, vary
from raysynth.core.errors import ConfigError, DataError
from raysynth.core.experiment import Data
from raysynth.data.splits import assign_splits, require_every_split
from tests.unit.core.test_arms import experiment

TABLE = {
    "kind": "csv", "path": "/own/t.csv", "images": "/own", "dataset": "own", "licence": "CC0",
    "image": {"channels": "grey"},
}  # fmt: skip
FINDINGS = {
    "columns": {"findings": {"a": "A", "b": "B"}, "patient": "p", "attributes": {"sex": "S", "age": "Y"}},
    "labels": {"kind": "multi", "classes": ["a", "b"], "policy": {"a": "ones", "b": "zeros"}},
}  # fmt: skip


def test_an_external_test_set_is_laid_over_the_data() -> None:
    e = experiment(evaluation={"test_sets": {"mars": {"kind": "class_folders", "path": "/mars"}}})
    mars = external_data(e, "mars")
    assert (mars.name, mars.data.kind, mars.data.path) == ("lungs-mars", "class_folders", "/mars")
    assert mars.data.image == e.data.image
    # However the experiment's own images are split, it is the same set.
    assert external_data(vary(e, {"data.split": {"seed": 7, "test": 0.3}}), "mars") == mars
    assert external_data(vary(e, {"data.columns.split": "fold"}), "mars") == mars


def test_a_class_of_one_image_does_not_refuse_an_external_test_set() -> None:
    """It could not be in three splits; but every image of the set is tested, so none is asked for."""
    sets = {"mars": {}, "typed": {"split": {"test": 0.3}, "columns": {"split": "fold"}}}
    e = experiment(evaluation={"test_sets": sets})
    split = external_data(e, "mars").data.split
    patients, of_class = [f"p{i}" for i in range(12)], np.array([[1, 0]] * 11 + [[0, 1]]) == 1
    dealt = assign_splits(np.arange(12), patients, [None] * 12, of_class, split).split
    assert not require_every_split("single", ["benign", "rare"], of_class, dealt, [None])
    typed = external_data(e, "typed").data
    assert (typed.split.val, typed.split.test, typed.columns.split) == (0, 0.3, "fold")


def mars(section: dict[str, Any], data: dict[str, Any], **sections: Any) -> Data:
    e = experiment(data={**TABLE, **data}, evaluation={"test_sets": {"mars": section}}, **sections)
    return external_data(e, "mars").data


@pytest.mark.parametrize(("section", "images", "licence"), [
    ({"kind": "class_folders", "path": "/mars"}, "", ""),
    ({"path": "/mars/t.csv"}, "", ""),
    ({"path": "/mars/t.csv", "images": "/mars/all", "licence": "CC BY"}, "/mars/all", "CC BY"),
    ({"columns": {"site": "Site"}}, "/own", "CC0"),
])  # fmt: skip
def test_a_test_set_from_elsewhere_has_images_of_its_own(section: dict[str, Any], images: str, licence: str) -> None:
    found = mars(section, {"columns": {"label": "l"}})
    assert (found.images, found.licence, found.dataset) == (images, licence, "own")
    assert found.columns.label == (None if "kind" in section else "l"), "folders have no columns"


def test_class_folders_have_no_other_folder() -> None:
    for base, where in ({"kind": "class_folders"}, "data"), ({"columns": {"label": "l"}}, "evaluation.test_sets.mars"):
        with pytest.raises(ConfigError, match=rf"^{where}.images: got '/own', must be left out .* {where}.path is the"):
            mars({"kind": "class_folders", "path": "/mars", "images": "/own"}, base)


def test_null_takes_out_what_a_test_set_lacks() -> None:
    """Also where a generator is conditioned on it."""
    lacks = {"columns": {"patient": None, "attributes": {"age": None}, "findings": {"b": None}}}
    found = mars(lacks, FINDINGS, generator={"conditions": ["age"]})
    assert (found.columns.patient, found.columns.attributes, found.columns.findings) == (None, {"sex": "S"}, {"a": "A"})
    assert (found.labels.classes, found.labels.policy) == (["a"], {"a": "ones"})
    for nothing in (None, {}):
        found = mars({"columns": {"attributes": nothing}, "labels": {"policy": nothing}}, FINDINGS)
        assert (found.columns.attributes, found.labels.policy, found.columns.patient) == ({}, {}, "p")


def test_names_in_a_test_set_s_columns_are_added() -> None:
    found = mars({"columns": {"attributes": {"sex": "Sex", "race": "Race"}}}, FINDINGS)
    assert found.columns.attributes == {"sex": "Sex", "age": "Y", "race": "Race"}
    assert mars({"columns": {"label": "L"}}, FINDINGS).columns.findings == {}, "either one column or one a finding"
    found = mars({"columns": {"findings": {"a": "A"}}, "labels": {"kind": "multi"}}, {"columns": {"label": "l"}})
    assert (found.columns.label, found.columns.findings) == (None, {"a": "A"})
    assert mars({"labels": {"classes": ["b"]}}, FINDINGS).labels.policy == {"b": "zeros"}


@pytest.mark.parametrize(("section", "text"), [
    ({"columns": {"attributes": {"agee": None}}}, "columns.attributes.agee: got None, must be text"),
    ({"labels": {"policy": {"c": "ones"}}}, r"labels.policy.c: got 'c', .* of evaluation.*.mars.labels.classes \("),
    ({"image": {"channels": "rgb"}}, "image.channels: got 'rgb', must be grey, as classifiers are trained"),
])  # fmt: skip
def test_what_a_test_set_cannot_be(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluation.test_sets.mars.{text}"):
        mars(section, FINDINGS)


def test_a_test_set_has_the_channels_that_classifiers_know() -> None:
    skin = {"image": {"preset": "skin"}}
    with pytest.raises(ConfigError, match=r"mars.image.channels: got 'grey', must be rgb.*Type rgb, whatever"):
        mars({"image": {"preset": "chest"}}, {**FINDINGS, **skin})
    found = mars({"image": {"preset": "chest", "channels": "rgb", "size": 64}}, {**FINDINGS, **skin})
    assert (found.image.preset, found.image.size) == ("chest", 64), "another size is resized for the classifier"


def test_a_column_that_was_not_typed_says_what_to_type() -> None:
    e = experiment(data={**TABLE, **FINDINGS}, evaluation={"test_sets": {"mars": {"columns": {"site": "Site"}}}})
    for key in ("columns.attributes.age", "columns.patient", "labels.policy.b"):
        told = rf"^evaluation.test_sets.mars.{key}: .* type evaluation.test_sets.mars.{key}: null where"
        with pytest.raises(DataError, match=told), keys_of_test_set(e, "mars"):
            raise DataError(f"data.{key}", "x", "one of the columns: y")
    for key in ("columns.site", "columns.file", "path"):
        with pytest.raises(DataError, match=r"one of the columns: y\.$"), keys_of_test_set(e, "mars"):
            raise DataError(f"data.{key}", "x", "one of the columns: y")
