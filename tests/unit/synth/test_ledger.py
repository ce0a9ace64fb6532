"""Packed keys, streamed waves, and where every row is: the parts that let one driver hold a hundred million rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysynth.synth import sets, wanted
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import ABSENT, FAILED, OK, Ledger, rows_of
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.shards import ShardRunner
from raysynth.synth.verify import orphans, repair, verify
from raysynth.synth.wanted import Wanted, held_by, pack, unpack
from raysynth.synth.waves import cut, extend
from tests.engine import images, keys_of, render_all, synthetic_set, wanted_rows


def test_keys_are_packed_and_unpacked() -> None:
    keys = ["00" * 16, "ff" * 16, "0a" * 15 + "00", "0a" * 16, "a0" + "00" * 15]
    packed = pack(pa.chunked_array([keys[:2], keys[2:]]))
    assert packed.itemsize == 16
    assert unpack(packed).to_pylist() == keys
    assert unpack(packed[2:3]).to_pylist() == keys[2:3]
    assert unpack(np.sort(packed)).to_pylist() == sorted(keys), "packed keys sort as their hex digits do"
    assert pack(pa.array([], pa.string())).shape == (0,)
    assert pack(pa.array(keys).slice(3)).tolist() == packed[3:].tolist()


@pytest.mark.parametrize("bad", ["zz" * 16, "AB" * 16, "ab", None])
def test_what_is_no_key_is_refused(bad: str | None) -> None:
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        pack(pa.array(["ab" * 16, bad]))


def test_held_by() -> None:
    keys = pack(pa.array([f"{i:032x}" for i in (5, 1, 9, 0)]))
    assert held_by(keys, np.sort(keys[:2])).tolist() == [True, True, False, False]
    assert held_by(keys, keys[:0]).tolist() == [False] * 4


def test_wanted_rows_are_streamed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "CHUNK", 7)
    table = wanted_rows(n=12, replicas=5).read()[0]
    parts = Wanted(pack(table["row_key"]), table["rank"].to_numpy(), lambda: [table.slice(0, 31), table.slice(31)])
    mask = np.arange(60) % 3 != 1
    pieces = list(parts.tables(mask))
    assert pa.concat_tables(pieces).equals(table.filter(pa.array(mask)))
    assert [p.num_rows for p in pieces] == [7] * 5 + [5]
    assert list(parts.tables(np.zeros(60, bool))) == []


def test_shards_lie_across_rows_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut_up = synthetic_set(str(tmp_path / "1")), synthetic_set(str(tmp_path / "2"))
    render_all(whole, wanted_rows(), FakeRenderer())
    monkeypatch.setattr(wanted, "CHUNK", 5)
    monkeypatch.setattr(sets, "ROW_GROUP", 2)
    render_all(cut_up, wanted_rows(), FakeRenderer())
    assert [n for _, n in cut_up.waves()[0].files] == [5] * 7 + [1]
    assert images(cut_up) == images(whole)
    assert verify(cut_up, wanted_rows()).clean
    assert verify(cut_up, wanted_rows()).extra == []


def test_a_shard_holds_one_mode() -> None:
    assert cut([("a", 5), ("a", 4), ("b", 2), ("a", 3)], 4) == [4, 4, 1, 2, 3]
    assert cut([], 4) == []


def test_the_ledger_says_where_every_row_is(tmp_path: Path) -> None:
    """Failed, retried, lost and rendered again, frozen, unknown: against what reading the parts says."""
    store, rows = synthetic_set(str(tmp_path)), wanted_rows()
    keys = keys_of(rows)
    render_all(store, rows, FakeRenderer(broken=(keys[3], keys[20])))
    render_all(store, rows, FakeRenderer(broken=(keys[20],)), retry_failed=True)  # row 3 is well now
    store.storage.delete(store.file(store.marker(1)["part"]))
    assert repair(store, verify(store, rows)) == 1
    render_all(store, rows, FakeRenderer())
    extend(Ledger(store), wanted_rows(replicas=4), 8, "frozen only")

    ledger = Ledger(store)
    markers = store.markers(ledger.done)
    found = ledger.find(rows.keys, ledger.statuses(markers))
    assert [keys[i] for i in np.flatnonzero(found.status == FAILED)] == [keys[20]]
    assert (found.status == OK).sum() == 35
    for key, shard, place in zip(keys, found.shard.tolist(), found.place.tolist()):
        table = sets.from_parquet(store.part(markers[shard]["part"]))
        assert table["row_key"][place].as_py() == key
    more = wanted_rows(replicas=4)
    assert (ledger.find(more.keys, ledger.statuses(markers)).status == ABSENT).sum() == 12
    assert sum(wave.shard_rows[s - wave.first_shard] for wave, s in ledger.pending(more)) == 12
    assert ledger.frozen(more.keys).all()
    assert ledger.committed(more.keys).sum() == 36
    assert ledger.waiting(more.keys).sum() == 12
    assert ledger.known(wanted_rows(replicas=5).keys).sum() == 48
    assert ledger.rows() == 48
    assert ledger.duplicates(ledger.statuses(markers)).size == 0
    table = rows_of(store)
    assert sorted(table["row_key"]) == sorted(keys)
    assert table.set_index("row_key")["reason"].dropna().index.tolist() == [keys[20]]


def test_a_row_that_failed_was_saved_and_lost_is_rendered_again(tmp_path: Path) -> None:
    """The failure of before is not what counts, neither for `verify` nor for the next rendering."""
    store, rows = synthetic_set(str(tmp_path)), wanted_rows()
    broken = keys_of(rows)[2]
    render_all(store, rows, FakeRenderer(raising=(broken,)))
    assert render_all(store, rows, FakeRenderer()) == [], "a failed row waits until somebody asks"
    render_all(store, rows, FakeRenderer(), retry_failed=True)
    before, saved = images(store), max(store.done())
    store.storage.delete(store.file(store.marker(saved)["part"]))  # type: ignore[index]
    verdict = verify(store, rows)
    assert (verdict.failed, verdict.missing) == (0, [broken])
    repair(store, verdict)
    assert verify(store, rows).missing == [broken]
    assert [row["ok"] for row in render_all(store, rows, FakeRenderer())] == [1]
    assert images(store) == before
    assert verify(store, rows).clean


def test_shards_and_how_many_of_their_rows(tmp_path: Path) -> None:
    store, rows = synthetic_set(str(tmp_path)), wanted_rows()
    render_all(store, rows, FakeRenderer())
    ledger = Ledger(store)
    some = np.concatenate([rows.keys[5:12], pack(pa.array(["00" * 16]))])
    assert ledger.find(some, ledger.statuses(store.markers(ledger.done))).shards() == {0: 3, 1: 4}


def test_a_set_is_found_under_another_experiments_name(any_root: str) -> None:
    store = synthetic_set(any_root)
    again = SyntheticSet.at(store.storage, "other", store.identity)
    assert again.name == "other", "nobody has begun it"
    store.announce()
    assert SyntheticSet.at(store.storage, "other", store.identity).path == store.path
    assert SyntheticSet.at(store.storage, "other", store.identity | {"seed": 9}).name == "other"


def test_a_ledger_is_refreshed_without_reading_waves_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, wanted_rows(replicas=2), FakeRenderer())
    ledger = Ledger(store)
    read: list[int] = []
    original = type(store).wave_keys
    monkeypatch.setattr(type(store), "wave_keys", lambda self, w: read.append(w.number) or original(self, w))
    render_all(synthetic_set(str(tmp_path)), wanted_rows(replicas=3), FakeRenderer())
    read.clear()
    ledger.refresh()
    assert read == [1]
    fresh = Ledger(synthetic_set(str(tmp_path)))
    assert (ledger.keys == fresh.keys).all()
    assert (ledger.order == fresh.order).all()
    assert ledger.done == fresh.done


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "FOLD", 2)


def test_markers_are_folded_and_nothing_else_changes(any_root: str, folding: None) -> None:
    store, rows = synthetic_set(any_root), wanted_rows()
    render_all(store, rows, FakeRenderer(broken=(keys_of(rows)[5],)))
    before, markers = images(store), store.markers(store.done())
    assert store.fold(past=5) == 0, "five markers are not past five"
    assert store.fold(past=4) == 4, "two full blocks of two; the fifth shard stays by itself"
    handle = synthetic_set(any_root)
    assert handle.done() == set(range(5))
    assert handle.markers(range(5)) == markers
    assert handle.marker(2) == markers[2]
    assert images(handle) == before
    verdict = verify(handle, rows)
    assert verdict.clean
    assert (verdict.failed, verdict.extra) == (1, [])
    assert [e.path.rpartition("/")[2] for e in store.storage.list(store.file("done"))] == ["00004.json"]


def test_a_fold_that_was_cut_off_is_finished_by_the_next(tmp_path: Path, folding: None) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, wanted_rows(), FakeRenderer())
    before = images(store)
    deleted = store.storage.delete
    calls: list[str] = []

    def dying(path: str) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        deleted(path)

    store.storage.delete = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        store.fold(past=0)
    again = synthetic_set(str(tmp_path))
    assert images(again) == before
    assert again.done() == set(range(5))
    again.fold(past=0)
    assert images(synthetic_set(str(tmp_path))) == before
    assert len(again.storage.list(again.file("done"))) == 1


def test_a_zombie_that_commits_a_folded_shard_is_not_seen(tmp_path: Path, folding: None) -> None:
    """It had looked before the shard was done; its marker is created, for the real one lies in the fold by now."""
    root = str(tmp_path)
    store = synthetic_set(root)
    zombie = synthetic_set(root)
    render_all(store, wanted_rows(), FakeRenderer())
    before, wave = images(store), store.waves()[0]
    store.fold(past=0)
    zombie.marker = lambda shard: None  # type: ignore[method-assign]
    assert ShardRunner(zombie, FakeRenderer(flavour=1), 4).run(wave, 2)["outcome"] == "already"
    fresh = synthetic_set(root)
    assert images(fresh) == before
    verdict = verify(fresh, wanted_rows())
    assert verdict.clean
    assert len(orphans(fresh, older_than_s=0)) == 1, "its part is for gc"
    assert fresh.marker(2)["part"] == store.marker(2)["part"]  # type: ignore[index]
    assert fresh.fold(past=0) == 0, "it left no marker"


def test_a_marker_once_seen_is_not_missed_by_a_stale_listing(tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, wanted_rows(), FakeRenderer())
    assert len(store.done()) == 5
    listed = store.storage.list
    store.storage.list = lambda folder="": [e for e in listed(folder) if "00003" not in e.path]  # type: ignore[method-assign]
    assert len(store.done()) == 5
