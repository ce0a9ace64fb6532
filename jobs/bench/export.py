"""How fast an export is: CPU time of one file, seconds and MB/s of each format, and of a run that finds it all done.

    uv run python jobs/bench/export.py [--images 5000] [--kb 200] [--file-mb 100] [--root DIR-or-s3://]

The pictures are random bytes of a 512 px film's size (an export never decodes them), so that making them costs nothing.
Rows of 30 columns in parts of 250 images, as a GPU would commit them in a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Compute
from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import synthetic_schema, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.plans import build_plan
from raysynth.stages import cluster
from raysynth.stages.export import begin, export, write_group
from raysynth.stages.export_formats import FORMATS
from raysynth.stages.generate import conclude
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from raysynth.synth.waves import extend
from tests.engine import SAMPLING, image_table

PART = 250


def made(storage: Storage, images: int, kb: int) -> tuple[Artifact, Artifact]:
    """A complete generate artifact of so many images, and the ingest artifact."""
    vocabulary = {"kind": "single", "classes": ["a", "b"], "attributes": {"sex": ["F", "M"]}}
    real = Artifact.at(storage, "ingest", "bench", 1, {}, {})
    real.put("vocabulary.json", json.dumps(vocabulary).encode())
    real.commit({})
    e = build_experiment({"name": "bench", "data": {"kind": "digits"}, "plan": {"replicas": images // 100}})
    wanted = Wanted.of(build_plan(image_table(100), e))
    store = SyntheticSet(storage, "bench", SAMPLING | {"generator_id": "g", "render_version": 1, "seed": 0})
    ledger = Ledger(store)
    extend(ledger, wanted, PART, "bench")
    rng = np.random.default_rng(0)
    schema = synthetic_schema(["a", "b"], ["sex"])
    for wave in ledger.waves:
        for shard in wave.shards:
            table = store.shard_rows(wave, shard).to_pylist()
            rows = [r | {"image": {"bytes": rng.bytes(kb * 1000)}, "status": "ok"} for r in table]
            data = to_parquet(pa.Table.from_pylist(rows, schema=schema))
            marker = {"part": store.put_part(shard, data), "sha256": sha256_bytes(data), "bytes": len(data),
                      "rows": len(rows), "ok": len(rows), "failed": {}, "rejected": {}, "render_seconds": 60.0,
                      "began": time.time(), "finished": time.time(), "actor": "a", "worker": "w"}  # fmt: skip
            store.commit(shard, marker)
    generated = Artifact.at(storage, "generate", "bench", 1, {}, {"plan": "p"})
    conclude(generated, Ledger(store), wanted, real, Compute(), sums={})
    return generated, real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kb", type=int, default=200)
    parser.add_argument("--file-mb", type=int, default=100)
    parser.add_argument("--root", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or folder
        generated, real = made(open_storage(f"{root}/runs"), args.images, args.kb)
        for to in FORMATS:
            job, groups = begin(generated, real, to, f"{root}/alone-{to}", args.file_mb)
            began = time.process_time()
            written = write_group(job, groups[0])
            seconds = time.process_time() - began
            rate = written["rows"] / seconds
            print(json.dumps({"to": to, "run": "one file, CPU time", "cpu_us_per_image": round(1e6 / rate),
                              "mb_per_cpu_s": round(rate * args.kb / 1000)}))  # fmt: skip
        resources = cluster.connect(Compute(address="local"))
        for to in FORMATS:
            for run in ("first", "second"):
                began = time.perf_counter()
                export(generated, real, to, f"{root}/{to}", lambda: resources, args.file_mb)
                seconds = time.perf_counter() - began
                mb = args.images * args.kb / 1000
                print(json.dumps({"to": to, "run": run, "seconds": round(seconds, 2), "mb_per_s": round(mb / seconds),
                                  "images_per_s": round(args.images / seconds), "cpus": resources.cpus}))  # fmt: skip


if __name__ == "__main__":
    main()
