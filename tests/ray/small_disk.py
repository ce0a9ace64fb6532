"""`python -m tests.ray.small_disk DISK`: renders on a disk that fills up, then on one that becomes read-only.

Must run in a mount namespace of its own whose DISK is a tmpfs of 200 KB. Prints a JSON line for every attempt: what
was tried, how the command line would have ended (exit code and words), and what the set then holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

from raysynth.cli import environment_fault
from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Compute
from raysynth.stages import cluster
from raysynth.stages.generate import render
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import verify
from tests.engine import images, render_all, synthetic_set, wanted_rows
from tests.waiting import wait_for

COMPUTE = Compute(render_workers=1, micro_batch=4, shard_rows=8)
BIG = partial(FakeRenderer, size=64)  # a shard of eight images is a part of 40 KB
ROWS = 3, 4, 6  # replicas that fit not, that meet a read-only disk, and that meet one while they are rendered


def remount(disk: str, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def attempt(disk: str, what: str, replicas: int, factory: partial, reference: dict[str, str]) -> None:
    """Renders, and prints how it ended."""
    wanted = wanted_rows(replicas=replicas)
    store = synthetic_set(f"{disk}/runs")
    code, words = 0, ""
    try:
        render(store, wanted, factory, COMPUTE, cluster.Resources(cpus=1, gpus=0, nodes=1))
    except EnvironmentFault as error:
        code, words = error.exit_code, str(error)
    except OSError as error:
        words = environment_fault(error) or ""
        code = 4 if words else 1
    held, verdict = images(store), verify(store, wanted)
    print(json.dumps({
        "what": what, "code": code, "words": words, "rows": len(held), "corrupt": len(verdict.corrupt),
        "right": held.items() <= reference.items(), "whole": verdict.clean and verdict.ok == len(wanted),
    }), flush=True)  # fmt: skip


def main(disk: str) -> None:
    import ray

    place = tempfile.mkdtemp(prefix="rf", dir="/tmp")
    with_all = synthetic_set(f"{place}/reference")
    render_all(with_all, wanted_rows(replicas=ROWS[-1]), BIG())
    reference = images(with_all)
    ray.init(
        address="local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, logging_level="error",
        log_to_driver=False, _temp_dir=place,
    )  # fmt: skip
    attempt(disk, "full", ROWS[0], BIG, reference)
    remount(disk, "size=8m")
    attempt(disk, "room again", ROWS[0], BIG, reference)
    remount(disk, "ro")
    attempt(disk, "read-only", ROWS[1], BIG, reference)
    remount(disk, "rw")
    attempt(disk, "writable again", ROWS[1], BIG, reference)

    store, gate = synthetic_set(f"{disk}/runs"), Path(place, "gate")
    before = len(store.done())

    def read_only() -> bool:
        # A remount waits until nobody has a file open for writing.
        done = subprocess.run(["mount", "-o", "remount,ro", disk], check=False, stderr=subprocess.DEVNULL)
        return done.returncode == 0

    def later() -> None:
        wait_for(lambda: len(store.done()) > before)
        wait_for(read_only)
        gate.touch()

    meanwhile = threading.Thread(target=later)
    meanwhile.start()
    # One shard is committed; the next is in the middle when the disk changes.
    attempt(disk, "read-only meanwhile", ROWS[2], partial(BIG, gate=str(gate), gate_after=12), reference)
    meanwhile.join()
    remount(disk, "rw")
    attempt(disk, "writable at last", ROWS[2], BIG, reference)


if __name__ == "__main__":
    main(sys.argv[1])
