"""Wanted rows against stored images: missing, duplicate, extra, corrupt. Reads every byte it vouches for.

Repair is a void marker: the shard's rows are no longer committed and the next `generate` renders them again, to
the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import from_parquet
from raysynth.data.images import decode_png, pixel_sha256
from raysynth.synth.ledger import ABSENT, FAILED, OK, REJECTED, Ledger
from raysynth.synth.sets import SyntheticSet, Wave
from raysynth.synth.wanted import Wanted, unpack

ORPHAN_AGE_S = 3600.0  # a younger part may belong to a writer that is about to create its marker


@dataclass
class Verdict:
    """What `verify` found. `clean` if the set holds exactly what is wanted and every byte is as committed."""

    wanted: int = 0
    ok: int = 0
    failed: int = 0
    rejected: int = 0
    missing: list[str] = field(default_factory=list)
    """Wanted row keys that no intact shard holds."""
    duplicate: list[str] = field(default_factory=list)
    """Row keys with more than one ok image."""
    corrupt: dict[int, str] = field(default_factory=dict)
    """Shard -> what is wrong with its part."""
    extra: list[str] = field(default_factory=list)
    """Files no marker or wave accounts for: orphans for `gc`."""
    unwanted: int = 0
    """Committed rows that nothing given asks for (another plan's, or a larger one's); no fault."""

    @property
    def clean(self) -> bool:
        """No row missing, none twice, no byte changed. Orphans are not a fault: readers follow markers."""
        return not (self.missing or self.duplicate or self.corrupt)

    def lines(self) -> list[str]:
        """For a person."""
        text = [
            f"{self.wanted:,} wanted: {self.ok:,} ok, {self.failed:,} failed, {self.rejected:,} rejected, "
            f"{len(self.missing):,} missing",
            f"{len(self.duplicate):,} duplicate, {len(self.corrupt):,} corrupt shards, {len(self.extra):,} orphan "
            f"files, {self.unwanted:,} rows of other plans",
        ]
        text += [f"corrupt shard {s}: {why}" for s, why in sorted(self.corrupt.items())]
        return text


def shard_fault(store: SyntheticSet, wave: Wave, shard: int, marker: dict[str, Any]) -> str | None:
    """What is wrong with a committed shard, or None: part, row keys and every image are checked."""
    try:
        data = store.part(marker["part"])
    except FileNotFoundError:
        return f"{marker['part']} is gone"
    if sha256_bytes(data) != marker["sha256"]:
        return f"{marker['part']} is not what was committed ({len(data)} bytes, {marker['bytes']} committed)"
    table = from_parquet(data)
    if table.column("row_key").to_pylist() != store.shard_rows(wave, shard).column("row_key").to_pylist():
        return "rows are not the shard's"
    for row in table.select(["row_key", "image", "sha256", "pixel_sha256", "status"]).to_pylist():
        if row["status"] == "failed":
            continue
        png = row["image"]["bytes"]
        if sha256_bytes(png) != row["sha256"] or pixel_sha256(decode_png(png)) != row["pixel_sha256"]:
            return f"image {row['row_key']} is not what its hash says"
    return None


def verify(
    store: SyntheticSet, *wanted: Wanted, advance: Callable[[int], None] = lambda n: None, threads: int = 8
) -> Verdict:
    """Checks every committed shard of the set and counts the wanted rows.

    Args:
        wanted: what each plan or selection wants of the set; a row that several want counts once.
        advance: called with 1 after each shard.
    """
    keys = np.unique(np.concatenate([w.keys for w in wanted]))
    ledger = Ledger(store)
    where = {shard: wave for wave in ledger.waves for shard in wave.shards}
    shards = sorted(ledger.done & where.keys())
    markers = store.markers(shards)

    def look(shard: int) -> str | None:
        try:
            return shard_fault(store, where[shard], shard, markers[shard])
        finally:
            advance(1)

    with ThreadPoolExecutor(threads) as pool:
        faults = dict(zip(shards, pool.map(look, shards)))
    verdict = Verdict(wanted=len(keys), corrupt={s: f for s, f in faults.items() if f})
    duplicate = ledger.duplicates(ledger.statuses(markers))
    intact = ledger.statuses({s: m for s, m in markers.items() if s not in verdict.corrupt}, verdict.corrupt)
    held = ledger.find(keys, intact).status
    verdict.ok, verdict.failed, verdict.rejected = (int((held == s).sum()) for s in (OK, FAILED, REJECTED))
    verdict.missing = unpack(keys[held == ABSENT]).to_pylist()
    there = np.unique(ledger.keys[intact[ledger.order] > ABSENT])
    verdict.unwanted = len(there) - int((held > ABSENT).sum())
    verdict.duplicate = unpack(duplicate).to_pylist()
    verdict.extra = orphans(store, older_than_s=0)
    return verdict


def orphans(store: SyntheticSet, older_than_s: float = ORPHAN_AGE_S) -> list[str]:
    """Parts that no valid marker or waiting attempt names, and rows files no wave names; at least so old."""
    done = store.done()
    named = {m["part"] for m in store.markers(done).values()} | {name for w in store.waves() for name, _ in w.files}
    prefix = len(store.path) + 1
    settled = done | store.void()
    for entry in store.storage.list(store.file("attempts")):
        if entry.path.endswith(".end.json") and int(entry.path.split("/")[-2]) not in settled:
            named.add((store.get_json(entry.path[prefix:]) or {}).get("part"))
    limit = time.time() - older_than_s
    files = [*store.storage.list(store.file("parts")), *store.storage.list(store.file("waves"))]
    return [
        e.path[prefix:] for e in files
        if e.path[prefix:] not in named and not e.path.endswith(".json") and e.modified <= limit
    ]  # fmt: skip


def repair(store: SyntheticSet, verdict: Verdict) -> int:
    """Voids the corrupt shards so that the next `generate` renders their rows again. Returns how many."""
    return sum(store.create_json(f"void/{s:05d}.json", {"why": why}) for s, why in verdict.corrupt.items())
