"""Renders a shard's rows in micro-batches at fixed places: halves them when memory is short, finds guilty rows,
and stops between two of them when told.

A failing row is found by bisection, a dying one by the records of `attempts`. Knows nothing of storage, parts or
markers. Exceptions are caught at the row boundary here and nowhere else in the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raysynth.synth.attempts import Attempt
from raysynth.synth.renderer import (
    Renderer,
    Row,
    SickWorker,
    canary_fault,
    fault_in,
    is_out_of_memory,
    release_memory,
    to_uint8,
)

CANARY_EVERY = 50  # shards; about an hour of one GPU


@dataclass
class Rendered:
    """Images of one shard as they come in."""

    micro_batch: int
    """Images rendered at once; the recorded size alone says how the bytes were made."""
    images: dict[int, np.ndarray] = field(default_factory=dict)
    """place -> (H, W, C) uint8."""
    failed: dict[int, str] = field(default_factory=dict)
    """place -> reason."""
    left: set[int] = field(default_factory=set)
    """Places not reached because the process was told to stop."""


class OutOfMemory(Exception):
    """Not even the smallest possible next micro-batch can follow what was rendered before at another size."""


class BatchRenderer:
    """One renderer and its health; used by one thread at a time.

    Args:
        micro_batch: images rendered at once, from render.json.
        stopping: set by whoever wants the process to end after the micro-batch it is rendering.
    """

    def __init__(self, renderer: Renderer, micro_batch: int, stopping: threading.Event) -> None:
        self.renderer, self.micro_batch, self.stopping = renderer, micro_batch, stopping
        self.shards = 0

    def render(
        self, rows: Sequence[Row], only: set[int], attempt: Attempt, micro_batch: int | None = None
    ) -> Rendered:
        """Renders the places `only` of a shard.

        Out of memory starts the shard again at half the micro-batch.

        Args:
            micro_batch: the size at which the other places were rendered by an earlier attempt; it is kept, or

        Raises:
            OutOfMemory: it cannot be kept.
            SickWorker: the canary failed now, or fails after rows failed.
        """
        if self.shards and self.shards % CANARY_EVERY == 0:
            self._require_health(attempt)
        self.shards += 1
        size = micro_batch or self.micro_batch
        while True:
            try:
                return self._pass(rows, only, size, attempt)
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                if micro_batch is not None:
                    raise OutOfMemory from error
                size //= 2
            # Outside the except clause, whose traceback keeps the failed batch's tensors alive.
            release_memory(self.renderer)

    def _pass(self, rows: Sequence[Row], only: set[int], size: int, attempt: Attempt) -> Rendered:
        done = Rendered(size)
        history = attempt.history
        for start in range(0, len(rows), size):
            places = [p for p in range(start, min(start + size, len(rows))) if p in only]
            if self.stopping.is_set() and not history.careful:
                done.left.update(places)
                continue
            for place in set(places) & history.quarantined:
                done.failed[place] = "the process died twice while rendering this row alone"
            for group in history.groups(places):
                self._group(rows, start, group, done, attempt)
        if history.careful:
            attempt.step([])
        elif done.failed:
            self._require_health(attempt, after_rows=True)
        return done

    def _group(self, rows: Sequence[Row], start: int, group: list[int], done: Rendered, attempt: Attempt) -> None:
        """Renders some places of one micro-batch; in careful mode the worker is proven well before and after."""
        if not attempt.history.careful:
            self._micro_batch(rows, start, group, done)
            return
        suspects = attempt.history.steps and set(group) <= set(attempt.history.steps[-1])
        if suspects:
            attempt.step([])
            self._require_health(attempt)
        attempt.step(group)
        self._micro_batch(rows, start, group, done)
        if set(group) & set(done.failed):
            self._require_health(attempt, after_rows=True)

    def _micro_batch(self, rows: Sequence[Row], start: int, places: list[int], done: Rendered) -> None:
        """Renders `places` at their fixed positions; bisects on an error until the guilty rows stand alone."""
        size = done.micro_batch
        slots: list[Row | None] = [None] * size
        for p in places:
            slots[p - start] = rows[p]
        try:
            images = self.renderer.render(slots, size)
        except Exception as error:
            if is_out_of_memory(error) and size > 1:
                raise
            if len(places) == 1:
                done.failed[places[0]] = f"{type(error).__name__}: {error}"[:300]
                return
            middle = len(places) // 2
            self._micro_batch(rows, start, places[:middle], done)
            self._micro_batch(rows, start, places[middle:], done)
            return
        for p in places:
            fault = fault_in(images[p - start])
            if fault:
                done.failed[p] = fault
            else:
                done.images[p] = to_uint8(images[p - start])

    def _require_health(self, attempt: Attempt, after_rows: bool = False) -> None:
        """Raises SickWorker where the canary fails.

        A worker that was well before these rows and is sick after them died of them, as far as anyone can tell: a
        row that breaks the CUDA context leaves the process alive and of no use. That counts as a death, so that the
        row is found; a worker that is sick anyway ends without a stain on the rows.
        """
        fault = canary_fault(self.renderer, self.micro_batch)
        if fault:
            if not after_rows:
                attempt.end("worker is sick", canary=fault)
            raise SickWorker(fault)
