"""Synthetic rows -> the files of three data set formats. Equal rows give equal bytes.

Input: a table of ok rows of one split (`export_schema`), images included. Output: (name, bytes) pairs.
Knows nothing of Ray, of storage, or of which rows go together.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from raysynth.core.schemas import ATTRIBUTE, LABEL, stream_parquet, synthetic_schema
from raysynth.data.labels import label_array

LEFT_OUT = ("status", "reason")  # every exported row is ok
ROW_GROUP_BYTES = 64 << 20  # what a reader holds at once; the Hub's viewer refuses groups of more than 300 MB
PIECE = 256  # rows that exist as Python objects at a time
NO_FINDING = "none"
"""Folder of images without a positive finding."""
UNKNOWN = "unknown"
SAFE_IN_NAMES = " (),&"
METADATA = "metadata.csv"


@dataclass(frozen=True)
class Vocabulary:
    """What the exported label columns mean."""

    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    single: bool
    """One class an image; otherwise any number of findings."""


def export_schema(vocabulary: Vocabulary) -> pa.Schema:
    """Columns of an exported row: the class (`label`) or positive findings (`labels`) as numbers into the
    vocabulary, then the synthetic table's own columns."""
    base = synthetic_schema(vocabulary.classes, vocabulary.attributes)
    features = json.loads(base.metadata[b"huggingface"])["info"]["features"]
    feature: dict = {"names": list(vocabulary.classes), "_type": "ClassLabel"}
    added = pa.field("label", pa.int64())
    if not vocabulary.single:
        added, feature = pa.field("labels", pa.list_(pa.int64())), {"feature": feature, "_type": "Sequence"}
    fields = [base.field("image"), added, *(f for f in base if f.name not in ("image", *LEFT_OUT))]
    described = {f.name: feature if f is added else features[f.name] for f in fields}
    return pa.schema(fields, {b"huggingface": json.dumps({"info": {"features": described}}).encode()})


def export_rows(table: pa.Table, vocabulary: Vocabulary) -> pa.Table:
    """Rows of a part in `export_schema`. Labels and attributes that a part does not know yet are null."""
    schema = export_schema(vocabulary)
    for name in schema.names:
        if name not in table.column_names and name not in ("label", "labels"):
            table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
    positive = label_array(table, list(vocabulary.classes)) == 1
    if vocabulary.single:
        found: pa.Array = pa.array(positive.argmax(axis=1), mask=~positive.any(axis=1))
        table = table.append_column("label", found)
    else:
        ends = np.concatenate([[0], positive.sum(axis=1).cumsum()]).astype(np.int32)
        found = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.nonzero(positive)[1].astype(np.int64)))
        table = table.append_column("labels", found)
    return table.select(schema.names).cast(schema)


Files = Iterator[tuple[str, bytes]]


def parquet_file(rows: pa.Table, split: str, number: int, vocabulary: Vocabulary) -> Files:
    """One parquet file; `datasets` shows pictures and class names from its schema alone."""
    each = max(1, round(ROW_GROUP_BYTES / max(1, rows.nbytes / rows.num_rows)))
    pieces = (rows.slice(at, each).combine_chunks() for at in range(0, rows.num_rows, each))
    yield f"data/{split}-{number:05d}.parquet", stream_parquet(pieces)


def tar_file(rows: pa.Table, split: str, number: int, vocabulary: Vocabulary) -> Files:
    """One tar: `<row key>.png` and `<row key>.json` with the row's other columns. Headers hold no time and no owner."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in _as_dicts(rows):
            png, key = row.pop("image")["bytes"], row["row_key"]
            text = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
            for ending, data in (("json", text), ("png", png)):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    yield f"data/{split}-{number:05d}.tar", sink.getvalue()


def folder_files(rows: pa.Table, split: str, number: int, vocabulary: Vocabulary) -> Files:
    """`<split>/<class>/<row key>.png` of every row, and this group's share of `<split>/metadata.csv`."""
    names: list[str] = []
    for row in _as_dicts(rows.select(["image", "row_key", _label_column(vocabulary)])):
        numbers = row["labels"] if not vocabulary.single else [row["label"]] if row["label"] is not None else []
        names.append(f"{folder_name([vocabulary.classes[i] for i in numbers])}/{row['row_key']}.png")
        yield f"{split}/{names[-1]}", row["image"]["bytes"]
    yield f".export/{split}-{number:05d}.csv", _metadata(rows, names, vocabulary)


FORMATS: dict[str, Callable[[pa.Table, str, int, Vocabulary], Files]] = {
    "huggingface": parquet_file, "webdataset": tar_file, "folders": folder_files,
}  # fmt: skip
"""`--to` -> what makes its files."""


def folder_name(positive: Sequence[str]) -> str:
    """Folder of images with these classes or findings; no name can leave its folder or be another's."""
    return "+".join(_name(n) for n in positive) or NO_FINDING


def _name(name: str) -> str:
    text = quote(name, safe=SAFE_IN_NAMES)
    hidden = text.startswith(".") or text == NO_FINDING
    return f"%{ord(text[0]):02X}{text[1:]}" if hidden else text


def _label_column(vocabulary: Vocabulary) -> str:
    return "label" if vocabulary.single else "labels"


def _as_dicts(rows: pa.Table) -> Iterator[dict]:
    for at in range(0, rows.num_rows, PIECE):
        yield from rows.slice(at, PIECE).to_pylist()


def _metadata(rows: pa.Table, names: Sequence[str], vocabulary: Vocabulary) -> bytes:
    """CSV as `imagefolder` reads it: `file_name`, the class (or findings joined by `|`) by name, other columns."""
    label = _label_column(vocabulary)
    numbers = rows[label].to_pylist()
    words = [
        "|".join(vocabulary.classes[i] for i in (n if isinstance(n, list) else [] if n is None else [n]))
        for n in numbers
    ]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {"file_name": pa.array(names), label: pa.array(words)}
    for name in rows.column_names:
        if name not in (label, "image", "split"):
            # A column whose first 10,000 cells are empty is read as numbers and fails at the first word.
            columns[name] = pc.fill_null(rows[name], UNKNOWN) if name.startswith(ATTRIBUTE) else rows[name]
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.table(columns), sink)
    return sink.getvalue()


def features_of(vocabulary: Vocabulary) -> list[dict]:
    """`dataset_info.features` of a WebDataset in the Hub's YAML: the reader would guess types from five rows."""
    kinds = {pa.float32(): "float32", pa.bool_(): "bool", pa.int64(): "int64", pa.int32(): "int32", pa.int8(): "int8"}
    fields: list[dict] = []
    for f in export_schema(vocabulary):
        if f.name == "labels":
            fields.append({"name": f.name, "list": "int64"})
        elif f.name != "image":
            fields.append({"name": f.name, "dtype": kinds.get(f.type, "string")})
    return [
        {"name": "json", "struct": sorted(fields, key=lambda f: f["name"])}, {"name": "png", "dtype": "image"},
        {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"},
    ]  # fmt: skip


def counts_of(rows: pa.Table, vocabulary: Vocabulary) -> dict[str, dict[str, int]]:
    """How many rows are positive for each class, and have each value of each attribute."""
    found = {"label": {n: int((pc.sum(pc.equal(rows[LABEL + n], 1)).as_py()) or 0) for n in vocabulary.classes}}
    for name in vocabulary.attributes:
        values = pc.value_counts(pc.fill_null(rows[ATTRIBUTE + name], UNKNOWN)).to_pylist()
        found[name] = {v["values"]: v["counts"] for v in values}
    return found
