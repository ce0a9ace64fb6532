"""Samples a conditional denoising network: DDIM, DPM-Solver++ 2M and ancestral DDPM, with classifier-free guidance.

Schedulers are diffusers' own, built from an exported scheduler config; its trailing timesteps start at the last
step, as zero terminal SNR needs (Lin 2024, 2305.08891, section 3.3). Guidance is diffusers' convention: at
`guidance_scale` 1 the conditional model alone, one pass a step; above 1 both halves in one pass,
eps = eps_null + s (eps_c - eps_null) (Ho & Salimans 2022, eq. 6 with s = 1 + w).

Every random number of an image comes from its own CPU generator. Knows nothing of rows, storage or checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from raysynth.core.experiment import Sampling

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_sampler(config: Mapping[str, Any], sampling: Sampling) -> Any:
    """The diffusers scheduler of `sampling.sampler`, with its timesteps set.

    Args:
        config: the exported `scheduler_config.json`.
    """
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    if sampling.sampler == "ddim":
        scheduler = DDIMScheduler.from_config(plain)
    elif sampling.sampler == "ddpm":
        scheduler = DDPMScheduler.from_config(plain)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(plain, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(sampling.steps)
    return scheduler


def initial_noise(generators: Sequence[torch.Generator | None], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise of each image from its own generator, zeros where there is none: (B, *shape) float32."""
    return torch.stack(
        [torch.zeros(shape) if g is None else torch.randn(shape, generator=g) for g in generators]
    )


@torch.inference_mode()
def sample(
    unet: torch.nn.Module,
    scheduler_config: Mapping[str, Any],
    conditions: torch.Tensor,
    null: torch.Tensor,
    generators: Sequence[torch.Generator | None],
    shape: tuple[int, int, int],
    sampling: Sampling,
) -> torch.Tensor:
    """Renders a batch.

    Args:
        unet: called as diffusers' `UNet2DConditionModel`.
        scheduler_config: the exported scheduler config.
        conditions: (B, dim) float32 on the network's device.
        null: (dim,) float32, the null condition.
        generators: one CPU generator an image; None renders from zeros.
        shape: (C, H, W).

    Returns:
        images: (B, C, H, W) float32, about [-1, 1], not clipped.
    """
    device = conditions.device
    scheduler = make_sampler(scheduler_config, sampling)
    images = initial_noise(generators, shape).to(device) * scheduler.init_noise_sigma
    images = images.contiguous(memory_format=torch.channels_last)
    # Places without a row draw from generators of their own, so that no other image's noise depends on them.
    noise = [torch.Generator("cpu").manual_seed(0) if g is None else g for g in generators]
    more: dict[str, Any] = {"generator": noise} if sampling.sampler != "dpm++" else {}
    if sampling.sampler == "ddim":
        more["eta"] = sampling.eta
    half = HALF.get(sampling.precision) if device.type == "cuda" else None
    guided = sampling.guidance_scale > 1
    told = torch.cat([null.expand_as(conditions), conditions]) if guided else conditions
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(images, timestep)
        with torch.autocast(device.type, half, enabled=half is not None):
            output = unet(torch.cat([x, x]) if guided else x, timestep, None, class_labels=told, return_dict=False)[0]
        output = output.float()
        if guided:
            without, conditional = output.chunk(2)
            output = guide(without, conditional, sampling.guidance_scale, sampling.guidance_rescale)
        images = scheduler.step(output, timestep, images, return_dict=False, **more)[0]
    return images.float()


def guide(null: torch.Tensor, conditional: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance, its standard deviation brought back towards the conditional one.

    Lin 2024 (2305.08891, eq. 15-16), each image by its own deviations: x = guided * std(conditional) / std(guided);
    rescale * x + (1 - rescale) * guided.

    Args:
        null: (B, C, H, W) prediction without condition.
        conditional: (B, C, H, W) prediction with it.
        scale: guidance scale. rescale: 0 (off) to 1.
    """
    guided = null + scale * (conditional - null)
    if not rescale:
        return guided
    ratio = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * (rescale * ratio + (1 - rescale))[:, None, None, None]
