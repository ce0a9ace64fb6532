"""The condition vector: layout, policies, unknowns, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raysynth.core.errors import ConfigError, DataError
from raysynth.data.conditions import ConditionSpec

MULTI = {
    "kind": "multi", "classes": ["Edema", "Fracture"], "attributes": {"sex": ["F", "M", "X"], "age": []},
}  # fmt: skip
ROWS: dict[str, list[Any]] = {
    "label_Edema": [1, 0, -1, None], "label_Fracture": [0, 1, 0, float("nan")],
    "attr_sex": ["M", None, "F", "M"], "attr_age": ["57", "9", None, "81.5"],
}  # fmt: skip


def spec(policy: dict[str, str] | None = None) -> ConditionSpec:
    return ConditionSpec.build(MULTI, ["label", "sex", "age"], ROWS, policy or {})


def test_layout_and_values_of_a_multi_label_row() -> None:
    found = spec()
    assert found.entries == [
        "label=Edema", "label=Edema missing", "label=Fracture", "label=Fracture missing",
        "sex=F", "sex=M", "sex missing", "age decade / 10", "age missing", "unconditional",
    ]  # fmt: skip
    expected = [
        [1, 0, 0, 0, 0, 1, 0, 0.5, 0, 0],
        [0, 0, 1, 0, 0, 0, 1, 0.0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0.0, 1, 0],
        [0, 1, 0, 1, 0, 1, 0, 0.8, 0, 0],
    ]
    np.testing.assert_allclose(found.encode(ROWS), np.array(expected, np.float32))
    assert found.encode(ROWS).dtype == np.float32
    assert found.dim == 10


@pytest.mark.parametrize(("policy", "value", "missing"), [("ignore", 0, 1), ("zeros", 0, 0), ("ones", 1, 0)])
def test_policy_says_what_uncertain_and_absent_mean(policy: str, value: int, missing: int) -> None:
    encoded = spec({"Edema": policy}).encode(ROWS)
    assert encoded[2, :2].tolist() == [value, missing]
    assert encoded[3, :2].tolist() == [value, missing]
    assert encoded[3, 2:4].tolist() == [0, 1]  # the other finding keeps its own policy


def test_single_label_is_one_hot_with_a_missing_entry() -> None:
    vocabulary = {"kind": "single", "classes": ["a", "b"]}
    rows = {"label_a": [1, 0, None], "label_b": [0, 1, None]}
    found = ConditionSpec.build(vocabulary, ["label"], rows, {})
    assert found.encode(rows).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_null_condition_is_no_rows_condition() -> None:
    found = spec()
    assert found.null.tolist() == [0] * 9 + [1]
    assert not found.encode(ROWS)[:, -1].any()


def test_a_category_the_generator_never_saw_is_refused_with_what_it_knows() -> None:
    with pytest.raises(DataError, match=r"attr_sex: got 'X'.*F, M") as error:
        spec().encode(ROWS | {"attr_sex": ["X", None, "F", "M"]})
    assert error.value.exit_code == 2


def test_a_class_the_generator_never_saw_is_refused() -> None:
    seen_one = ConditionSpec.build(MULTI, ["label"], {"label_Edema": [1, 0], "label_Fracture": [0, 0]}, {})
    assert seen_one.encode({"label_Edema": [0], "label_Fracture": [0]}).shape == (1, 5)
    with pytest.raises(DataError, match=r"'Fracture'.*Edema"):
        seen_one.encode({"label_Edema": [0], "label_Fracture": [1]})


def test_an_attribute_the_data_lacks_is_refused_at_build() -> None:
    with pytest.raises(ConfigError, match=r"generator.conditions\[1\]: got 'race'"):
        ConditionSpec.build(MULTI, ["label", "race"], ROWS, {})


def test_a_row_without_a_column_is_refused() -> None:
    with pytest.raises(DataError, match="attr_age"):
        spec().encode({k: v for k, v in ROWS.items() if k != "attr_age"})


def test_age_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="old"):
        spec().encode(ROWS | {"attr_age": ["old"] * 4})


def test_json_round_trip() -> None:
    found = spec({"Edema": "ones"})
    assert ConditionSpec.from_json(found.to_json()) == found


def test_a_class_that_the_rows_data_do_not_have_is_not_annotated() -> None:
    """A generator of more classes than a data set has renders those it has, as it will when the others come."""
    single = ConditionSpec("single", ["a", "b", "c"], ["a", "b", "c"])
    fewer = single.encode({"label_a": [1, 0], "label_b": [0, 1]})
    assert (fewer == single.encode({"label_a": [1, 0], "label_b": [0, 1], "label_c": [0, 0]})).all()
    multi = ConditionSpec("multi", ["a", "b"], ["a", "b"], policy={"b": "ones"})
    assert (multi.encode({"label_a": [1]}) == [[1, 0, 0, 1, 0]]).all()
    with pytest.raises(DataError, match="label_a"):
        single.encode({"attr_sex": ["F"]})
