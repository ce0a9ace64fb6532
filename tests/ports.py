"""Ports for servers that must be told theirs."""

from __future__ import annotations

import os
import random
import socket

FIRST, SHARE, SHARES = 20_000, 3_000, 4
"""Below what Linux gives to sockets that ask for any port (32768 and up), above Ray's workers (10002 to 19999)."""


def free_port() -> int:
    """A port of loopback that nobody has now, and that nobody is given who asks for any port.

    Every process of pytest-xdist draws from a share of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % SHARES
    share = list(range(FIRST + worker * SHARE, FIRST + (worker + 1) * SHARE))
    random.SystemRandom().shuffle(share)
    for port in share:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
