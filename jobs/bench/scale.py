"""What a row costs at ten thousand and at a million: plan, waves, rendering, driver memory, resume.

    uv run python jobs/bench/scale.py [--rows 10000 1000000] [--shard-rows 1000] [--kill-at 0.9]

Each stage runs in a process of its own, so that its peak memory is its own. The renderer is cheap 8 px noise: what is
measured is the engine. With `--kill-at` the driver is killed by SIGKILL at that share of the shards and started
again; the seconds from Ray being up to the first new attempt are the resume.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Compute, Experiment
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import open_storage

SOURCES = 20_000


def experiment(root: str, rows: int) -> Experiment:
    """A plan of `rows` over at most 20,000 source images."""
    n = min(SOURCES, rows // 10)
    return build_experiment({
        "name": "scale", "root": root, "data": {"kind": "digits"}, "plan": {"replicas": rows // n},
    })  # fmt: skip


def images(e: Experiment, rows: int) -> Artifact:
    """An ingest artifact without pictures."""
    from tests.engine import image_table

    storage = open_storage(e.root)
    artifact = Artifact.at(storage, "ingest", "scale", 1, {"rows": rows}, {})
    if not artifact.complete:
        artifact.put("table.parquet", to_parquet(image_table(min(SOURCES, rows // 10))))
        artifact.commit({})
    return artifact


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def do_plan(root: str, rows: int) -> dict[str, Any]:
    """The plan stage."""
    from raysynth.stages.plan import plan

    e = experiment(root, rows)
    source = images(e, rows)
    before, began = peak_mb(), time.perf_counter()
    plan(e, open_storage(root), source)
    return {"plan_s": time.perf_counter() - began, "plan_peak_mb": peak_mb(), "plan_before_mb": before}


def do_render(root: str, rows: int, shard_rows: int, workers: int) -> dict[str, Any]:
    """The engine over the plan's rows, in a Ray of its own; as `generate` does it, with a cheap renderer."""
    import ray

    from raysynth.stages import cluster
    from raysynth.stages.generate import conclude, render
    from raysynth.stages.plan import plan_artifact, wanted_rows
    from raysynth.synth.fake import FakeRenderer
    from raysynth.synth.ledger import Ledger
    from tests.engine import synthetic_set

    ray.init(
        address="local", num_cpus=workers + 2, include_dashboard=False, logging_level=logging.ERROR,
        log_to_driver=False, object_store_memory=256 << 20, _temp_dir=tempfile.mkdtemp(prefix="rb", dir="/tmp"),
    )  # fmt: skip
    cluster.quiet_data_context()
    up = time.time()
    e = experiment(root, rows)
    storage = open_storage(root)
    planned = plan_artifact(e, storage, images(e, rows))
    wanted = wanted_rows(e, storage, planned)
    store = synthetic_set(storage)
    ledger = Ledger(store)
    before = ledger.done
    compute = Compute(render_workers=workers, micro_batch=50, shard_rows=shard_rows)
    found = cluster.Resources(workers + 2, 0, 1)
    sums = render(store, wanted, partial(FakeRenderer), compute, found, ledger=ledger)
    rendered = time.time()
    artifact = Artifact.at(storage, "generate", "scale", 1, {}, {"plan": planned.digest()})
    conclude(artifact, ledger, wanted, planned, compute, sums)
    new = store.markers(store.done() - before)
    return {
        "first_render_s": min(m["began"] for m in new.values()) - up, "render_wall_s": rendered - up,
        "rows": sum(m["rows"] for m in new.values()), "conclude_s": time.time() - rendered, "driver_peak_mb": peak_mb(),
        "shards": len(new), "device_s": sums["render_s"],
    }  # fmt: skip


def in_process(stage: str, *words: object, kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Runs one stage in a fresh interpreter; its result, or nothing where it was killed."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--stage", stage, *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    while kill_when is not None and process.poll() is None:
        if kill_when():
            process.kill()
            process.wait()
            return {}
        time.sleep(0.2)
    out, _ = process.communicate()
    return json.loads(out.splitlines()[-1])


def measure(rows: int, a: argparse.Namespace) -> dict[str, Any]:
    """Every figure at one size."""
    with tempfile.TemporaryDirectory(dir=a.dir or None) as root:
        found = in_process("plan", root, rows)
        sets, enough = Path(root) / "synthetic-sets", a.kill_at * rows / a.shard_rows

        def far() -> bool:
            return sum(len(os.listdir(d)) for d in sets.glob("*/done")) >= enough

        run = in_process("render", root, rows, a.shard_rows, a.workers, kill_when=far if a.kill_at else None)
        found |= run
        if a.kill_at and not run:
            time.sleep(3)  # the dead driver's actors end
            resumed = in_process("render", root, rows, a.shard_rows, a.workers)
            found |= {f"resumed_{k}": v for k, v in resumed.items()}
    return {"wanted": rows, **found}


def main() -> None:
    if sys.argv[1:2] == ["--stage"]:
        stage, root, *numbers = sys.argv[2:]
        stages: dict[str, Callable[..., dict[str, Any]]] = {"plan": do_plan, "render": do_render}
        print(json.dumps(stages[stage](root, *map(int, numbers))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--shard-rows", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-at", type=float, default=0.0)
    parser.add_argument("--dir", default="", help="folder for the temporary root")
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    runs = []
    for rows in a.rows:
        runs.append(measure(rows, a))
        print(json.dumps(runs[-1], indent=1), flush=True)
    result = {"hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores", "arguments": vars(a) | {"out": None},
              "runs": runs}  # fmt: skip
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
