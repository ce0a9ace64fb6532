"""What a person sees of rendering: a view that is redrawn in place in a terminal, one quiet line every 10 s elsewhere.

`draw` makes the picture of a `Rendering`; `raysynth status` shows the same from markers. Input: rows of statistics as
they come in. Knows nothing of Ray.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raysynth.core.experiment import Compute
from raysynth.core.progress import console, duration, say
from raysynth.stages.telemetry import BEAT_S, RenderMetrics
from raysynth.synth.settle import Settled
from raysynth.synth.throughput import Throughput

REDRAWN_A_SECOND = 2
QUIET_S = 10.0
BAR = 20
"""Columns of an actor's busy bar."""
WIDE, NARROW = 100, 60
"""Columns of a terminal that has room for the bars; of one that is too narrow for counts and times of actors."""


def gpus_of_worker(settled: Settled | None, compute: Compute) -> float:
    """GPUs that one actor of a set holds: 0 where CPUs render it, or where nothing is known yet."""
    return compute.gpus_per_renderer if settled and settled.on_gpu else 0.0


@dataclass
class Rendering:
    """A set being rendered: what `draw` draws and `line` says."""

    name: str
    wanted: int
    done: int
    gpus_each: float = 0.0
    """GPUs of one actor; 0 where CPUs render."""
    price: float | None = None
    """Currency units a GPU hour."""
    sums: Throughput = field(default_factory=Throughput)
    failed: int | None = None
    """Wanted rows that failed, where that is known better than by the sums."""
    rejected: int | None = None

    @property
    def gpu_seconds(self) -> float:
        """Seconds of rendering x GPUs of an actor."""
        return self.sums.render_s * self.gpus_each

    @property
    def cost(self) -> float | None:
        """Currency units so far; None without a price or without GPUs."""
        return self.gpu_seconds / 3600 * self.price if self.price is not None and self.gpus_each else None

    def speed(self, now: float) -> list[str]:
        """Rates, busy share, time left; where nobody is at work, or nothing is left, the average only."""
        s = self.sums
        left, busy = s.left_s(self.wanted - self.done, now), s.busy(now)
        said = []
        if left is not None:
            said = [f"{s.rate(now):,.1f} images/s now, {s.average:,.1f} on average", f"{duration(left)} left"]
        elif s.rows:
            said = [f"{s.average:,.1f} images/s on average"]
        return said if busy is None else [*said, f"busy {busy:.0%}"]

    def counts(self) -> list[str]:
        """What went wrong, and what it cost."""
        s = self.sums
        failed = s.failed if self.failed is None else self.failed
        rejected = s.rejected if self.rejected is None else self.rejected
        said = [f"{failed:,} failed", f"{rejected:,} rejected", f"{s.retried:,} of {s.shards:,} shards retried"]
        if self.gpus_each:
            said.append(f"{self.gpu_seconds:,.0f} GPU seconds")
        if self.cost is not None:
            each = f", {1000 * self.cost / s.ok:,.3f} per thousand accepted" if s.ok else ""
            said.append(f"cost {self.cost:,.2f}{each}")
        return said

    def line(self, now: float) -> str:
        """All of it but the actors, in one line."""
        return "  ".join([f"{self.name}: {self.done:,}/{self.wanted:,} images", *self.speed(now), *self.counts()])


@dataclass
class Picture:
    """A drawing of `rendering` that fits the terminal it is printed on.

    Attributes:
        spare: lines that something else on the screen needs.
        lock: held while it is drawn.
    """

    rendering: Rendering
    now: Callable[[], float] = time.time
    spare: int = 2
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self.lock:
            parts = self._parts(console, options)
        yield from parts

    def _parts(self, console: Console, options: ConsoleOptions) -> list[RenderableType]:
        r, now, width = self.rendering, self.now(), options.max_width
        head = [Text(f"{r.name}: {r.done:,}/{r.wanted:,} images", style="bold")]
        head += [Text(text) for text in r.speed(now) or ["waiting for the first shard"]]
        parts: list[RenderableType] = [*_flow(head, width)]
        parts.append(Padding(_bar(r.done, max(1, r.wanted), width), 0))  # ends its line
        parts += _flow([Text(text) for text in r.counts()], width)
        actors = r.sums.working(now)
        if not actors:
            return parts
        # Without a terminal nothing scrolls away.
        room = (console.height if console.is_terminal else 10_000) - len(parts) - self.spare - 2
        if room < 2:
            return parts
        shown = actors if len(actors) <= room else actors[: room - 1]
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        names = ("busy", "images/s", "images", "last shard")[: 4 if width >= NARROW else 2]
        taken = sum(max(len(name), 7) + 2 for name in names) + (BAR + 2 if width >= WIDE else 0)
        table.add_column("actor", no_wrap=True, overflow="ellipsis", max_width=max(5, width - taken))
        if width >= WIDE:
            table.add_column("", no_wrap=True, width=BAR)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for p in shown:
            bar = [_bar(p.busy or 0.0, 1.0, BAR)] if width >= WIDE else []
            cells = [_share(p.busy), f"{p.rate:,.1f}", f"{p.rows:,}", f"{duration(max(0.0, now - p.last))} ago"]
            table.add_row(p.worker, *bar, *cells[: len(names)])
        parts.append(table)
        if len(shown) < len(actors):
            parts.append(Text(f"and {len(actors) - len(shown):,} more, no less busy", style="dim", no_wrap=True))
        return parts


def _bar(done: float, total: float, width: int) -> ProgressBar:
    return ProgressBar(total, done, width, complete_style="cyan", finished_style="green")


def _share(busy: float | None) -> str:
    return "-" if busy is None else f"{busy:.0%}"


def _flow(words: list[Text], width: int) -> list[Text]:
    """Phrases side by side, broken between them where a line is full, cut where one alone is too long."""
    lines = [Text(no_wrap=True, overflow="ellipsis")]
    for word in words:
        if lines[-1].cell_len and lines[-1].cell_len + 3 + word.cell_len > width:
            lines.append(Text(no_wrap=True, overflow="ellipsis"))
        lines[-1].append("   " if lines[-1].cell_len else "").append_text(word)
    return lines


class RenderView:
    """Shows a rendering while this context lasts; ends with one plain line.

    Args:
        rendering: what is shown; its sums and done rows grow by `add`.
        metrics: told of the rows too.
        every_s: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        rendering: Rendering,
        metrics: RenderMetrics | None = None,
        every_s: float = QUIET_S,
    ) -> None:
        self.rendering, self.metrics, self.every_s = rendering, metrics, every_s
        self.shown, self.began = time.monotonic(), time.monotonic()
        self._lock = threading.Lock()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self._live: Live | None = None
        # FORCE_COLOR makes a log a terminal for rich; redrawing it would fill it with control codes.
        if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
            picture = Picture(rendering, lock=self._lock)
            # The common console, so that what others say meanwhile comes above the view.
            self._live = Live(picture, console=console, refresh_per_second=REDRAWN_A_SECOND, transient=True)

    def __enter__(self) -> RenderView:
        self._thread.start()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if self._live:
            self._live.stop()
        say(f"{self.rendering.line(time.time())}  in {duration(time.monotonic() - self.began)}")

    def _beat(self) -> None:
        """Repeats the metrics that must not go stale while no row comes in."""
        while self.metrics and not self._ended.wait(BEAT_S):
            with self._lock:
                self.metrics.repeat(self.rendering.sums, self.rendering.done, time.time())

    def add(self, row: Mapping[str, Any], elsewhere: int = 0) -> None:
        """One row of statistics came in.

        Args:
            elsewhere: rows of its shard that another driver's actor had committed.
        """
        now = time.time()
        with self._lock:
            r = self.rendering
            r.sums.add_row(row, now)
            r.done += int(row["ok"] + row["failed"] + row["rejected"]) + elsewhere
            if self.metrics:
                self.metrics.add(row, r.sums, r.done, now)
        if not self._live and time.monotonic() - self.shown >= self.every_s:
            self.shown = time.monotonic()
            say(self.rendering.line(now))
