"""The process that holds a device: renders the shards that Ray Data hands it, commits them and answers with numbers.

Told to stop, it ends between two micro-batches. Inputs: a `RenderJob`. Knows nothing of pools, rounds or plans.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raysynth.core.errors import EnvironmentFault
from raysynth.core.faults import is_storage_fault, storage_words
from raysynth.synth.renderer import Renderer, SickWorker, canary_fault
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.settle import Settled, settle
from raysynth.synth.shards import ShardRunner

PATIENCE_S = 10.0  # a sick worker lets the others start this long before it turns shards away at once
NAP_S = 5.0  # and holds each shard so long while they work
MAX_STARTS = 3  # of one actor that ended its process while the renderer was loaded; Ray restarts it for ever
LOOK_EVERY_S = 2.0  # so often it looks whether its driver was told to stop
SUMMED = ("ok", "failed", "rejected", "render_s", "load_s", "encode_s", "commit_s")
"""Numbers of a row of statistics that add up."""


@dataclass(frozen=True)
class RenderJob:
    """All an actor needs; a few hundred bytes."""

    store: SyntheticSet
    factory: Callable[[], Renderer]
    """Makes the renderer inside the actor; a functools.partial of an importable class."""
    micro_batch: int | None
    accept_render_change: bool
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Names this run of the driver."""

    alone: bool = False
    """Whether there is one actor only, who need not leave work to others."""

    @property
    def stop_file(self) -> str:
        """The actors end after the micro-batch they are rendering once this is there."""
        return self.store.file(f"stop/{self.run}")

    def settle(self, renderer: Renderer) -> Settled:
        """render.json as this job wants or finds it."""
        return settle(self.store, renderer, self.micro_batch, self.accept_render_change)


class RenderActor:
    """Ray Data's actor. Answers every shard with a row of statistics; the only process that touches the device.

    Told to stop, it finishes the micro-batch it is rendering and keeps what is done of the shard. SIGTERM (a spot
    node is taken away) then ends the process, and Ray repeats its calls in another one; the driver's own stop is
    answered with a row.
    """

    def __init__(self, job: RenderJob) -> None:
        self.refusal = self.sickness = ""
        self.job, self.born = job, time.monotonic()
        self.runner: ShardRunner | None = None
        self.calls = _Calls()
        self.leaving = False
        try:
            began = self._note_start()
            renderer = job.factory()
            settled = job.settle(renderer)
            self.sickness = canary_fault(renderer, settled.micro_batch) or ""
            self.runner = ShardRunner(job.store, renderer, settled.micro_batch)
            self.waves = {w.number: w for w in job.store.waves()}
            for name in began:
                job.store.storage.delete(name)
        except EnvironmentFault as error:
            # Raised here it would reach the user as an actor's death; as a row it keeps its words.
            self.refusal = str(error)
        except Exception as error:  # noqa: BLE001 - one bad device must not end the others' run
            self.sickness = storage_words(error) if is_storage_fault(error) else f"{type(error).__name__}: {error}"
        threading.Thread(target=self._watch, args=(_sigterm_pipe(),), daemon=True).start()

    def _note_start(self) -> list[str]:
        """Records that this actor begins to load its renderer, to be removed once it has: the names of the records.

        Raises:
            SickWorker: it died of that too often.
        """
        import ray

        storage = self.job.store.storage
        folder = self.job.store.file(f"starts/{self.job.run}-{ray.get_runtime_context().get_actor_id()}")
        earlier = [e.path for e in storage.list(folder)]
        if len(earlier) >= MAX_STARTS:
            raise SickWorker(
                f"the process ended {len(earlier)} times while it loaded the renderer: is memory short? Ray's logs of "
                "the worker say more"
            )
        storage.put(f"{folder}/{len(earlier)}", b"")
        return [*earlier, f"{folder}/{len(earlier)}"]

    def _watch(self, terminated: int | None) -> None:
        """Waits for SIGTERM or the driver's stop."""
        import select

        while True:
            if terminated is None:
                time.sleep(LOOK_EVERY_S)
            elif select.select([terminated], [], [], LOOK_EVERY_S)[0]:
                self.leaving = True
                self._stop()
                self.calls.wait()
                time.sleep(0.2)  # for the answers that are on their way
                os._exit(128 + signal.SIGTERM)
            try:
                if self.job.store.storage.exists(self.job.stop_file):
                    self._stop()
            except Exception as error:
                if not is_storage_fault(error):
                    raise

    def _stop(self) -> None:
        if self.runner:
            self.runner.stopping.set()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        wave, shard = int(batch["wave"][0]), int(batch["shard"][0])
        with self.calls:
            row = self._shard(wave, shard)
        if row["outcome"] == "stopped":
            # Nobody answers before everybody is done: a stopped row says that this process has come to rest.
            self.calls.wait(forever=self.leaving)
        return {k: [v] for k, v in row.items()}

    def _shard(self, wave: int, shard: int) -> dict[str, Any]:
        if self.refusal:
            return _uncommitted("refused", shard, self.refusal)
        if self.sickness:
            self._let_others_work()
            return _uncommitted("sick", shard, self.sickness)
        assert self.runner is not None
        try:
            return self.runner.run(self.waves[wave], shard)
        except SickWorker:
            # A fresh process may be well again; Ray restarts the actor and repeats the call.
            os._exit(1)
        except Exception as error:
            if not is_storage_fault(error):
                raise
            return _uncommitted("storage", shard, storage_words(error))

    def _let_others_work(self) -> None:
        """A sick worker that answered at once would drain the queue before the healthy ones get a shard."""
        if self.job.alone:
            return
        before = len(self.job.store.done())
        while time.monotonic() - self.born < PATIENCE_S:
            time.sleep(1.0)
            if len(self.job.store.done()) > before:
                self.born = time.monotonic()  # others work: go on being patient
                time.sleep(NAP_S)
                return


class _Calls:
    """Counts the calls of an actor that are at work."""

    def __init__(self) -> None:
        self.working = 0
        self.changed = threading.Condition()

    def __enter__(self) -> None:
        with self.changed:
            self.working += 1

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.working -= 1
            self.changed.notify_all()

    def wait(self, forever: bool = False) -> None:
        """Waits until none is at work any more, or for the end of the process."""
        with self.changed:
            self.changed.wait_for(lambda: not forever and self.working == 0)


def _sigterm_pipe() -> int | None:
    """A file descriptor that becomes readable on SIGTERM; None outside the main thread.

    Python's own handlers run when the main thread is back in Python, which a Ray worker's seldom is.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read


def _uncommitted(outcome: str, shard: int, reason: str) -> dict[str, Any]:
    who = {"actor": "", "worker": "", "attempt": 0}
    return {"outcome": outcome, "shard": shard, "reason": reason, **who, **dict.fromkeys(SUMMED, 0.0)}
