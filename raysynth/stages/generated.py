"""What a generate artifact says: where each row is, and which failed.

`rows/00000.parquet` and so on hold 16,384 rows each (key, rank, shard, place, attempt, part, status, reason),
`failed.parquet` the plan's row and why.

Written by `generate`, read by whatever uses synthetic images. Starts no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import Damaged
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.synth.ledger import FAILED, Places, rows_table
from raysynth.synth.sets import SyntheticSet, is_content
from raysynth.synth.wanted import CHUNK, Wanted

FOLDER = "rows"


def put_rows(artifact: Artifact, wanted: Wanted, places: Places, markers: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes both tables.

    Args:
        places: where each wanted row is. markers: of the shards they are in.
    """
    for number, at in enumerate(range(0, len(wanted) or 1, CHUNK)):
        piece = slice(at, at + CHUNK)
        rows = rows_table(wanted.keys[piece], places[piece], markers)
        rows = rows.add_column(1, "rank", pa.array(wanted.ranks[piece], pa.int64()))
        artifact.put(f"{FOLDER}/{number:05d}.parquet", to_parquet(rows))
    artifact.put("failed.parquet", to_parquet(failed_rows(wanted, places, markers)))
    pa.default_memory_pool().release_unused()


def failed_rows(wanted: Wanted, places: Places, markers: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """The failed rows as the plan has them, with reason, shard, place, attempt and part."""
    bad = places.status == FAILED
    why = rows_table(wanted.keys[bad], places[np.flatnonzero(bad)], markers).drop_columns(["row_key", "status"])
    pieces = list(wanted.tables(bad))
    if not pieces:
        return why.add_column(0, "row_key", pa.array([], pa.string()))
    rows = pa.concat_tables(pieces)
    for name in why.column_names:
        rows = rows.append_column(name, why[name])
    return rows


def index_tables(artifact: Artifact, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The artifact's rows by rank, a file at a time."""
    for entry in artifact.storage.list(artifact.file(FOLDER)):
        yield from_parquet(artifact.storage.get(entry.path), columns)


def load_index(artifact: Artifact) -> pd.DataFrame:
    """The artifact's rows by rank, as one table in memory."""
    return pa.concat_tables(index_tables(artifact)).to_pandas()


def synthetic_set_of(artifact: Artifact) -> SyntheticSet:
    """The set that a complete generate artifact's images live in."""
    return SyntheticSet.open(artifact.storage, artifact.run_info()["synthetic_set"].partition("/")[2])


def read_part(storage: Storage, path: str) -> bytes:
    """Bytes of a synthetic set's part.

    Args:
        path: relative to the storage root.

    Raises:
        Damaged: it is gone or not what was committed.
    """
    try:
        data = storage.get(path)
    except FileNotFoundError:
        data = b""
    if not is_content(path, data):
        raise Damaged(f"{path} is not what was committed. `raysynth verify --repair`, then `raysynth run`, mend it.")
    return data


def read_images(artifact: Artifact, index: pd.DataFrame) -> Iterator[pa.Table]:
    """Synthetic rows of `index` (rows of `load_index`), images included, one table a part.

    Raises:
        Damaged: a part is gone or not what was committed.
    """
    store = synthetic_set_of(artifact)
    for part, rows in index.groupby("part", sort=True):
        data = read_part(store.storage, store.file(str(part)))
        yield from_parquet(data).take(pa.array(sorted(rows["place"])))
