"""A task for a child process that one input ends and another makes raise; light to import, as every child does."""

from __future__ import annotations

import os
import signal
from typing import Any


def ends_its_process(location: str) -> dict[str, Any]:
    """A fact, unless the location says otherwise."""
    if location == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if location == "lost":
        raise ConnectionError("the store is gone")
    return {"png": location.encode()}
