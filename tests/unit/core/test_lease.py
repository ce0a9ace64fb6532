"""The advisory lock: a living holder is seen, a dead one is not, and only its owner removes it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raysynth.core import lease
from raysynth.core.lease import BEAT_S, DEAD_AFTER_S, Lease, holder_of
from raysynth.core.storage import Storage, open_storage
from tests.waiting import wait_for


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


def leave(storage: Storage, host: str, pid: int, age_s: float) -> None:
    """A lock as its holder wrote it `age_s` ago."""
    record = {"run": "x", "host": host, "pid": pid, "beat": time.time() - age_s}
    storage.put("lock.json", json.dumps(record).encode())


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("who", "alive"),
    [
        (lambda: ("elsewhere", 1, 2 * BEAT_S), True),
        (lambda: ("elsewhere", 1, DEAD_AFTER_S + 1), False),
        (lambda: (socket.gethostname(), os.getppid(), 2 * BEAT_S), True),
        (lambda: (socket.gethostname(), os.getppid(), DEAD_AFTER_S + 1), False),
        (lambda: (socket.gethostname(), ended_process(), 0.0), False),
    ],
    ids=["far and fresh", "far and old", "here and alive", "here, alive, its heart stopped", "here and ended"],
)
def test_a_dead_driver_is_recognised(any_root: str, who: Callable[[], tuple[str, int, float]], alive: bool) -> None:
    storage = open_storage(any_root)
    leave(storage, *who())
    with Lease(storage, "lock.json") as mine:
        assert (mine.others is not None) == alive
        assert (holder_of(storage, "lock.json")["run"] == mine.run) != alive  # type: ignore[index]


def test_a_lock_that_is_no_record_is_nobodys(any_root: str) -> None:
    storage = open_storage(any_root)
    storage.put("lock.json", b'{"run": ')
    with Lease(storage, "lock.json") as mine:
        assert mine.others is None


def test_waiting_ends_with_the_holders_process(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_EVERY_S", 0.05)
    storage = open_storage(any_root)
    holder = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    leave(storage, socket.gethostname(), holder.pid, 0.0)
    with Lease(storage, "lock.json") as mine:
        assert f"process {holder.pid}" in (mine.others or "")
        waiting = threading.Thread(target=mine.wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        holder.kill()
        holder.wait()
        waiting.join(20)
        assert mine.others is None
        assert holder_of(storage, "lock.json")["run"] == mine.run  # type: ignore[index]


def test_waiting_ends_where_our_own_heart_took_it(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "LOOK_EVERY_S", 0.5)
    storage = open_storage(any_root)
    first = Lease(storage, "lock.json").__enter__()
    with Lease(storage, "lock.json") as mine:
        waiting = threading.Thread(target=mine.wait, daemon=True)
        waiting.start()
        time.sleep(0.2)
        first.__exit__(None, None, None)  # between two looks; several beats before the next one
        waiting.join(10)
        assert not waiting.is_alive()
        assert mine.others is None


def test_a_fault_keeps_its_words_where_the_lock_cannot_be_removed(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))

    def refuse(path: str) -> None:
        raise OSError(30, "Read-only file system")

    def work() -> None:
        with Lease(storage, "lock.json"):
            storage.delete = refuse  # type: ignore[method-assign]
            raise RuntimeError("the first reason")

    with pytest.raises(RuntimeError, match="the first reason"):
        work()


def test_the_heart_beats_and_a_survivor_takes_over(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    storage = open_storage(any_root)
    first = Lease(storage, "lock.json")
    with first, Lease(storage, "lock.json") as second:

        def holder() -> dict:
            return holder_of(storage, "lock.json") or {"beat": 0.0, "run": ""}

        began = holder()["beat"]
        wait_for(lambda: holder()["beat"] > began)
        first._stop.set()
        first._thread.join()
        storage.delete("lock.json")
        wait_for(lambda: holder()["run"] == second.run)
