"""What is still to be rendered: wanted rows minus those committed or already frozen, cut into shards.

Pure bookkeeping over row keys; the only decisions are what a new wave holds and how long its shards are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from raysynth.core.errors import EnvironmentFault
from raysynth.synth.sets import SyntheticSet, Wave

SHARDS_A_WORKER = 20  # so that the last shard of a run costs a twentieth of it at most


def rows_a_shard(
    rows: int, workers: int, micro_batch: int, rows_per_s: float | None, shard_seconds: float, shard_rows: int | None
) -> int:
    """Rows of a shard: as typed, or `shard_seconds` of one renderer with at least 20 shards a worker where there
    are that many micro-batches; a multiple of the micro-batch unless typed."""
    if shard_rows is not None:
        return shard_rows
    by_time = shard_seconds * rows_per_s if rows_per_s else rows
    by_share = rows / (workers * SHARDS_A_WORKER)
    return max(1, round(min(by_time, max(by_share, micro_batch)) / micro_batch)) * micro_batch


def cut(rows: pa.Table, size: int) -> list[int]:
    """Shard lengths for rows in order: at most `size`, and no shard holds two modes."""
    if rows.num_rows == 0:
        return []
    modes = rows.column("mode").combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    breaks = np.flatnonzero(np.diff(modes)) + 1
    lengths: list[int] = []
    for start, stop in zip([0, *breaks], [*breaks, len(modes)]):
        full, rest = divmod(int(stop - start), size)
        lengths += [size] * full + ([rest] if rest else [])
    return lengths


def failed_rows(store: SyntheticSet) -> list[str]:
    """Keys of the rows whose newest record is a failure."""
    index = store.index()
    return index.loc[index["status"] == "failed", "row_key"].tolist()


def missing(wanted: pa.Table, known: pd.DataFrame, reopen: Sequence[str] = ()) -> pa.Table:
    """Wanted rows that are neither committed nor frozen, in rank order; `reopen` names rows to render once more."""
    have = known["row_key"]
    if len(reopen):
        have = have[~have.isin(set(reopen)) | have.isin(known.loc[~known["done"].astype(bool), "row_key"])]
    keys = wanted.column("row_key").to_pandas()
    return wanted.filter(pa.array(~keys.isin(have))).sort_by("rank")


def extend(
    store: SyntheticSet, wanted: pa.Table, shard_size: int, why: str, retry_failed: bool = False
) -> Wave | None:
    """Adds a wave with whatever is missing; None if nothing is.

    Two drivers may call this at once: the loser of the race looks again and finds less missing.

    Args:
        retry_failed: rows recorded as failed are missing too.
    """
    for _ in range(100):
        waves = store.waves()
        known = store.rows()
        rows = missing(wanted, known, failed_rows(store) if retry_failed else ())
        if rows.num_rows == 0:
            return None
        rows = rows.append_column("attempt", pa.array(np.zeros(rows.num_rows, np.int32)))
        wave = store.add_wave(waves, rows, cut(rows, shard_size), why)
        if wave is not None:
            return wave
    raise EnvironmentFault(f"{store.path}: other drivers kept adding waves. Run the same command again.")


def pending(store: SyntheticSet, wanted: pa.Table) -> list[tuple[Wave, int]]:
    """Frozen shards without a marker that hold a wanted row, oldest first."""
    rows = store.rows()
    if rows.empty:
        return []
    left = rows[~rows["done"].astype(bool)]
    shards = set(left.loc[left["row_key"].isin(wanted.column("row_key").to_pandas()), "shard"])
    return [(wave, shard) for wave in store.waves() for shard in wave.shards if shard in shards]
