"""`raysynth status` from what is on storage: counts, cost, who runs it, failed rows; what it reads again."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from raysynth.core.config import build_experiment
from raysynth.core.lease import Lease
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import LocalStorage
from raysynth.stages.generated import failed_rows
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import plan, wanted_rows
from raysynth.stages.status import SetStatus, Status
from raysynth.stages.train_generator import generator_artifact
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.settle import settle
from raysynth.synth.shards import ShardRunner
from raysynth.synth.wanted import Wanted
from raysynth.synth.waves import extend
from tests.digits import digit_artifact
from tests.engine import keys_of, render_all


class Counting(LocalStorage):
    """Remembers what was read."""

    read: list[str] = []

    def get(self, path: str) -> bytes:
        self.read.append(path)
        return super().get(path)


class OnGpu(FakeRenderer):
    def facts(self) -> dict:
        return super().facts() | {"device": "NVIDIA H100", "cuda": "13.0"}


def planned(root: Path) -> tuple[Pipeline, Wanted]:
    """An experiment whose images, generator and plan are there: 60 rows wanted."""
    e = build_experiment({
        "name": "digits", "root": str(root), "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 2}, "plan": {"replicas": 3}, "compute": {"price_per_gpu_hour": 3600.0},
    })  # fmt: skip
    pipeline = Pipeline(e)
    pipeline.storage = Counting(str(root))
    pipeline.images = digit_artifact(pipeline.storage)
    generator = generator_artifact(e, pipeline.storage, pipeline.images)
    generator.put("export/unet/weights", b"weights")
    generator.commit({})
    plan(e, pipeline.storage, pipeline.images)
    return pipeline, wanted_rows(e, pipeline.storage, pipeline.plan)


def text_of(status: Status, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(status.look())
    return console.file.getvalue()


def test_counts_cost_holder_and_the_failed_table(tmp_path: Path) -> None:
    pipeline, wanted = planned(tmp_path)
    status, store = Status(pipeline), pipeline.synthetic_set
    assert "digits" in text_of(status)
    assert "0/60 images" in text_of(status)
    bad = keys_of(wanted)[7]
    renderer = OnGpu(seconds_a_row=0.01, broken=(bad,))
    settle(store, renderer, 4)
    extend(Ledger(store), wanted, 10, "test")
    runners = [ShardRunner(store, renderer, 4) for _ in range(2)]
    with Lease(store.storage, store.file("lock.json")):
        for wave, shard in Ledger(store).pending(wanted)[:4]:
            if runners[0].run(wave, shard)["outcome"] == "second opinion":
                runners[1].run(wave, shard)
        shown = text_of(status)
        assert f"{pipeline.generated.path}: 40/60 images" in shown
        assert "images/s now" in shown
        assert "left" in shown
        assert "1 failed   0 rejected   1 of 4 shards retried" in shown
        seconds = sum(m["render_seconds"] for m in store.markers(store.done()).values())
        # A currency unit a second, so that the cost is the seconds.
        assert f"{seconds:,.0f} GPU seconds   cost {seconds:,.2f}, {1000 * seconds / 39:,.3f} per thousand" in shown
        assert f"running: process {os.getpid()} on " in shown
        assert f"/{os.getpid()}" in shown.split("last shard")[1]  # the actors
    assert "running" not in text_of(status)
    assert "failed rows" not in text_of(status)
    render_all(store, wanted, FakeRenderer(broken=(bad,)), shard_rows=10)
    ledger = Ledger(store)
    markers = store.markers(ledger.done)
    places = ledger.find(wanted.keys, ledger.statuses(markers))
    pipeline.generated.put("failed.parquet", to_parquet(failed_rows(wanted, places, markers)))
    shown = text_of(status)
    assert "60/60 images" in shown
    file = pipeline.storage.url(pipeline.generated.file("failed.parquet"))
    assert f"failed rows: {file}" in shown

    frame = pd.read_parquet(file)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row["row_key"] == bad
    assert row["rank"] == 7
    assert "not finite" in row["reason"]
    assert (row["shard"], row["place"]) == divmod(int(places.position[7]), 10)
    assert (tmp_path / store.path / row["part"]).exists()
    assert {"source_image_id", "replica", "label_0", "attr_sex", "attempt"} <= set(frame.columns)


def test_a_second_look_reads_only_what_is_new(tmp_path: Path) -> None:
    pipeline, wanted = planned(tmp_path)
    store = pipeline.synthetic_set
    extend(Ledger(store), wanted, 10, "test")
    runner = ShardRunner(store, FakeRenderer(), 4)
    pending = Ledger(store).pending(wanted)
    status = SetStatus(pipeline)
    for done in range(1, 7):
        runner.run(*pending[done - 1])
        storage = pipeline.storage
        storage.read.clear()
        rendering = status.read()
        assert (rendering.done, rendering.sums.ok, rendering.sums.shards) == (10 * done, 10 * done, done)
        markers = [p for p in storage.read if "/done/" in p]
        assert markers == [store.file(f"done/{pending[done - 1][1]:05d}.json")]
        assert not [p for p in storage.read if p.endswith(".parquet") and done > 1]
    # A shard that is given up counts no more.
    store.storage.create(store.file("void/00002.json"), b"{}")
    rendering = status.read()
    assert (rendering.done, rendering.sums.ok) == (50, 50)


def test_watching_goes_on_until_interrupted(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[3] / "raysynth" / "quickstart.yaml"
    process = subprocess.Popen(
        [sys.executable, "-m", "raysynth", "status", str(quickstart), f"root={tmp_path}", "--watch", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    seen = 0
    for line in process.stdout:
        seen += line.startswith("ingest")
        if seen == 2:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
