"""Waiting for an event instead of sleeping through a guess."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(what: Callable[[], object], seconds: float = 240, every_s: float = 0.02) -> None:
    """Returns as soon as `what()` is true; fails the test where that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain"
        time.sleep(every_s)
