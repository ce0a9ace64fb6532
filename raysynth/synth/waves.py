"""What is still to be rendered: wanted rows minus those committed or already frozen, cut into shards.

Pure bookkeeping over row keys; the only decisions are what a new wave holds and how long its shards are.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import EnvironmentFault
from raysynth.synth.ledger import ABSENT, FAILED, Ledger
from raysynth.synth.sets import Wave
from raysynth.synth.wanted import Wanted

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
    return max(1, int(min(by_time, by_share) / micro_batch)) * micro_batch  # down, or there were fewer shards


def cut(runs: Iterable[tuple[str, int]], size: int) -> list[int]:
    """Shard lengths for rows in order: at most `size`, and no shard holds two modes.

    Args:
        runs: (mode, rows) of neighbouring rows; equal neighbours are one run.
    """
    lengths: list[int] = []
    for _, same in groupby(runs, key=lambda run: run[0]):
        full, rest = divmod(sum(n for _, n in same), size)
        lengths += [size] * full + ([rest] if rest else [])
    return lengths


def _runs(table: pa.Table) -> list[tuple[str, int]]:
    """(mode, rows) of neighbouring rows of equal mode."""
    ends = pc.run_end_encode(table.column("mode").combine_chunks())
    lengths = np.diff(np.concatenate([[0], ends.run_ends.to_numpy()]))
    return list(zip(ends.values.to_pylist(), lengths.tolist()))


def missing(ledger: Ledger, wanted: Wanted, retry_failed: bool = False) -> np.ndarray:
    """Which wanted rows are neither committed nor frozen: (N,) bool.

    Args:
        retry_failed: rows recorded as failed are missing too, unless they wait in a frozen shard already.
    """
    absent = ~ledger.frozen(wanted.keys)
    # A row may have failed, been rendered well by a later shard, and be lost with that one.
    if retry_failed or (~absent & ledger.lost(wanted.keys)).any():
        status = ledger.find(wanted.keys, ledger.statuses(ledger.store.markers(ledger.done))).status
        absent |= (status <= (FAILED if retry_failed else ABSENT)) & ~ledger.waiting(wanted.keys)
    return absent


def extend(
    ledger: Ledger, wanted: Wanted, shard_size: int, why: str, retry_failed: bool = False
) -> Wave | None:
    """Adds a wave with whatever is missing; None if nothing is. The ledger is up to date afterwards.

    Two drivers may call this at once: the loser of the race looks again and finds less missing.

    Args:
        retry_failed: rows recorded as failed are missing too.
    """
    store = ledger.store
    for _ in range(100):
        absent = missing(ledger.refresh(), wanted, retry_failed)
        if not absent.any():
            return None
        files, runs = [], []
        for table in wanted.tables(absent):
            runs += _runs(table)
            attempt = pa.array(np.zeros(table.num_rows, np.int32))
            files.append(store.put_rows(table.append_column("attempt", attempt)))
        wave = store.add_wave(ledger.waves, files, cut(runs, shard_size), why)
        if wave is not None:
            ledger.refresh()
            return wave
    raise EnvironmentFault(f"{store.path}: other drivers kept adding waves. Run the same command again.")
