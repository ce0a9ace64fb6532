"""Predictions tables (core.schemas.predictions_schema): the truth of a test set's images, and what a classifier said.

The truth is the annotation under the label policy; raw annotations stay in the image table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.schemas import ATTRIBUTE, LABEL, PROBABILITY, TRUE, predictions_schema


def truth(index: pa.Table, test_set: str, classes: Sequence[str], policy: Mapping[str, str], kind: str) -> pa.Table:
    """A predictions table whose probabilities are null, one row a row of `index`.

    Args:
        index: image_id, patient_id, site, label_* and attr_*; a class without a column is not annotated there.
        classes: what the classifier knows.
        policy: finding -> ignore (default), zeros or ones, as `data.labels.policy`.
        kind: `single`: where an image is not of exactly one of `classes`, none of them is right, and its truth is null.
    """
    attributes = [n.removeprefix(ATTRIBUTE) for n in index.column_names if n.startswith(ATTRIBUTE)]
    schema = predictions_schema(classes, attributes)
    columns: dict[str, Any] = {n: pa.nulls(index.num_rows, schema.field(n).type) for n in schema.names}
    columns["test_set"] = pa.repeat(pa.scalar(test_set), index.num_rows)
    for name in ("image_id", "site", "patient_id", *(ATTRIBUTE + a for a in attributes)):
        columns[name] = index[name]
    for name in classes:
        if LABEL + name not in index.column_names:
            continue
        raw = index[LABEL + name]
        known = pc.if_else(pc.less(raw, 0), pa.scalar(None, pa.int8()), raw)
        use = {"zeros": 0, "ones": 1}.get(policy.get(name, "ignore"))
        columns[TRUE + name] = known if use is None else pc.fill_null(known, pa.scalar(use, pa.int8()))
    if kind == "single":
        names = [TRUE + name for name in classes]
        one = pa.array(np.sum([pc.fill_null(columns[n], 0).to_numpy() for n in names], axis=0) == 1)
        columns |= {n: pc.if_else(one, columns[n], pa.scalar(None, pa.int8())) for n in names}
    return pa.table(columns, schema=schema)


def with_probabilities(predictions: pa.Table, probabilities: np.ndarray, classes: Sequence[str]) -> pa.Table:
    """`predictions` with the probabilities (N, L) filled in, L in the order of `classes`."""
    for i, name in enumerate(classes):
        at = predictions.schema.get_field_index(PROBABILITY + name)
        column = pa.array(np.ascontiguousarray(probabilities[:, i]), pa.float32())
        predictions = predictions.set_column(at, predictions.schema.field(at), column)
    return predictions


def judged(predictions: pa.Table) -> np.ndarray:
    """Images of which the truth of some class is known: (N,) bool."""
    names = [n for n in predictions.column_names if n.startswith(TRUE)]
    return np.any([predictions[n].is_valid().to_numpy() for n in names], axis=0)


def arrays(predictions: pa.Table, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Truth (N, L) float64 with NaN where unknown, and probabilities (N, L) float64."""
    truths = [predictions[TRUE + c].cast(pa.float64()).to_numpy() for c in classes]
    said = [predictions[PROBABILITY + c].cast(pa.float64()).to_numpy() for c in classes]
    return np.stack(truths, axis=1), np.stack(said, axis=1)
