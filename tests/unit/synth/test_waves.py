"""How long the shards of a new wave are: by time, by each worker's share, or as typed."""

from __future__ import annotations

import pytest

from raysynth.synth.waves import SHARDS_A_WORKER, cut, rows_a_shard

BATCH = 32


@pytest.mark.parametrize(("rows", "workers", "rows_per_s", "size"), [
    (1_000_000, 4, 50.0, 2976),  # a minute at 50 rows/s is 3,000 rows: 93 micro-batches
    (1_000, 1, 50.0, 32),        # a twentieth is 50 rows: a micro-batch, not two
    (1_279, 1, 50.0, 32),
    (1_280, 1, 50.0, 64),
    (1_280, 2, 50.0, 32),
    (100, 4, 50.0, 32),          # fewer micro-batches than twenty a worker: one a shard
    (1_000_000, 4, 0.1, 32),     # a micro-batch takes longer than a minute
])  # fmt: skip
def test_shards_are_sized_by_time_and_by_share(rows: int, workers: int, rows_per_s: float, size: int) -> None:
    assert rows_a_shard(rows, workers, BATCH, rows_per_s, 60.0, None) == size
    assert rows_a_shard(rows, workers, BATCH, rows_per_s, 60.0, 95) == 95, "as typed"


@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_has_twenty_shards_where_there_are_as_many_micro_batches(workers: int) -> None:
    for rows in range(1, 200 * BATCH, 7):
        shards = len(cut([("random", rows)], rows_a_shard(rows, workers, BATCH, 1e9, 60.0, None)))
        assert shards >= min(workers * SHARDS_A_WORKER, -(-rows // BATCH)), rows
