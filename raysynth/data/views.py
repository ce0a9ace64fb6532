"""A training view: pixels decoded and resized once, and batches that are a pure function of (seed, epoch, step).

A view is a folder of `chunks/*.npy` (uint8, memory-mapped) and `index.parquet` (one row an image: where it is, its
patient, labels and attributes). Batches are positions in the index: orders of every epoch are concatenated, so
that nothing is dropped at the end of one, and any step's batch is found without reading those before it, which is
what makes resume in mid-epoch exact.

Knows nothing of models, nor how the chunks were decoded.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from raysynth.core.schemas import LABEL, from_parquet
from raysynth.data.strata import primary_label, used_labels

INDEX = "index.parquet"
CHUNKS = "chunks"


class View:
    """Images of one training view, mapped from local disk.

    Args:
        folder: the view's folder on local disk.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index: pa.Table = from_parquet((self.folder / INDEX).read_bytes())
        self._chunk = np.asarray(self.index["chunk"].to_pylist(), dtype=object)
        self._row = self.index["row"].to_numpy()
        self._maps: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.index.num_rows

    def columns(self) -> dict[str, list[Any]]:
        """Every `label_*` and `attr_*` column as lists."""
        return {
            n: self.index[n].to_pylist() for n in self.index.column_names if n.startswith((LABEL, "attr_"))
        }

    def images(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pixels at `positions` of the index: (B, H, W, C) uint8."""
        return np.stack([self._map(self._chunk[p])[self._row[p]] for p in positions])

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.load(self.folder / CHUNKS / name, mmap_mode="r", allow_pickle=False)
        return self._maps[name]


def npy_bytes(images: np.ndarray) -> bytes:
    """A chunk's file content: (N, H, W, C) uint8 in numpy's own format."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(images), allow_pickle=False)
    return sink.getvalue()


class Order(Protocol):
    """An endless stream of positions, cut into batches."""

    def batch(self, step: int) -> np.ndarray:
        """Positions of batch `step`: (batch_size,) int64."""


def _permutation(n: int, *key: int) -> np.ndarray:
    # SeedSequence mixes the whole key, so that neighbouring seeds and epochs are unrelated.
    bits = np.random.Philox(np.random.SeedSequence(list(key)))
    return np.random.Generator(bits).permutation(n)


class ShuffledOrder:
    """Every image once an epoch, each epoch in its own permutation, epochs one after the other.

    Args:
        n: images.
        seed: another stream.
        batch_size: global batch.
    """

    def __init__(self, n: int, seed: int, batch_size: int) -> None:
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _permutation(n, seed, epoch))

    def batch(self, step: int) -> np.ndarray:
        """Positions of batch `step`: (batch_size,) int64."""
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self._epoch(i // self.n)[i % self.n] for i in stream.tolist()], np.int64)


class BalancedOrder:
    """Every group equally often; within a group, every image once a cycle, each cycle in its own permutation.

    The stream is a sequence of rounds; a round draws one image of every group, in an order of its own.

    Args:
        groups: positions of each group; empty groups are left out.
        seed: another stream.
        batch_size: global batch.
    """

    def __init__(self, groups: Sequence[np.ndarray], seed: int, batch_size: int) -> None:
        self.groups = [np.asarray(g, np.int64) for g in groups if len(g)]
        self.seed, self.batch_size = seed, batch_size
        k = len(self.groups)
        self._round = lru_cache(maxsize=4096)(lambda r: _permutation(k, seed, 1, r))
        self._cycle = lru_cache(maxsize=4 * k)(lambda g, c: _permutation(len(self.groups[g]), seed, 2, g, c))

    def batch(self, step: int) -> np.ndarray:
        """Positions of batch `step`: (batch_size,) int64."""
        k, found = len(self.groups), []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            turn, place = divmod(i, k)
            g = int(self._round(turn)[place])
            cycle, within = divmod(turn, len(self.groups[g]))
            found.append(self.groups[g][self._cycle(g, cycle)[within]])
        return np.array(found, np.int64)


def label_groups(
    columns: Mapping[str, Sequence[Any]], classes: Sequence[str], policy: Mapping[str, str] | None = None
) -> list[np.ndarray]:
    """Positions of the images positive for each class or finding, of those that have none, and of those not known.

    An image with several findings is in several groups. It is not known where nothing is positive and a finding of
    policy `ignore` is uncertain or not annotated.

    Args:
        policy: finding -> ignore (default), zeros or ones, as `data.labels.policy`.
    """
    names = [LABEL + c for c in classes]
    table = pa.table({n: pa.array([None if v != v else v for v in columns[n]], pa.int8()) for n in names})
    primary, _ = primary_label(table, policy)
    positive = (used_labels(table, policy) == 1).T
    return [*(np.flatnonzero(p) for p in positive), *(np.flatnonzero(primary == len(names) + i) for i in range(2))]


def order_for(
    columns: Mapping[str, Sequence[Any]], classes: Sequence[str], n: int, balanced: bool, seed: int, batch_size: int,
    policy: Mapping[str, str] | None = None,
) -> Order:  # fmt: skip
    """The batch order of a training run: balanced over `classes`, or as frequent as in the data."""
    if balanced and classes:
        return BalancedOrder(label_groups(columns, classes, policy), seed, batch_size)
    return ShuffledOrder(n, seed, batch_size)
