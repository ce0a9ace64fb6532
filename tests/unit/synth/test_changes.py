"""Which rows are rendered again when something changes: the table that invariants 1 and 5 live by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import repair, verify
from tests.engine import images, keys_of, render_all, rendered, synthetic_set, wanted_rows

BASE = {"micro_batch": 4, "shard_rows": 8, "workers": 1}


class World:
    """A finished set of 36 rows, and what a second run renders."""

    def __init__(self, root: str, log: Path) -> None:
        self.root, self.log = root, log
        render_all(synthetic_set(root), wanted_rows(), FakeRenderer(), **BASE)
        self.before = images(synthetic_set(root))

    def again(self, wanted=None, store=None, renderer=None, **how) -> set[str]:
        """Keys rendered by a second run."""
        self.log.unlink(missing_ok=True)
        renderer = renderer or FakeRenderer()
        renderer.log = str(self.log)
        self.store = store or synthetic_set(self.root)
        render_all(self.store, wanted if wanted is not None else wanted_rows(), renderer, **(BASE | how))
        return rendered(self.log)


def keys(n: int = 12, replicas: int = 3, seed: int = 0) -> set[str]:
    return set(keys_of(wanted_rows(n, replicas, seed)))


@pytest.fixture
def world(any_root: str, tmp_path: Path) -> World:
    return World(any_root, tmp_path / "rendered")


NOTHING: list[tuple[str, Callable[[World], set[str]]]] = [
    ("same again", lambda w: w.again()),
    ("shard size", lambda w: w.again(shard_rows=5)),
    ("workers", lambda w: w.again(workers=3)),
    ("micro-batch", lambda w: w.again(micro_batch=2)),
    ("fewer replicas", lambda w: w.again(wanted_rows(replicas=2))),
    ("out of memory", lambda w: w.again(renderer=FakeRenderer(largest=1))),
]


@pytest.mark.parametrize(("change", "run"), NOTHING, ids=[n for n, _ in NOTHING])
def test_renders_nothing_again(world: World, change: str, run: Callable[[World], set[str]]) -> None:
    assert run(world) == set()
    assert images(world.store) == world.before


def test_more_replicas_render_only_the_new_ones(world: World) -> None:
    assert world.again(wanted_rows(replicas=10)) == keys(replicas=10) - keys(replicas=3)
    assert world.before.items() <= images(world.store).items()
    assert len(images(world.store)) == 120


def test_one_more_source_image_renders_its_rows(world: World) -> None:
    new = world.again(wanted_rows(n=13))
    assert new == keys(n=13) - keys()
    assert len(new) == 3


@pytest.mark.parametrize("change", [{"generator": "one changed weight"}, {"version": 2}])
def test_what_makes_pixels_makes_another_set(world: World, change: dict) -> None:
    assert world.again(store=synthetic_set(world.root, **change)) == keys()
    assert images(synthetic_set(world.root)) == world.before


def test_another_seed_renders_other_images(world: World) -> None:
    assert world.again(wanted_rows(seed=1), store=synthetic_set(world.root, seed=1)) == keys()
    assert not set(images(world.store).values()) & set(world.before.values())


def flipped(data: bytes) -> bytes:
    """One bit of the middle byte is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-10], lambda data: b""],
                         ids=["flipped", "truncated", "deleted"])  # fmt: skip
def test_a_damaged_part_is_found_and_rendered_again_alone_to_the_same_bytes(
    world: World, damage: Callable[[bytes], bytes]
) -> None:
    store = synthetic_set(world.root)
    part = store.file(store.marker(1)["part"])
    data = damage(store.storage.get(part))
    store.storage.put(part, data)
    if not data:
        store.storage.delete(part)
    verdict = verify(store, wanted_rows())
    assert list(verdict.corrupt) == [1]
    assert len(verdict.missing) == 8
    assert repair(store, verdict) == 1
    assert world.again() == set(verdict.missing)
    assert images(world.store) == world.before
    assert verify(world.store, wanted_rows()).clean


@pytest.mark.parametrize("how", [{"shard_rows": 5}, {"shard_rows": 36}, {"workers": 3}])
def test_seeds_and_keys_do_not_depend_on_how(tmp_path: Path, how: dict) -> None:
    """The fake's pixels depend on nothing but the seed, so equal images mean equal seeds."""
    one, two = synthetic_set(str(tmp_path / "1")), synthetic_set(str(tmp_path / "2"))
    render_all(one, wanted_rows(), FakeRenderer(), **BASE)
    render_all(two, wanted_rows(), FakeRenderer(), **(BASE | how))
    assert images(one) == images(two)


def test_out_of_memory_halves_the_micro_batch_and_says_so(tmp_path: Path) -> None:
    one, two = synthetic_set(str(tmp_path / "1")), synthetic_set(str(tmp_path / "2"))
    render_all(one, wanted_rows(), FakeRenderer(), micro_batch=8)
    render_all(two, wanted_rows(), FakeRenderer(largest=2), micro_batch=8)
    assert {m["micro_batch"] for m in one.markers(one.done()).values()} == {8}
    assert {m["micro_batch"] for m in two.markers(two.done()).values()} == {2}
    assert images(one) == images(two)
    assert verify(two, wanted_rows()).clean


def test_growing_from_3_to_10_equals_10_at_once(tmp_path: Path) -> None:
    grown, once = synthetic_set(str(tmp_path / "1")), synthetic_set(str(tmp_path / "2"))
    render_all(grown, wanted_rows(replicas=3), FakeRenderer())
    render_all(grown, wanted_rows(replicas=10), FakeRenderer())
    render_all(once, wanted_rows(replicas=10), FakeRenderer())
    assert images(grown) == images(once)
    assert len(grown.waves()) == 2
    assert verify(grown, wanted_rows(replicas=3)).unwanted == 84


def test_what_several_plans_want_is_verified_once(tmp_path: Path) -> None:
    store, few, many = synthetic_set(str(tmp_path)), wanted_rows(n=12, replicas=2), wanted_rows(n=8, replicas=4)
    render_all(store, few, FakeRenderer())
    verdict = verify(store, few, many)
    assert (verdict.wanted, verdict.ok, verdict.unwanted, verdict.clean) == (40, 24, 0, False)
    assert set(verdict.missing) == keys(n=8, replicas=4) - keys(n=12, replicas=2)
    render_all(store, many, FakeRenderer())
    assert verify(store, few, many).clean
    assert verify(store, many).unwanted == 8


def test_files_a_run_leaves(tmp_path: Path) -> None:
    store = synthetic_set(str(tmp_path))
    render_all(store, wanted_rows(n=4), FakeRenderer())
    names = [e.path.removeprefix(store.path + "/") for e in store.storage.list(store.path)]
    (rows, _), = store.waves()[0].files
    parts = [store.marker(s)["part"] for s in (0, 1)]
    assert names == sorted([
        "attempts/00000/0.json", "attempts/00000/0.start.json", "attempts/00001/0.json",
        "attempts/00001/0.start.json", "done/00000.json", "done/00001.json", *parts, "set.json",
        "waves/00000.json", rows,
    ])  # fmt: skip
