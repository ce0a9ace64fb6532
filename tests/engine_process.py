"""`python -m tests.engine_process ROOT`: kills a rendering process at every write it makes, then lets two others
finish side by side, and prints one JSON line a kill: what was killed, whether the set verifies clean, and whether
its images are those of an uninterrupted run.

The process imports everything once and forks before it opens a connection, so that a kill costs milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

import s3fs  # noqa: F401 - imported before the forks

import raysynth.synth.shards  # noqa: F401
from raysynth.core.storage import Storage, open_storage
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import verify
from tests.engine import images, render_all, synthetic_set, wanted_rows

WANTED = wanted_rows(n=4, replicas=3)  # 12 rows: two shards, the second not full


def dying_storage(root: str, at: int, after: bool) -> Storage:
    """Storage that ends the process with SIGKILL before or after its `at`-th write."""
    storage = open_storage(root)
    count = 0

    def wrap(real: Callable) -> Callable:
        def write(path: str, data: bytes) -> object:
            nonlocal count
            count += 1
            mine = count  # notes are written by another thread
            if mine == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(path, data)
            if mine == at and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return write

    storage.put, storage.create = wrap(storage.put), wrap(storage.create)  # type: ignore[method-assign]
    return storage


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: str) -> None:
    def judge(place: str, killed: str) -> None:
        store, reference = synthetic_set(place), synthetic_set(f"{root}/reference")
        verdict = verify(store, WANTED)
        record = {
            "killed": killed, "clean": verdict.clean, "ok": verdict.ok, "same": images(store) == images(reference),
            "duplicate": len(verdict.duplicate),
        }  # fmt: skip
        os.write(1, f"{json.dumps(record)}\n".encode())

    def run(where: str | Storage) -> None:
        render_all(synthetic_set(where), WANTED, FakeRenderer())

    assert wait(fork(lambda: run(f"{root}/reference"))) == 0
    at = 0
    while True:
        at += 1
        for after in (False, True):
            place = f"{root}/{at}{'b' if after else 'a'}"
            if wait(fork(lambda p=place, n=at, a=after: run(dying_storage(p, n, a)))) == 0:
                return  # it made fewer writes than that
            pair = [fork(lambda p=place: run(p)) for _ in "ab"]
            assert [wait(p) for p in pair] == [0, 0]
            assert wait(fork(lambda p=place, k=f"{at} {after}": judge(p, k))) == 0


if __name__ == "__main__":
    main(sys.argv[1])
