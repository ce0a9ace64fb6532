"""The advisory lock: a living holder is seen, a dead one is not, and only its owner removes it."""

from __future__ import annotations

import json
import time

import pytest

from raysynth.core import lease
from raysynth.core.lease import DEAD_AFTER_S, Lease, holder_of
from raysynth.core.storage import open_storage


def test_a_second_driver_sees_the_first(any_root: str) -> None:
    storage = open_storage(any_root)
    with Lease(storage, "lock.json") as first:
        assert first.others is None
        with Lease(storage, "lock.json") as second:
            assert first.run in (second.others or "")
        holder = holder_of(storage, "lock.json")
        assert holder is not None
        assert holder["run"] == first.run
    assert holder_of(storage, "lock.json") is None
    assert storage.list() == []


def test_a_dead_driver_is_recognised(any_root: str) -> None:
    storage = open_storage(any_root)
    dead = {"run": "x", "host": "h", "pid": 1, "beat": time.time() - DEAD_AFTER_S - 1}
    storage.put("lock.json", json.dumps(dead).encode())
    with Lease(storage, "lock.json") as mine:
        assert mine.others is None
        assert holder_of(storage, "lock.json")["run"] == mine.run  # type: ignore[index]


def test_the_heart_beats_and_a_survivor_takes_over(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    storage = open_storage(any_root)
    first = Lease(storage, "lock.json")
    with first, Lease(storage, "lock.json") as second:
        began = holder_of(storage, "lock.json")["beat"]  # type: ignore[index]
        time.sleep(0.5)
        assert holder_of(storage, "lock.json")["beat"] > began  # type: ignore[index]
        first._stop.set()
        first._thread.join()
        storage.delete("lock.json")
        time.sleep(0.5)
        assert holder_of(storage, "lock.json")["run"] == second.run  # type: ignore[index]
