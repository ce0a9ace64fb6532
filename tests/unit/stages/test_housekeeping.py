"""What `ls` shows; what `gc` lists and deletes, also where a driver comes while it is at it. One process, no Ray."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.lease import Lease
from raysynth.core.storage import open_storage
from raysynth.stages import housekeeping
from raysynth.stages.housekeeping import collect_garbage, show_artifacts
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from raysynth.synth.waves import extend
from tests.engine import images, render_all, synthetic_set, wanted_rows

SMALL, LARGE = wanted_rows(12, 1), wanted_rows(12, 2)


def old(store: SyntheticSet, folder: str) -> None:
    """Every file there was written two hours ago."""
    for entry in store.storage.list(store.file(folder)):
        path = Path(store.storage.url(entry.path))
        os.utime(path, (time.time() - 7200,) * 2)


def killed_before_its_wave(store: SyntheticSet, wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> str:
    """A driver put the rows of its wave and died two hours ago; path of the rows."""
    before = {e.path for e in store.storage.list(store.file("waves"))}

    def die(*a: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSet, "add_wave", die)
        with pytest.raises(KeyboardInterrupt):
            extend(Ledger(store), wanted, 8, "test")
    old(store, "waves")
    (path,) = {e.path for e in store.storage.list(store.file("waves"))} - before
    return path


def test_artifacts_with_size_and_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = open_storage(str(tmp_path))
    images = Artifact.at(storage, "ingest", "t", 1, {}, {})
    images.put("table.parquet", bytes(2_500_000))
    images.commit({})
    for stage, n in (("plan", 3), ("train-classifier", 4)):
        for i in range(n):
            Artifact.at(storage, stage, "t", 1, {"i": i}, {"images": images.digest()}).commit({})
    Artifact.at(storage, "view", "t", 1, {}, {"images": images.digest()}).put("part", b"12")
    show_artifacts(storage)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("ingest/"))
    assert re.match(r"ingest/t-\w+ done 2\.5 MB plan/t-\w+", lines[first])
    assert all(re.fullmatch(r"plan/t-\w+", line) for line in lines[first + 1 : first + 3])
    assert lines[first + 3] == "4 train-classifier"
    assert any(re.fullmatch(r"view/t-\w+ incomplete 2 bytes", line) for line in lines)


def test_orphans_are_listed_and_deleted_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, SMALL, FakeRenderer())
    orphan = killed_before_its_wave(store, LARGE, monkeypatch)
    storage = open_storage(str(tmp_path))
    with Lease(storage, store.file("lock.json")):
        assert collect_garbage(storage, delete=True) == []
    assert collect_garbage(storage, delete=False) == [orphan]
    assert storage.exists(orphan)
    assert collect_garbage(storage, delete=True) == [orphan]
    assert not storage.exists(orphan)
    assert len(images(synthetic_set(str(tmp_path)))) == 12


def test_what_a_driver_names_after_a_look_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, SMALL, FakeRenderer())
    orphan = killed_before_its_wave(store, LARGE, monkeypatch)
    looks = []

    def look(of: SyntheticSet) -> list[str]:
        found = orphans(of)
        looks.append(found)
        if len(looks) == 1:  # the same command as two hours ago, from start to end
            with Lease(store.storage, store.file("lock.json")):
                render_all(synthetic_set(str(tmp_path)), LARGE, FakeRenderer())
        return found

    orphans = housekeeping.orphans
    monkeypatch.setattr(housekeeping, "orphans", look)
    assert collect_garbage(open_storage(str(tmp_path)), delete=True) == []
    assert [store.file(o) for o in looks[0]] == [orphan]
    assert len(images(synthetic_set(str(tmp_path)))) == 24


def test_deleting_ends_where_a_driver_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted((synthetic_set(str(tmp_path), g) for g in "gh"), key=lambda s: s.path)
    for store in (first, second):
        render_all(store, SMALL, FakeRenderer())
        for shard in range(3):
            store.put_part(shard, b"a zombie's")
        old(store, "parts")
    with ExitStack() as drivers:

        def say(text: str) -> None:
            print(text)
            if text.startswith(first.path):
                drivers.enter_context(Lease(first.storage, first.file("lock.json")))

        monkeypatch.setattr(housekeeping, "say", say)
        deleted = collect_garbage(open_storage(str(tmp_path)), delete=True)
    assert [p.startswith(first.path) for p in deleted] == [True, False, False, False]
    assert f"gc: {first.path} is being rendered, the rest is left alone" in capsys.readouterr().out
    assert [len(images(s)) for s in (first, second)] == [12, 12]


def test_orphans_too_young_to_be_one_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, SMALL, FakeRenderer())
    store.put_part(0, b"a zombie's")
    assert collect_garbage(open_storage(str(tmp_path)), delete=False) == []
    assert "gc: 0 orphan files; 1 younger than an hour left alone" in capsys.readouterr().out


def test_what_a_writer_left_unfinished_is_found_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, SMALL, FakeRenderer())
    storage = open_storage(str(tmp_path))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raysynth.core.storage.os.replace", die)
        for path in (store.file("parts/00007-abc.parquet"), "ingest/t-0/table.parquet", "ingest/t-0/young.parquet"):
            with pytest.raises(KeyboardInterrupt):
                storage.put(path, b"all but the name")
    (tmp_path / "ingest" / ".another_program.tmp").write_text("not ours")
    diary = tmp_path / "notes" / ".diary.20240131.tmp"  # beside our folders, whatever its name looks like
    diary.parent.mkdir()
    diary.write_text("not ours")
    os.utime(diary, (time.time() - 7200,) * 2)
    staged = [e.path for folder in ("ingest", "synthetic-sets") for e in storage.staged(folder)]
    assert [p.rpartition("/")[0] for p in staged] == ["ingest/t-0"] * 2 + [store.file("parts")]
    young = next(p for p in staged if "young" in p)
    left = [p for p in staged if p != young]
    for path in left:
        os.utime(tmp_path / path, (time.time() - 7200,) * 2)
    with Lease(storage, store.file("lock.json")):
        assert collect_garbage(storage, delete=False) == left[:1]
    assert collect_garbage(storage, delete=False) == left
    assert "gc: 2 orphan files; --delete removes them; 1 younger than an hour" in capsys.readouterr().out
    assert all((tmp_path / path).exists() for path in staged)
    assert collect_garbage(storage, delete=True) == left
    assert [(tmp_path / path).exists() for path in staged] == [path == young for path in staged]
    assert (tmp_path / "ingest" / ".another_program.tmp").exists()
    assert diary.exists()
    assert len(images(synthetic_set(str(tmp_path)))) == 12
