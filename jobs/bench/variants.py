"""The renderer with one choice changed at a time, and the loop of plain diffusers: what `pipeline.py` measures.

A variant is a function from rows to images (B, C, H, W) float32 in [-1, 1].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysynth.core.experiment import Sampling
from raysynth.data.conditions import ConditionSpec
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row
from raysynth.synth.samplers import cast_weights, make_sampler

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@contextmanager
def plain_flags() -> Iterator[None]:
    """CUDA's arithmetic as torch sets it: TF32 in convolutions, which our renderer turns off for its whole process."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


class Diffusers:
    """The loop of diffusers' pipelines, as one finds it in its examples, under torch's own flags.

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
        self.spec = ConditionSpec.from_json((Path(folder) / "condition.json").read_bytes())
        torch.set_num_threads(1)

    @torch.no_grad()
    @plain_flags()
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
        self.layer = layer
        self.kept: dict[int, torch.Tensor] = {}

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
