"""Batches of a classifier's training: a pure function of (seed, phase, step).

Input: the members of a training set (core.schemas.members_schema) and the training views that hold their pixels.
Output: batches in uint8, exact in ratio, mixed over classes and sources, with nothing dropped when an epoch ends. Any
step's batch is found without those before it, which makes resume in mid-epoch exact; a rank reads only its places.

Knows nothing of models, augmentation or devices. There is no reading ahead in threads or processes: pixels are
decoded and resized already, so that a batch costs one copy from mapped files (jobs/bench/feed.py has the numbers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import DataError
from raysynth.data.labels import apply_policy, label_array, label_columns
from raysynth.data.strata import seeded_hash
from raysynth.data.views import BalancedOrder, MixedOrder, Order, ShuffledOrder, View, table_groups

SOURCES = ("real", "synthetic")


@dataclass(frozen=True)
class Batch:
    """One batch, or a rank's share of it."""

    images: np.ndarray
    """(B, H, W, C) uint8."""
    labels: np.ndarray
    """(B, L) float32: 1, 0, NaN where not known under the label policy."""
    synthetic: np.ndarray
    """(B,) bool."""


class Feed:
    """Batches of one training phase.

    Args:
        members: rows of every phase; an image that is there twice comes twice an epoch.
        phase: the one to feed, 0 or 1.
        views: "real" and "synthetic" -> the view with that source's images, ids in `image_id`; only those needed.
        classes: the columns of the labels, in order.
        batch_size: global batch.
        seed: another order.
        balanced: classes (or findings, none and not known) equally often, instead of as often as among the members.
        real_fraction: exactly round(real_fraction * batch_size) real images in every batch, at least one and not all,
            of a phase that has both sources; null: as in the union.
        policy: `data.labels.policy`.

    Raises:
        DataError: no member in this phase; a member that its view does not have; views of different shapes.
    """

    def __init__(
        self, members: pa.Table, phase: int, views: Mapping[str, View], classes: Sequence[str], batch_size: int,
        seed: int, balanced: bool = False, real_fraction: float | None = None, policy: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        rows = members.filter(pc.field("phase") == phase).combine_chunks()
        if not rows.num_rows:
            raise DataError("training_set", f"no member of phase {phase}", "at least one")
        self.phase, self.batch_size, self.seed = phase, batch_size, seed
        self.synthetic: np.ndarray = pc.equal(rows["source"], "synthetic").to_numpy()
        self.views = {s: views[s] for s in SOURCES if (self.synthetic == (s == "synthetic")).any()}
        shapes = {s: view.shape for s, view in self.views.items()}
        if len(set(shapes.values())) > 1:
            raise DataError("views", shapes, "of one shape", "Build both at classifier.size.")
        self.shape = next(iter(shapes.values()))
        self._at = np.empty(rows.num_rows, np.int64)
        raw = np.empty((rows.num_rows, len(classes)), np.float32)
        for source, view in self.views.items():
            mine = self.synthetic == (source == "synthetic")
            part = rows.filter(pa.array(mine))
            self._at[mine] = view.positions(part["id"])
            raw[mine] = label_array(view.index, classes)[view.positions(part["labels_from"])]
        values, known = apply_policy(raw, policy or {}, classes)
        self._labels = np.where(known, values, np.float32(np.nan))
        groups = pa.table(label_columns(classes, raw)) if balanced and len(classes) else None
        self._order = self._order_of(groups, real_fraction, policy)

    def _order_of(
        self, groups: pa.Table | None, real_fraction: float | None, policy: Mapping[str, str] | None
    ) -> Order:
        def order(places: np.ndarray, batch_size: int, name: str) -> Order:
            seed = int(seeded_hash("feed", self.seed, [f"{self.phase} {name}"])[0])
            if groups is None:
                return ShuffledOrder(len(places), seed, batch_size)
            return BalancedOrder(table_groups(groups.take(pa.array(places)), policy), seed, batch_size)

        if real_fraction is None:
            return order(np.arange(len(self)), self.batch_size, "all")
        real = round(real_fraction * self.batch_size)
        shares = ((np.flatnonzero(~self.synthetic), real), (np.flatnonzero(self.synthetic), self.batch_size - real))
        parts = [(order(places, share, s), places) for (places, share), s in zip(shares, SOURCES)]
        return MixedOrder(parts, int(seeded_hash("feed", self.seed, [f"{self.phase} places"])[0]))

    def __len__(self) -> int:
        """Members of the phase."""
        return len(self._at)

    def positions(self, step: int) -> np.ndarray:
        """Members in the global batch of `step` of this phase: (batch_size,) int64."""
        return self._order.batch(step)

    def batch(self, step: int, where: slice | np.ndarray | None = None) -> Batch:
        """Batch `step` of this phase, counted from 0.

        Args:
            where: this rank's places in the global batch; null: all.
        """
        members = self.positions(step)[where if where is not None else slice(None)]
        synthetic = self.synthetic[members]
        images = np.empty((len(members), *self.shape), np.uint8)
        for source, view in self.views.items():
            places = np.flatnonzero(synthetic == (source == "synthetic"))
            view.copy_to(images, places.tolist(), self._at[members[places]])
        return Batch(images, self._labels[members], synthetic)

    def labels_all(self) -> np.ndarray:
        """Labels of every member, as in the batches: (N, L) float32: 1, 0, NaN."""
        return self._labels

    def class_counts(self) -> np.ndarray:
        """Members with each class or finding, and known not to have it: (2, L) int64."""
        return np.stack([(self._labels == value).sum(axis=0) for value in (1, 0)])
