"""The tables raysynth writes, as Arrow schemas. Column names are the contract between stages.

Label columns are `label_<finding>` (int8 as annotated: 1, 0, -1 uncertain, null not annotated); attribute columns
are `attr_<name>` (string, null unknown). Single-label data has one `label_<class>` column a class, exactly one is 1.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

LABEL = "label_"
ATTRIBUTE = "attr_"
LOCATION = "location"
"""Column of an imported plan beside `plan_schema`: where the image of the row lies (data.reading)."""

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _conditions(labels: Sequence[str], attributes: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    return [(LABEL + n, pa.int8()) for n in labels] + [(ATTRIBUTE + n, pa.string()) for n in attributes]


def _features(schema: pa.Schema) -> pa.Schema:
    # With this, `datasets.load_dataset("parquet", ...)` decodes the column and the viewer shows pictures.
    kinds = {"int8": "int8", "int32": "int32", "int64": "int64", "float": "float32", "double": "float64",
             "string": "string", "bool": "bool"}  # fmt: skip
    features: dict[str, dict] = {}
    for f in schema:
        if f.name == "image":
            features[f.name] = {"_type": "Image"}
        else:
            features[f.name] = {"dtype": kinds[str(f.type)], "_type": "Value"}
    return schema.with_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def image_schema(labels: Sequence[str], attributes: Sequence[str]) -> pa.Schema:
    """Real images, one row an image, encoded bytes included."""
    return _features(pa.schema([
        ("image_id", pa.string()), ("dataset", pa.string()), ("site", pa.string()), ("split", pa.string()),
        ("patient_id", pa.string()), ("image", IMAGE_TYPE), ("height", pa.int32()), ("width", pa.int32()),
        ("sha256", pa.string()), ("pixel_sha256", pa.string()),
        ("value_lo", pa.float32()), ("value_hi", pa.float32()),
        *_conditions(labels, attributes),
        ("report", pa.string()), ("source_uri", pa.string()),
    ]))  # fmt: skip


def quarantine_schema() -> pa.Schema:
    """Real images left out, and why."""
    return pa.schema([("image_id", pa.string()), ("source_uri", pa.string()), ("reason", pa.string())])


def plan_schema(labels: Sequence[str], attributes: Sequence[str]) -> pa.Schema:
    """Synthetic images wanted, one row an image. Says what, never how."""
    return pa.schema([
        ("row_key", pa.string()), ("rank", pa.int64()), ("source_image_id", pa.string()), ("replica", pa.int32()),
        ("split", pa.string()), ("mode", pa.string()), ("prompt", pa.string()),
        *_conditions(labels, attributes),
    ])  # fmt: skip


def synthetic_schema(labels: Sequence[str], attributes: Sequence[str]) -> pa.Schema:
    """Synthetic images as committed: stands alone, without hosts or times."""
    return _features(pa.schema([
        *plan_schema(labels, attributes),
        ("generator_id", pa.string()), ("sampler", pa.string()), ("steps", pa.int32()),
        ("guidance_scale", pa.float32()), ("guidance_rescale", pa.float32()),
        ("strength", pa.float32()), ("mask", pa.string()),
        ("seed", pa.int64()), ("attempt", pa.int32()), ("derived_from_real", pa.bool_()),
        ("image", IMAGE_TYPE), ("sha256", pa.string()), ("pixel_sha256", pa.string()),
        ("status", pa.string()), ("reason", pa.string()),
    ]))  # fmt: skip


TRUE, PROBABILITY = "true_", "prob_"


def members_schema() -> pa.Schema:
    """A classifier's training set, one row a place in a training stage; an image may have several.

    `phase` 0 or 1: the training stage; `source` real or synthetic; `id` image_id or row_key; `labels_from` the id
    whose labels are used, which differs from `id` only where labels are permuted.
    """
    return pa.schema([
        ("phase", pa.int8()), ("source", pa.string()), ("id", pa.string()), ("labels_from", pa.string()),
    ])  # fmt: skip


def predictions_schema(labels: Sequence[str], attributes: Sequence[str]) -> pa.Schema:
    """What a classifier said of a test set's images, one row an image: everything in a report derives from these.

    `true_<finding>` is null where the finding is not known under the label policy.
    """
    return pa.schema([
        ("image_id", pa.string()), ("test_set", pa.string()), ("site", pa.string()), ("patient_id", pa.string()),
        *((TRUE + n, pa.int8()) for n in labels), *((PROBABILITY + n, pa.float32()) for n in labels),
        *((ATTRIBUTE + n, pa.string()) for n in attributes),
    ])  # fmt: skip


def metric_schema() -> pa.Schema:
    """The metric table, long form: the only input of reports.

    `finding` is a class, or `macro`; `subgroup` is empty or `attribute=value`; `value` is null where withheld.
    """
    text = ("run", "arm", "generator_id", "synthetic_set", "architecture", "init", "strategy", "test_set", "site",
            "finding", "subgroup", "metric", "threshold_rule")  # fmt: skip
    whole = ("fold", "n_real", "n_synth", "n_real_generator", "sampling_steps", "gradient_steps", "seed_split",
             "seed_subset", "seed_generator", "seed_classifier", "n", "n_pos", "n_patients")  # fmt: skip
    real = ("ratio", "guidance_scale", "threshold", "value", "ci_low", "ci_high")
    kinds = {
        **dict.fromkeys(text, pa.string()), **dict.fromkeys(whole, pa.int64()), **dict.fromkeys(real, pa.float64()),
    }  # fmt: skip
    order = (
        "run", "arm", "fold", "generator_id", "synthetic_set", "architecture", "init", "strategy", "ratio", "n_real",
        "n_synth", "n_real_generator", "guidance_scale", "sampling_steps", "gradient_steps", "seed_split",
        "seed_subset", "seed_generator", "seed_classifier", "test_set", "site", "finding", "subgroup", "metric",
        "threshold", "threshold_rule", "value", "ci_low", "ci_high", "n", "n_pos", "n_patients",
    )  # fmt: skip
    return pa.schema([(name, kinds[name]) for name in order])


def label_names(schema: pa.Schema) -> list[str]:
    """Findings or classes of a table, in column order."""
    return [n.removeprefix(LABEL) for n in schema.names if n.startswith(LABEL)]


def attribute_names(schema: pa.Schema) -> list[str]:
    """Attributes of a table, in column order."""
    return [n.removeprefix(ATTRIBUTE) for n in schema.names if n.startswith(ATTRIBUTE)]


def to_parquet(table: pa.Table, row_groups: Iterable[int] | None = None) -> bytes:
    """Parquet bytes of `table`; equal tables give equal bytes under one pyarrow version.

    Args:
        row_groups: rows of each row group in order; they must add up to the table.
    """
    groups = list(row_groups or []) or [table.num_rows]
    starts = [0, *accumulate(groups)]
    if starts[-1] != table.num_rows:
        raise ValueError(f"row groups hold {starts[-1]} rows of {table.num_rows}")
    return stream_parquet(table.slice(a, b - a) for a, b in pairwise(starts))


def stream_parquet(tables: Iterable[pa.Table]) -> bytes:
    """Parquet bytes of tables of one schema, a row group each; at least one."""
    sink, writer = io.BytesIO(), None
    for table in tables:
        writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=max(table.num_rows, 1))
    if writer is None:
        raise ValueError("no table to write")
    writer.close()
    return sink.getvalue()


def from_parquet(source: bytes | IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """The table in parquet bytes or an open parquet file.

    Read by the calling thread alone: a thread of `pyarrow.parquet.read_table` may still hold the Python object when
    the interpreter ends, and aborts it (apache/arrow#33975; 1 in 12 of busy `raysynth verify`).

    Args:
        columns: names of the ones to read, in the order wanted; all by default.
    """
    names = list(columns) if columns is not None else None
    with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source, pre_buffer=False) as file:
        table = file.read(names, use_threads=False)
    return table if names is None else table.select(names)
