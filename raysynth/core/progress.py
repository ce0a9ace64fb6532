"""One progress line a stage: done/total, rate, failed, time left. Live in a terminal, quiet elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console

# Logs have no width; 80 columns would cut folder names out of tables.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """One line for a person, without markup."""
    console.print(text, markup=False)


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """Use as a context manager; call `advance` whenever work is finished.

    Args:
        stage: name shown first.
        total: units of work in all.
        unit: plural noun of the work, such as `images`.
        done: units finished by an earlier run; they do not count in the rate.
        every_s: seconds between lines where there is no terminal.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0, every_s: float = 10.0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.fresh, self.failed = done, 0, 0
        self.every_s, self.facts = every_s, ""
        self.started = self.shown = time.monotonic()
        self.first: tuple[float, int] | None = None
        self.live = sys.stdout.isatty()
        self._said: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._show(last=True)

    def advance(self, n: int, failed: int = 0, facts: str = "") -> None:
        """`n` more units are done, `failed` of them badly; `facts` is shown at the end of the line."""
        self.done += n
        self.fresh += n
        self.failed += failed
        self.facts = facts or self.facts
        now = time.monotonic()
        if self.first is None:
            # Workers start before the first unit is done; the rate is that of the work.
            self.first = now, self.fresh
        if now - self.shown >= (0.25 if self.live else self.every_s):
            self.shown = now
            self._show()

    def line(self, last: bool = False) -> str:
        """The line as text; the `last` one says the rate over all of it, start included."""
        now = time.monotonic()
        since, before = (self.started, 0) if last else self.first or (now, 0)
        rate = (self.fresh - before) / max(now - since, 1e-9) if self.fresh > before else 0.0
        parts = [f"{self.stage}: {self.done:,}/{self.total:,} {self.unit}"]
        if rate:
            parts.append(f"{rate:,.1f} {self.unit}/s")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        left = self.total - self.done
        parts.append(f"{duration(left / rate)} left" if rate and left > 0 else duration(now - self.started))
        return "  ".join([*parts, self.facts] if self.facts else parts)

    def _show(self, last: bool = False) -> None:
        if self.live:
            # A line that wraps would leave its upper part behind.
            line = self.line(last) if last else self.line()[: console.width - 1]
            sys.stdout.write("\r\x1b[2K" + line + ("\n" if last else ""))
            sys.stdout.flush()
        elif not last or self._said != self.done:
            self._said = self.done
            say(self.line(last))
