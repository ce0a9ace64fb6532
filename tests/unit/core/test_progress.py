"""The progress line: what it says while work goes on, and at its end."""

from __future__ import annotations

import re

import pytest

from raysynth.core import progress


def test_the_last_line_says_the_rate_over_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first chunk that took nearly all the time is in it; while work goes on the start of workers is not."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress("ingest", 260, "images") as shown:
        for at, n in ((109.0, 250), (109.5, 10)):
            clock[0] = at
            shown.advance(n)
        assert "20.0 images/s" in shown.line()
        clock[0] = 110.0
    assert re.findall(r"260/260 images  ([\d.,]+) images/s  (\d+)s", capsys.readouterr().out) == [("26.0", "10")]
