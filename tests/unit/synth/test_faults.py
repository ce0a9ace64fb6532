"""Failing, dying and sick: which rows pay (invariant 4). Real processes die here."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from raysynth.synth import batches
from raysynth.synth.attempts import Attempt, History
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger, rows_of
from raysynth.synth.renderer import Row, SickWorker, canary_fault, fault_in
from raysynth.synth.shards import ShardRunner
from raysynth.synth.verify import verify
from raysynth.synth.waves import extend
from tests.engine import images, keys_of, render_all, rendered, synthetic_set, wanted_rows

KEYS = keys_of(wanted_rows())


def statuses(root: str) -> dict[str, tuple[str, str]]:
    index = rows_of(synthetic_set(root))
    return {k: (s, r) for k, s, r in zip(index["row_key"], index["status"], index["reason"]) if s != "ok"}


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, str]:
    store = synthetic_set(str(tmp_path / "reference"))
    render_all(store, wanted_rows(), FakeRenderer())
    return images(store)


@pytest.mark.parametrize("fault", ["broken", "raising"])
def test_a_failing_row_fails_alone_after_two_actors(tmp_path: Path, reference: dict, fault: str) -> None:
    root = str(tmp_path / "set")
    bad = (KEYS[5], KEYS[6], KEYS[20])
    found = render_all(synthetic_set(root), wanted_rows(), FakeRenderer(**{fault: bad}))
    assert [s["outcome"] for s in found].count("second opinion") == 2  # two of five shards hold a bad row
    failed = statuses(root)
    assert set(failed) == set(bad)
    assert all(("not finite" if fault == "broken" else "cannot be rendered") in r for _, r in failed.values())
    assert images(synthetic_set(root)) == {k: v for k, v in reference.items() if k not in bad}
    verdict = verify(synthetic_set(root), wanted_rows())
    assert verdict.clean
    assert verdict.failed == 3


def test_a_row_that_fails_on_one_actor_only_is_ok(tmp_path: Path, reference: dict) -> None:
    store = synthetic_set(str(tmp_path / "set"))
    render_all(store, wanted_rows(), FakeRenderer(broken=(KEYS[5],)), rounds=1)
    assert len(Ledger(store).pending(wanted_rows())) == 1
    log = tmp_path / "log"
    render_all(store, wanted_rows(), FakeRenderer(log=str(log)))
    assert rendered(log) == {KEYS[5]}  # the first actor's good rows are kept
    assert images(store) == reference


def test_retry_failed_reopens_with_the_same_noise(tmp_path: Path, reference: dict) -> None:
    store = synthetic_set(str(tmp_path / "set"))
    render_all(store, wanted_rows(), FakeRenderer(broken=(KEYS[5],)))
    assert list(statuses(str(tmp_path / "set"))) == [KEYS[5]]
    render_all(store, wanted_rows(), FakeRenderer(), retry_failed=True)
    assert images(store) == reference
    assert verify(store, wanted_rows()).clean


def one_process(root: str, faults: dict[str, tuple[str, ...]]) -> None:
    try:
        render_all(synthetic_set(root), wanted_rows(), FakeRenderer(**faults))
    except SickWorker:
        os._exit(1)  # as the render actor does


def run_until_done(root: str, limit: int = 40, **faults: tuple[str, ...]) -> int:
    """Starts processes until one ends well, as Ray restarts actors; returns how many died."""
    context = multiprocessing.get_context("fork")
    for died in range(limit):
        process = context.Process(target=one_process, args=(root, faults))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            return died
    pytest.fail(f"still dying after {limit} processes")


@pytest.mark.parametrize("fault", ["deadly", "breaking"])
@pytest.mark.parametrize("places", [(9,), (8, 11), (9, 10, 30)], ids=["one", "two in a batch", "three"])
def test_a_deadly_row_is_quarantined_and_no_innocent_fails(
    tmp_path: Path, reference: dict, places: tuple[int, ...], fault: str
) -> None:
    """Deadly: the process ends. Breaking: it lives on with a device that renders nothing any more."""
    root = str(tmp_path / "set")
    bad = tuple(KEYS[p] for p in places)
    died = run_until_done(root, **{fault: bad})
    failed = statuses(root)
    assert set(failed) == set(bad)
    assert all("died twice" in r for _, r in failed.values())
    assert images(synthetic_set(root)) == {k: v for k, v in reference.items() if k not in bad}
    # One before it was noted, two before care, halving a micro-batch of four, two alone.
    assert died <= 7 * len(bad)


def test_deaths_of_the_machine_quarantine_nobody(tmp_path: Path, reference: dict) -> None:
    """Processes killed while they render innocent rows: the shard becomes careful, its bytes stay the same."""
    store = synthetic_set(str(tmp_path / "set"))
    extend(Ledger(store), wanted_rows(), 8, "test")
    for _ in range(3):
        killed = Attempt(store, 1, "killed")
        killed.begin()
        killed.start()
    assert Attempt(store, 1, "next").history.careful
    render_all(store, wanted_rows(), FakeRenderer())
    assert statuses(str(tmp_path / "set")) == {}
    assert images(store) == reference


def test_a_sick_worker_judges_no_row(tmp_path: Path, reference: dict) -> None:
    store = synthetic_set(str(tmp_path / "set"))
    extend(Ledger(store), wanted_rows(), 8, "test")
    sick = ShardRunner(store, FakeRenderer(sick_file=str(tmp_path / "sick")), 4)
    for wave, shard in Ledger(store).pending(wanted_rows()):
        with pytest.raises(SickWorker):
            sick.run(wave, shard)
    assert len(Ledger(store).pending(wanted_rows())) == 5
    assert statuses(str(tmp_path / "set")) == {}
    assert not Attempt(store, 0, "next").history.careful
    render_all(store, wanted_rows(), FakeRenderer())
    assert images(store) == reference


@dataclass
class Fading(FakeRenderer):
    """Well at first: every image is black once `last` rows were rendered."""

    last: int = 0

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        ends = self.rendered >= self.last
        images = super().render(rows, micro_batch)
        return np.full_like(images, -1.0) if ends else images


@pytest.mark.parametrize(("last", "begun"), [(8, 8), (12, 16)], ids=["between shards", "within a shard"])
def test_a_worker_that_falls_ill_later_is_told_by_its_canary(
    tmp_path: Path, reference: dict, monkeypatch: pytest.MonkeyPatch, last: int, begun: int
) -> None:
    monkeypatch.setattr(batches, "CANARY_EVERY", 1)
    store, renderer = synthetic_set(str(tmp_path / "set")), Fading(last=last)
    with pytest.raises(SickWorker, match="image is constant"):
        render_all(store, wanted_rows(), renderer)
    assert renderer.rendered == begun
    assert len(store.done()) == 1
    assert Attempt(store, 1, "next").history.carried is None
    assert statuses(str(tmp_path / "set")) == {}
    render_all(store, wanted_rows(), FakeRenderer())
    assert images(store) == reference


@pytest.mark.parametrize(("image", "fault"), [
    (np.zeros((1, 2, 2)), "image is constant"), (np.full((3, 2, 2), np.nan), "pixels are not finite"),
    (np.array([[[0.5, np.inf]]]), "pixels are not finite"), (np.array([[[0.5, 0.5001]]]), None),
    (np.stack([np.zeros((2, 2)), np.ones((2, 2))]), None), (np.zeros((1, 1, 1)), None),
])  # fmt: skip
def test_what_cannot_be_an_image(image: np.ndarray, fault: str | None) -> None:
    assert fault_in(image.astype(np.float32)) == fault


def test_a_lost_first_opinion_is_rendered_again(tmp_path: Path, reference: dict) -> None:
    """The part that waits for a second actor is deleted or changed: the shard starts anew instead of blocking."""
    for damage in (lambda s, f: s.delete(f), lambda s, f: s.put(f, s.get(f)[:-9])):
        store = synthetic_set(str(tmp_path / f"set{id(damage)}"))
        render_all(store, wanted_rows(), FakeRenderer(broken=(KEYS[5],)), rounds=1)
        failures = Attempt(store, 0, "next").history.carried
        assert failures is not None
        damage(store.storage, store.file(failures["part"]))
        render_all(store, wanted_rows(), FakeRenderer())
        assert images(store) == reference


def test_render_seconds_count_both_opinions(tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path / "set"))
    answers = render_all(store, wanted_rows(), FakeRenderer(broken=(KEYS[5],), seconds_a_row=0.02))
    spent = [[a["render_s"] for a in answers if a["shard"] == shard] for shard in (0, 1)]
    assert [len(s) for s in spent] == [2, 1]  # shard 0 holds the broken row and was begun twice
    markers = store.markers(store.done())
    assert [markers[shard]["render_seconds"] for shard in (0, 1)] == pytest.approx([sum(s) for s in spent], abs=2e-3)
    assert min(map(min, spent)) > 0.1


def test_a_canary_that_runs_out_of_memory_tries_smaller() -> None:
    assert canary_fault(FakeRenderer(largest=4), 64) is None
    assert "out of memory" in (canary_fault(FakeRenderer(largest=0), 64) or "")


def test_two_drivers_retrying_failed_rows_render_them_once(tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path / "set"))
    render_all(store, wanted_rows(), FakeRenderer(broken=(KEYS[5],)))
    create = store.storage.create
    raced = []

    def overtaken(path: str, data: bytes) -> bool:
        if "/waves/" in path and not raced:
            raced.append(path)
            render_all(synthetic_set(str(tmp_path / "set")), wanted_rows(), FakeRenderer(), retry_failed=True)
        return create(path, data)

    store.storage.create = overtaken  # type: ignore[method-assign]
    render_all(store, wanted_rows(), FakeRenderer(), retry_failed=True)
    assert raced
    verdict = verify(store, wanted_rows())
    assert verdict.clean
    assert verdict.ok == 36


def test_a_row_alone_and_in_a_batch(tmp_path: Path, reference: dict) -> None:
    """Shards of one row in micro-batches padded to four give the bytes of full micro-batches."""
    store = synthetic_set(str(tmp_path / "set"))
    render_all(store, wanted_rows(), FakeRenderer(), shard_rows=1)
    assert images(store) == reference


def test_bisection_narrows_with_every_death() -> None:
    def history(*steps: tuple[int, ...]) -> History:
        return History(attempts=9, deaths=2 + len(steps), steps=steps)

    places = [0, 1, 2, 3]
    assert History().groups(places) == [places]
    assert history().groups(places) == [places]
    assert history((0, 1, 2, 3)).groups(places) == [[0, 1], [2, 3]]
    assert history((2, 3)).groups(places) == [[2], [3], [0, 1]]
    assert history((2,)).groups(places) == [[2], [0, 1, 3]]
    assert history((2, 3), (2,), (2,)).groups(places) == [[0, 1, 3]]
    assert history((2, 3), (2,), (2,)).quarantined == {2}
    assert history((2, 3), (2,), (2,), (0, 1, 3)).groups(places) == [[0], [1, 3]]
    # Two machines that happened to die at the same row, never suspected before, convict nobody.
    assert history((2,), (2,)).quarantined == set()
