"""Which images of a test set from elsewhere have been seen in training: the same picture, or another of its patient.

Input: image tables without pictures. Output: who is to be left out of the judgement. Knows no files and no experiment.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.data.grouping import LONE

COLUMNS = ("dataset", "image_id", "patient_id", "pixel_sha256")
"""Of an image table, what tells whether an image or its patient was seen."""


def seen_among(
    table: pa.Table, seen: pa.Table, dataset: str, patients: bool, same_source: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which images of `table` are among those seen, and which others show a patient who is: (N,) bool each.

    Names of patients and images count within one data set alone: patient 7 of another hospital is somebody else.

    Args:
        table: COLUMNS; its own `dataset` is not looked at.
        seen: COLUMNS, null where not known.
        dataset: what `seen` calls the data set of `table`.
        patients: whether a column names the patients of `table`.
        same_source: whether image ids of `table` are those of `dataset`: its rows come from the same table.
    """
    of_set = seen.filter(pc.equal(seen["dataset"], dataset))
    pictures = _is_in(table["pixel_sha256"], seen["pixel_sha256"])
    if same_source:  # however large they are stored
        pictures |= _is_in(table["image_id"], of_set["image_id"])
    if not patients:
        return pictures, np.zeros_like(pictures)
    named = pc.if_else(pc.starts_with(table["patient_id"], LONE), None, table["patient_id"])
    return pictures, _is_in(named, of_set["patient_id"]) & ~pictures


def _is_in(column: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    known = known.combine_chunks().cast(pa.string())
    return pc.is_in(column, value_set=known, skip_nulls=True).to_numpy(zero_copy_only=False)
