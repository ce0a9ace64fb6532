"""Engine against a bare loop of the same pipeline, in turn in one run: the ratio of medians.

    uv run python jobs/bench/throughput.py [--rows 512] [--repeats 5] [--workers 1]

The bare loop renders the same micro-batches with the same renderer and rounds to uint8: no storage, no PNG, no
hashes, no Ray. The engine is the render pool as `raysynth generate` runs it, on an untrained generator. Both are in
steady state: the bare loop after one warm-up micro-batch, the engine from each worker's first marker to the last
marker; start-up, first shard included, is printed apart. With several workers the bare loop runs as as many processes,
on GPUs in turn; the workers of one GPU share it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from raysynth.core.config import build_experiment, resolved
from raysynth.core.experiment import Compute, Experiment, Sampling
from raysynth.core.storage import open_storage
from raysynth.data.plans import build_plan
from raysynth.stages import cluster
from raysynth.stages.generate import render
from raysynth.synth.renderer import RENDER_VERSION, Renderer, Row, noise_seed, to_uint8
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted

CLASSES = [f"c{i}" for i in range(10)]


def experiment(size: int, preset: str, steps: int) -> Experiment:
    """A digits-like experiment; only its generator's shape and its sampling matter here."""
    return resolved(build_experiment({
        "name": "bench", "data": {"kind": "digits", "image": {"size": size, "channels": "grey"}},
        "generator": {"preset": preset}, "sampling": {"steps": steps},
    }))  # fmt: skip


def exported(e: Experiment, folder: str) -> None:
    """An untrained generator: rendering costs what a trained one does."""
    import torch

    from raysynth.data.conditions import ConditionSpec
    from raysynth.models.export import export_generator
    from raysynth.models.unet import build_unet

    spec = ConditionSpec("single", CLASSES, CLASSES)
    torch.manual_seed(0)
    unet = build_unet(e.generator, spec.dim, 1)
    # The last layer starts at zero in some architectures; noise keeps images from being constant.
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    facts = {"n_real_generator": 0, "train_on": "train", "channels": 1, "licence": "", "dataset": "none"}
    export_generator(folder, e.generator, unet, spec, facts)


def plan_rows(n: int) -> pa.Table:
    """`n` rows over ten classes."""
    table = {"image_id": [f"i{i}" for i in range(n)], "split": ["train"] * n, "patient_id": [f"p{i}" for i in range(n)]}
    labels = {f"label_{c}": pa.array([int(i % 10 == k) for i in range(n)], pa.int8()) for k, c in enumerate(CLASSES)}
    content = {"name": "bench", "data": {"kind": "digits"}, "plan": {"replicas": 1}}
    return build_plan(pa.table({**table, **labels}), build_experiment(content))


def make(folder: str, sampling: Sampling, device: str) -> Renderer:
    """The renderer, on one thread of a CPU or on a GPU."""
    from raysynth.synth.ddpm import DDPMRenderer

    return DDPMRenderer(folder, sampling, device, threads=1)


def devices(workers: int, gpus: int) -> list[str]:
    """torch devices of bare loops."""
    return [f"cuda:{i % gpus}" if gpus else "cpu" for i in range(workers)]


def gpu_share(workers: int, gpus: int) -> float:
    """GPUs of one worker, so that Ray starts all of them: a worker's part of a GPU lies on one GPU."""
    return 1 / math.ceil(workers / gpus) if gpus else 1.0


def bare(folder: str, sampling: Sampling, rows: list[Row], micro_batch: int, device: str, result: Any = None) -> float:
    """Images/s of the plain loop."""
    renderer = make(folder, sampling, device)
    renderer.render(rows[:micro_batch], micro_batch)
    began = time.perf_counter()
    for start in range(0, len(rows), micro_batch):
        for image in renderer.render(rows[start : start + micro_batch], micro_batch):
            to_uint8(image)
    rate = len(rows) / (time.perf_counter() - began)
    if result is not None:
        result.put(rate)
    return rate


def bare_processes(on: list[str], *args: object) -> float:
    """Sum of the images/s of plain loops side by side, one on each of these devices."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=bare, args=(*args, device, results)) for device in on]
    for p in processes:
        p.start()
    rates = [results.get() for _ in processes]
    for p in processes:
        p.join()
    return sum(rates)


def engine(
    folder: str, e: Experiment, gpus: int, wanted: Wanted, micro_batch: int, shard_rows: int, workers: int
) -> tuple[float, float, float]:
    """(images/s in steady state, seconds from call to the first marker, busy share of the device)."""
    identity = {
        "render_version": RENDER_VERSION, "generator_id": "bench", "seed": 0, "sampler": e.sampling.sampler,
        "steps": e.sampling.steps, "guidance_scale": 1.0, "guidance_rescale": 0.0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        store = SyntheticSet(open_storage(root), "bench", identity)
        share = gpu_share(workers, gpus)
        compute = Compute(
            render_workers=workers, micro_batch=micro_batch, shard_rows=shard_rows, gpus_per_renderer=share
        )
        factory = partial(make, folder, e.sampling, "cuda" if gpus else "cpu")
        began = time.time()
        render(store, wanted, factory, compute, cluster.connect(compute))
        markers = sorted(store.markers(store.done()).values(), key=lambda m: m["finished"])
    # Each worker's first shard carries its start; steady state begins when the last of them is committed.
    steady = markers[workers:]
    first, last = markers[workers - 1]["finished"], markers[-1]["finished"]
    busy = sum(m["render_seconds"] for m in steady) / workers / (last - first)
    return sum(m["ok"] for m in steady) / (last - first), markers[0]["finished"] - began, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 512, "repeats": 5, "workers": 1, "size": 16, "steps": 16, "micro-batch": 16,
                        "shard-rows": 64}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count()
    cluster.connect(Compute(address="local"))
    e = experiment(a.size, a.preset, a.steps)
    table = plan_rows(a.rows)
    keys = table["row_key"].to_pylist()
    columns = table.select([n for n in table.column_names if n.startswith("label_")]).to_pylist()
    rows = [Row(k, noise_seed(0, k, 0), c) for k, c in zip(keys, columns)]
    with tempfile.TemporaryDirectory() as folder:
        exported(e, folder)
        found: dict[str, list[float]] = {"bare": [], "engine": [], "cold_start_s": [], "busy": []}
        for i in range(a.repeats):
            share = rows[: a.rows // a.workers]
            found["bare"].append(bare_processes(devices(a.workers, gpus), folder, e.sampling, share, a.micro_batch))
            rate, cold, busy = engine(folder, e, gpus, Wanted.of(table), a.micro_batch, a.shard_rows, a.workers)
            for key, number in (("engine", rate), ("cold_start_s", cold), ("busy", busy)):
                found[key].append(number)
            print(f"{i + 1}: bare {found['bare'][-1]:.2f}, engine {rate:.2f} images/s, busy {busy:.3f}", flush=True)
    medians = {k: statistics.median(v) for k, v in found.items()}
    result = {
        "hardware": torch.cuda.get_device_name() if gpus else f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__, "arguments": vars(a) | {"out": None}, "runs": found, "median": medians,
        "ratio": medians["engine"] / medians["bare"],
    }  # fmt: skip
    print(f"ratio of medians {result['ratio']:.3f}")
    print(f"engine {medians['engine']:.2f}, bare {medians['bare']:.2f} images/s")
    print(f"device busy {medians['busy']:.3f}, cold start {medians['cold_start_s']:.1f} s")
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
