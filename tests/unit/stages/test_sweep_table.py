"""What a person sees of a sweep: the live table fits the terminal, elsewhere one line a finished trial."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysynth.stages import sweep_table
from raysynth.stages.sweep_table import Row, SweepTable


def table(n: int) -> SweepTable:
    return SweepTable([Row(f"arm {i}", 0, 100) for i in range(n)], before=2)


def validation(step: int) -> dict:
    return {"step": step, "steps": 100, "monitor": "auroc", "value": 0.5 + step / 1000}


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(sweep_table.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_by_steps_and_starts_with_the_first_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    now, t = clock(monkeypatch), table(3)
    t.started(0)
    now[0] += 60  # importing torch is no training
    t.reported(0, validation(10))
    assert t.left() is None
    now[0] += 20
    t.reported(0, validation(50))
    assert t.left() == pytest.approx(250 / 2)  # 40 steps in 20 s; 50 + 100 + 100 to go
    t.reported(0, validation(30))  # a new worker repeats steps
    assert t.left() == pytest.approx(250 / 2)
    assert t.facts() == "2/5 trials, 2m05s left"


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now, said = clock(monkeypatch), []
    monkeypatch.setattr(sweep_table, "say", said.append)
    with table(2) as t:
        t.started(0)
        t.started(1)
        now[0] += 12
        t.reported(0, validation(100))
        t.ended(0)
        t.ended(1, "classifier.lr: got 5, must be lower")
    assert said == [
        "sweep: 3/4 trials: arm 0, seed 0 done, auroc 0.6000 at step 100, 100 steps in 12s",
        "sweep: 4/4 trials, 1 failed: arm 1, seed 0 failed in 12s: classifier.lr: got 5, must be lower",
    ]


def test_the_live_table_fits_the_terminal_and_keeps_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sink = clock(monkeypatch), io.StringIO()
    terminal = Console(file=sink, force_terminal=True, width=80, height=8, highlight=False)
    monkeypatch.setattr(sweep_table, "console", terminal)
    with table(20) as t:
        for i in range(6):
            t.started(i)
            now[0] += 1
            t.reported(i, validation(100))
            t.ended(i, "diverged" if i == 2 else "")
        t.started(6)
        assert [r.arm for r in t.shown(8)] == ["arm 2", "arm 3", "arm 4", "arm 5", "arm 6"]
        terminal.print(t.table())
    text = sink.getvalue()
    assert "8/22 trials, 1 failed" in text
    assert "2 more done, 13 more waiting" in text
    assert "diverged" in text
    last = text.rstrip().rsplit("arm  ", 1)[-1].splitlines()
    assert len(last) <= 8
