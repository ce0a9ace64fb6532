"""A synthetic set on storage: frozen waves of shards, content-named parts, create-if-absent markers.

    synthetic-sets/<name>-<fp12>/
      set.json                     what makes pixels: weights, sampler, steps, guidance, seed, render version
      render.json                  micro-batch, device, versions: byte equality is promised under one of these
      waves/00000.json             which rows, cut into which shards; created if absent, never changed
      waves/rows-<sha12>.parquet   the rows, in rendering order, up to 16,384 a file
      attempts/00012/0.json ...    who began to render shard 12 (see `attempts.py`)
      parts/00012-<sha12>.parquet  images; the name is the content
      done/00012.json              the marker that makes a part part of the set
      void/00012.json              the shard's images are lost or corrupt; its rows may be rendered again
      folded/00003.json            the markers of shards 3000 to 3999 in one object, in place of their own

Readers follow markers only. Whether a shard is done is known from listings of names. Past ten thousand shards the
markers of each full thousand are folded into one object, so that a set of a hundred million images is opened by
hundreds of requests and not by a million. Knows nothing of Ray, of rendering, or of what a plan wants beyond row keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysynth.core.identity import canonical_json, fp12, sha256_bytes
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage
from raysynth.synth.wanted import pack

FOLDER = "synthetic-sets"
ROW_GROUP = 8192  # a shard's rows are read without the wave's; a footer of a million rows stays small
FOLD = 1000  # shards whose markers become one object of about 500 KB
FOLD_PAST = 10_000  # loose markers that a set may have; ten listing calls
_THREADS = 16  # concurrent small requests; S3 answers each in tens of milliseconds


@dataclass(frozen=True)
class Wave:
    """An append-only batch of rows cut into shards, frozen when it was added."""

    number: int
    files: tuple[tuple[str, int], ...]
    """Rows files inside the set's folder and how many rows each holds, in rendering order."""
    first_shard: int
    shard_rows: tuple[int, ...]
    why: str

    @property
    def shards(self) -> range:
        """Shard numbers of this wave; numbers run on over all waves of a set."""
        return range(self.first_shard, self.first_shard + len(self.shard_rows))


def is_content(name: str, data: bytes) -> bool:
    """Whether `data` is what a content-named part promises."""
    return name.rpartition("-")[2] == f"{sha256_bytes(data)[:12]}.parquet"


class SyntheticSet:
    """Handle on one synthetic set. Picklable; opens storage where it is used."""

    def __init__(self, storage: Storage, name: str, identity: dict[str, Any]) -> None:
        self.storage, self.name, self.identity = storage, name, identity
        self._footers: dict[str, pq.FileMetaData] = {}
        self._blocks: dict[int, dict[int, dict[str, Any]]] = {}
        self._seen: set[int] = set()

    def __reduce__(self) -> tuple:
        return type(self), (self.storage, self.name, self.identity)

    @classmethod
    def at(cls, storage: Storage, name: str, identity: dict[str, Any]) -> SyntheticSet:
        """The set of this identity, under another experiment's name where that one has begun it already."""
        own = cls(storage, name, identity)
        for folder in storage.folders(FOLDER):
            other = cls(storage, folder.removesuffix(f"-{own.fp}"), identity)
            if other.path == f"{FOLDER}/{folder}" and storage.exists(other.file("set.json")):
                return other
        return own

    @classmethod
    def open(cls, storage: Storage, folder: str) -> SyntheticSet:
        """The set in `synthetic-sets/<folder>`."""
        identity = json.loads(storage.get(f"{FOLDER}/{folder}/set.json"))
        return cls(storage, folder.rpartition("-")[0], identity)

    @property
    def fp(self) -> str:
        """12 hex digits of what makes pixels."""
        return fp12(self.identity)

    @property
    def path(self) -> str:
        """Folder relative to the storage root."""
        return f"{FOLDER}/{self.name}-{self.fp}"

    def file(self, name: str) -> str:
        """Path of one file of the set, relative to the storage root."""
        return f"{self.path}/{name}"

    def get_json(self, name: str) -> Any | None:
        """A small record, or None if it is not there."""
        try:
            return json.loads(self.storage.get(self.file(name)))
        except FileNotFoundError:
            return None

    def create_json(self, name: str, record: dict[str, Any]) -> bool:
        """Creates a small record if absent. Returns whether this call wrote it."""
        return self.storage.create(self.file(name), (json.dumps(record, sort_keys=True) + "\n").encode())

    def _numbers(self, folder: str) -> set[int]:
        names = (e.path.rpartition("/")[2] for e in self.storage.list(self.file(folder)))
        return {int(n.removesuffix(".json")) for n in names if n.endswith(".json")}

    def waves(self) -> list[Wave]:
        """Every wave, oldest first."""
        found: list[Wave] = []
        # Numbers have no gaps, so that names are asked for and not listed: a stale listing hides no wave.
        while (w := self.get_json(f"waves/{len(found):05d}.json")) is not None:
            files = tuple((name, rows) for name, rows in w["files"])
            lengths = tuple(n for n, times in w["shard_rows"] for _ in range(times))
            found.append(Wave(len(found), files, w["first_shard"], lengths, w["why"]))
        return found

    def announce(self) -> None:
        """Writes `set.json`, before anything else of the set."""
        self.storage.create(self.file("set.json"), canonical_json(self.identity).encode())

    def put_rows(self, rows: pa.Table) -> tuple[str, int]:
        """Stores rows for a wave under their content's name; (name inside the set's folder, rows)."""
        groups = [min(ROW_GROUP, rows.num_rows - at) for at in range(0, rows.num_rows, ROW_GROUP)]
        data = to_parquet(rows, groups)
        name = f"waves/rows-{sha256_bytes(data)[:12]}.parquet"
        self.storage.put(self.file(name), data)
        return name, rows.num_rows

    def add_wave(
        self, waves: Sequence[Wave], files: Sequence[tuple[str, int]], shard_rows: Sequence[int], why: str
    ) -> Wave | None:
        """Freezes a new wave behind `waves`. None if another driver added one first: look again.

        Args:
            files: what `put_rows` returned, in rendering order.
            shard_rows: rows of each shard; they add up to the files.
        """
        self.announce()
        first = waves[-1].shards.stop if waves else 0
        wave = Wave(len(waves), tuple(files), first, tuple(shard_rows), why)
        # Run lengths: a million equal shards are one pair.
        lengths = [(n, len(list(same))) for n, same in groupby(shard_rows)]
        record = {"files": list(files), "first_shard": first, "shard_rows": lengths, "why": why}
        return wave if self.create_json(f"waves/{wave.number:05d}.json", record) else None

    def _parquet(self, name: str, f: IO[bytes]) -> pq.ParquetFile:
        file = pq.ParquetFile(f, metadata=self._footers.get(name))
        self._footers[name] = file.metadata
        return file

    def wave_keys(self, wave: Wave) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Packed row keys and attempts (int8) of a wave in rendering order, one file at a time."""
        for name, _ in wave.files:
            table = from_parquet(self.storage.get(self.file(name)), ["row_key", "attempt"])
            yield pack(table["row_key"]), table["attempt"].to_numpy().astype(np.int8)

    def shard_rows(self, wave: Wave, shard: int) -> pa.Table:
        """The frozen rows of one shard; reads the row groups that hold them only."""
        first = sum(wave.shard_rows[: shard - wave.first_shard])
        stop = first + wave.shard_rows[shard - wave.first_shard]
        found, at = [], 0
        for name, rows in wave.files:
            low, high = max(first - at, 0), min(stop - at, rows)
            at += rows
            if low >= high:
                continue
            groups = list(range(low // ROW_GROUP, (high - 1) // ROW_GROUP + 1))
            with self.storage.open(self.file(name)) as f:
                table = self._parquet(name, f).read_row_groups(groups)
            found.append(table.slice(low - groups[0] * ROW_GROUP, high - low))
        return pa.concat_tables(found).combine_chunks()

    def done(self) -> set[int]:
        """Shards whose marker is there and which are not void: listings of names, however large the set.

        A marker once seen is never missed again by this handle, whatever a stale listing says.
        """
        # Loose markers first: one that is folded between the two listings is then in both, not in neither.
        self._seen |= self._numbers("done")
        for block in self._numbers("folded"):
            self._seen |= set(self._block(block).keys())
        return self._seen - self.void()

    def void(self) -> set[int]:
        """Shards given up because their images are lost or corrupt."""
        return self._numbers("void")

    def marker(self, shard: int) -> dict[str, Any] | None:
        """The marker of a shard, or None."""
        return self.get_json(f"done/{shard:05d}.json") or self._block(shard // FOLD).get(shard)

    def markers(self, shards: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Markers of many shards, read side by side."""
        found: dict[int, dict[str, Any]] = {}
        wanted = sorted(shards)
        for block in {s // FOLD for s in wanted} & self._numbers("folded"):
            found |= self._block(block)
        loose = [s for s in wanted if s not in found]
        with ThreadPoolExecutor(_THREADS) as pool:
            found |= {s: m for s, m in zip(loose, pool.map(self.marker, loose)) if m is not None}
        return {s: found[s] for s in wanted if s in found}

    def _block(self, block: int) -> dict[int, dict[str, Any]]:
        """Markers in one folded object, empty if there is none; read once, for it never changes."""
        if block not in self._blocks:
            record = self.get_json(f"folded/{block:05d}.json")
            if record is None:
                return {}
            self._blocks[block] = {int(s): m for s, m in record.items()}
        return self._blocks[block]

    def fold(self, past: int = FOLD_PAST) -> int:
        """Puts the markers of every finished thousand shards into one object each, where more than `past` lie about.

        Any number of drivers may do so at once: equal markers make equal objects, created if absent. Own markers
        are deleted only when the object that replaces them is there.

        Returns:
            Markers folded.
        """
        loose = self._numbers("done")
        if len(loose) <= past:
            return 0
        finished, count = self.done() | self.void(), 0
        for block in sorted({s // FOLD for s in loose}):
            members = range(block * FOLD, (block + 1) * FOLD)
            if not finished.issuperset(members):
                continue
            if not self._block(block):
                record = {str(s): m for s, m in self.markers(members).items()}
                self.create_json(f"folded/{block:05d}.json", record)
            mine = [s for s in members if s in loose]
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(lambda s: self.storage.delete(self.file(f"done/{s:05d}.json")), mine))
            count += len(mine)
        return count

    def put_part(self, shard: int, data: bytes) -> str:
        """Stores part bytes under their content's name. Returns the name inside the set's folder."""
        name = f"parts/{shard:05d}-{sha256_bytes(data)[:12]}.parquet"
        self.storage.put(self.file(name), data)
        return name

    def commit(self, shard: int, marker: dict[str, Any]) -> bool:
        """Makes a stored part part of the set. False if another writer committed the shard first."""
        name = f"done/{shard:05d}.json"
        if not self.create_json(name, marker):
            return False
        # The first writer's marker may have been folded meanwhile, and its own name be free again.
        folded = shard in self._block(shard // FOLD)
        if folded:
            self.storage.delete(self.file(name))
        return not folded

    def part(self, name: str) -> bytes:
        """Bytes of a part."""
        return self.storage.get(self.file(name))
