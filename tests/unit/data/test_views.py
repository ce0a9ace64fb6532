"""Batch orders as pure functions of the step, and views read from disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.schemas import to_parquet
from raysynth.data.views import BalancedOrder, ShuffledOrder, View, label_groups, npy_bytes
from tests.digits import digit_images

SMALL = settings(max_examples=30, deadline=None)


@SMALL
@given(n=st.integers(1, 40), batch=st.integers(1, 17), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_every_epoch_has_every_image_once_and_nothing_is_dropped(n: int, batch: int, seed: int, epochs: int) -> None:
    order = ShuffledOrder(n, seed, batch)
    steps = -(-n * epochs // batch)
    stream = np.concatenate([order.batch(s) for s in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@SMALL
@given(step=st.integers(0, 10_000), seed=st.integers(0, 99), batch=st.sampled_from([1, 5, 64]))
def test_a_batch_is_found_without_the_batches_before_it(step: int, seed: int, batch: int) -> None:
    groups = [np.arange(0, 7), np.arange(7, 10), np.arange(10, 31)]
    for make in (lambda: ShuffledOrder(31, seed, batch), lambda: BalancedOrder(groups, seed, batch)):
        warmed = make()
        for before in range(max(0, step - 3), step):
            warmed.batch(before)
        assert (warmed.batch(step) == make().batch(step)).all()


def test_batch_size_cuts_one_and_the_same_stream() -> None:
    whole = ShuffledOrder(50, 3, 60).batch(0)
    parts = np.concatenate([ShuffledOrder(50, 3, 12).batch(s) for s in range(5)])
    assert (whole == parts).all()


@SMALL
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=st.integers(0, 99))
def test_groups_come_equally_often_and_each_cycles_through_its_images(sizes: list[int], seed: int) -> None:
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=False)]
    k, rounds = sum(n > 0 for n in sizes), 2 * max(sizes)
    stream = BalancedOrder(groups, seed, k * rounds).batch(0)
    for group in (g for g in groups if len(g)):
        drawn = [p for p in stream.tolist() if p in group]
        assert len(drawn) == rounds
        counts = Counter(drawn)
        assert set(counts) == set(group.tolist())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_batches_are_not_sorted_by_class() -> None:
    groups = [np.arange(0, 10), np.arange(10, 20)]
    first = BalancedOrder(groups, 0, 64).batch(0) < 10
    assert len({tuple(pair) for pair in first.reshape(-1, 2).tolist()}) == 2


def test_seeds_epochs_and_groups_have_their_own_permutations() -> None:
    a, b = ShuffledOrder(100, 0, 100), ShuffledOrder(100, 1, 100)
    assert (a.batch(0) != a.batch(1)).any()
    assert (a.batch(1) != b.batch(0)).any()


def test_findings_none_and_unknown_are_groups() -> None:
    columns = {"label_a": [1, 1, 0, None, -1], "label_b": [1, 0, 0, 0, 0]}
    def groups(**policy: str) -> list[list[int]]:
        return [g.tolist() for g in label_groups(columns, ["a", "b"], policy)]

    assert groups() == groups(a="ignore") == [[0, 1], [0], [2], [3, 4]]
    assert groups(a="zeros") == [[0, 1], [0], [2, 3, 4], []]
    assert groups(a="ones") == [[0, 1, 3, 4], [0], [2], []]


def test_view_reads_the_pixels_of_the_index(tmp_path: Path) -> None:
    images, labels = digit_images()
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "a.npy").write_bytes(npy_bytes(images[:5]))
    (tmp_path / "chunks" / "b.npy").write_bytes(npy_bytes(images[5:9]))
    index = pa.table({
        "image_id": ["x", "y", "z"], "chunk": ["b.npy", "a.npy", "b.npy"], "row": [3, 0, 0],
        "label_0": pa.array((labels[[8, 0, 5]] == 0).astype(np.int8)), "attr_sex": ["F", None, "M"],
    })  # fmt: skip
    (tmp_path / "index.parquet").write_bytes(to_parquet(index))
    view = View(tmp_path)
    assert len(view) == 3
    assert (view.images([2, 0, 1]) == images[[5, 8, 0]]).all()
    assert view.columns() == {"label_0": [0, 1, 0], "attr_sex": ["F", None, "M"]}
