"""The image table from before the data grew (`data.split.keep`): which split each image had in it.

Input: an ingest artifact's `table.parquet`, local or s3://. Output: a split or null for every image there is now. Knows
nothing of how new patients are dealt (data.splits).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from raysynth.data.metadata import read_file


def read_earlier(keep: str) -> bytes:
    """Parquet bytes of the table that `data.split.keep` names. Raises DataError where there is none."""
    path = keep if keep.endswith(".parquet") else f"{keep.rstrip('/')}/table.parquet"
    return read_file(path, "data.split.keep", "an ingest artifact's folder, or its table.parquet,")


def earlier_splits(
    table: pa.Table, ids: Sequence[str], pixels: Sequence[str], patients: Sequence[str] | None
) -> list[str | None]:
    """The split that an earlier image table has for each image, or null for one that is new to it.

    An image is known by its id, else by its pixels (a file that was renamed), else by its patient.

    Args:
        table: an ingest artifact's: image_id, patient_id, pixel_sha256, split.
        ids, pixels: (N) image ids and pixel hashes.
        patients: (N) patient ids where the data names them; null where they are told by pictures, whose groups have
            no lasting names.
    """
    splits = table["split"].to_pylist()
    found: list[str | None] = [None] * len(ids)
    keys = (("image_id", ids), ("pixel_sha256", pixels), ("patient_id", patients))
    for column, mine in ((c, m) for c, m in keys if m is not None):
        known = {key: split for key, split in zip(table[column].to_pylist(), splits) if key is not None}
        found = [f or known.get(key) for f, key in zip(found, mine)]
    return found


def kept_note(table: pa.Table, ids: Sequence[str], splits: Sequence[str | None]) -> str:
    """What was kept, in a sentence: arguments and result of `earlier_splits`."""
    known = sum(s is not None for s in splits)
    gone = pc.invert(pc.is_in(table["image_id"], value_set=pa.array(ids, pa.string())))
    return (f"splits of an earlier table kept for {known:,} images; {len(splits) - known:,} are new, "
            f"{pc.sum(gone).as_py() or 0:,} of the earlier ones are gone")  # fmt: skip
