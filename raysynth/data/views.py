"""A training view: pixels decoded and resized once, and batches that are a pure function of (seed, epoch, step).

A view is a folder of `chunks/*.npy` (uint8, memory-mapped) and `index.parquet` (one row an image: where it is, its
patient, labels and attributes). Batches are positions in the index: orders of every epoch are concatenated, so
that nothing is dropped at the end of one, and any step's batch is found without reading those before it, which is
what makes resume in mid-epoch exact.

Knows nothing of models, nor how the chunks were decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.errors import DataError
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
        chunks = self.index["chunk"].combine_chunks().dictionary_encode()
        self._names: list[str] = chunks.dictionary.to_pylist()
        self._chunk = chunks.indices.to_numpy()
        self._row = self.index["row"].to_numpy()
        self._maps: list[np.ndarray | None] = [None] * len(self._names)

    def __len__(self) -> int:
        return self.index.num_rows

    def columns(self) -> dict[str, list[Any]]:
        """Every `label_*` and `attr_*` column as lists."""
        return {
            n: self.index[n].to_pylist() for n in self.index.column_names if n.startswith((LABEL, "attr_"))
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of every image."""
        return self._map(0).shape[1:]

    def positions(self, ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> np.ndarray:
        """Where images are in the index, (N,) int64.

        Raises:
            DataError: an id that the view does not have.
        """
        wanted = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
        found = pc.index_in(wanted, value_set=self.index["image_id"].combine_chunks())
        if found.null_count:
            raise DataError(
                "image_id", wanted.filter(pc.is_null(found))[0].as_py(),
                f"one of the {len(self)} images of {self.folder}", "The view was built for other images.",
            )  # fmt: skip
        return found.to_numpy(zero_copy_only=False).astype(np.int64)

    def images(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pixels at `positions` of the index: (B, H, W, C) uint8."""
        images = np.empty((len(positions), *self.shape), np.uint8)
        self.copy_to(images, range(len(positions)), positions)
        return images

    def copy_to(self, images: np.ndarray, places: Iterable[int], positions: Sequence[int] | np.ndarray) -> None:
        """Writes the pixels at `positions` to `images[places]`.

        One copy an image, straight from the map: grouping a batch by chunk costs a second one (64 images of 224 px from
        8 chunks: 0.36 against 0.23 ms).
        """
        at = np.asarray(positions, np.int64)
        chunks = self._chunk[at].tolist()
        maps = {chunk: self._map(chunk) for chunk in set(chunks)}
        for place, chunk, row in zip(places, chunks, self._row[at].tolist(), strict=True):
            images[place] = maps[chunk][row]

    def _map(self, chunk: int) -> np.ndarray:
        found = self._maps[chunk]
        if found is None:
            file = self.folder / CHUNKS / self._names[chunk]
            # A plain array over the map: indexing np.memmap itself costs several times a small image's copy.
            found = self._maps[chunk] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        return found


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
        begin, end = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(begin // self.n, (end - 1) // self.n + 1)
        parts = [self._epoch(k)[max(0, begin - k * self.n) : end - k * self.n] for k in epochs]
        return np.concatenate(parts).astype(np.int64)


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


class MixedOrder:
    """A fixed number of images of every part in every batch, each part in an order of its own.

    Places inside a batch are permuted at each step, so that any share of a batch is a mix as well.

    Args:
        parts: (order, positions its numbers stand for) of each part; the order's batch size is the part's share.
        seed: another stream of places.
    """

    def __init__(self, parts: Sequence[tuple[Order, np.ndarray]], seed: int) -> None:
        self.parts, self.seed = parts, seed

    def batch(self, step: int) -> np.ndarray:
        """Positions of batch `step`: (sum of the parts' batch sizes,) int64."""
        found = np.concatenate([places[order.batch(step)] for order, places in self.parts])
        return found[_permutation(len(found), self.seed, step)]


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
    return table_groups(
        pa.table({n: pa.array([None if v != v else v for v in columns[n]], pa.int8()) for n in names}), policy
    )


def table_groups(table: pa.Table, policy: Mapping[str, str] | None = None) -> list[np.ndarray]:
    """As `label_groups`, of every `label_*` column of a table."""
    primary, names = primary_label(table, policy)
    positive = (used_labels(table, policy) == 1).T
    return [*(np.flatnonzero(p) for p in positive), *(np.flatnonzero(primary == len(names) - i) for i in (2, 1))]


def order_for(
    columns: Mapping[str, Sequence[Any]], classes: Sequence[str], n: int, balanced: bool, seed: int, batch_size: int,
    policy: Mapping[str, str] | None = None,
) -> Order:  # fmt: skip
    """The batch order of a training run: balanced over `classes`, or as frequent as in the data."""
    if balanced and classes:
        return BalancedOrder(label_groups(columns, classes, policy), seed, batch_size)
    return ShuffledOrder(n, seed, batch_size)
