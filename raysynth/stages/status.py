"""`raysynth status`: what is done and running, from storage alone; from any machine that sees the root. No Ray.

Input: a `Pipeline` that is only looked at. What was read once (waves, markers, the plan) is kept for the next look,
so that `--watch` costs a listing and the new markers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysynth.core.errors import EnvironmentFault
from raysynth.core.lease import holder_of
from raysynth.core.progress import console, say
from raysynth.stages.live import Picture, Rendering, gpus_of_worker
from raysynth.stages.pipeline import Pipeline, is_sweep
from raysynth.stages.plan import wanted_rows
from raysynth.stages.sweep import find_trials, is_planned, rendering
from raysynth.synth.ledger import ABSENT, FAILED, REJECTED, Ledger
from raysynth.synth.settle import read_settled
from raysynth.synth.throughput import Throughput


class SetStatus:
    """One synthetic set, read again and again."""

    def __init__(self, pipeline: Pipeline) -> None:
        """
        Raises:
            EnvironmentFault: the generator or the plan is not there yet, so that the set has no name.
        """
        self.pipeline, self.store = pipeline, pipeline.synthetic_set
        self.wanted = wanted_rows(pipeline.experiment, pipeline.storage, pipeline.plan)
        self.ledger = Ledger(self.store)
        self.markers: dict[int, dict[str, Any]] = {}
        self.sums, self._counted = Throughput(), set[int]()

    def read(self) -> Rendering:
        """The set as it is now. Reads only markers that are new."""
        done = self.ledger.refresh().done
        self.markers = {s: m for s, m in self.markers.items() if s in done}
        self.markers |= self.store.markers(done - self.markers.keys())
        places = self.ledger.find(self.wanted.keys, self.ledger.statuses(self.markers))
        there = places.status > ABSENT
        self._sum(set(places.shards()))
        compute = self.pipeline.experiment.compute
        return Rendering(
            self.pipeline.generated.path, len(self.wanted), int(there.sum()),
            gpus_of_worker(read_settled(self.store), compute), compute.price_per_gpu_hour, self.sums,
            failed=int((places.status == FAILED).sum()), rejected=int((places.status == REJECTED).sum()),
        )  # fmt: skip

    def _sum(self, shards: set[int]) -> None:
        """Brings the sums up to these shards, which hold wanted rows."""
        if not self._counted <= shards:  # some were given up
            self.sums, self._counted = Throughput(), set()
        for marker in sorted((self.markers[s] for s in shards - self._counted), key=lambda m: m["finished"]):
            self.sums.add_marker(marker)
        self._counted = shards

    def notes(self, rendering: Rendering) -> list[str]:
        """Who renders, and where the failed rows are written down."""
        said, storage = [], self.store.storage
        holder = holder_of(storage, self.store.file("lock.json"))
        if holder:
            ago = max(0.0, time.time() - holder["beat"])
            said.append(f"running: process {holder['pid']} on {holder['host']}, heard of {ago:.0f} s ago")
        table = self.pipeline.generated.file("failed.parquet")
        if rendering.failed and storage.exists(table):
            said.append(f"failed rows: {storage.url(table)}")
        return said


class Status:
    """Everything `raysynth status` shows of one experiment."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._sets: dict[tuple[str, str], SetStatus] = {}

    def look(self) -> RenderableType:
        """Artifacts, the progress of rendering, and how many trials of a sweep are trained."""
        trained, trials = self._trials()
        # A sweep writes its own folder at its end only: what it has trained so far lies beside it.
        parts: list[RenderableType] = [artifacts_table(self.pipeline, ["sweep"] if trained else [])]
        for status in self._renderings():
            now = status.read()
            spare = 2 + parts[0].row_count if isinstance(parts[0], Table) else 2
            notes = status.notes(now)
            parts += ["", Picture(now, spare=spare + len(notes)), *(Text(note, no_wrap=True) for note in notes)]
        parts += [f"trials: {trained:,}/{trials:,} trained"] if trials else []
        return Group(*parts)

    def _renderings(self) -> list[SetStatus]:
        """The sets that images are rendered into, as far as they have names."""
        pipelines = [self.pipeline]
        if is_sweep(self.pipeline.experiment):
            pipelines = rendering([(arm, p) for arm, p in self.pipeline.arm_pipelines if is_planned(p)])
        found: dict[tuple[str, str], SetStatus] = {}
        for p in pipelines:
            try:
                key = (p.synthetic_set.path, p.generated.path)
                found[key] = found.get(key) or self._sets.get(key) or SetStatus(p)
            except EnvironmentFault:
                continue
        self._sets = found
        return list(found.values())

    def _trials(self) -> tuple[int, int]:
        """Trained and all trials of a sweep; zeros for anything else, and before its images are made."""
        if not is_sweep(self.pipeline.experiment):
            return 0, 0
        try:
            trials = find_trials(self.pipeline, self.pipeline.experiment)
        except EnvironmentFault:
            return 0, 0
        distinct = {t.classifier.path: t.classifier.complete for t in trials}
        return sum(distinct.values()), len(distinct)


def artifacts_table(pipeline: Pipeline, begun: Sequence[str] = ()) -> Table:
    """One line a stage: done, begun or missing, and its folder. `begun`: stages known to be, whatever is in theirs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state", "folder"):
        table.add_column(column)
    for stage, artifact in pipeline.found().items():
        if artifact is None:
            table.add_row(stage, "waits", "named when the stages before it are done")
        else:
            some = not artifact.complete and (stage in begun or bool(pipeline.storage.list(artifact.path)))
            state = "done" if artifact.complete else "begun" if some else "missing"
            table.add_row(stage, state, pipeline.storage.url(artifact.path))
    return table


def show_status(pipeline: Pipeline, every_s: float | None = None) -> None:
    """Prints the status once, or again every `every_s` seconds until it is interrupted; in place in a terminal."""
    status = Status(pipeline)
    if every_s is None:
        console.print(status.look())
        return
    if not sys.stdout.isatty():
        while True:
            say(time.strftime("%Y-%m-%d %H:%M:%S"))
            console.print(status.look())
            time.sleep(every_s)
    with Live(status.look(), console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(status.look(), refresh=True)
