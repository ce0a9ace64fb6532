"""How busy the engine keeps its devices when storage is slow: a renderer that sleeps, puts that are late.

    uv run python jobs/bench/overlap.py [--actors 4] [--shards 40] [--shard-rows 400] [--delay 2] [--gpus]

Busy share of an actor in steady state: seconds that held its device, from the end of its first shard to the end of
its last, over the seconds between. The tail is what follows when the first actor has nothing left to render.
`--gpus` gives every actor a logical GPU, so that Ray Data plans what it plans in production.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from raysynth.core.experiment import Compute
from raysynth.core.storage import LocalStorage
from raysynth.stages import cluster
from raysynth.stages.generate import render
from raysynth.synth.fake import FakeRenderer
from tests.engine import synthetic_set, wanted_rows


class SlowStorage(LocalStorage):
    """A local folder whose writes take `delay_s` longer, as those of a far object store."""

    def __init__(self, root: str, delay_s: float) -> None:
        super().__init__(root)
        self.delay_s = delay_s

    def __reduce__(self) -> tuple:
        return SlowStorage, (self.root, self.delay_s)

    def put(self, path: str, data: bytes) -> None:
        time.sleep(self.delay_s)
        super().put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        time.sleep(self.delay_s)
        return super().create(path, data)


def measure(a: argparse.Namespace) -> dict[str, float]:
    """One run."""
    compute = Compute(render_workers=a.actors, micro_batch=a.micro_batch, shard_rows=a.shard_rows)
    resources = cluster.Resources(cpus=a.actors + 4, gpus=a.actors if a.gpus else 0, nodes=1)
    rows = a.shards * a.shard_rows
    with tempfile.TemporaryDirectory() as root:
        store = synthetic_set(SlowStorage(root, a.delay))
        factory = partial(FakeRenderer, seconds_a_row=a.seconds_a_row)
        began = time.time()
        render(store, wanted_rows(n=a.shard_rows, replicas=a.shards), factory, compute, resources)
        ended = time.time()
        markers = store.markers(store.done())
    spans = defaultdict(list)
    for m in markers.values():
        spans[m["actor"]].append((m["began"], m["began"] + m["render_seconds"]))
    shares, ends = [], []
    for mine in spans.values():
        mine.sort()
        ends.append(mine[-1][1])
        if len(mine) > 1:
            shares.append(sum(stop - start for start, stop in mine[1:]) / (mine[-1][1] - mine[0][1]))
    return {
        "busy": statistics.mean(shares), "busy_least": min(shares), "tail_s": ended - min(ends),
        "first_render_s": min(s[0][0] for s in spans.values()) - began, "wall_s": ended - began,
        "ideal_s": rows * a.seconds_a_row / a.actors, "actors": len(spans),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"actors": 4, "shards": 40, "shard-rows": 400, "micro-batch": 20, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in {"delay": 2.0, "seconds-a-row": 0.01}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--gpus", action="store_true", help="a logical GPU an actor")
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    import ray

    ray.init(
        address="local", num_cpus=a.actors + 4, num_gpus=a.actors if a.gpus else 0, include_dashboard=False,
        logging_level=logging.ERROR, log_to_driver=False, object_store_memory=256 << 20,
        _temp_dir=tempfile.mkdtemp(prefix="rb", dir="/tmp"),
    )  # fmt: skip
    cluster.quiet_data_context()
    runs = []
    for i in range(a.repeats):
        runs.append(measure(a))
        print(f"{i + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in runs[-1].items()), flush=True)
    medians = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores", "arguments": vars(a) | {"out": None},
        "runs": runs, "median": medians,
    }  # fmt: skip
    print(f"busy share {medians['busy']:.3f}, tail {medians['tail_s']:.1f} s")
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
