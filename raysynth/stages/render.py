"""Drives a pool of render actors with Ray Data over frozen shards, in rounds, until nothing wanted is pending.

One Ray Data row is one shard (its wave and number only), one row a block, so nothing else can be cut or fused under
us; `from_items` needs no read task, so no pool size can starve the input of a CPU. The actor commits; the driver
sees a row of statistics. A second round gives rows that failed to a second actor. Inputs: a `RenderJob`. Knows
nothing of plans.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.core.faults import is_storage_fault, storage_words
from raysynth.core.progress import say
from raysynth.stages.cluster import Resources, quiet_data_context
from raysynth.stages.live import RenderView
from raysynth.synth.renderer import Renderer, SickWorker, canary_fault
from raysynth.synth.sets import SyntheticSet, Wave
from raysynth.synth.settle import Settled, read_settled, settle
from raysynth.synth.shards import ShardRunner

MAX_IDLE_ROUNDS = 3
PATIENCE_S = 10.0  # a sick worker lets the others start this long before it turns shards away at once
NAP_S = 5.0  # and holds each shard so long while they work
MAX_FAULTS = 3  # shards in a row that storage refused; s3fs has retried each request by then
SUMMED = ("ok", "failed", "rejected", "render_s", "load_s", "encode_s", "commit_s")
MAX_INIT_DEATHS = 5  # actors in a row that died while they loaded the renderer
CALLS_PER_ACTOR = 3  # one shard renders, one is loaded and waits, one encodes and commits
TASKS_PER_ACTOR = 6  # Ray Data grows a pool only while tasks in flight per concurrent call >= 1.75
LOOK_EVERY_S = 2.0  # an actor looks so often whether its driver was told to stop
DRAIN_S = 60.0  # a stopping driver waits so long for the last micro-batches


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
            renderer = job.factory()
            settled = job.settle(renderer)
            self.sickness = canary_fault(renderer, settled.micro_batch) or ""
            self.runner = ShardRunner(job.store, renderer, settled.micro_batch)
            self.waves = {w.number: w for w in job.store.waves()}
        except EnvironmentFault as error:
            # Raised here it would reach the user as an actor's death; as a row it keeps its words.
            self.refusal = str(error)
        except Exception as error:  # noqa: BLE001 - one bad device must not end the others' run
            self.sickness = storage_words(error) if is_storage_fault(error) else f"{type(error).__name__}: {error}"
        threading.Thread(target=self._watch, args=(_sigterm_pipe(),), daemon=True).start()

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


def worker_shape(compute: Compute, resources: Resources) -> tuple[int, float, float]:
    """(workers, CPUs each, GPUs each) of the render pool; never more workers than asked for, at least one."""
    gpus = compute.gpus_per_renderer if resources.gpus else 0.0
    fit = resources.gpus / gpus if gpus else resources.cpus / max(compute.cpus_per_renderer, 0.01)
    return max(1, compute.render_workers or math.floor(fit)), compute.cpus_per_renderer, gpus


def settle_first(job: RenderJob, compute: Compute, resources: Resources) -> Settled:
    """render.json, measured by one renderer in a worker process if it is not there yet; needed to cut shards."""
    import ray

    settled = read_settled(job.store)
    if settled is not None:
        return settled
    say("generate: measuring the renderer on one worker")
    _, cpus, gpus = worker_shape(compute, resources)

    def measure() -> Settled | str:
        try:
            return job.settle(job.factory())
        except Exception as error:  # noqa: BLE001 - told in words, below
            return storage_words(error) if is_storage_fault(error) else f"{type(error).__name__}: {error}"

    found: Settled | str = ""
    for _ in range(MAX_IDLE_ROUNDS):
        found = ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(measure).remote())
        if isinstance(found, Settled):
            return found
    raise EnvironmentFault(
        f"the renderer cannot be measured: {found}. Check the device and the weights; nothing is lost, the same "
        "command goes on from here."
    )


def run_rounds(
    job: RenderJob,
    pending: Callable[[], list[tuple[Wave, int]]],
    compute: Compute,
    resources: Resources,
    view: RenderView,
    backwards: bool = False,
) -> dict[str, float]:
    """Renders until `pending()` is empty.

    Args:
        backwards: take the last shards first, to meet a driver that works from the front.

    Returns:
        Sums over this run: rows `ok`, `failed`, `rejected`, `render_s`, and `wall_s`.

    Raises:
        EnvironmentFault: a renderer refuses its render.json, no worker is fit to work, storage fails, or this process
            got SIGTERM.
    """
    sums = dict.fromkeys(SUMMED, 0.0)
    idle, faults, sick, began = 0, 0, 0, time.perf_counter()
    workers, _, _ = worker_shape(compute, resources)
    with _stop_on_sigterm(job) as stopping:
        while shards := pending():
            moved, reason, drained = 0, "", set()
            if sick:
                # A sick actor may be the first to be ready and take as many shards as fit in its queue: let there be
                # copies for the healthy ones. A copy of a shard that is done answers "already".
                shards = shards * max(2, math.ceil(workers * TASKS_PER_ACTOR / len(shards)))
            sick = 0
            for row in _round(job, shards[::-1] if backwards else shards, compute, resources):
                if row["outcome"] == "refused":
                    raise EnvironmentFault(row["reason"])
                faults = faults + 1 if row["outcome"] == "storage" else 0
                if faults >= MAX_FAULTS:
                    raise EnvironmentFault(
                        f"root {job.store.storage.root}: {row['reason']}. Nothing is lost: the same command then goes "
                        "on from here."
                    )
                sick += row["outcome"] == "sick"
                moved += row["outcome"] in ("committed", "already", "second opinion", "stopped")
                reason = row["reason"] or reason
                for key in SUMMED:
                    sums[key] += row[key]
                view.add(row)
                if stopping.is_set():
                    drained |= {row["actor"]} if row["outcome"] == "stopped" else set()
                    if len(drained) >= workers or time.monotonic() > stopping.since + DRAIN_S:
                        break
            if stopping.is_set():
                raise EnvironmentFault(
                    "stopped by SIGTERM after the micro-batches that were being rendered. Nothing is lost; the same "
                    "command goes on from here."
                )
            idle = 0 if moved else idle + 1
            if idle >= MAX_IDLE_ROUNDS:
                what = "no render worker passes its canary" if sick else f"root {job.store.storage.root} cannot be used"
                raise EnvironmentFault(
                    f"{what} ({reason}). Check the {'device and the weights' if sick else 'storage'}; nothing is lost, "
                    "the same command goes on from here."
                )
    return sums | {"wall_s": time.perf_counter() - began}


class _Stopping(threading.Event):
    since = math.inf


@contextmanager
def _stop_on_sigterm(job: RenderJob) -> Iterator[_Stopping]:
    """While this lasts, SIGTERM asks the actors to stop instead of ending the process."""
    stopping = _Stopping()
    storage = job.store.storage

    def stop(*_: object) -> None:
        if not stopping.is_set():
            stopping.since = time.monotonic()
            stopping.set()
            say("generate: SIGTERM; stopping after the micro-batches that are being rendered")
            threading.Thread(target=storage.put, args=(job.stop_file, b""), daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
        if stopping.is_set():
            storage.delete(job.stop_file)


def actor_of(job: RenderJob) -> type[RenderActor]:
    """The actor under a name that says, in Ray's dashboard and in `ps`, what it renders and with which weights."""
    return type(f"Render({job.store.name} by {job.store.identity['generator_id'][:8]})", (RenderActor,), {})


def _round(job: RenderJob, shards: list[tuple[Wave, int]], compute: Compute, resources: Resources) -> Any:
    """Statistics rows of one pass over the shards, as they come in."""
    import ray.data

    quiet_data_context()
    context = ray.data.DataContext.get_current()
    # A shard may take long on a slow device; only a real hang should end the run.
    context.execution_no_progress_timeout_s = max(
        context.execution_no_progress_timeout_s, round(30 * compute.shard_seconds)
    )
    # A node may be taken away while an actor on it loads its weights; one that always dies there ends the run.
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    workers, cpus, gpus = worker_shape(compute, resources)
    workers = min(workers, len(shards))
    items = [{"wave": wave.number, "shard": shard} for wave, shard in shards]
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=TASKS_PER_ACTOR,
        max_concurrent_calls_per_actor=CALLS_PER_ACTOR, enable_true_multi_threading=True,
    )  # fmt: skip
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actor_of(job), fn_constructor_kwargs={"job": job}, batch_size=1, batch_format="numpy", compute=pool,
        num_cpus=cpus, num_gpus=gpus or None,
    )  # fmt: skip
    rows.set_name(f"render-{job.store.name}")
    yield from rows.iter_rows()
