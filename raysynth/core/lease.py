"""An advisory lock with a heartbeat: tells a second driver that a first one is alive. Correctness never needs it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType

from raysynth.core.faults import is_storage_fault
from raysynth.core.storage import Storage

BEAT_S = 10.0
LOOK_EVERY_S = 2.0
DEAD_AFTER_S = 4 * BEAT_S


class Lease:
    """Context manager that keeps `path` fresh while it is held.

    Attributes:
        others: who else was alive on entry, in words; None if nobody.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage, self.path = storage, path
        self.run = uuid.uuid4().hex[:12]
        self.others: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Lease:
        holder = holder_of(self.storage, self.path)
        if holder:
            self.others = f"process {holder['pid']} on {holder['host']}, run {holder['run']}"
        else:
            self._write()
        self._thread.start()
        return self

    def wait(self) -> None:
        """Until whoever was alive on entry has finished or died; then the lease is ours."""
        # Our own heart may have taken it between two looks; of two who wait, the one that wrote last has it.
        while (holder := holder_of(self.storage, self.path)) is None or holder["run"] != self.run:
            if holder:
                time.sleep(LOOK_EVERY_S)
            else:
                self._write()
        self.others = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            holder = holder_of(self.storage, self.path)
            if holder and holder["run"] == self.run:
                self.storage.delete(self.path)
        except Exception as fault:
            # What ended the work says more than a lock that cannot be removed; it dies with this process.
            if error is None or not is_storage_fault(fault):
                raise

    def _write(self) -> None:
        me = {"run": self.run, "host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}
        self.storage.put(self.path, json.dumps(me).encode())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                holder = holder_of(self.storage, self.path)
                if holder is None or holder["run"] == self.run:
                    self._write()
            except Exception as error:
                # A missed beat costs nothing; whether storage is usable is the engine's to say.
                if not is_storage_fault(error):
                    raise


def holder_of(storage: Storage, path: str) -> dict | None:
    """The living holder's record, or None if nobody holds it or its heart stopped."""
    try:
        record = json.loads(storage.get(path))
    except (FileNotFoundError, ValueError):
        return None
    if record["host"] == socket.gethostname() and not _alive(record["pid"]):
        return None
    return record if time.time() - record["beat"] < DEAD_AFTER_S else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
