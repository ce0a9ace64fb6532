"""Every table of the page as CSV: to be written beside it, and as links that carry it.

Does not know where files go. Input: `ReportData`; output: bytes by file name, `data:` links.
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass

import numpy as np
import pandas as pd

from raysynth.report.data import ReportData
from raysynth.report.panels import multilabel

PLAIN_CSV, MOST_CSV = 100_000, 1_000_000
"""Bytes of a table up to which it is embedded as it is, and up to which gzip's result is; larger ones stand beside
the page."""


@dataclass(frozen=True)
class Download:
    """One table to be saved; `uri` is empty where it is too large to be carried."""

    name: str
    rows: int
    uri: str


def write_tables(data: ReportData) -> dict[str, bytes]:
    """File name -> CSV of every table of the data, whole, and of what the page derives from them.

    Numbers have all their digits; a missing or withheld one is empty.
    """
    tables = {**data.tables(), "summary": data.summary(), "confusion": _confusion_rows(data)}
    return {f"{name}.csv": table.to_csv(index=False).encode() for name, table in tables.items() if len(table)}


def _confusion_rows(data: ReportData) -> pd.DataFrame:
    """Long form: finding is empty for a matrix of classes; true and predicted are 0 or 1 within a finding."""
    rows = []
    for arm, (counts, names) in data.confusion.items():
        stacked = multilabel(counts, names)
        tables = {"": np.asarray(counts)} if stacked is None else dict(zip(names, stacked))
        for finding, matrix in tables.items():
            labels = names if stacked is None else [0, 1]
            rows += [(arm, finding, labels[i], labels[j], v) for (i, j), v in np.ndenumerate(matrix)]
    return pd.DataFrame(rows, columns=["arm", "finding", "true", "predicted", "count"])


def downloads(data: ReportData) -> list[Download]:
    """Every table as a link that carries it."""
    found = []
    for name, csv in write_tables(data).items():
        rows = csv.count(b"\n") - 1
        if len(csv) <= PLAIN_CSV:
            found.append(Download(name, rows, _uri("text/csv", csv)))
            continue
        packed = gzip.compress(csv, mtime=0)
        small = len(packed) <= MOST_CSV
        found.append(Download(f"{name}.gz" if small else name, rows, _uri("application/gzip", packed) if small else ""))
    return found


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
