"""Where every row of a synthetic set is: 21 bytes a row, so that a driver may keep a hundred million of them.

Built from waves (which rows, in which shards) and names of done and void shards; statuses of rows come from the
markers of their shards. A row may be in several waves: it was rendered again after it failed, or after its image was
lost. Knows nothing of plans, and reads no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from raysynth.synth.sets import SyntheticSet, Wave
from raysynth.synth.wanted import CHUNK, Wanted, unpack

LOST, ABSENT, FAILED, REJECTED, OK = -1, 0, 1, 2, 3
STATUSES = ("absent", "failed", "rejected", "ok")


@dataclass(frozen=True)
class Places:
    """Where each of some keys is: five bytes a key; shard, place and attempt follow from them when asked for."""

    ledger: Ledger
    position: np.ndarray
    """(N,) int32; -1 where no done shard has the key."""
    status: np.ndarray
    """(N,) int8; ABSENT where no done shard has the key."""

    def __getitem__(self, some: slice | np.ndarray) -> Places:
        return Places(self.ledger, self.position[some], self.status[some])

    @property
    def shard(self) -> np.ndarray:
        """(N,) int32; -1 where there is none."""
        return self.ledger.shard_of(self.position)

    @property
    def place(self) -> np.ndarray:
        """(N,) int32 place within the shard; meaningless where there is none."""
        return (self.position - self.ledger.starts[np.maximum(self.shard, 0)]).astype(np.int32)

    @property
    def attempt(self) -> np.ndarray:
        """(N,) int32; meaningless where there is no place."""
        return self.ledger.attempts[self.position].astype(np.int32)

    def shards(self) -> dict[int, int]:
        """Shards that hold any of the keys -> how many of them."""
        found = np.zeros(self.ledger.shards + 1, np.int64)
        for start in range(0, len(self.position), CHUNK):
            found += np.bincount(self[start : start + CHUNK].shard + 1, minlength=len(found))
        return {int(shard): int(found[shard + 1]) for shard in np.flatnonzero(found[1:])}


class Ledger:
    """A reading of one set; `refresh` brings it up to date."""

    def __init__(self, store: SyntheticSet) -> None:
        self.store = store
        self.waves: list[Wave] = []
        self.done: set[int] = set()
        self.void: set[int] = set()
        self.starts = np.zeros(1, np.int64)
        """(shards + 1,) position of each shard's first row."""
        self.keys = np.zeros(0, "S16")
        self.order = np.zeros(0, np.int32)
        """(rows,) positions in the order of `keys`; equal keys oldest first."""
        self.attempts = np.zeros(0, np.int8)
        self.refresh()

    def refresh(self) -> Ledger:
        """Looks at the set again. Waves never change, so that only new ones are read."""
        # Names of finished shards first: a shard that ends meanwhile is then merely not yet known to be done.
        self.done, self.void = self.store.done(), self.store.void()
        waves = self.store.waves()
        new = waves[len(self.waves) :]
        self.waves = waves
        if not new:
            return self
        lengths = np.array([n for wave in waves for n in wave.shard_rows], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        whole, attempts = np.empty(self.starts[-1], "S16"), np.empty(self.starts[-1], np.int8)
        whole[self.order], attempts[: len(self.attempts)] = self.keys, self.attempts
        at = len(self.keys)
        for wave in new:
            for keys, tries in self.store.wave_keys(wave):
                whole[at : at + len(keys)], attempts[at : at + len(keys)] = keys, tries
                at += len(keys)
        self.order = np.argsort(whole, kind="stable").astype(np.int32)
        self.keys, self.attempts = whole[self.order], attempts
        pa.default_memory_pool().release_unused()  # Arrow would keep what reading the waves took
        return self

    @property
    def shards(self) -> int:
        """Shards of all waves."""
        return len(self.starts) - 1

    def shard_of(self, position: np.ndarray) -> np.ndarray:
        """Shard (N,) int32 of each position."""
        return (np.searchsorted(self.starts, position, side="right") - 1).astype(np.int32)

    def _flags(self, shards: Iterable[int]) -> np.ndarray:
        """(shards,) bool: which shards are among these."""
        flags = np.zeros(self.shards, bool)
        flags[[s for s in shards if s < self.shards]] = True
        return flags

    def _each(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where keys are: (indices into `keys`, positions), oldest first where a key is in several waves.

        A piece at a time: whatever is as long as the set is memory of the driver.
        """
        for start in range(0, len(keys), CHUNK):
            some = keys[start : start + CHUNK]
            inside = np.arange(len(some))
            at = np.searchsorted(self.keys, some)
            while len(inside):
                there = at < len(self.keys)
                inside, at = inside[there], at[there]
                same = self.keys[at] == some[inside]
                inside, at = inside[same], at[same]
                yield start + inside, self.order[at]
                at = at + 1

    def _in(self, keys: np.ndarray, shards: np.ndarray) -> np.ndarray:
        found = np.zeros(len(keys), bool)
        for i, position in self._each(keys):
            found[i] |= shards[self.shard_of(position)]
        return found

    def known(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N,) are in any wave: (N,) bool."""
        return self._in(keys, np.ones(self.shards, bool))

    def frozen(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N,) are committed or wait in a frozen shard: (N,) bool."""
        return self._in(keys, ~self._flags(self.void))

    def committed(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N,) are in done shards: (N,) bool."""
        return self._in(keys, self._flags(self.done))

    def waiting(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N,) are in shards that are frozen and not done: (N,) bool."""
        return self._in(keys, ~self._flags(self.done | self.void))

    def lost(self, keys: np.ndarray) -> np.ndarray:
        """Which keys (N,) are in shards that were given up: (N,) bool."""
        return self._in(keys, self._flags(self.void))

    def rows(self) -> int:
        """Distinct rows that are committed or wait in a frozen shard."""
        counts = np.repeat(~self._flags(self.void), np.diff(self.starts))[self.order]
        first = np.flatnonzero(np.concatenate([[True], self.keys[1:] != self.keys[:-1]])[: len(self.keys)])
        return int(np.logical_or.reduceat(counts, first).sum()) if len(first) else 0

    def pending(self, wanted: Wanted) -> list[tuple[Wave, int]]:
        """Frozen shards without a marker that hold a wanted row, oldest first."""
        left = ~self._flags(self.done | self.void)
        if not left.any():
            return []
        hit = np.zeros(self.shards, bool)
        for _, position in self._each(wanted.keys):
            hit[self.shard_of(position)] = True
        shards = set(np.flatnonzero(hit & left).tolist())
        return [(wave, shard) for wave in self.waves for shard in wave.shards if shard in shards]

    def statuses(self, markers: Mapping[int, Mapping[str, Any]], corrupt: Iterable[int] = ()) -> np.ndarray:
        """(rows,) int8 status by position; LOST in shards that were given up.

        Args:
            markers: of every done shard.
            corrupt: done shards that are to be given up.
        """
        shards = self._flags(markers).astype(np.int8) * np.int8(OK)
        shards[self._flags(self.void.union(corrupt))] = LOST
        found = np.repeat(shards, np.diff(self.starts))
        for shard, marker in markers.items():
            for code, name in ((FAILED, "failed"), (REJECTED, "rejected")):
                for place in marker[name]:
                    found[self.starts[shard] + int(place)] = code
        return found

    def find(self, keys: np.ndarray, statuses: np.ndarray) -> Places:
        """The record that counts of each key: ok if it is ok in any wave, otherwise the latest; none if that one
        was lost, whatever came before it."""
        position = np.full(len(keys), -1, np.int32)
        status = np.zeros(len(keys), np.int8)
        for i, at in self._each(keys):
            new = statuses[at]
            better = (new != ABSENT) & ((new == OK) | (status[i] != OK))
            i, at, new = i[better], at[better], new[better]
            position[i], status[i] = np.where(new == LOST, -1, at), np.maximum(new, ABSENT)
        return Places(self, position, status)

    def duplicates(self, statuses: np.ndarray) -> np.ndarray:
        """Keys with more than one ok image."""
        fine = self.keys[statuses[self.order] == OK]
        return np.unique(fine[1:][fine[1:] == fine[:-1]])


def rows_table(keys: np.ndarray, places: Places, markers: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """`row_key, shard, place, attempt, part, status, reason` of keys (N,) and their places."""
    shard, place = places.shard, places.place
    shards, of = np.unique(shard, return_inverse=True)
    parts = pa.array([markers[s]["part"] if s in markers else None for s in shards.tolist()], pa.string())
    reasons = [None] * len(keys)
    for i in np.flatnonzero((places.status == FAILED) | (places.status == REJECTED)).tolist():
        reasons[i] = markers[int(shard[i])][STATUSES[places.status[i]]][str(place[i])]
    return pa.table({
        "row_key": unpack(keys), "shard": shard, "place": place, "attempt": places.attempt,
        "part": parts.take(pa.array(of)), "status": pa.array(STATUSES).take(pa.array(places.status)),
        "reason": pa.array(reasons, pa.string()),
    })  # fmt: skip


def rows_of(store: SyntheticSet) -> pd.DataFrame:
    """Every row of done shards, one line a key, as `rows_table`: for sets that fit into memory as such."""
    ledger = Ledger(store)
    markers = store.markers(ledger.done)
    keys = np.unique(ledger.keys)
    places = ledger.find(keys, ledger.statuses(markers))
    there = np.flatnonzero(places.status > ABSENT)
    return rows_table(keys[there], places[there], markers).to_pandas()
