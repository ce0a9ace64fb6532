"""An object store on a bad day: errors, time-outs, cut connections, lost answers, stale listings (invariant 3)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import fsspec.config
import pytest

from raysynth.core.faults import storage_words
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import open_storage
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet, is_content
from raysynth.synth.verify import verify
from tests.engine import images, render_all, synthetic_set, wanted_rows
from tests.faulty_s3 import PASSING, Fault, FaultyS3

WANTED = wanted_rows(n=8)  # 24 rows in three shards
READ_TIMEOUT_S = 0.4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = synthetic_set(str(tmp_path_factory.mktemp("reference")))
    render_all(store, WANTED, FakeRenderer())
    return images(store)


@pytest.fixture
def bad_day(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy that every storage opened from now on talks to; it does nothing bad yet."""
    quick = {"read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 4, "mode": "standard"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": quick})
    with FaultyS3(s3_server, silent_s=3 * READ_TIMEOUT_S) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


class Reader:
    """Follows the markers of a set beside its writers, and notes every image that is not whole."""

    def __init__(self, store: SyntheticSet) -> None:
        self.store = store
        self.seen: set[int] = set()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Reader:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()

    def _follow(self) -> None:
        while not self.stop.wait(0.05):
            self._look()

    def _look(self) -> None:
        for shard, marker in self.store.markers(self.store.done() - self.seen).items():
            data = self.store.part(marker["part"])
            if not is_content(marker["part"], data) or from_parquet(data).num_rows != marker["rows"]:
                self.wrong.append(f"shard {shard}: {len(data)} of {marker['bytes']} bytes")
            self.seen.add(shard)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_at_every_kind_of_request_is_got_over(
    s3_root: str, bad_day: FaultyS3, reference: dict, fault: str
) -> None:
    if fault == "stale":
        bad_day.script = [Fault("stale", "LIST", times=10_000)]
    else:
        bad_day.script = [
            Fault(fault, "PUT", "set.json"), Fault(fault, "PUT", "/waves/rows"), Fault(fault, "PUT", "/waves/00000"),
            Fault(fault, "PUT", r"attempts/00001/0\.json"), Fault(fault, "PUT", "/parts/00001", times=2),
            Fault(fault, "PUT", "/done/00002"),
        ]  # fmt: skip
        if fault != "cut":
            bad_day.script += [Fault(fault, "GET", "/waves/rows"), Fault(fault, "LIST", "attempts/00001")]
    store = synthetic_set(s3_root)
    found = render_all(store, WANTED, FakeRenderer(), rounds=20)
    assert bad_day.happened[fault] >= 7
    # Nobody else is there: whoever lost an answer must find that it was its own write that won.
    assert [s["outcome"] for s in found].count("committed") == 3
    bad_day.script = []
    assert images(synthetic_set(s3_root)) == reference
    verdict = verify(synthetic_set(s3_root), WANTED)
    assert verdict.clean
    assert verdict.extra == []


def test_two_writers_under_random_faults_and_a_reader(
    s3_root: str, bad_day: FaultyS3, reference: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as undone:
        undone.setenv("AWS_ENDPOINT_URL", bad_day.server)
        reader = Reader(synthetic_set(s3_root))
        reader.store.done()  # connects it to the server itself: it sees what is there
    bad_day.chance = 0.1
    outcomes: list[str] = []

    def write() -> None:
        store = synthetic_set(s3_root)
        while Ledger(store).pending(WANTED) or not store.waves():
            outcomes.extend(s["outcome"] for s in render_all(store, WANTED, FakeRenderer(), rounds=1))

    with reader:
        writers = [threading.Thread(target=write) for _ in "ab"]
        for w in writers:
            w.start()
        for w in writers:
            w.join(120)
    bad_day.chance = 0.0
    assert reader.wrong == []
    assert reader.seen == set(range(3))
    assert outcomes.count("committed") == 3
    assert sum(bad_day.happened.values()) >= 5
    assert images(synthetic_set(s3_root)) == reference
    assert verify(synthetic_set(s3_root), WANTED).clean


@pytest.mark.parametrize(("fault", "words"), [("507", "full: free space"), ("403", "check the credentials")])
def test_a_store_that_refuses_for_good_loses_nothing(
    s3_root: str, bad_day: FaultyS3, reference: dict, fault: str, words: str
) -> None:
    store = synthetic_set(s3_root)
    bad_day.script = [Fault("", "PUT", "/parts/", times=2), Fault(fault, "PUT", times=10_000)]
    with pytest.raises(OSError) as refused:  # noqa: PT011 - its words are looked at below
        render_all(store, WANTED, FakeRenderer())
    assert words in storage_words(refused.value)
    assert len(store.done()) <= 1
    bad_day.script = []
    render_all(synthetic_set(s3_root), WANTED, FakeRenderer())
    assert images(synthetic_set(s3_root)) == reference
    assert verify(synthetic_set(s3_root), WANTED).clean


def test_two_creators_whose_answers_are_lost_have_one_winner(s3_root: str, bad_day: FaultyS3) -> None:
    bad_day.script = [Fault("lost", "PUT", "done/00001", times=2)]
    storage = open_storage(s3_root)
    assert storage.create("done/00001.json", b"mine")
    assert not open_storage(s3_root).create("done/00001.json", b"other")
    assert bad_day.happened["lost"] == 2
    assert storage.get("done/00001.json") == b"mine"


def test_a_listing_that_hides_a_new_wave_adds_no_second_one(s3_root: str, bad_day: FaultyS3) -> None:
    """Otherwise a second driver would ask for the same rows again and again until the store shows the wave."""
    bad_day.stale_s = 3600
    bad_day.script = [Fault("stale", "LIST", times=10_000)]
    render_all(synthetic_set(s3_root), WANTED, FakeRenderer(), rounds=1)
    again = render_all(synthetic_set(s3_root), WANTED, FakeRenderer(), rounds=1)
    assert {s["outcome"] for s in again} == {"already"}
    assert len(synthetic_set(s3_root).waves()) == 1
