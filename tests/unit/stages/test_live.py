"""The live view in a real pseudo-terminal, read through a terminal emulator; the quiet line elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from raysynth.stages import live
from raysynth.stages.live import Picture, Rendering, RenderView
from raysynth.synth.throughput import Throughput
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[3]
# Rows of statistics of ACTORS actors; waits for a line on standard input after each ten, to be looked at.
PROGRAM = """
import os, sys
from raysynth.core.progress import say
from raysynth.stages.live import Rendering, RenderView
actors, rows, every_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with RenderView(Rendering("generate digits", 4000, 100, gpus_each=1.0, price=36.0), every_s=every_s) as view:
    for i in range(rows):
        a = i % actors
        view.add(dict(outcome="committed", attempt=int(i == 3), ok=8, failed=int(i == 4), rejected=int(i == 5),
                      actor=f"a{a}", worker=f"gpu-node-{a}.cluster.local/{1000 + a}", render_s=5.0))
        if i == 4:
            say("a line of somebody else")
        if i % 10 == 9 and sys.stdin.isatty():
            for _ in range(2):
                view._live.refresh()
            os.write(1, b"\\x1b]0;look\\x07")
            sys.stdin.readline()
"""


def in_terminal(columns: int, lines: int, actors: int, rows: int) -> tuple[list[list[str]], bytes]:
    """What the screen shows each time the program asks to be looked at and at its end; and all bytes."""
    screen = pyte.Screen(columns, lines)
    stream, seen, shots = pyte.ByteStream(screen), b"", []
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    modes = termios.tcgetattr(theirs)
    modes[3] &= ~termios.ECHO  # our answers are not typed onto the screen
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(actors), str(rows), "10"], stdin=theirs, stdout=theirs, stderr=theirs,
        env=environment | {"TERM": "xterm-256color"}, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    while True:
        asked = seen.count(b"]0;look") > len(shots)
        if not select.select([ours], [], [], 0.2 if asked else 60)[0]:  # between two redraws
            if not asked:
                process.kill()
                raise AssertionError(f"nothing came for a minute: {screen.display}")
            shots.append([line.rstrip() for line in screen.display])
            os.write(ours, b"\n")
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        stream.feed(data)
        seen += data
    os.close(ours)
    assert process.wait(10) == 0, screen.display
    return [*shots, [line.rstrip() for line in screen.display if line.strip()]], seen


def test_a_view_that_is_redrawn_in_place_and_ends_with_one_line() -> None:
    (first, second, last), seen = in_terminal(120, 24, actors=3, rows=20)
    # What others print stays above; below it there is one view, not a trail of old ones.
    assert first[0] == "a line of somebody else"
    assert first[1].startswith("generate digits: 182/4,000 images   ")
    assert "images/s now" in first[1]
    assert "1 failed   1 rejected   1 of 10 shards retried   50 GPU seconds   cost 0.50" in first[3]
    assert [line.split()[0] for line in first[5:8]] == [f"gpu-node-{a}.cluster.local/{1000 + a}" for a in range(3)]
    assert not any(first[9:])
    assert second[1].startswith("generate digits: 262/4,000 images   ")
    assert sum("generate digits" in line for line in second) == 1
    # No flicker: nothing clears the screen, and the cursor is there again at the end.
    assert b"\x1b[2J" not in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert last[0] == "a line of somebody else"
    assert re.fullmatch(
        r"generate digits: 262/4,000 images  .*1 failed  1 rejected  1 of 20 shards retried  100 GPU seconds  "
        r"cost 1\.00, 6\.250 per thousand accepted  in \d+s", "".join(last[1:])
    ), last  # fmt: skip


def test_a_narrow_and_low_terminal() -> None:
    (shot, last), _ = in_terminal(34, 16, actors=10, rows=10)
    view = [line for line in shot if line]
    assert view[0] == "a line of somebody else"
    assert view[1] == "generate digits: 182/4,000 images"
    assert len(view) <= 16
    assert re.fullmatch(r"gpu-node-\S+…  +- +\d+\.\d", view[-2]), view
    assert view[-1] == "and 7 more, no less busy"
    assert "".join(last[1:]).startswith("generate digits: 182/4,000 images")


def test_metrics_are_repeated_while_no_row_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heard:
        done: list[int] = []

        def repeat(self, sums: Throughput, done: int, now: float) -> None:
            self.done.append(done)

    monkeypatch.setattr(live, "BEAT_S", 0.01)
    with RenderView(Rendering("generate digits", 10, 4), Heard()):
        wait_for(lambda: len(Heard.done) > 3)
    heard = len(Heard.done)
    assert set(Heard.done) == {4}
    time.sleep(0.1)
    assert len(Heard.done) == heard


def test_quiet_lines_where_there_is_no_terminal() -> None:
    def lines(every_s: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "3", "20", every_s], capture_output=True, text=True, check=True,
            stdin=subprocess.DEVNULL, cwd=REPOSITORY, timeout=60, env=os.environ | {"FORCE_COLOR": "1"},
        )  # fmt: skip
        assert "\x1b" not in done.stdout
        assert not done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("generate")]

    (last,) = lines("10")
    assert last.startswith("generate digits: 262/4,000 images")
    assert len(lines("0")) == 21


@pytest.mark.parametrize(("height", "more"), [(8, None), (12, 27), (24, 15), (60, None)])
def test_it_is_never_higher_than_the_screen(height: int, more: int | None) -> None:
    rendering = Rendering("generate digits", 10_000, 0, gpus_each=1.0, price=2.0)
    for i in range(30):
        rendering.sums.add_row(
            {"outcome": "committed", "attempt": 0, "ok": 9, "failed": 1, "rejected": 0, "actor": str(i), "worker": "n",
             "render_s": 1.0}, now=100.0,
        )  # fmt: skip
    console = Console(width=100, height=height, force_terminal=True, file=io.StringIO())
    console.print(Picture(rendering, now=lambda: 100.0))
    lines = console.file.getvalue().splitlines()
    assert len(lines) < height
    assert lines[-1].endswith(f"and {more} more, no less busy\x1b[0m") if more else "more" not in lines[-1]


def test_before_the_first_shard() -> None:
    console = Console(width=60)
    with console.capture() as captured:
        console.print(Picture(Rendering("generate digits", 10, 0)))
    assert "generate digits: 0/10 images   waiting for the first shard" in captured.get()
