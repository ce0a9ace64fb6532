"""Names change exactly when results may: one meaning, one text; unknown types are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysynth.core.experiment import Plan, Sampling
from raysynth.core.identity import canonical_json, content_digest, fp12


def test_one_meaning_one_text() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None, "é"]}) == '{"a":[true,null,"\\u00e9"],"b":1}'
    assert fp12({"a": 1, "b": 2}) == fp12({"b": 2.0, "a": 1})
    assert fp12((1, 2)) == fp12([1, 2])
    assert fp12(Sampling()) == fp12(dataclasses.asdict(Sampling()))


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": "1"}, {"a": True}, {"a": None}, {"A": 1}, {"a": 1.0000001}, [1]]
)
def test_another_meaning_another_name(other: Any) -> None:
    assert fp12(other) != fp12({"a": 1})


def test_every_field_counts() -> None:
    assert fp12(Plan()) != fp12(Plan(seed=1))
    assert fp12(Plan(targets={"label=a": 0.5})) != fp12(Plan(targets={"label=a": 0.6}))


def test_golden() -> None:
    """If this fails, every stored artifact gets another name."""
    assert fp12({"version": 1, "config": {"lr": 1e-3, "steps": 2000}, "inputs": {}}) == "3489d2747bea"


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": {"b": {1, 2}}}, "value.a.b: set"), ({"a": Path("x")}, "value.a: "),
        ([object()], r"value\[0\]: object"), ({"a": float("nan")}, "value.a: nan"),
        ({1: "a"}, "key 1 is not a string"), (np.float32(1), "float32"), (np.int64(1), "int64"), (b"x", "bytes"),
    ],
)  # fmt: skip
def test_unknown_types_are_refused_by_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        canonical_json(value)


def test_a_content_digest_is_of_names_and_contents_in_any_order() -> None:
    one = content_digest([("a", "1"), ("b", "2")])
    assert one == content_digest([("b", "2"), ("a", "1")])
    assert one != content_digest([("a", "2"), ("b", "1")])
    assert one != content_digest([("a", "1")])
