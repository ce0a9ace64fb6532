"""Keeps lines that Ray prints about itself, and that no user can act on, out of the terminal.

Ray's C++ core writes straight to file descriptor 2, past Python's logging, so the descriptor itself is filtered.
Everything that is not on the list below passes unchanged.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KNOWN = re.compile(
    rb"issues/53727"  # printed as an error for every actor pool with constructor arguments
    rb"|Failed to query Ray Train Controller actor state"  # the state API is off without a dashboard
)


@contextmanager
def without_ray_noise() -> Iterator[None]:
    """Filters standard error of this process while the context lasts."""
    terminal = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)

    def pump() -> None:
        rest = b""
        while data := os.read(read, 65536):
            *lines, rest = (rest + data).split(b"\n")
            kept = b"".join(line + b"\n" for line in lines if not KNOWN.search(line))
            if kept:
                os.write(terminal, kept)
        if rest and not KNOWN.search(rest):
            os.write(terminal, rest)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield
    finally:
        # The pipe ends once its last writer does; processes that inherited it must not be waited for.
        os.dup2(terminal, 2)
        thread.join(timeout=0.5)
        if not thread.is_alive():
            os.close(read)
