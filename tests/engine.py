"""The engine in one process, without Ray: what tests of its promises drive, also in processes they kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from raysynth.core.config import build_experiment
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.plans import build_plan
from raysynth.synth.ledger import Ledger, rows_of
from raysynth.synth.renderer import Renderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.shards import ShardRunner
from raysynth.synth.wanted import Wanted, unpack
from raysynth.synth.waves import extend

SAMPLING = {"sampler": "ddim", "steps": 2, "guidance_scale": 1.0, "guidance_rescale": 0.0}


def image_table(n: int = 12) -> pa.Table:
    """An ingest table of `n` training images in two classes, without pixels."""
    return pa.table({
        "image_id": [f"img-{i:03d}" for i in range(n)], "split": ["train"] * n,
        "patient_id": [f"p{i}" for i in range(n)],
        "label_a": pa.array([int(i % 3 == 0) for i in range(n)], pa.int8()),
        "label_b": pa.array([int(i % 3 != 0) for i in range(n)], pa.int8()),
        "attr_sex": pa.array(["F" if i % 2 else "M" for i in range(n)]),
    })  # fmt: skip


def wanted_rows(n: int = 12, replicas: int = 3, seed: int = 0) -> Wanted:
    """A replicated plan over `image_table(n)`."""
    content: dict[str, Any] = {
        "name": "t", "data": {"kind": "digits"}, "plan": {"replicas": replicas, "seed": seed},
    }  # fmt: skip
    return Wanted.of(build_plan(image_table(n), build_experiment(content)))


def keys_of(wanted: Wanted) -> list[str]:
    """Hex row keys by rank."""
    return unpack(wanted.keys).to_pylist()


def synthetic_set(root: str | Storage, generator: str = "g", version: int = 1, seed: int = 0) -> SyntheticSet:
    """The set of one generator under a fixed sampling."""
    storage = open_storage(root) if isinstance(root, str) else root
    return SyntheticSet(storage, "t", SAMPLING | {"generator_id": generator, "render_version": version, "seed": seed})


def render_all(
    store: SyntheticSet,
    wanted: Wanted,
    renderer: Renderer,
    micro_batch: int = 4,
    shard_rows: int = 8,
    workers: int = 1,
    rounds: int = 4,
    retry_failed: bool = False,
) -> list[dict[str, Any]]:
    """Extends the set and renders what is pending, in rounds of fresh runners; returns every statistics row."""
    extend(Ledger(store), wanted, shard_rows, "test", retry_failed)
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        left = Ledger(store).pending(wanted)
        if not left:
            break
        runners = [ShardRunner(store, renderer, micro_batch) for _ in range(workers)]
        found += [runners[i % workers].run(wave, shard) for i, (wave, shard) in enumerate(left)]
    return found


def images(store: SyntheticSet) -> dict[str, str]:
    """row_key -> sha256 of its PNG, of every ok row that readers see."""
    rows = rows_of(store)
    found: dict[str, str] = {}
    for part, mine in rows[rows["status"] == "ok"].groupby("part"):
        table = from_parquet(store.part(str(part)), ["row_key", "sha256"]).to_pylist()
        found |= {table[p]["row_key"]: table[p]["sha256"] for p in mine["place"]}
    return found


def rendered(log: Path) -> set[str]:
    """Row keys in a FakeRenderer's log."""
    return {line.split()[0] for line in log.read_text().splitlines()} if log.exists() else set()
