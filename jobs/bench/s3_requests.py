"""S3 requests of the engine, counted: for each shard, and for opening, listing, folding and checking a set.

    uv run python jobs/bench/s3_requests.py [--shards 60] [--rows 20]

Every request of this process passes botocore's client and is counted there by its operation. A moto server answers;
counts do not depend on the store.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import aiobotocore.client

from raysynth.core.storage import open_storage
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.shards import ShardRunner
from raysynth.synth.verify import verify
from raysynth.synth.waves import extend
from tests.engine import synthetic_set, wanted_rows

CALLS: Counter[str] = Counter()
PAID_AS_PUT = ("PutObject", "ListObjectsV2", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
FREE = ("DeleteObject", "CreateBucket")


def count_calls() -> None:
    """Counts every request from now on in CALLS."""
    original = aiobotocore.client.AioBaseClient._make_api_call

    async def counted(self: Any, operation: str, kwargs: Any) -> Any:
        CALLS[operation] += 1
        return await original(self, operation, kwargs)

    aiobotocore.client.AioBaseClient._make_api_call = counted


def tell(what: str, n: int) -> None:
    """Prints and forgets the counts, for each of `n`."""
    put = sum(v for k, v in CALLS.items() if k in PAID_AS_PUT)
    get = sum(v for k, v in CALLS.items() if k not in (*PAID_AS_PUT, *FREE))
    price = (put * 5e-6 + get * 4e-7) / n
    found = ", ".join(f"{k} {v / n:.2f}" for k, v in sorted(CALLS.items()))
    print(f"{what}: {found}; put class {put / n:.2f}, get class {get / n:.2f}, {1e3 * price:.4f} USD a thousand")
    CALLS.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        measure(args.shards, args.rows)
    finally:
        server.terminate()


def measure(shards: int, rows: int) -> None:
    storage = open_storage("s3://bench/runs")
    storage.fs.mkdir("bench")  # type: ignore[attr-defined]
    wanted, store = wanted_rows(rows, replicas=shards), synthetic_set(storage)
    count_calls()
    ledger = Ledger(store)
    tell("opening an empty set", 1)
    extend(ledger, wanted, rows, "bench")
    tell("freezing one wave", 1)
    pending = ledger.refresh().pending(wanted)
    tell("looking for what is pending", 1)
    runner = ShardRunner(store, FakeRenderer(), rows)
    CALLS.clear()
    for wave, shard in pending[:1]:
        runner.run(wave, shard)
    tell("an actor's first shard", 1)
    for wave, shard in pending[1:]:
        runner.run(wave, shard)
    tell(f"a shard ({len(pending) - 1} of them)", len(pending) - 1)
    fresh = synthetic_set(storage)
    fresh.markers(fresh.done())
    tell("markers at the end, each shard", len(pending))
    assert verify(fresh, wanted).clean
    tell("verify, each shard", len(pending))
    storage.exists(store.file("stop/x"))
    tell("an actor's look whether to stop", 1)


if __name__ == "__main__":
    main()
