"""Arithmetic of rendering speed, on times and counts written down by hand; rows and markers give the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raysynth.synth.fake import FakeRenderer
from raysynth.synth.throughput import BREAK_S, Throughput
from tests.engine import keys_of, render_all, synthetic_set, wanted_rows


def marker(actor: str, finished: float, seconds: float, rows: int = 100, attempt: int = 0) -> dict:
    return {"actor": actor, "worker": f"node/{actor}", "finished": finished, "render_seconds": seconds, "rows": rows,
            "ok": rows, "failed": {}, "rejected": {}, "attempt": attempt}  # fmt: skip


def of(*markers: dict) -> Throughput:
    found = Throughput()
    for m in markers:
        found.add_marker(m)
    return found


def test_busy_share_is_rendering_between_the_first_start_and_the_latest_end() -> None:
    # Started at 0; 30 s of rendering in each of three shards; idle for 10 s in between.
    sums = of(marker("a", 30, 30), marker("a", 70, 30), marker("a", 100, 30))
    assert sums.busy(100) == pytest.approx(0.9)
    # While the next shard is rendered nothing changes: its seconds are not known yet.
    assert sums.busy(150) == pytest.approx(0.9)
    # Carried seconds of another actor's attempt never make more than the whole.
    assert of(marker("a", 30, 30), marker("a", 40, 60)).busy(40) == 1.0


def test_one_shard_says_nothing_of_idling() -> None:
    sums = of(marker("a", 30, 30))
    assert sums.busy(30) is None
    assert sums.working(30)[0].busy is None
    assert sums.rate(30) == pytest.approx(100 / 30)


def test_now_is_the_last_minute_of_each_actor() -> None:
    # Two rows/s for ten minutes, then one row/s for two: shards of 10 s.
    slow = [marker("a", 10.0 * i, 10, rows=20 if i <= 60 else 10) for i in range(1, 73)]
    sums = of(*slow)
    assert sums.rate(720) == pytest.approx(1.0)
    assert sums.average == pytest.approx((60 * 20 + 12 * 10) / 720)
    assert sums.left_s(60, 720) == pytest.approx(60)
    # Shards of two minutes: the latest one counts whole, and does not come and go with the clock.
    long = of(marker("b", 120, 118), marker("b", 240, 118, rows=50))
    assert long.rate(240) == long.rate(350) == pytest.approx(50 / 120)


def test_actors_that_fell_silent_do_not_count_as_at_work() -> None:
    gone = (marker("gone", 10.0 * i, 10) for i in range(1, 5))
    sums = of(*gone, *(marker("here", 10.0 * i, 8) for i in range(1, 30)))
    assert {p.worker for p in sums.working(60)} == {"node/gone", "node/here"}
    assert {p.worker for p in sums.working(290)} == {"node/here"}
    assert sums.rate(290) == pytest.approx(10.0)
    assert sums.rate(10_000) == 0
    assert sums.left_s(5, 10_000) is None
    # A slow device may take an hour a shard.
    assert of(marker("slow", 3600, 3600)).working(7300)


def test_the_least_busy_come_first() -> None:
    sums = of(*(marker(a, t, s) for a, s in (("fine", 10), ("idle", 2), ("fair", 7)) for t in (10.0, 20.0)),
              marker("new", 20, 5))  # fmt: skip
    assert [p.worker for p in sums.working(20)] == ["node/idle", "node/fair", "node/fine", "node/new"]


def test_nights_between_runs_are_no_rendering_in_any_order() -> None:
    night = 8 * 3600
    found = [marker("a", 10.0 * i, 9) for i in range(1, 11)] + [marker("b", night + 10.0 * i, 9) for i in range(1, 11)]
    found.append(marker("c", 100 + BREAK_S / 2, 5))  # a pause of two minutes belongs to the run
    for seed in range(5):
        random.Random(seed).shuffle(found)
        sums = of(*found)
        assert sums.running_s == pytest.approx((100 + BREAK_S / 2 - 1) + 99)
        assert sums.average == pytest.approx(2100 / sums.running_s)


def test_a_long_run_costs_no_memory_a_shard() -> None:
    sums = of(*(marker("a", 10.0 * i, 9) for i in range(5000)))
    assert len(sums.actors["a"].recent) <= 8
    assert len(sums._spans) == 1


def test_rows_of_statistics_and_markers_say_the_same(tmp_path: Path) -> None:
    wanted = wanted_rows(replicas=4)
    store = synthetic_set(str(tmp_path))
    renderer = FakeRenderer(seconds_a_row=0.002, broken=(keys_of(wanted)[5],))
    driver = Throughput()
    for i, row in enumerate(render_all(store, wanted, renderer, workers=2)):
        driver.add_row(row, now=1000.0 + i)
    markers = of(*store.markers(store.done()).values())
    for sums in (driver, markers):
        assert (sums.ok, sums.failed, sums.rejected, sums.rows) == (47, 1, 0, 48)
        assert (sums.shards, sums.retried) == (6, 1)
    # Seconds of an attempt that waits for a second opinion are in the marker of its shard.
    assert markers.render_s == pytest.approx(driver.render_s, abs=0.01)
