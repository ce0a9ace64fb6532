"""The bare pipeline: what each choice of the renderer is worth by itself, and all of it against plain diffusers.

    uv run python jobs/bench/pipeline.py [--preset tiny] [--size 16] [--steps 16] [--micro-batch 16] [--guidance 2]
                                         [--repeats 7] [--images FOLDER] [--no-compile] [--out FILE.json]

Variants render the same rows of an untrained generator in turn, one micro-batch each a round: medians over rounds,
ratios of medians against the renderer as it is (`default`) and against `diffusers`, the loop of diffusers' own
pipelines (stock scheduler with its timesteps on the device, network as `from_pretrained` gives it). `difference` is
the largest absolute one of any pixel in [-1, 1] from diffusers' images. On a CPU the clock is the process's CPU time
in one thread, so that neighbours on the machine count less; on CUDA it is wall time of a synchronised device, and
half precision and CUDA graphs join the table. Further tables: shares of one micro-batch, micro-batch sizes and what
`auto` picks, PNG levels on real pictures.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from throughput import CLASSES, experiment, exported

from raysynth.core.experiment import ImageSpec, Sampling
from raysynth.core.storage import open_storage
from raysynth.data.images import BadImage, decode, encode_png, pixel_sha256, to_size
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row, fault_in, noise_seed, to_uint8
from raysynth.synth.samplers import cast_weights, initial_noise, make_sampler
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.settle import settle

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


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


class Diffusers:
    """The loop of diffusers' pipelines, as one finds it in its examples.

    Args:
        halves: one: both halves of guidance in one forward, as its pipelines do; two: one after the other, as its
            course does.
        dtype: the network's, `torch_dtype` of `from_pretrained`.
    """

    def __init__(self, folder: str, sampling: Sampling, halves: str = "one", dtype: torch.dtype = torch.float32):
        from diffusers import UNet2DConditionModel

        self.sampling, self.halves = sampling, halves
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).to(DEVICE)
        self.unet.eval()
        self.config = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text())
        self.spec = DDPMRenderer(folder, sampling, DEVICE).spec

    @torch.no_grad()
    def __call__(self, wanted: Sequence[Row]) -> np.ndarray:
        from diffusers.utils.torch_utils import randn_tensor

        unet, dtype, scale = self.unet, self.unet.dtype, self.sampling.guidance_scale
        told = self.spec.encode({n: [r.columns[n] for r in wanted] for n in wanted[0].columns})
        condition = torch.from_numpy(told).to(DEVICE, dtype)
        null = torch.from_numpy(self.spec.null).to(DEVICE, dtype).expand_as(condition)
        generators = [torch.Generator("cpu").manual_seed(r.seed) for r in wanted]
        side = unet.config.sample_size
        scheduler = make_sampler(self.config, self.sampling)
        scheduler.set_timesteps(self.sampling.steps, device=DEVICE)
        shape = (len(wanted), unet.config.in_channels, side, side)
        x = randn_tensor(shape, generators, torch.device(DEVICE), dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            if scale == 1:
                output = unet(x, t, None, class_labels=condition, return_dict=False)[0]
            elif self.halves == "one":
                both = unet(torch.cat([x] * 2), t, None, class_labels=torch.cat([null, condition]), return_dict=False)
                without, conditional = both[0].chunk(2)
                output = without + scale * (conditional - without)
            else:
                without = unet(x, t, None, class_labels=null, return_dict=False)[0]
                conditional = unet(x, t, None, class_labels=condition, return_dict=False)[0]
                output = without + scale * (conditional - without)
            more = {} if self.sampling.sampler == "dpm++" else {"generator": generators}
            x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        return x.clamp(-1, 1).float().cpu().numpy()


def ours(
    folder: str, sampling: Sampling, change: Callable[[DDPMRenderer], Any] | None = None, compiled: bool = False
) -> Callable[[Sequence[Row]], np.ndarray]:
    """The renderer, with `change` made to it."""
    made = DDPMRenderer(folder, sampling, DEVICE, compiled=compiled)
    if change:
        change(made)
    return lambda wanted: made.render(list(wanted), len(wanted))


def contiguous(made: DDPMRenderer) -> None:
    """The network in torch's usual memory format."""
    made.unet.to(memory_format=torch.contiguous_format)


def compile_with(options: dict[str, Any], made: DDPMRenderer) -> None:
    """`torch.compile` with other options than the renderer's."""
    made.network = torch.compile(made.unet, dynamic=False, fullgraph=True, options=options)


def throughout(dtype: torch.dtype, made: DDPMRenderer) -> None:
    """Network and activations in half precision, norms too."""
    made.unet.to(dtype=dtype)
    network = made.unet

    def forward(x: torch.Tensor, t: torch.Tensor, _: None, class_labels: torch.Tensor, return_dict: bool) -> Any:
        with torch.autocast(DEVICE, enabled=False):
            return network(x.to(dtype), t, None, class_labels=class_labels.to(dtype), return_dict=return_dict)

    made.network = forward


def autocast(dtype: torch.dtype, once: bool, made: DDPMRenderer) -> None:
    """Half precision by autocast, which the renderer does on CUDA only; weights cast at every call or once."""
    network = made.unet
    if once:
        cast_weights(network, dtype)

    def forward(*args: Any, **keys: Any) -> Any:
        with torch.autocast(DEVICE, dtype):
            return network(*args, **keys)

    made.network = forward


def two_forwards(made: DDPMRenderer) -> None:
    """The halves of guidance one after the other."""
    network = made.unet

    def forward(x: torch.Tensor, t: torch.Tensor, _: None, class_labels: torch.Tensor, return_dict: bool) -> Any:
        halves = zip(x.chunk(2), class_labels.chunk(2))
        return (torch.cat([network(a, t, None, class_labels=b, return_dict=False)[0] for a, b in halves]),)

    made.network = forward


class Remembered(torch.nn.Module):
    """A layer that gives its first answer for ever."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.kept = layer, {}

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        if len(x) not in self.kept:
            self.kept[len(x)] = self.layer(x)
        return self.kept[len(x)]


def free_embeddings(made: DDPMRenderer) -> None:
    """Condition and time embedded once for ever: wrong images, the most that remembering them could save."""
    for name in ("time_embedding", "class_embedding"):
        setattr(made.unet, name, Remembered(getattr(made.unet, name)))


def variants(folder: str, s: Sampling, compile_too: bool) -> dict[str, Callable[[], Callable]]:
    """Name -> what makes the variant."""
    guided = s.guidance_scale > 1
    found: dict[str, Callable[[], Callable]] = {
        "diffusers": partial(Diffusers, folder, s), "default": partial(ours, folder, s),
        "contiguous, not channels-last": partial(ours, folder, s, contiguous),
        "embeddings for free (wrong images)": partial(ours, folder, s, free_embeddings),
    }  # fmt: skip
    if guided:
        found |= {
            "diffusers, two forwards": partial(Diffusers, folder, s, "two"),
            "two forwards": partial(ours, folder, s, two_forwards),
            "guidance in [0.2, 0.8] (other images)": partial(ours, folder, replace(s, guidance_interval=[0.2, 0.8])),
        }
    else:
        found["guidance 1 by two halves"] = partial(ours, folder, replace(s, guidance_scale=1 + 1e-9))
    if compile_too:
        found["compile"] = partial(ours, folder, s, compiled=True)
        frozen = {"freezing": True, "deterministic": True}
        found["compile, frozen weights"] = partial(ours, folder, s, partial(compile_with, frozen))
        if CUDA:
            graphs = {"triton.cudagraphs": True, "deterministic": True}
            found["compile, CUDA graphs"] = partial(ours, folder, s, partial(compile_with, graphs))
    bf16 = torch.bfloat16
    for words, change in {
        "bf16 autocast": partial(autocast, bf16, False),
        "bf16 autocast, weights cast once": partial(autocast, bf16, True),
        "bf16 throughout": partial(throughout, bf16),
    }.items():  # fmt: skip
        found[f"{words} (other pixels)"] = partial(ours, folder, s, change)
    if CUDA:
        found["diffusers, bf16 (other pixels)"] = partial(Diffusers, folder, s, "one", bf16)
        half = replace(s, precision="bf16")
        found["compile, bf16 autocast (other pixels)"] = partial(ours, folder, half, compiled=True)
    return found


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
    sizes = [2**i for i in range(9 if CUDA else 7)]
    spent: dict[int, list[float]] = {n: [] for n in sizes}
    for round_ in range(max(3, a.repeats // 2) + 1):
        for n in sizes:
            began = seconds()
            made.render(list(rows(n)), n)
            if round_:
                spent[n].append(seconds() - began)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        settled = settle(SyntheticSet(open_storage(root), "bench", {}), made, None)
    rates = {n: round(n / statistics.median(times), 2) for n, times in spent.items()}
    return {"images_per_s": rates, "auto": settled.micro_batch, "auto_s": round(time.perf_counter() - began, 1)}


def pictures(folder: str, size: int, n: int = 24) -> list[np.ndarray]:
    """Real pictures as they are stored; scikit-learn's two photographs in grey and colour without a folder."""
    if not folder:
        from sklearn.datasets import load_sample_images

        photos = [np.asarray(Image.fromarray(p).resize((size, size))) for p in load_sample_images().images]
        return [*photos, *(np.asarray(Image.fromarray(p).convert("L"))[..., None] for p in photos)]
    found: list[np.ndarray] = []
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        try:
            found.append(to_size(decode(path.read_bytes(), ImageSpec(channels="grey", size=size)).array, size, "pad"))
        except BadImage:
            continue
        if len(found) == n:
            break
    return found


def png(a: argparse.Namespace) -> dict[str, Any]:
    """KB and milliseconds a picture by compression level, and of a grey one written as colour."""
    shown = pictures(a.images, a.png_size)

    def row(level: int, these: list[np.ndarray]) -> dict[str, float]:
        ms = median_ms(a.repeats, lambda: [encode_png(p, level) for p in these]) / len(these)
        return {"kb": round(sum(len(encode_png(p, level)) for p in these) / len(these) / 1024, 2), "ms": round(ms, 3)}

    found: dict[str, Any] = {f"level {level}": row(level, shown) for level in range(10)}
    grey = [p for p in shown if p.shape[-1] == 1]
    found["grey, one channel, level 6"] = row(6, grey)
    found["grey as three channels, level 6"] = row(6, [np.repeat(p, 3, axis=2) for p in grey])
    return {"pictures": len(shown), "of": Path(a.images).name or "scikit-learn's photographs", "size": a.png_size,
            "zlib": features.version("zlib"), "zlib_ng": features.version("zlib_ng"), **found}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"repeats": 7, "size": 16, "steps": 16, "micro-batch": 16, "png-size": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sampler", default="dpm++")
    parser.add_argument("--images", default="", help="folder of real pictures for the PNG table")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="*", default=["guidance_1", "guided", "shares", "micro_batch", "png"])
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
        "arguments": vars(a) | {"out": None, "images": Path(a.images).name},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        exported(e, folder)
        tables: dict[str, Callable[[], Any]] = {
            "guidance_1": lambda: table(folder, s, a),
            "guided": lambda: table(folder, replace(s, guidance_scale=a.guidance), a),
            "shares": lambda: shares(folder, s, a), "micro_batch": lambda: micro_batches(folder, s, a),
            "png": lambda: png(a),
        }  # fmt: skip
        for name in a.only:
            result[name] = tables[name]()
            print(f"\n{name}")
            for key, value in result[name].items():
                if isinstance(value, dict) and "seconds" in value:
                    value = {k: v for k, v in value.items() if k != "seconds"}
                print(f"  {key:40} {value}", flush=True)
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
