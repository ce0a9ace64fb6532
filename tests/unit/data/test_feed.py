"""Batches of a training set: pure functions of the step, exact in ratio, mixed like a shuffled set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from raysynth.core.errors import DataError
from raysynth.core.schemas import members_schema, to_parquet
from raysynth.data.feed import Feed
from raysynth.data.views import View, npy_bytes
from tests.digits import CLASSES, digit_images

IMAGES, LABELS = digit_images()
N_REAL, N_SYNTH = 60, 150
SYNTHETIC = 200 + np.argsort(LABELS[200 : 200 + N_SYNTH], kind="stable")
"""Digits that play the synthetic images: stored sorted by class, as a generator a class would leave them."""
FEW = settings(max_examples=25, deadline=None)


def write_view(folder: Path, digits: np.ndarray, prefix: str, chunk_rows: int = 16) -> View:
    """A view of some digits, ids `<prefix><digit>`, in chunks."""
    (folder / "chunks").mkdir(parents=True)
    for start in range(0, len(digits), chunk_rows):
        part = IMAGES[digits[start : start + chunk_rows]]
        (folder / "chunks" / f"{start // chunk_rows:05d}.npy").write_bytes(npy_bytes(part))
    columns = {f"label_{c}": (LABELS[digits] == int(c)).astype(np.int8) for c in CLASSES}
    index = {
        "image_id": [f"{prefix}{d}" for d in digits],
        "chunk": [f"{i // chunk_rows:05d}.npy" for i in range(len(digits))],
        "row": np.arange(len(digits)) % chunk_rows, **columns,
    }  # fmt: skip
    at = np.random.default_rng(1).permutation(len(digits))  # an index is in hash order
    (folder / "index.parquet").write_bytes(to_parquet(pa.table(index).take(at)))
    return View(folder)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[str, View]:
    folder = tmp_path_factory.mktemp("views")
    return {
        "real": write_view(folder / "real", np.arange(N_REAL), "r"),
        "synthetic": write_view(folder / "synthetic", SYNTHETIC, "s"),
    }


def table(rows: list[tuple]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows)], schema=members_schema())


def mix(n_real: int = N_REAL, n_synth: int = N_SYNTH, phase: int = 0) -> pa.Table:
    real = [(phase, "real", f"r{d}", f"r{d}") for d in range(n_real)]
    return table(real + [(phase, "synthetic", f"s{d}", f"s{d}") for d in SYNTHETIC[:n_synth]])


def feed(views: dict[str, View], members: pa.Table, batch_size: int = 16, seed: int = 0, **options) -> Feed:  # type: ignore[no-untyped-def]
    return Feed(members, options.pop("phase", 0), views, CLASSES, batch_size, seed, **options)


def test_a_batch_has_the_pixels_and_labels_of_its_members(views: dict[str, View]) -> None:
    f = feed(views, mix(), batch_size=210)
    batch = f.batch(0)
    digits = [*range(N_REAL), *SYNTHETIC]
    expected = np.array([digits[p] for p in f.positions(0)])
    assert batch.images.dtype == np.uint8
    assert batch.labels.dtype == np.float32
    assert (batch.images == IMAGES[expected]).all()
    assert (batch.labels == np.eye(10)[LABELS[expected]]).all()
    assert (batch.synthetic == (expected >= 200)).all()
    assert (f.labels_all() == np.eye(10)[LABELS[digits]]).all()
    counts = np.bincount(LABELS[digits], minlength=10)
    assert (f.class_counts() == [counts, len(digits) - counts]).all()


@FEW
@given(
    n_real=st.integers(1, N_REAL), n_synth=st.integers(1, N_SYNTH), batch=st.integers(2, 33), step=st.integers(0, 500),
    fraction=st.sampled_from([None, 0.25, 0.5, 0.8]), balanced=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_step_is_the_same_however_it_is_reached(
    views: dict[str, View], n_real: int, n_synth: int, batch: int, step: int, fraction: float | None, balanced: bool,
    seed: int,
) -> None:  # fmt: skip
    if fraction and not 0 < round(fraction * batch) < batch:
        fraction = None
    def make() -> Feed:
        return feed(views, mix(n_real, n_synth), batch, seed, balanced=balanced, real_fraction=fraction)

    trained, resumed = make(), make()
    for before in range(max(0, step - 4), step):
        trained.batch(before)
    one, other = trained.batch(step), resumed.batch(step)
    assert (one.images == other.images).all()
    assert (one.labels == other.labels).all()
    assert (one.synthetic == other.synthetic).all()
    half = batch // 2
    parts = [resumed.batch(step, slice(0, half)), resumed.batch(step, np.arange(half, batch))]
    assert (np.concatenate([p.images for p in parts]) == one.images).all()
    if fraction:
        assert (~one.synthetic).sum() == round(fraction * batch)


@FEW
@given(n_real=st.integers(1, N_REAL), n_synth=st.integers(1, N_SYNTH), batch=st.integers(1, 50))
def test_nothing_is_dropped_when_an_epoch_ends(views: dict[str, View], n_real: int, n_synth: int, batch: int) -> None:
    f = feed(views, mix(n_real, n_synth), batch)
    n = n_real + n_synth
    stream = np.concatenate([f.positions(s) for s in range(-(-3 * n // batch))])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@FEW
@given(n_real=st.integers(1, 40), n_synth=st.integers(1, N_SYNTH), fraction=st.floats(0.1, 0.9))
def test_each_part_of_a_mix_has_epochs_of_its_own(
    views: dict[str, View], n_real: int, n_synth: int, fraction: float
) -> None:
    f, steps = feed(views, mix(n_real, n_synth), 20, real_fraction=fraction), 40
    stream = [f.positions(s) for s in range(steps)]
    for part, share in ((range(n_real), round(fraction * 20)), (range(n_real, n_real + n_synth), None)):
        drawn = [[p for p in batch if p in part] for batch in stream]
        assert {len(d) for d in drawn} == {share if share is not None else 20 - round(fraction * 20)}
        counts = Counter(p for d in drawn for p in d)
        seen = [counts[p] for p in part]
        assert max(seen) - min(seen) <= 1


def test_an_image_that_is_there_twice_comes_twice_an_epoch(views: dict[str, View]) -> None:
    repeated = table([(0, "real", f"r{d}", f"r{d}") for d in (0, 1, 2, 2, 2)])
    images = np.concatenate([feed(views, repeated, 5, seed=s).batch(7).images for s in range(3)])
    assert (images == IMAGES[2]).all(axis=(1, 2, 3)).sum() == 9


def batch_entropies(labels: np.ndarray, batch: int) -> np.ndarray:
    """Entropy of the classes of each batch, nats; labels (N,)."""
    return entropy((labels.reshape(-1, batch, 1) == np.arange(10)).sum(axis=1), axis=1)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fraction", [None, 0.25])
def test_class_entropy_of_batches_is_that_of_a_shuffled_set(
    views: dict[str, View], fraction: float | None, ranks: int
) -> None:
    # Views and members hold the synthetic images sorted by class. A rank's share must be as mixed as the batch.
    batch, steps = 32, 400
    f = feed(views, mix(), batch, real_fraction=fraction)
    fed = np.concatenate([f.labels_all()[f.positions(s)].argmax(axis=1) for s in range(steps)])
    rng = np.random.default_rng(0)
    classes = np.array(LABELS[[*range(N_REAL), *SYNTHETIC]])
    real, synthetic = classes[:N_REAL], classes[N_REAL:]

    def shuffled() -> np.ndarray:
        if fraction is None:
            return rng.permutation(classes)[:batch]
        k = round(fraction * batch)
        return rng.permutation([*rng.permutation(real)[:k], *rng.permutation(synthetic)[: batch - k]])

    reference = np.concatenate([shuffled() for _ in range(4000)])
    mine, theirs = batch_entropies(fed, batch // ranks), batch_entropies(reference, batch // ranks)
    error = np.hypot(mine.std() / len(mine) ** 0.5, theirs.std() / len(theirs) ** 0.5)
    assert abs(mine.mean() - theirs.mean()) < 4 * error
    # The test would see a set in stored order: one or two classes a batch.
    assert batch_entropies(np.tile(classes, batch), batch).mean() < theirs.mean() - 40 * error


def test_ranks_share_real_and_synthetic_images(views: dict[str, View]) -> None:
    f = feed(views, mix(), 32, real_fraction=0.25)
    first = np.array([(~f.batch(s, slice(0, 16)).synthetic).sum() for s in range(300)])
    assert abs(first.mean() - 4) < 0.4
    assert 0 < first.std() < 2.5


def test_balanced_batches_have_the_classes_equally_often(views: dict[str, View]) -> None:
    few = [*range(20), *(d for d in range(20, N_REAL) if LABELS[d] == 3)]
    members = table([(0, "real", f"r{d}", f"r{d}") for d in few])
    f = feed(views, members, 20, balanced=True)
    for step in range(5):
        assert (f.batch(step).labels.sum(axis=0) == 2).all()
    both = feed(views, mix(), 40, balanced=True, real_fraction=0.5)
    for step in range(5):
        batch = both.batch(step)
        assert (batch.labels[batch.synthetic].sum(axis=0) == 2).all()
        assert (batch.labels[~batch.synthetic].sum(axis=0) == 2).all()


def test_labels_may_come_from_another_image(views: dict[str, View]) -> None:
    a, b = (int(SYNTHETIC[i]) for i in (0, -1))
    f = feed(views, table([(0, "synthetic", f"s{a}", f"s{b}"), (0, "synthetic", f"s{b}", f"s{a}")]), 2)
    batch = f.batch(0)
    first = int((batch.images[0] == IMAGES[b]).all())
    assert (batch.images[first] == IMAGES[a]).all()
    assert batch.labels[first].argmax() == LABELS[b] != LABELS[a]


def test_phases_and_seeds_have_their_own_orders(views: dict[str, View]) -> None:
    members = pa.concat_tables([mix(phase=0), mix(phase=1)])
    one, two, other = feed(views, members), feed(views, members, phase=1), feed(views, members, seed=1)
    assert len(one) == len(two) == N_REAL + N_SYNTH
    assert (one.positions(0) != two.positions(0)).any()
    assert (one.positions(0) != other.positions(0)).any()


def test_unknown_labels_are_nan_until_the_policy_decides(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "a.npy").write_bytes(npy_bytes(IMAGES[:4]))
    raw = {"label_a": pa.array([1, -1, None, 0], pa.int8()), "label_b": pa.array([0, 1, 0, None], pa.int8())}
    index = pa.table({"image_id": list("wxyz"), "chunk": ["a.npy"] * 4, "row": range(4), **raw})
    (tmp_path / "index.parquet").write_bytes(to_parquet(index))
    views, members = {"real": View(tmp_path)}, table([(0, "real", i, i) for i in "wxyz"])

    def labels(**policy: str) -> list[list[float]]:
        f = Feed(members, 0, views, ["b", "a"], 4, 0, policy=policy, balanced=True)
        return np.nan_to_num(f.labels_all(), nan=-9).tolist()

    assert labels() == [[0, 1], [1, -9], [0, -9], [-9, 0]]
    assert labels(a="ones", b="zeros") == [[0, 1], [1, 1], [0, 1], [0, 0]]
    assert Feed(members, 0, views, ["b", "a"], 4, 0).class_counts().tolist() == [[1, 1], [2, 1]]


def test_what_cannot_be_fed_is_refused(views: dict[str, View], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no member of phase 1"):
        feed(views, mix(), phase=1)
    with pytest.raises(DataError, match=r"image_id: got 'r999'"):
        feed(views, table([(0, "real", "r999", "r0")]))
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "a.npy").write_bytes(npy_bytes(IMAGES[:4].repeat(2, axis=1)))
    index = views["synthetic"].index.slice(0, 4)
    index = index.set_column(1, "chunk", pa.array(["a.npy"] * 4)).set_column(2, "row", pa.array(range(4)))
    (tmp_path / "index.parquet").write_bytes(to_parquet(index))
    members = table([(0, "real", "r0", "r0"), *((0, "synthetic", i, i) for i in index["image_id"].to_pylist())])
    taller = {**views, "synthetic": View(tmp_path)}
    with pytest.raises(DataError, match=r"views.*\(16, 8, 1\).*of one shape"):
        feed(taller, members)
