"""An HTTP proxy before a real S3 server that answers some requests as a bad day of an object store does.

Faults by name:

* 500, 503: an internal error; slow down
* 507, 403: the store is full; access is refused (neither is worth a retry)
* silent: no answer for longer than the client's read time-out
* cut: the connection ends when half of the body is there; the server never sees the request
* lost: the server does what it is told, and the answer is lost
* stale: a LIST does not show what was written within the last `stale_s` seconds

A request gets the first scripted fault that fits it, otherwise a fault by seeded chance, at most `in_a_row` times in a
row on one object. Knows nothing of raysynth.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "507": (507, "InsufficientStorage", "The store has reached its capacity."),
    "403": (403, "AccessDenied", "Access Denied."),
}
ENDED_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "server", "date", "content-length"}
PASSING = ("500", "503", "silent", "cut", "lost", "stale")
"""Faults that a client should get over by itself."""


@dataclass
class Fault:
    """One scripted fault: what happens to the next `times` requests that fit."""

    what: str
    method: str = ""
    """PUT, GET, HEAD, DELETE or LIST; empty: any."""
    path: str = ""
    """Regular expression found in the object's path (for LIST in its prefix)."""
    times: int = 1


@dataclass
class FaultyS3:
    """Use as a context manager; `url` is the endpoint that clients use.

    Args:
        server: URL of the real S3 server.
        script: scripted faults; may be added to at any time.
        chance: probability of a fault a request.
        faults: what happens by chance.
    """

    server: str
    script: list[Fault] = field(default_factory=list)
    chance: float = 0.0
    faults: tuple[str, ...] = PASSING
    seed: int = 0
    in_a_row: int = 2
    stale_s: float = 0.5
    silent_s: float = 2.0
    happened: Counter[str] = field(default_factory=Counter)
    """Injected faults by name."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lock = threading.Lock()
        self.written: dict[str, float] = {}
        self.row: Counter[str] = Counter()
        proxy = self

        class Handler(_Handler):
            faulty = proxy

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.shutdown()
        self.http.server_close()

    def choose(self, method: str, path: str) -> str:
        """The fault of this request; empty for none."""
        with self.lock:
            for fault in self.script:
                if fault.times and fault.method in ("", method) and re.search(fault.path, path):
                    fault.times -= 1
                    return self._count(fault.what)
            fits = [f for f in self.faults if (f == "stale") <= (method == "LIST") and (f != "cut" or method == "PUT")]
            name = f"{method} {path}"
            if fits and self.random.random() < self.chance and self.row[name] < self.in_a_row:
                self.row[name] += 1
                return self._count(self.random.choice(fits))
            self.row[name] = 0
        return ""

    def _count(self, what: str) -> str:
        self.happened[what] += 1
        return what

    def without_young(self, listing: bytes, bucket: str) -> bytes:
        """The listing without objects written within the last `stale_s` seconds."""
        limit = time.monotonic() - self.stale_s

        def keep(match: re.Match[bytes]) -> bytes:
            key = re.search(rb"<Key>(.*?)</Key>", match[0])
            name = f"/{bucket}/{key[1].decode()}" if key else ""
            return b"" if self.written.get(name, 0.0) > limit else match[0]

        return re.sub(rb"<Contents>.*?</Contents>", keep, listing, flags=re.DOTALL)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet; otherwise each answer waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True
    faulty: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def handle_expect_100(self) -> bool:
        """Never answered: a client that waits for it without limit hangs, as it would on a store gone silent."""
        return True

    def _do(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        method = "LIST" if self.command == "GET" and ("list-type" in query or "prefix" in query) else self.command
        about = f"{path}/{query.get('prefix', [''])[0]}" if method == "LIST" else path
        fault = self.faulty.choose(method, about)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if fault in ANSWERS:
            status, code, message = ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], text)
        elif fault == "silent":
            time.sleep(self.faulty.silent_s)
            self._hang_up()
        else:
            status, headers, text = self._forward(body)
            if method == "PUT" and status < 300:
                self.faulty.written[path] = time.monotonic()
            if fault == "stale":
                text = self.faulty.without_young(text, path.strip("/"))
            if fault == "lost":
                self._hang_up()
            else:
                self._answer(status, headers, text)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _do  # noqa: N815 - names that http.server looks for

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = urlsplit(self.faulty.server)
        connection = http.client.HTTPConnection(server.hostname or "", server.port or 80, timeout=30)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], text: bytes) -> None:
        length = {k.lower(): v for k, v in headers}.get("content-length") if self.command == "HEAD" else None
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ENDED_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may have gone first
            self.connection.shutdown(socket.SHUT_RDWR)
