"""A synthetic set on storage: frozen waves of shards, content-named parts, create-if-absent markers.

    synthetic-sets/<name>-<fp12>/
      set.json                     what makes pixels: weights, sampler, steps, guidance, seed, render version
      render.json                  micro-batch, device, versions: byte equality is promised under one of these
      waves/00000.json             which rows, cut into which shards; created if absent, never changed
      waves/rows-<sha12>.parquet   the rows, in rendering order
      attempts/00012/0.json ...    who began to render shard 12 (see `attempts.py`)
      parts/00012-<sha12>.parquet  images; the name is the content
      done/00012.json              the marker that makes a part part of the set
      void/00012.json              the shard's images are lost or corrupt; its rows may be rendered again

Readers follow markers only. Whether a shard is done is known from one listing of names. Knows nothing of Ray, of
rendering, or of what a plan wants beyond row keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from raysynth.core.identity import canonical_json, fp12, sha256_bytes
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.core.storage import Storage

FOLDER = "synthetic-sets"
ROW_GROUP = 8192  # a shard's rows are read without the wave's; a footer of a million rows stays small
_THREADS = 16  # concurrent small requests; S3 answers each in tens of milliseconds


@dataclass(frozen=True)
class Wave:
    """An append-only batch of rows cut into shards, frozen when it was added."""

    number: int
    rows: str
    """Path of the rows file inside the set's folder."""
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

    def __reduce__(self) -> tuple:
        return type(self), (self.storage, self.name, self.identity)

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
        found = []
        for number in sorted(self._numbers("waves")):
            w = self.get_json(f"waves/{number:05d}.json")
            if w is not None:
                found.append(Wave(number, w["rows"], w["first_shard"], tuple(w["shard_rows"]), w["why"]))
        return found

    def announce(self) -> None:
        """Writes `set.json`, before anything else of the set."""
        self.storage.create(self.file("set.json"), canonical_json(self.identity).encode())

    def add_wave(self, waves: Sequence[Wave], rows: pa.Table, shard_rows: Sequence[int], why: str) -> Wave | None:
        """Freezes a new wave behind `waves`. None if another driver added one first: look again.

        Args:
            rows: plan rows plus `attempt`, in rendering order.
            shard_rows: rows of each shard; they add up to the table.
        """
        self.announce()
        groups = [min(ROW_GROUP, rows.num_rows - at) for at in range(0, rows.num_rows, ROW_GROUP)]
        data = to_parquet(rows, groups)
        name = f"waves/rows-{sha256_bytes(data)[:12]}.parquet"
        self.storage.put(self.file(name), data)
        first = waves[-1].shards.stop if waves else 0
        wave = Wave(len(waves), name, first, tuple(shard_rows), why)
        record = {"rows": name, "first_shard": first, "shard_rows": list(shard_rows), "why": why}
        return wave if self.create_json(f"waves/{wave.number:05d}.json", record) else None

    def wave_rows(self, wave: Wave, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a wave with a `shard` column in front."""
        table = from_parquet(self.storage.get(self.file(wave.rows)), columns)
        shards = np.repeat(np.arange(wave.first_shard, wave.shards.stop), wave.shard_rows)
        return table.add_column(0, "shard", pa.array(shards, pa.int64()))

    def shard_rows(self, wave: Wave, shard: int) -> pa.Table:
        """The frozen rows of one shard; reads the row groups that hold them only."""
        first = sum(wave.shard_rows[: shard - wave.first_shard])
        count = wave.shard_rows[shard - wave.first_shard]
        with self.storage.open(self.file(wave.rows)) as f:
            file = pq.ParquetFile(f, metadata=self._footers.get(wave.rows))
            self._footers[wave.rows] = file.metadata
            groups = list(range(first // ROW_GROUP, (first + count - 1) // ROW_GROUP + 1))
            return file.read_row_groups(groups).slice(first - groups[0] * ROW_GROUP, count).combine_chunks()

    def done(self) -> set[int]:
        """Shards whose marker is there and which are not void: listings of names, however large the set."""
        return self._numbers("done") - self.void()

    def void(self) -> set[int]:
        """Shards given up because their images are lost or corrupt."""
        return self._numbers("void")

    def marker(self, shard: int) -> dict[str, Any] | None:
        """The marker of a shard, or None."""
        return self.get_json(f"done/{shard:05d}.json")

    def markers(self, shards: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Markers of many shards, read side by side."""
        wanted = sorted(shards)
        with ThreadPoolExecutor(_THREADS) as pool:
            return {s: m for s, m in zip(wanted, pool.map(self.marker, wanted)) if m is not None}

    def put_part(self, shard: int, data: bytes) -> str:
        """Stores part bytes under their content's name. Returns the name inside the set's folder."""
        name = f"parts/{shard:05d}-{sha256_bytes(data)[:12]}.parquet"
        self.storage.put(self.file(name), data)
        return name

    def commit(self, shard: int, marker: dict[str, Any]) -> bool:
        """Makes a stored part part of the set. False if another writer committed the shard first."""
        return self.create_json(f"done/{shard:05d}.json", marker)

    def part(self, name: str) -> bytes:
        """Bytes of a part."""
        return self.storage.get(self.file(name))

    def rows(self) -> pd.DataFrame:
        """Every row of every wave: `row_key, attempt, shard, place, done` (bool), oldest first, void shards out."""
        done, void = self.done(), self.void()
        frames = []
        for wave in self.waves():
            frame = self.wave_rows(wave, ["row_key", "attempt"]).to_pandas()
            frame["place"] = np.concatenate([np.arange(n) for n in wave.shard_rows] or [np.arange(0)])
            frames.append(frame[~frame["shard"].isin(void)] if void else frame)
        if not frames:
            return pd.DataFrame({"shard": [], "row_key": [], "attempt": [], "place": [], "done": []})
        table = pd.concat(frames, ignore_index=True)
        table["done"] = table["shard"].isin(done)
        return table

    def index(self, markers: dict[int, dict[str, Any]] | None = None) -> pd.DataFrame:
        """Where each row's image is: `row_key, attempt, shard, place, part, status, reason`, one row a key.

        A row in several waves is ok if it is ok in any; otherwise its latest record counts.

        Args:
            markers: of every done shard, where the caller has read them.
        """
        rows = self.rows()
        rows = rows[rows["done"].astype(bool)]
        markers = self.markers(rows["shard"].unique()) if markers is None else markers
        rows = rows.assign(part=rows["shard"].map({s: m["part"] for s, m in markers.items()}))
        bad = [
            (shard, int(place), status, reason)
            for shard, m in markers.items()
            for status in ("failed", "rejected")
            for place, reason in m[status].items()
        ]
        faults = pd.DataFrame(bad, columns=["shard", "place", "status", "reason"])
        faults = faults.astype({"shard": "int64", "place": "int64", "status": "str", "reason": "object"})
        rows = rows.astype({"shard": "int64", "place": "int64"}).merge(faults, on=["shard", "place"], how="left")
        rows["status"] = rows["status"].fillna("ok")
        order = rows.assign(fine=rows["status"] == "ok").sort_values(["fine", "shard"], kind="stable")
        return order.drop_duplicates("row_key", keep="last").drop(columns=["fine", "done"]).reset_index(drop=True)
