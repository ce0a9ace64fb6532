"""Renders one shard and commits it: load, render, encode, put the part, create the marker.

The only code that turns plan rows into stored images; runs inside a render actor or, in tests, in any process.
Knows nothing of Ray.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raysynth.core.identity import fp12, sha256_bytes
from raysynth.core.schemas import (
    ATTRIBUTE,
    LABEL,
    LOCATION,
    attribute_names,
    from_parquet,
    label_names,
    synthetic_schema,
    to_parquet,
)
from raysynth.data.images import encode_png, pixel_sha256
from raysynth.synth.attempts import STOPPED, Attempt, History
from raysynth.synth.batches import BatchRenderer, OutOfMemory, Rendered
from raysynth.synth.renderer import Renderer, Row, SickWorker, facts_of, noise_seed
from raysynth.synth.sets import SyntheticSet, Wave, is_content

MODES_FROM_PIXELS = ("img2img", "inpaint", "outpaint")
IDENTITY_COLUMNS = ("generator_id", "sampler", "steps", "guidance_scale", "guidance_rescale")
"""Columns equal in every row of a set."""


@dataclass
class Timing:
    """Seconds of one shard's steps; `render` is time that held the device, from `began` (seconds since 1970)."""

    began: float = 0.0
    load: float = 0.0
    render: float = 0.0
    encode: float = 0.0
    commit: float = 0.0


@dataclass(frozen=True)
class Carried:
    """What an earlier attempt rendered of this shard: its good rows are kept, `again` is rendered."""

    record: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def stopped(self) -> bool:
        """It was told to stop; otherwise rows failed there and this is the second opinion."""
        return self.record["why"] == STOPPED


class ShardRunner:
    """One per render process. `run` may be called from several threads: a lock keeps the device to one of them, so
    that loading, encoding and committing of some shards overlap the rendering of another.

    Attributes:
        stopping: set it, and rendering ends after the current micro-batch; what is done of the shard is kept.
    """

    def __init__(self, store: SyntheticSet, renderer: Renderer, micro_batch: int) -> None:
        """
        Args:
            micro_batch: images rendered at once, from render.json.
        """
        self.store = store
        self.stopping = threading.Event()
        self.batches = BatchRenderer(renderer, micro_batch, self.stopping)
        self.constants = {name: store.identity[name] for name in IDENTITY_COLUMNS}
        self.facts = fp12(facts_of(renderer))
        self.actor = uuid.uuid4().hex[:12]
        self.worker = f"{socket.gethostname()}/{os.getpid()}"
        self.device = threading.Lock()
        self._notes = ThreadPoolExecutor(1)
        self._mine: set[int] = set()
        self._claims = threading.Lock()

    def run(self, wave: Wave, shard: int) -> dict[str, Any]:
        """Renders and commits one shard. Returns its statistics, `outcome` first:

        * committed: this call's marker made it part of the set;
        * already: another writer was first;
        * at work: another call of this process has it in hand;
        * second opinion: rows failed here and wait for another actor;
        * stopped: the process was told to stop; what was rendered is kept for the next attempt.

        Raises:
            SickWorker: the canary failed, or fails after rows failed.
        """
        if self.stopping.is_set():
            return self._statistics("stopped", shard, Timing(), [])
        with self._claims:
            if shard in self._mine:
                return self._statistics("at work", shard, Timing(), [])
            self._mine.add(shard)
        try:
            return self._run(wave, shard)
        finally:
            with self._claims:
                self._mine.discard(shard)

    def _run(self, wave: Wave, shard: int) -> dict[str, Any]:
        timing, began = Timing(), time.perf_counter()
        if self.store.marker(shard) is not None:
            return self._statistics("already", shard, timing, [])
        table = self.store.shard_rows(wave, shard)
        rows = self._rows(table)
        attempt = Attempt(self.store, shard, self.actor)
        earlier = self._carried(attempt.history)
        if earlier and not earlier.stopped and earlier.record["actor"] == self.actor:
            return self._statistics("second opinion", shard, timing, [])
        attempt.begin()
        timing.load = time.perf_counter() - began
        notes: list[Future] = []
        try:
            with self.device:
                timing.began, began = time.time(), time.perf_counter()
                # That rendering starts is noted beside it: the device need not wait for storage. Where processes
                # ended before they could say so it waits: a row may kill faster than a note is written.
                if attempt.history.cautious:
                    attempt.start()
                else:
                    notes.append(self._notes.submit(attempt.start))
                try:
                    done, earlier = self._render(rows, attempt, earlier)
                finally:
                    timing.render = time.perf_counter() - began
            return self._commit(shard, table, done, attempt, earlier, timing)
        except SickWorker:
            raise
        except Exception as error:
            attempt.end("error", error=f"{type(error).__name__}: {error}"[:300])
            raise
        finally:
            wait(notes)  # a note that storage refused is missed by nobody but the search for a deadly row

    def _render(
        self, rows: list[Row], attempt: Attempt, earlier: Carried | None
    ) -> tuple[Rendered, Carried | None]:
        """What was rendered, and what of an earlier attempt still counts."""
        if earlier:
            only, size = set(earlier.record["again"]), earlier.record["micro_batch"]
            with suppress(OutOfMemory):  # then all of it, at half the size
                return self.batches.render(rows, only, attempt, size), earlier
        return self.batches.render(rows, set(range(len(rows))), attempt), None

    def _commit(
        self, shard: int, table: pa.Table, done: Rendered, attempt: Attempt, earlier: Carried | None, timing: Timing
    ) -> dict[str, Any]:
        began = time.perf_counter()
        if done.left and (not done.images or (earlier and not earlier.stopped)):
            attempt.end(STOPPED)  # nothing to keep, or a few failed rows whose second opinion starts anew
            return self._statistics("stopped", shard, timing, [])
        part = self._part(table, done, earlier)
        data = to_parquet(part)
        timing.encode = time.perf_counter() - began
        began = time.perf_counter()
        name = self.store.put_part(shard, data)
        statuses = part.column("status").to_pylist()
        seconds = round(timing.render + (earlier.record["render_seconds"] if earlier else 0.0), 3)
        kept = {"part": name, "micro_batch": done.micro_batch, "render_seconds": seconds}
        if done.left:
            attempt.end(STOPPED, again=sorted(done.left | set(done.failed)), **kept)
            return self._statistics("stopped", shard, timing, [])
        if set(done.failed) - attempt.history.quarantined and not (earlier and not earlier.stopped):
            attempt.end("rows failed", again=sorted(done.failed), **kept)
            return self._statistics("second opinion", shard, timing, [])
        reasons = part.column("reason").to_pylist()
        marker = {
            **kept, "sha256": sha256_bytes(data), "bytes": len(data), "rows": len(statuses),
            "row_keys": sha256_bytes("\n".join(table.column("row_key").to_pylist()).encode()),
            "ok": statuses.count("ok"),
            "failed": {str(i): reasons[i] for i, s in enumerate(statuses) if s == "failed"},
            "rejected": {str(i): reasons[i] for i, s in enumerate(statuses) if s == "rejected"},
            "facts": self.facts, "began": round(timing.began, 3),
            "finished": round(time.time(), 3), "actor": self.actor, "worker": self.worker,
            "attempt": attempt.number,
        }  # fmt: skip
        won = self.store.commit(shard, marker)
        timing.commit = time.perf_counter() - began
        outcome = "committed" if won else "already"
        return self._statistics(outcome, shard, timing, statuses if won else [], attempt.number)

    def _rows(self, table: pa.Table) -> list[Row]:
        columns = [n for n in table.column_names if n.startswith((LABEL, ATTRIBUTE)) or n in ("prompt", LOCATION)]
        seed = self.store.identity["seed"]
        return [
            Row(r["row_key"], noise_seed(seed, r["row_key"], r["attempt"]), {c: r[c] for c in columns})
            for r in table.to_pylist()
        ]

    def _carried(self, history: History) -> Carried | None:
        """What an earlier attempt kept of this shard; None if that part is not intact."""
        record = history.carried
        if record is None:
            return None
        try:
            data = self.store.part(record["part"])
        except FileNotFoundError:
            return None
        return Carried(record, from_parquet(data).to_pylist()) if is_content(record["part"], data) else None

    def _part(self, table: pa.Table, done: Rendered, earlier: Carried | None) -> pa.Table:
        """The shard's rows as a synthetic table. With an earlier attempt's part, its good rows are kept as they are."""
        schema = synthetic_schema(label_names(table.schema), attribute_names(table.schema))
        filled = []
        for place, row in enumerate(table.to_pylist()):
            if earlier and not {place} & (done.images.keys() | done.failed.keys() | done.left):
                filled.append(earlier.rows[place])
                continue
            seed = noise_seed(self.store.identity["seed"], row["row_key"], row["attempt"])
            # Imported rows say themselves what they were made with, as far as that is known.
            row = self.constants | {"seed": seed, "derived_from_real": row["mode"] in MODES_FROM_PIXELS} | row
            if place in done.images:
                pixels = done.images[place]
                png = encode_png(pixels)
                row |= {
                    "image": {"bytes": png, "path": f"{row['row_key']}.png"}, "sha256": sha256_bytes(png),
                    "pixel_sha256": pixel_sha256(pixels), "status": "ok",
                }  # fmt: skip
            elif place in done.failed:
                row |= {"status": "failed", "reason": done.failed[place]}
            else:
                row |= {"status": "left"}
            filled.append(row)
        return pa.Table.from_pylist(filled, schema=schema)

    def _statistics(
        self, outcome: str, shard: int, timing: Timing, statuses: list[str], attempt: int = 0
    ) -> dict[str, Any]:
        return {
            "outcome": outcome, "shard": shard, "actor": self.actor, "worker": self.worker, "reason": "",
            "attempt": attempt, "ok": statuses.count("ok"),
            "failed": statuses.count("failed"), "rejected": statuses.count("rejected"),
            "load_s": timing.load, "render_s": timing.render, "encode_s": timing.encode, "commit_s": timing.commit,
        }  # fmt: skip
