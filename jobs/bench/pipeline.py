"""The bare pipeline: what each choice of the renderer is worth by itself, and all of it against plain diffusers.

    uv run python jobs/bench/pipeline.py [--preset tiny] [--size 16] [--steps 16] [--micro-batch 16] [--guidance 2]
                                         [--sampler dpm++] [--repeats 7] [--no-compile] [--out FILE.json]

Variants render the same rows of an untrained generator in turn, one micro-batch each a round: medians over rounds,
ratios of medians against the renderer as it is (`default`) and against `diffusers`, the loop of diffusers' own
pipelines (stock scheduler with its timesteps on the device, network as `from_pretrained` gives it). `difference` is
the largest absolute one of any pixel in [-1, 1] from diffusers' images. On a CPU the clock is the process's CPU time
in one thread, so that neighbours on the machine count less; on CUDA it is wall time of a synchronised device, and
half precision and CUDA graphs join the table. Further tables: shares of one micro-batch, and micro-batch sizes with
what `auto` picks. The variants are in `variants.py`, the encoding of pictures is measured by `png.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput import CLASSES, experiment, exported
from variants import CUDA, DEVICE, variants

from raysynth.core.experiment import Sampling
from raysynth.core.storage import open_storage
from raysynth.data.images import encode_png, pixel_sha256
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row, fault_in, is_out_of_memory, noise_seed, to_uint8
from raysynth.synth.samplers import initial_noise, make_sampler
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.settle import settle


def seconds() -> float:
    """Now, on the clock of the table."""
    if not CUDA:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def rows(n: int) -> list[Row]:
    """`n` rows over ten classes."""
    return [Row(str(i), noise_seed(0, str(i), 0), {f"label_{c}": int(i % 10 == k) for k, c in enumerate(CLASSES)})
            for i in range(n)]  # fmt: skip


def table(folder: str, s: Sampling, a: argparse.Namespace) -> dict[str, Any]:
    """Every variant's images/s, ratios, cold start and difference."""
    wanted = rows(a.micro_batch)
    made, cold, images = {}, {}, {}
    for name, make in variants(folder, s, a.compile).items():
        began = time.perf_counter()
        made[name] = make()
        images[name] = made[name](wanted)
        cold[name] = time.perf_counter() - began
    spent: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(a.repeats):
        for name, render in made.items():
            began = seconds()
            for image in render(wanted):
                to_uint8(image)
            spent[name].append(seconds() - began)
    median = {name: statistics.median(times) for name, times in spent.items()}
    return {
        name: {
            "images_per_s": round(a.micro_batch / t, 2), "against_default": round(median["default"] / t, 3),
            "against_diffusers": round(median["diffusers"] / t, 3), "cold_start_s": round(cold[name], 2),
            "difference": float(np.abs(images[name] - images["diffusers"]).max()),
            "seconds": [round(x, 5) for x in spent[name]],
        } for name, t in sorted(median.items(), key=lambda item: item[1])
    }  # fmt: skip


def median_ms(repeats: int, call: Callable[[], Any]) -> float:
    """Median milliseconds of a call after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = seconds()
        call()
        times.append(seconds() - began)
    return round(1000 * statistics.median(times), 4)


def shares(folder: str, s: Sampling, a: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one micro-batch, step by step."""
    made, wanted = DDPMRenderer(folder, s, DEVICE), rows(a.micro_batch)
    images = made.render(list(wanted), a.micro_batch)
    pixels = [to_uint8(image) for image in images]
    device_images = torch.from_numpy(images).to(DEVICE)

    def noise() -> None:
        initial_noise([torch.Generator("cpu").manual_seed(r.seed) for r in wanted], made.shape)

    def steps(on: str) -> None:
        scheduler, x = make_sampler(made.scheduler_config, s), device_images
        for t in scheduler.timesteps.to(on):
            x = scheduler.step(device_images, t, x, return_dict=False)[0]

    return {
        "whole micro-batch": median_ms(a.repeats, lambda: made.render(list(wanted), a.micro_batch)),
        "conditions": median_ms(a.repeats, lambda: [made._condition(r) for r in wanted]),
        "initial noise": median_ms(a.repeats, noise),
        "scheduler made": median_ms(a.repeats, lambda: make_sampler(made.scheduler_config, s)),
        "scheduler made and all its steps": median_ms(a.repeats, lambda: steps("cpu")),
        "the same, timesteps on the device": median_ms(a.repeats, lambda: steps(DEVICE)),
        "copy to the host": median_ms(a.repeats, lambda: device_images.clamp(-1, 1).cpu().numpy()),
        "look for faults": median_ms(a.repeats, lambda: [fault_in(i) for i in images]),
        "round to uint8": median_ms(a.repeats, lambda: [to_uint8(i) for i in images]),
        "PNG": median_ms(a.repeats, lambda: [encode_png(p) for p in pixels]),
        "hashes": median_ms(
            a.repeats, lambda: [(pixel_sha256(p), hashlib.sha256(encode_png(p, 0)).digest()) for p in pixels]
        ),
    }  # fmt: skip


def micro_batches(folder: str, s: Sampling, a: argparse.Namespace) -> dict[str, Any]:
    """Images/s by micro-batch, and what `auto` finds in how many seconds."""
    made = DDPMRenderer(folder, s, DEVICE)
    sizes = []
    try:
        for n in [2**i for i in range(11 if CUDA else 7)]:
            made.render(list(rows(n)), n)  # not on the clock
            sizes.append(n)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    made.release_memory()
    spent: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(max(3, a.repeats // 2)):
        for n in sizes:
            began = seconds()
            made.render(list(rows(n)), n)
            spent[n].append(seconds() - began)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        settled = settle(SyntheticSet(open_storage(root), "bench", {}), made, None)
    rates = {n: round(n / statistics.median(times), 2) for n, times in spent.items()}
    return {"images_per_s": rates, "auto": settled.micro_batch, "auto_s": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"repeats": 7, "size": 16, "steps": 16, "micro-batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sampler", default="dpm++")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="*", default=["guidance_1", "guided", "shares", "micro_batch"])
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    import diffusers

    e = experiment(a.size, a.preset, a.steps)
    s = replace(e.sampling, sampler=a.sampler)
    result: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "clock": "wall" if CUDA else "CPU time, 1 thread",
        "load_average": round(os.getloadavg()[0], 2),
        "arguments": vars(a) | {"out": None},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        exported(e, folder)
        tables: dict[str, Callable[[], Any]] = {
            "guidance_1": lambda: table(folder, s, a),
            "guided": lambda: table(folder, replace(s, guidance_scale=a.guidance), a),
            "shares": lambda: shares(folder, s, a), "micro_batch": lambda: micro_batches(folder, s, a),
        }  # fmt: skip
        for name in a.only:
            result[name] = tables[name]()
            print(f"\n{name}")
            for key, found in result[name].items():
                shown = {k: v for k, v in found.items() if k != "seconds"} if isinstance(found, dict) else found
                print(f"  {key:40} {shown}", flush=True)
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
