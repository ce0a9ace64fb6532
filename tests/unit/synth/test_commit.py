"""A marker has one winner, whoever dies or comes late (invariant 3), on disk and on the S3 protocol."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysynth.core.storage import open_storage
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import orphans, verify
from tests.engine import images, render_all, synthetic_set, wanted_rows


@pytest.mark.timeout(600)
def test_sigkill_at_every_write_then_two_processes_resume(any_root: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine_process", any_root], capture_output=True, text=True, timeout=580,
        cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    verdicts = [json.loads(line) for line in run.stdout.splitlines()]
    # set.json, rows, wave; attempt, start, part and marker of two shards: each killed before and after.
    assert len(verdicts) == 22
    assert [v for v in verdicts if not (v["clean"] and v["same"] and v["ok"] == 12)] == []


def test_a_zombie_that_commits_late_with_other_bytes_loses(any_root: str) -> None:
    wanted = wanted_rows()
    reference = synthetic_set(any_root + "-reference")
    render_all(reference, wanted, FakeRenderer())

    zombie = synthetic_set(any_root)
    create = zombie.storage.create
    woken = []

    def late(path: str, data: bytes) -> bool:
        if "/done/" in path and not woken:
            woken.append(path)
            render_all(synthetic_set(any_root), wanted, FakeRenderer())
        return create(path, data)

    zombie.storage.create = late  # type: ignore[method-assign]
    outcomes = [s["outcome"] for s in render_all(zombie, wanted, FakeRenderer(flavour=7))]
    assert woken
    assert set(outcomes) == {"already"}
    store = synthetic_set(any_root)
    assert images(store) == images(reference)
    verdict = verify(store, wanted)
    assert verdict.clean
    assert len(verdict.extra) == 1  # the zombie's part, left for gc
    assert orphans(store) == []  # too young to collect


def test_two_drivers_freezing_waves_at_once_never_overlap(any_root: str) -> None:
    """The loser of the race for a wave number sees the winner's rows and adds only what is left."""
    slow = synthetic_set(any_root)
    create = slow.storage.create
    raced = []

    def overtaken(path: str, data: bytes) -> bool:
        if "/waves/" in path and not raced:
            raced.append(path)
            render_all(synthetic_set(any_root), wanted_rows(replicas=2), FakeRenderer())
        return create(path, data)

    slow.storage.create = overtaken  # type: ignore[method-assign]
    render_all(slow, wanted_rows(replicas=3), FakeRenderer())
    store = synthetic_set(any_root)
    assert raced
    assert [sum(w.shard_rows) for w in store.waves()] == [24, 12]
    verdict = verify(store, wanted_rows(replicas=3))
    assert verdict.clean
    assert verdict.ok == 36


def test_verify_finds_truncated_and_deleted_parts(any_root: str) -> None:
    store = synthetic_set(any_root)
    render_all(store, wanted_rows(), FakeRenderer())
    parts = [store.file(store.marker(s)["part"]) for s in (0, 1, 2)]
    storage = open_storage(any_root)
    storage.put(parts[0], storage.get(parts[0])[:-10])
    storage.delete(parts[2])
    verdict = verify(store, wanted_rows())
    assert sorted(verdict.corrupt) == [0, 2]
    assert "gone" in verdict.corrupt[2]
    assert not verdict.clean
    assert len(verdict.missing) == 16
    assert verdict.ok == 20
