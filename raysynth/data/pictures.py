"""A few pictures out of the parts of an image table, without reading the others.

Knows the layout that ingest writes: the rows of `images/part-*.parquet` are those of `table.parquet` in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq

from raysynth.core.storage import Storage
from raysynth.data.strata import seeded_order


class StoredPictures:
    """Where each picture is. Reads the footers of the parts only.

    Args:
        folder: that of the parts.
        ids: `image_id` of every row of the table, in order.
    """

    def __init__(self, storage: Storage, folder: str, ids: Sequence[str]) -> None:
        self.storage = storage
        self._groups: list[tuple[str, int]] = []
        rows: list[int] = []
        for entry in storage.list(folder):
            with storage.open(entry.path) as file:
                footer = pq.ParquetFile(file).metadata
            self._groups += [(entry.path, g) for g in range(footer.num_row_groups)]
            rows += [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
        self._group_of = dict(zip(ids, np.repeat(np.arange(len(rows)), rows).tolist()))

    def sample(self, ids: Sequence[str], most: int) -> list[str]:
        """All of `ids`, or `most` of them: those of whole row groups, drawn in a seeded order."""
        if len(ids) <= most:
            return list(ids)
        turn = np.argsort(seeded_order("row groups", 0, [str(g) for g in range(len(self._groups))]))
        order = np.argsort(turn[[self._group_of[i] for i in ids]], kind="stable")
        return [ids[i] for i in order[:most]]

    def read(self, ids: set[str]) -> dict[str, bytes]:
        """Encoded pictures of `ids`; loads only the row groups they are in."""
        groups: dict[str, set[int]] = {}
        for name in ids:
            part, group = self._groups[self._group_of[name]]
            groups.setdefault(part, set()).add(group)
        found: dict[str, bytes] = {}
        for part in sorted(groups):
            with self.storage.open(part) as file:
                parquet = pq.ParquetFile(file)
                for group in sorted(groups[part]):
                    rows = parquet.read_row_group(group, columns=["image_id", "image"])
                    for name, picture in zip(rows["image_id"].to_pylist(), rows["image"]):
                        if name in ids:
                            found[name] = picture["bytes"].as_py()
        return found
