"""How fast a set is rendered: images/s, busy share of each actor, retries, time left. Arithmetic only.

Input: one record a shard, either a statistics row of the driver or a marker on storage, in any order; so that the
live view, `raysynth status` and the metrics say the same. Knows nothing of Ray, terminals or storage, and never asks
for the time. Memory: a few hundred bytes an actor, however many shards.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW_S = 60.0
"""What `now` means: the last minute of each actor, and at least its last shard."""
BREAK_S = 300.0
"""A longer silence of all actors is no rendering: the driver was away. Averages leave it out."""


@dataclass
class Pace:
    """What one actor did. Times are seconds since 1970."""

    worker: str
    """`host/pid`"""
    shards: int = 0
    rows: int = 0
    render_s: float = 0.0
    first: float = float("inf")
    """When its first shard began to render."""
    last: float = float("-inf")
    """When its latest shard was done."""
    recent: list[tuple[float, int]] = field(default_factory=list)
    """(finished, rows) of the last minute and the one before it."""

    def add(self, finished: float, render_s: float, rows: int) -> None:
        """One more shard."""
        self.shards += 1
        self.rows += rows
        self.render_s += render_s
        self.first, self.last = min(self.first, finished - render_s), max(self.last, finished)
        insort(self.recent, (finished, rows))
        while len(self.recent) > 1 and self.recent[1][0] <= self.last - WINDOW_S:
            self.recent.pop(0)

    @property
    def busy(self) -> float | None:
        """Share of its time, from its first shard to its latest, in which it rendered; None before the second shard.

        What it is rendering now is left out on both sides, so that long shards do not look like idling.
        """
        return min(1.0, self.render_s / max(self.last - self.first, 1e-9)) if self.shards > 1 else None

    @property
    def rate(self) -> float:
        """Rows/s over its last minute, or its last shard if that took longer."""
        begun, _ = self.recent[0]
        if begun <= self.last - WINDOW_S:
            rows = sum(n for _, n in self.recent[1:])
        else:  # all it ever did is within the minute
            begun, rows = self.first, sum(n for _, n in self.recent)
        return rows / max(self.last - begun, 1e-9)

    def working(self, now: float) -> bool:
        """Whether it may still be at work: it is not silent for longer than a minute and three of its shards."""
        return now - self.last <= WINDOW_S + 3 * (self.last - self.first) / self.shards


class Throughput:
    """Sums over shards.

    Attributes:
        ok, failed, rejected: rows by status.
        retried: shards that were taken more than once.
        render_s: seconds that held a device.
        running_s: seconds in which anything was rendered; pauses of less than `BREAK_S` are part of it.
    """

    def __init__(self) -> None:
        self.ok = self.failed = self.rejected = self.retried = self.shards = 0
        self.render_s = self.running_s = 0.0
        self.actors: dict[str, Pace] = {}
        self._spans: list[tuple[float, float]] = []

    @property
    def rows(self) -> int:
        """Rows with a verdict."""
        return self.ok + self.failed + self.rejected

    def add_row(self, row: Mapping[str, Any], now: float) -> None:
        """One row of statistics, which came in at `now`."""
        self.ok += int(row["ok"])
        self.failed += int(row["failed"])
        self.rejected += int(row["rejected"])
        if row["outcome"] == "committed":
            self.shards += 1
            self.retried += bool(row["attempt"])
        if row["render_s"]:
            rows = int(row["ok"] + row["failed"] + row["rejected"])
            self._add(row["actor"], row["worker"], now, float(row["render_s"]), rows)

    def add_marker(self, marker: Mapping[str, Any]) -> None:
        """The marker of one finished shard."""
        self.ok += marker["ok"]
        self.failed += len(marker["failed"])
        self.rejected += len(marker["rejected"])
        self.shards += 1
        self.retried += bool(marker["attempt"])
        self._add(marker["actor"], marker["worker"], marker["finished"], marker["render_seconds"], marker["rows"])

    def _add(self, actor: str, worker: str, finished: float, render_s: float, rows: int) -> None:
        self.render_s += render_s
        self.actors.setdefault(actor, Pace(worker)).add(finished, render_s, rows)
        self._run(finished - render_s, finished)

    def _run(self, start: float, stop: float) -> None:
        """Merges a span of rendering into the others."""
        at = len(self._spans)
        while at and self._spans[at - 1][0] > stop + BREAK_S:
            at -= 1
        end = at
        while at and self._spans[at - 1][1] >= start - BREAK_S:
            at -= 1
            was = self._spans[at]
            self.running_s -= was[1] - was[0]
            start, stop = min(start, was[0]), max(stop, was[1])
        self._spans[at:end] = [(start, stop)]
        self.running_s += stop - start

    def working(self, now: float) -> list[Pace]:
        """Actors that may be at work, the least busy first: those are what one looks for."""
        return sorted((p for p in self.actors.values() if p.working(now)), key=_busy_then_name)

    def rate(self, now: float) -> float:
        """Rows/s of all actors at work, each over its last minute."""
        return sum(p.rate for p in self.working(now))

    @property
    def average(self) -> float:
        """Rows/s while anything was rendered."""
        return self.rows / self.running_s if self.running_s else 0.0

    def busy(self, now: float) -> float | None:
        """Share of the time of the actors at work in which they rendered; None before one has two shards."""
        here = [p for p in self.working(now) if p.shards > 1]
        wall = sum(p.last - p.first for p in here)
        return min(1.0, sum(p.render_s for p in here) / wall) if wall else None

    def left_s(self, rows: int, now: float) -> float | None:
        """Seconds until `rows` more are done, at the present rate; None where nobody is at work."""
        rate = self.rate(now)
        return rows / rate if rate and rows > 0 else None


def _busy_then_name(pace: Pace) -> tuple[float, str]:
    return (2.0 if pace.busy is None else pace.busy), pace.worker
