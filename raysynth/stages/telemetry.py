"""What a rendering driver tells Prometheus, through Ray's metrics agent (Ray adds the prefix `ray_`).

Labels are few: the set, and the worker where it says which one idles. Input: rows of statistics and the sums made of
them. `cluster/grafana/raysynth.json` draws them. Without a metrics agent they go nowhere and cost microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysynth.synth.throughput import Throughput

STEPS = ("load", "render", "encode", "commit")
STEP_BOUNDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Seconds; a shard is made for 60 to 120 s of rendering, its other steps for less."""
BEAT_S = 5.0
"""Ray's agent forgets a gauge that was not set for two report intervals of 10 s; a shard may take minutes."""


class RenderMetrics:
    """Counters and gauges of one set.

    Args:
        set_name: name of the set's folder; the label `set`.
        wanted: rows wanted.
        gpus_each: GPUs of one actor, 0 on CPUs.
    """

    def __init__(self, set_name: str, wanted: int, gpus_each: float) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def named(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            made = kind(f"raysynth_{name}", description=text, tag_keys=("set", *labels), **more)
            return made.set_default_tags({"set": set_name})

        self.wanted, self.gpus_each, self.told = wanted, gpus_each, set[str]()
        self.images = named(Counter, "images", "Rows with a verdict.", "status")
        self.shards = named(Counter, "shards", "Answers of actors, one a shard.", "outcome")
        self.retried = named(Counter, "shards_retried", "Shards committed after more than one attempt.")
        self.gpu_seconds = named(Counter, "gpu_seconds", "GPU seconds of rendering.")
        # A counter too: Ray's agent makes up a histogram's sum from the middles of its buckets.
        self.seconds = named(Counter, "seconds", "Seconds of all shards in a step.", "step")
        self.spread = named(
            Histogram, "step_seconds", "Seconds a shard spends in a step.", "step", boundaries=STEP_BOUNDS
        )
        self.busy = named(Gauge, "busy_share", "Share of an actor's time in which it renders.", "worker")
        self.rate = named(Gauge, "images_per_second", "Rows/s of all actors at work.")
        self.rows_done = named(Gauge, "rows_done", "Rows committed, failed ones included.")
        self.rows_wanted = named(Gauge, "rows_wanted", "Rows wanted.")
        # A series that starts with its first event shows no increase by it; Ray refuses to add nothing.
        for status in ("ok", "failed", "rejected"):
            self.images.inc(1e-9, {"status": status})
        for counter in (self.retried, self.gpu_seconds):
            counter.inc(1e-9)

    def add(self, row: Mapping[str, Any], sums: Throughput, done: int, now: float) -> None:
        """One row of statistics came in; `sums` and `done` have it already."""
        self.shards.inc(1, {"outcome": row["outcome"]})
        for status in ("ok", "failed", "rejected"):
            if row[status]:
                self.images.inc(float(row[status]), {"status": status})
        if row["outcome"] == "committed" and row["attempt"]:
            self.retried.inc()
        if row["render_s"]:
            for step in STEPS:
                seconds = float(row[f"{step}_s"])
                self.spread.observe(seconds, {"step": step})
                if seconds:
                    self.seconds.inc(seconds, {"step": step})
            if self.gpus_each:
                self.gpu_seconds.inc(float(row["render_s"]) * self.gpus_each)
        self.repeat(sums, done, now)

    def repeat(self, sums: Throughput, done: int, now: float) -> None:
        """Sets the gauges; to be called every `BEAT_S` too."""
        self.rows_wanted.set(self.wanted)
        self.rows_done.set(done)
        self.rate.set(sums.rate(now))
        here = {p.worker: p.busy for p in sums.working(now) if p.busy is not None}
        for worker in self.told - here.keys():
            self.busy.set(0.0, {"worker": worker})  # a gauge would keep a dead worker's last word
        for worker, share in here.items():
            self.busy.set(share, {"worker": worker})
        self.told = set(here)
