"""What a person sees of a running sweep: one live table in a terminal, one line a finished trial elsewhere.

Input: what trials report at validations and how they end. Knows nothing of Ray, of training or of storage.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raysynth.core.progress import console, duration, say

FRAME = 3
"""Lines of a terminal that are no trial's: header, footer, cursor."""
STATES = ("failed", "running", "done", "waiting")
"""What is shown first where not everything fits."""
STYLES = {"failed": "red", "running": "bold", "done": "green", "waiting": "dim"}


@dataclass
class Row:
    """One trial of the table."""

    arm: str
    seed: int
    steps: int
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    step: int = 0
    monitor: str = ""
    value: float | None = None
    """Of the latest validation."""
    reason: str = ""
    began: float | None = None
    ended: float | None = None

    @property
    def name(self) -> str:
        """Arm and seed, in words."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def seconds(self) -> float | None:
        """How long the trial has been running, or ran; null before its first validation or start."""
        return None if self.began is None else (self.ended or time.monotonic()) - self.began


@dataclass
class SweepTable:
    """Use as a context manager; tell it of starts, validations and ends by the row's number.

    Args:
        rows: the trials to be trained, in the order of the sweep.
        before: distinct trials of the sweep that earlier runs finished.
    """

    rows: list[Row]
    before: int = 0
    _first: tuple[float, int] | None = field(default=None, init=False)
    """When the first step was heard of, and how many steps were done by then: workers start before they train."""
    _live: Live | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> SweepTable:
        if console.is_terminal:
            self._live = Live(get_renderable=self.table, console=console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, number: int) -> None:
        """The trial has a process; also when it has a new one because the last one died."""
        row = self.rows[number]
        row.state, row.began = "running", row.began or time.monotonic()

    def reported(self, number: int, result: dict[str, Any]) -> None:
        """The trial validated: `step`, `monitor` and `value` are looked at."""
        row = self.rows[number]
        # A worker that died repeats steps; they are not done twice.
        row.step = max(row.step, int(result.get("step", 0)))
        row.monitor, row.value = str(result.get("monitor", row.monitor)), result.get("value", row.value)
        if self._first is None:
            self._first = time.monotonic(), sum(r.step for r in self.rows)

    def ended(self, number: int, reason: str = "") -> None:
        """The trial is done, or failed for `reason`."""
        row = self.rows[number]
        row.state, row.reason, row.ended = "failed" if reason else "done", reason, time.monotonic()
        if self._live is None:
            say(f"sweep: {self._line(row)}")

    def left(self) -> float | None:
        """Seconds until every trial has ended, at the rate of steps so far; null while no rate is known."""
        if self._first is None:
            return None
        since, before = self._first
        fresh, passed = sum(r.step for r in self.rows) - before, time.monotonic() - since
        todo = sum(r.steps - r.step for r in self.rows if r.state in ("running", "waiting"))
        return todo * passed / fresh if fresh > 0 and passed > 0 else None

    def facts(self) -> str:
        """`3/12 trials, 1 failed, 2m10s left`."""
        count = Counter(r.state for r in self.rows)
        ended = self.before + count["done"] + count["failed"]
        words = [f"{ended}/{self.before + len(self.rows)} trials"]
        if count["failed"]:
            words.append(f"{count['failed']} failed")
        left = self.left()
        if left:
            words.append(f"{duration(left)} left")
        return ", ".join(words)

    def _line(self, row: Row) -> str:
        took = f" in {duration(row.seconds)}" if row.seconds is not None else ""
        if row.reason:
            return f"{self.facts()}: {row.name} failed{took}: {row.reason}"
        judged = f"{row.monitor} {row.value:.4f} at step {row.step:,}, " if row.value is not None else ""
        return f"{self.facts()}: {row.name} done, {judged}{row.step:,} steps{took}"

    def shown(self, height: int) -> Sequence[Row]:
        """The rows that fit `height` lines: failed and running ones first, then the last ones to finish; in the order
        of the sweep."""
        room = max(1, height - FRAME)
        ranked = sorted(self.rows, key=lambda r: (STATES.index(r.state), -(r.ended or 0.0)))
        kept = {id(r) for r in ranked[:room]}
        return [r for r in self.rows if id(r) in kept]

    def table(self) -> Group:
        """The table as it is now, at most as high as the terminal."""
        shown = self.shown(console.size.height)
        hidden = Counter(r.state for r in self.rows) - Counter(r.state for r in shown)
        more = ", ".join(f"{n} more {state}" for state, n in hidden.items())
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        for name, side in (("arm", "left"), ("seed", "right"), ("state", "left"), ("step", "right"),
                           ("validation", "left"), ("time", "right")):  # fmt: skip
            # A long reason gives way to the other columns.
            ratio = 1 if name == "validation" else None
            table.add_column(name, justify=side, ratio=ratio, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        for r in shown:
            value = f"{r.monitor} {r.value:.4f}" if r.value is not None else ""
            table.add_row(
                r.arm, str(r.seed), r.state, f"{r.step:,}/{r.steps:,}", r.reason or value,
                duration(r.seconds) if r.seconds is not None else "", style=STYLES[r.state],
            )  # fmt: skip
        facts = " · ".join(part for part in (self.facts(), more) if part)
        return Group(table, Text(facts, style="dim", no_wrap=True, overflow="ellipsis"))
