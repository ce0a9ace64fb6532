"""Drives a pool of render actors with Ray Data over frozen shards, in rounds, until nothing wanted is pending.

One Ray Data row is one shard (its wave and number only), one row a block, so nothing else can be cut or fused under
us; `from_items` needs no read task, so no pool size can starve the input of a CPU. The actor commits; the driver
sees a row of statistics. A second round gives rows that failed to a second actor. Inputs: a `RenderJob`. Knows
nothing of plans.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.core.faults import is_storage_fault, storage_words
from raysynth.core.progress import say
from raysynth.stages.cluster import Resources, gpu_times, quiet_data_context, slots, times
from raysynth.stages.live import RenderView
from raysynth.stages.render_actor import SUMMED, RenderActor, RenderJob
from raysynth.synth.sets import FOLD_PAST, SyntheticSet, Wave
from raysynth.synth.settle import Settled, read_settled

MAX_IDLE_ROUNDS = 3
MAX_FAULTS = 3  # shards in a row that storage refused; s3fs has retried each request by then
MAX_INIT_DEATHS = 5  # actors in a row that died while they loaded the renderer
CALLS_PER_ACTOR = 3  # one shard renders, one is loaded and waits, one encodes and commits
GROWING = 2  # times as many tasks wait at each actor of a pool that may grow; Ray Data adds actors above 1.75
ROUND_SHARDS = 20_000  # Ray Data's driver holds about 10 KB a block
DRAIN_S = 60.0  # a stopping driver waits so long for the last micro-batches
PATIENCE_S = 60.0  # without a first renderer, before words about it


def worker_shape(compute: Compute, resources: Resources) -> tuple[int, float, float]:
    """(workers to begin with, CPUs each, GPUs each) of the render pool; at least one worker."""
    gpus = compute.gpus_per_renderer if resources.gpus else 0.0
    fit = gpu_times(resources.gpus, gpus) if gpus else times(resources.cpus, max(compute.cpus_per_renderer, 0.01))
    return max(1, compute.render_workers or fit), compute.cpus_per_renderer, gpus


def where(compute: Compute) -> dict[str, Any]:
    """Which nodes render workers may run on, as Ray's own arguments."""
    found: dict[str, Any] = {"label_selector": dict(compute.render_labels)} if compute.render_labels else {}
    return found | ({"accelerator_type": compute.accelerator} if compute.accelerator else {})


def _asked_for(compute: Compute) -> str:
    return "".join(f", {key}={value}" for key, value in where(compute).items())


def require_room(compute: Compute, resources: Resources) -> None:
    """Refuses a renderer that fits no node, or Ray would wait for ever; a pool that may grow waits for its nodes.

    Raises:
        EnvironmentFault: no node has that many CPUs or GPUs.
    """
    import ray

    _, cpus, gpus = worker_shape(compute, resources)
    one = {kind: n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not one or compute.max_render_workers or slots(nodes, one):
        return
    have = sorted({" and ".join(f"{node.get(kind, 0):g} {kind}" for kind in one) for node in nodes})
    raise EnvironmentFault(
        f"compute.cpus_per_renderer, gpus_per_renderer: got {' and '.join(f'{n:g} {kind}' for kind, n in one.items())} "
        f"for one renderer, must be at most what a node has ({'; '.join(have)}). Lower it, or add a larger node; where "
        "nodes come later, set compute.max_render_workers."
    )


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
        answer = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2, **where(compute))(measure).remote()
        if not ray.wait([answer], timeout=PATIENCE_S)[0]:
            say(f"generate: no answer after {PATIENCE_S:g}s: the renderer is slow to start, or no node with {cpus:g} "
                f"CPUs and {gpus:g} GPUs is free{_asked_for(compute)}; `ray status` tells. Still waiting")  # fmt: skip
        found = ray.get(answer)
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
    began, judge, folder = time.perf_counter(), _Judge(job), _Folder(job.store)
    workers, _, _ = worker_shape(compute, resources)
    most = max(workers, compute.max_render_workers or 0)
    with _stop_on_sigterm(job) as stopping:
        while shards := pending():
            if judge.sick:
                # A sick actor may be the first to be ready and take as many shards as fit in its queue: let there be
                # copies for the healthy ones. A copy of a shard that is done answers "already".
                shards = shards * max(2, math.ceil(workers * CALLS_PER_ACTOR / len(shards)))
            if backwards:
                shards.reverse()
            drained = set()
            lengths = {shard: wave.shard_rows[shard - wave.first_shard] for wave, shard in shards[:ROUND_SHARDS]}
            for row in _round(job, shards[:ROUND_SHARDS], compute, resources):
                judge.row(row)
                folder.row(row)
                rows = lengths.pop(row["shard"], 0) if row["outcome"] in ("committed", "already") else 0
                view.add(row, rows if row["outcome"] == "already" else 0)
                if stopping.is_set():
                    drained |= {row["actor"]} if row["outcome"] == "stopped" else set()
                    if len(drained) >= min(most, len(shards)) or time.monotonic() > stopping.since + DRAIN_S:
                        break
            if stopping.is_set():
                raise EnvironmentFault(
                    "stopped by SIGTERM after the micro-batches that were being rendered. Nothing is lost; the same "
                    "command goes on from here."
                )
            judge.round_is_over()
    return judge.sums | {"wall_s": time.perf_counter() - began}


class _Judge:
    """What the rows of statistics say of workers and storage. Its methods raise EnvironmentFault."""

    def __init__(self, job: RenderJob) -> None:
        self.root = f"root {job.store.storage.root}"
        self.sums = dict.fromkeys(SUMMED, 0.0)
        self.idle = self.faults = self.sick = self.moved = 0
        self.reason, self.fresh = "", True

    def row(self, row: dict[str, Any]) -> None:
        if self.fresh:
            self.fresh, self.sick, self.moved, self.reason = False, 0, 0, ""
        if row["outcome"] == "refused":
            raise EnvironmentFault(row["reason"])
        self.faults = self.faults + 1 if row["outcome"] == "storage" else 0
        if self.faults >= MAX_FAULTS:
            raise EnvironmentFault(
                f"{self.root}: {row['reason']}. Nothing is lost: the same command then goes on from here."
            )
        self.sick += row["outcome"] == "sick"
        self.moved += row["outcome"] in ("committed", "already", "at work", "second opinion", "stopped")
        self.reason = row["reason"] or self.reason
        for key in SUMMED:
            self.sums[key] += row[key]

    def round_is_over(self) -> None:
        self.fresh = True
        self.idle = 0 if self.moved else self.idle + 1
        if self.idle < MAX_IDLE_ROUNDS:
            return
        what = "no render worker passes its canary" if self.sick else f"{self.root} cannot be used"
        raise EnvironmentFault(
            f"{what} ({self.reason}). Check the {'device and the weights' if self.sick else 'storage'}; nothing is "
            "lost, the same command goes on from here."
        )


class _Folder:
    """Folds markers beside the rendering, whenever ten thousand more shards are done."""

    def __init__(self, store: SyntheticSet) -> None:
        # Another handle: what this one remembers is read by the driver's own thread.
        self.store = SyntheticSet(store.storage, store.name, store.identity)
        self.committed, self.thread = 0, threading.Thread()

    def row(self, row: dict[str, Any]) -> None:
        self.committed += row["outcome"] == "committed"
        if self.committed >= FOLD_PAST and not self.thread.is_alive():
            self.committed, self.thread = 0, threading.Thread(target=self._fold, daemon=True)
            self.thread.start()

    def _fold(self) -> None:
        try:
            self.store.fold()
        except Exception as error:
            if not is_storage_fault(error):
                raise
            # The next one folds these too.


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
    most = min(max(workers, compute.max_render_workers or 0), len(shards))
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=most, initial_size=workers, max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
        # No more than it works on, or the last shards of a run would wait at one actor while others are idle.
        max_tasks_in_flight_per_actor=CALLS_PER_ACTOR * (GROWING if most > workers else 1),
        enable_true_multi_threading=True,
    )  # fmt: skip
    job = dataclasses.replace(job, alone=most == 1)
    items = [{"wave": wave.number, "shard": shard} for wave, shard in shards]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actor_of(job), fn_constructor_kwargs={"job": job}, batch_size=1, batch_format="numpy", compute=pool,
        num_cpus=cpus, num_gpus=gpus or None, **where(compute),
    )  # fmt: skip
    rows.set_name(f"render-{job.store.name}")
    yield from rows.iter_rows()
