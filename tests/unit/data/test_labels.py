"""Annotations as read, as stored, and as used."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.errors import DataError
from raysynth.core.experiment import Labels
from raysynth.data.attributes import age_bin_names, age_years, attribute_columns, categories
from raysynth.data.labels import (
    apply_policy,
    check_policy,
    label_array,
    label_columns,
    parse_findings,
    parse_names,
)

NAN = np.nan
MULTI = Labels(kind="multi")


def test_single_label_classes_are_discovered_in_order() -> None:
    got = parse_names(["nv", " mel ", "nv"], Labels())
    assert got.classes == ["mel", "nv"]
    assert got.values.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert not got.bad


def test_multi_label_names_annotate_the_whole_vocabulary() -> None:
    got = parse_names(["Mass|Edema", "", "Mass"], MULTI)
    assert got.classes == ["Edema", "Mass"]
    assert np.array_equal(got.values, [[1, 1], [NAN, NAN], [0, 1]], equal_nan=True)
    assert not got.bad


def test_vocabulary_order_is_kept_and_labels_outside_it_are_said() -> None:
    got = parse_names(["b", "nevus", None], Labels(classes=["b", "nevi"]))
    assert got.classes == ["b", "nevi"]
    assert got.bad == {1: "label 'nevus' is not in data.labels.classes (near 'nevi')", 2: "no label"}


def test_findings_keep_uncertain_and_missing() -> None:
    got = parse_findings({"Edema": ["1.0", "-1", None], "Mass": ["0", " ", "maybe"]}, MULTI)
    assert np.array_equal(got.values, [[1, 0], [-1, NAN], [NAN, NAN]], equal_nan=True)
    assert got.bad == {2: "finding 'Mass' is 'maybe', not 1, 0, -1 or empty"}


def test_findings_without_a_column_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.labels\.classes\[1\]: got 'Mass'.*Edema.*findings\.Mass"):
        parse_findings({"Edema": ["1"]}, Labels(kind="multi", classes=["Edema", "Mass"]))


def test_policy_for_no_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.labels\.policy\.Edma.*Did you mean Edema"):
        check_policy(Labels(policy={"Edma": "ones"}), ["Edema"])


def test_columns_keep_raw_annotations() -> None:
    values = np.array([[1, -1], [0, NAN]], np.float32)
    table = pa.table(label_columns(["a", "b"], values))
    assert table.schema.types == [pa.int8(), pa.int8()]
    assert table.to_pydict() == {"label_a": [1, 0], "label_b": [-1, None]}
    assert np.array_equal(label_array(table), values, equal_nan=True)
    assert np.array_equal(label_array(table, ["b"]), values[:, 1:], equal_nan=True)


def test_policy_at_use() -> None:
    raw = np.tile(np.array([[1], [0], [-1], [NAN]], np.float32), 3)
    values, mask = apply_policy(raw, {"z": "zeros", "o": "ones"}, ["i", "z", "o"])
    assert values.T.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1]]
    assert mask.T.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert np.isnan(raw[3]).all()


@pytest.mark.parametrize(
    ("cell", "years"),
    [("80.0", 80), ("058Y", 58), ("018M", 1.5), ("42", 42), ("0", 0), ("411", None), ("old", None), ("", None)],
)
def test_age_in_years(cell: str, years: float | None) -> None:
    assert age_years(cell) == years


def test_attributes_and_age_bins() -> None:
    cells = {"sex": ["F", "unknown", " M ", ""], "age": ["17", "018Y", "80", "999"]}
    columns, notes = attribute_columns(cells, [18, 40, 60, 80])
    assert columns == {
        "sex": ["F", None, "M", None],
        "age": ["17", "18", "80", None],
        "age_bin": ["<18", "18-39", ">=80", None],
    }
    assert len(notes) == 1
    assert "'999'" in notes[0]
    assert age_bin_names([18, 40]) == ["<18", "18-39", ">=40"]
    assert list(attribute_columns({"age": ["3"]}, [])[0]) == ["age"]


def test_categories_are_known_values_in_a_fixed_order() -> None:
    assert categories("sex", pa.chunked_array([["M", None, "F", "M"]]), []) == ["F", "M"]
    assert categories("age", pa.chunked_array([["9", "10"]]), []) == ["9", "10"]
    assert categories("age_bin", pa.chunked_array([[">=80", "<18"]]), [18, 80]) == ["<18", ">=80"]
