"""Which images of a set from elsewhere were seen in training: by pixels anywhere, by names within one data set."""

from __future__ import annotations

import pyarrow as pa
import pytest

from raysynth.data.seen import COLUMNS, seen_among


def rows(*of: tuple[str | None, str | None, str | None, str]) -> pa.Table:
    return pa.table({name: pa.array([row[i] for row in of], pa.string()) for i, name in enumerate(COLUMNS)})


SEEN = rows(("here", "1", "anna", "x"), ("here", "2", "image:2", "y"), ("there", "3", "carl", "z"),
            ("there", None, None, "w"))  # fmt: skip
FOUND = rows(("-", "1", "berta", "a"), ("-", "2", "image:2", "b"), ("-", "7", "anna", "x"), ("-", "8", "anna", "c"),
             ("-", "9", "carl", "d"), ("-", "10", None, "w"))  # fmt: skip


@pytest.mark.parametrize(("dataset", "patients", "same_source", "pictures", "people"), [
    ("elsewhere", True, False, "x w", ""),
    ("here", True, False, "x w", "c"),
    ("there", True, False, "x w", "d"),
    ("here", False, False, "x w", ""),
    ("here", True, True, "a b x w", "c"),
])  # fmt: skip
def test_pixels_count_anywhere_and_names_within_one_data_set(
    dataset: str, patients: bool, same_source: bool, pictures: str, people: str
) -> None:
    found = seen_among(FOUND, SEEN, dataset, patients, same_source)
    said = [" ".join(FOUND["pixel_sha256"].filter(pa.array(mask)).to_pylist()) for mask in found]
    assert said == [pictures, people]
