"""Renders one shard and commits it: load, render in fixed micro-batches, encode, put the part, create the marker.

The only code that turns plan rows into stored images; runs inside a render actor or, in tests, in any process.
Knows nothing of Ray. Exceptions are caught at the row boundary here and nowhere else in the engine.
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raysynth.core.identity import fp12, sha256_bytes
from raysynth.core.schemas import (
    ATTRIBUTE,
    LABEL,
    attribute_names,
    from_parquet,
    label_names,
    synthetic_schema,
    to_parquet,
)
from raysynth.data.images import encode_png, pixel_sha256
from raysynth.synth.attempts import Attempt, History
from raysynth.synth.renderer import (
    Renderer,
    Row,
    SickWorker,
    canary_fault,
    fault_in,
    is_out_of_memory,
    noise_seed,
    release_memory,
    to_uint8,
)
from raysynth.synth.sets import SyntheticSet, Wave, is_content

MODES_FROM_PIXELS = ("img2img", "inpaint", "outpaint")
IDENTITY_COLUMNS = ("generator_id", "sampler", "steps", "guidance_scale", "guidance_rescale")
"""Columns equal in every row of a set."""
CANARY_EVERY = 50  # shards; about an hour of one GPU


@dataclass
class Timing:
    """Seconds of one shard's steps; `render` is time that held the device."""

    load: float = 0.0
    render: float = 0.0
    encode: float = 0.0
    commit: float = 0.0


@dataclass
class Rendered:
    """Images of one shard as they come in."""

    images: dict[int, np.ndarray] = field(default_factory=dict)
    """place -> (H, W, C) uint8."""
    failed: dict[int, str] = field(default_factory=dict)
    """place -> reason."""


@dataclass(frozen=True)
class FirstOpinion:
    """A shard as one actor rendered it, some of whose rows failed there."""

    record: dict[str, Any]
    rows: list[dict[str, Any]]


class ShardRunner:
    """One per render process. `run` may be called from two threads: the lock keeps the device to one of them, so
    that loading, encoding and committing of one shard overlap the rendering of the next."""

    def __init__(self, store: SyntheticSet, renderer: Renderer, micro_batch: int) -> None:
        """
        Args:
            micro_batch: images rendered at once, from render.json.
        """
        self.store, self.renderer, self.micro_batch = store, renderer, micro_batch
        self.constants = {name: store.identity[name] for name in IDENTITY_COLUMNS}
        self.facts = fp12(renderer.facts())
        self.actor = uuid.uuid4().hex[:12]
        self.device = threading.Lock()
        self.shards_run = 0

    def run(self, wave: Wave, shard: int) -> dict[str, Any]:
        """Renders and commits one shard. Returns its statistics, `outcome` first:

        * committed: this call's marker made it part of the set;
        * already: another writer was first;
        * second opinion: rows failed here and wait for another actor.

        Raises:
            SickWorker: the canary failed, or fails after rows failed.
        """
        timing = Timing()
        began = time.perf_counter()
        if self.store.marker(shard) is not None:
            return self._statistics("already", shard, timing, [])
        table = self.store.shard_rows(wave, shard)
        rows = self._rows(table)
        attempt = Attempt(self.store, shard, self.actor)
        earlier = self._first_opinion(attempt.history)
        timing.load = time.perf_counter() - began
        if earlier and earlier.record["actor"] == self.actor:
            return self._statistics("second opinion", shard, timing, [])
        try:
            return self._run(shard, table, rows, attempt, earlier, timing)
        except SickWorker:
            raise
        except Exception as error:
            attempt.end("error", error=f"{type(error).__name__}: {error}"[:300])
            raise

    def _run(
        self,
        shard: int,
        table: pa.Table,
        rows: list[Row],
        attempt: Attempt,
        earlier: FirstOpinion | None,
        timing: Timing,
    ) -> dict[str, Any]:
        with self.device:
            if self.store.marker(shard) is not None:  # by the call that held the device, or another driver
                return self._statistics("already", shard, timing, [])
            began = time.perf_counter()
            attempt.begin()
            try:
                self._periodic_canary(attempt)
                only = {int(p) for p in earlier.record["failed"]} if earlier else set(range(len(rows)))
                micro_batch = earlier.record["micro_batch"] if earlier else self.micro_batch
                done, micro_batch = self._render(rows, only, micro_batch, attempt)
            finally:
                timing.render = time.perf_counter() - began
        began = time.perf_counter()
        part = self._part(table, done, earlier)
        data = to_parquet(part)
        timing.encode = time.perf_counter() - began
        began = time.perf_counter()
        name = self.store.put_part(shard, data)
        statuses = part.column("status").to_pylist()
        seconds = round(timing.render + (earlier.record["render_seconds"] if earlier else 0.0), 3)
        if set(done.failed) - attempt.history.quarantined and not earlier:
            failed = {str(p): r for p, r in done.failed.items()}
            attempt.end("rows failed", failed=failed, part=name, micro_batch=micro_batch, render_seconds=seconds)
            return self._statistics("second opinion", shard, timing, [])
        reasons = part.column("reason").to_pylist()
        marker = {
            "part": name, "sha256": sha256_bytes(data), "bytes": len(data), "rows": len(statuses),
            "row_keys": sha256_bytes("\n".join(table.column("row_key").to_pylist()).encode()),
            "ok": statuses.count("ok"), "micro_batch": micro_batch,
            "failed": {str(i): reasons[i] for i, s in enumerate(statuses) if s == "failed"},
            "rejected": {str(i): reasons[i] for i, s in enumerate(statuses) if s == "rejected"},
            "render_seconds": seconds, "facts": self.facts, "finished": round(time.time(), 3), "actor": self.actor,
        }  # fmt: skip
        won = self.store.commit(shard, marker)
        timing.commit = time.perf_counter() - began
        return self._statistics("committed" if won else "already", shard, timing, statuses if won else [])

    def _rows(self, table: pa.Table) -> list[Row]:
        columns = [n for n in table.column_names if n.startswith((LABEL, ATTRIBUTE)) or n == "prompt"]
        seed = self.store.identity["seed"]
        return [
            Row(r["row_key"], noise_seed(seed, r["row_key"], r["attempt"]), {c: r[c] for c in columns})
            for r in table.to_pylist()
        ]

    def _first_opinion(self, history: History) -> FirstOpinion | None:
        """What another actor rendered of this shard before rows failed there; None if that part is not intact."""
        record = history.failures
        if record is None:
            return None
        try:
            data = self.store.part(record["part"])
        except FileNotFoundError:
            return None
        return FirstOpinion(record, from_parquet(data).to_pylist()) if is_content(record["part"], data) else None

    def _periodic_canary(self, attempt: Attempt) -> None:
        if self.shards_run and self.shards_run % CANARY_EVERY == 0:
            self._require_health(attempt)
        self.shards_run += 1

    def _require_health(self, attempt: Attempt, after_rows: bool = False) -> None:
        """Raises SickWorker where the canary fails.

        A worker that was well before these rows and is sick after them died of them, as far as anyone can tell: a
        row that breaks the CUDA context leaves the process alive and of no use. That counts as a death, so that the
        row is found; a worker that is sick anyway ends without a stain on the rows.
        """
        fault = canary_fault(self.renderer, self.micro_batch)
        if fault:
            if not after_rows:
                attempt.end("worker is sick", canary=fault)
            raise SickWorker(fault)

    def _render(
        self, rows: list[Row], only: set[int], micro_batch: int, attempt: Attempt
    ) -> tuple[Rendered, int]:
        """Renders the places `only`. Out of memory starts the shard again at half the micro-batch, so that the
        recorded size alone says how the bytes were made."""
        while True:
            done = Rendered()
            try:
                for start in range(0, len(rows), micro_batch):
                    places = [p for p in range(start, min(start + micro_batch, len(rows))) if p in only]
                    for place in set(places) & attempt.history.quarantined:
                        done.failed[place] = "the process died twice while rendering this row alone"
                    for group in attempt.history.groups(places):
                        self._group(rows, start, group, micro_batch, done, attempt)
                if attempt.history.careful:
                    attempt.step([])
                elif done.failed:
                    self._require_health(attempt, after_rows=True)
                return done, micro_batch
            except Exception as error:
                if not is_out_of_memory(error) or micro_batch == 1:
                    raise
                micro_batch //= 2
            release_memory(self.renderer)

    def _group(
        self, rows: list[Row], start: int, group: list[int], micro_batch: int, done: Rendered, attempt: Attempt
    ) -> None:
        """Renders some places of one micro-batch; in careful mode the worker is proven well before and after."""
        if not attempt.history.careful:
            self._micro_batch(rows, start, group, micro_batch, done)
            return
        suspects = attempt.history.steps and set(group) <= set(attempt.history.steps[-1])
        if suspects:
            attempt.step([])
            self._require_health(attempt)
        attempt.step(group)
        self._micro_batch(rows, start, group, micro_batch, done)
        if set(group) & set(done.failed):
            self._require_health(attempt, after_rows=True)

    def _micro_batch(self, rows: list[Row], start: int, places: list[int], micro_batch: int, done: Rendered) -> None:
        """Renders `places` at their fixed positions; bisects on an error until the guilty rows stand alone."""
        slots: list[Row | None] = [None] * micro_batch
        for p in places:
            slots[p - start] = rows[p]
        try:
            images = self.renderer.render(slots, micro_batch)
        except Exception as error:
            if is_out_of_memory(error) and micro_batch > 1:
                raise
            if len(places) == 1:
                done.failed[places[0]] = f"{type(error).__name__}: {error}"[:300]
                return
            middle = len(places) // 2
            self._micro_batch(rows, start, places[:middle], micro_batch, done)
            self._micro_batch(rows, start, places[middle:], micro_batch, done)
            return
        for p in places:
            fault = fault_in(images[p - start])
            if fault:
                done.failed[p] = fault
            else:
                done.images[p] = to_uint8(images[p - start])

    def _part(self, table: pa.Table, done: Rendered, earlier: FirstOpinion | None) -> pa.Table:
        """The shard's rows as a synthetic table. With an earlier actor's part, its good rows are kept as they are."""
        schema = synthetic_schema(label_names(table.schema), attribute_names(table.schema))
        filled = []
        for place, row in enumerate(table.to_pylist()):
            if earlier and place not in done.images and place not in done.failed:
                filled.append(earlier.rows[place])
                continue
            seed = noise_seed(self.store.identity["seed"], row["row_key"], row["attempt"])
            row |= self.constants | {"seed": seed, "derived_from_real": row["mode"] in MODES_FROM_PIXELS}
            if place in done.images:
                pixels = done.images[place]
                png = encode_png(pixels)
                row |= {
                    "image": {"bytes": png, "path": f"{row['row_key']}.png"}, "sha256": sha256_bytes(png),
                    "pixel_sha256": pixel_sha256(pixels), "status": "ok",
                }  # fmt: skip
            else:
                row |= {"status": "failed", "reason": done.failed[place]}
            filled.append(row)
        return pa.Table.from_pylist(filled, schema=schema)

    def _statistics(self, outcome: str, shard: int, timing: Timing, statuses: list[str]) -> dict[str, Any]:
        return {
            "outcome": outcome, "shard": shard, "actor": self.actor, "reason": "",
            "ok": statuses.count("ok"), "failed": statuses.count("failed"), "rejected": statuses.count("rejected"),
            "load_s": timing.load, "render_s": timing.render, "encode_s": timing.encode, "commit_s": timing.commit,
        }  # fmt: skip
