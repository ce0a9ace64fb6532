"""Sources with a table: a CSV beside a folder of images, and parquet with images or their paths in it."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from raysynth.core.experiment import Data
from raysynth.core.identity import sha256_bytes
from raysynth.core.storage import Entry
from raysynth.data.found import LEAVES, NO_FILE, NO_ROW, Found, digest, is_image, listed
from raysynth.data.labels import parse_findings, parse_names
from raysynth.data.metadata import (
    Cells,
    parquet_files,
    read_csv,
    read_file,
    read_parquet,
    require_column,
    text_column,
)
from raysynth.data.reading import image_storage, inside, link_leaves


def from_csv(data: Data) -> Found:
    """Rows of a CSV. Raises DataError."""
    raw = read_file(data.path, "data.path", "a CSV file")
    table = read_csv(raw, "data.path", data.path)
    for key, column in {"data.columns.file": data.columns.file, **_mapped(data)}.items():
        require_column(table.column_names, column, key)
    paths = text_column(table, data.columns.file)
    found = _tabular(data, table, paths, [p or "" for p in paths])
    return dataclasses.replace(found, digest=digest(_check_files(data, found, paths), ("table", sha256_bytes(raw))))


def from_parquet(data: Data) -> Found:
    """Rows of one parquet file or of all in a folder. Raises DataError."""
    storage, files = parquet_files(data.path)
    table, locations = read_parquet(storage, [e.path for e in files], _mapped(data), data.columns.file)
    if data.columns.file not in table.column_names:
        return dataclasses.replace(_tabular(data, table, list(locations), locations), digest=digest(files))
    paths = text_column(table, data.columns.file)
    found = _tabular(data, table, paths, [p or "" for p in paths])
    return dataclasses.replace(found, digest=digest([*files, *_check_files(data, found, paths)]))


def _mapped(data: Data) -> dict[str, str]:
    """Configuration key -> column, without the image column."""
    c = data.columns
    plain = {f"data.columns.{k}": getattr(c, k) for k in ("id", "label", "patient", "split", "site", "report")}
    return {
        **{k: v for k, v in plain.items() if v},
        **{f"data.columns.findings.{k}": v for k, v in c.findings.items()},
        **{f"data.columns.attributes.{k}": v for k, v in c.attributes.items()},
    }


def _tabular(data: Data, table: pa.Table, paths: Cells, locations: list[str]) -> Found:
    c = data.columns

    def cells(column: str | None) -> Cells | None:
        return text_column(table, column) if column else None

    annotations = (
        parse_findings({k: text_column(table, v) for k, v in c.findings.items()}, data.labels)
        if c.findings
        else parse_names([known_label(v) for v in text_column(table, str(c.label))], data.labels)
    )
    ids = [(v or "").strip() for v in (cells(c.id) or paths)]
    return Found(
        locations, list(locations), ids, annotations, "", {k: text_column(table, v) for k, v in c.attributes.items()},
        cells(c.site), cells(c.patient), cells(c.split), cells(c.report),
        {row: "no id" for row, v in enumerate(ids) if not v},
    )  # fmt: skip


def known_label(cell: str | None) -> str | None:
    """The cell without surrounding blanks, or None if it is empty."""
    return (cell or "").strip() or None


def _check_files(data: Data, found: Found, paths: Cells) -> list[Entry]:
    """Marks rows whose path leaves the folder or is not there, adds files without row; returns the rows' files."""
    storage = image_storage(data)
    relative = [inside(storage, p.strip()) if p and p.strip() else "" for p in paths]
    named = {p for p in relative if p}
    tops = {p.split("/")[0] if "/" in p else "" for p in named}
    # Only the folders that rows point into: artifacts may well lie beside the data.
    tops = {""} if "" in tops else tops
    entries = [e for top in sorted(tops) for e in listed(storage, top, "data.images", named)]
    there = {e.path for e in entries}
    for row, path in enumerate(relative):
        if path == "":
            found.bad.setdefault(row, NO_FILE)
        elif path is None or link_leaves(storage, path):
            found.bad.setdefault(row, LEAVES)
        elif path not in there:
            found.bad.setdefault(row, NO_FILE)
        else:
            found.locations[row] = found.uris[row] = path
    folders = {p.rpartition("/")[0] for p in named}
    stray = [e.path for e in entries if e.path not in named and is_image(e.path)]
    found.extra += [(p, p, NO_ROW) for p in stray if p.rpartition("/")[0] in folders]
    return [e for e in entries if e.path in named]
