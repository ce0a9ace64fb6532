"""Samples a conditional denoising network: DDIM, DPM-Solver++ 2M and ancestral DDPM, with classifier-free guidance.

Schedulers are diffusers' own, built from an exported scheduler config; its trailing timesteps start at the last
step, as zero terminal SNR needs (Lin 2024, 2305.08891, section 3.3). Where theirs go wrong for some numbers of steps
or kinds of prediction, `make_sampler` says how they are mended. Guidance is diffusers' convention: at
`guidance_scale` 1 the conditional model alone, one pass a step; above 1 both halves in one pass,
eps = eps_null + s (eps_c - eps_null) (Ho & Salimans 2022, eq. 6 with s = 1 + w). Outside a guidance interval
(Kynkaanniemi 2024, 2404.07724) one pass again.

Every random number of an image comes from its own CPU generator. The scheduler's numbers stay on the CPU and the
network's timesteps on the device, so that the host never waits for the device between the first step and the last;
noise added at each step (`ddpm`, `eta`) crosses from the CPU and does wait. Knows nothing of rows, storage or
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from raysynth.core.experiment import Sampling

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_sampler(config: Mapping[str, Any], sampling: Sampling) -> Any:
    """The diffusers scheduler of `sampling.sampler`, with exactly `sampling.steps` timesteps set.

    DPM-Solver++ on an epsilon-prediction clips its estimate of the image to [-1, 1], as the exported config makes the
    others do: near pure noise epsilon's small error is a huge one of the image, and nothing else would stop it.

    Args:
        config: the exported `scheduler_config.json`.
    """
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    if sampling.sampler == "ddim":
        scheduler = DDIM.from_config(plain)
    elif sampling.sampler == "ddpm":
        scheduler = DDPMScheduler.from_config(plain)
    else:
        clips = plain.get("prediction_type") == "epsilon"
        scheduler = DPMSolverMultistepScheduler.from_config(
            plain, algorithm_type="dpmsolver++", solver_order=2, thresholding=clips, sample_max_value=1.0
        )
    scheduler.set_timesteps(sampling.steps)
    kept = scheduler.timesteps[: sampling.steps]
    if len(kept) < len(scheduler.timesteps):
        # By rounding, diffusers has one too many of some numbers of trailing timesteps, the last of them -1.
        if sampling.sampler == "dpm++":
            scheduler.set_timesteps(timesteps=kept.tolist())
        scheduler.timesteps = kept
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks the first timestep up
    return scheduler


class DDIM(DDIMScheduler):
    """diffusers' DDIM, but each step ends where the next begins.

    diffusers goes down by T // steps from timesteps that are T / steps apart: where steps do not divide T it leaves
    more noise than the network is then told of, and at 501 steps of 1,000 a fifth too much contrast.
    """

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, eta: float = 0.0,
        generator: list[torch.Generator] | None = None, return_dict: bool = False,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        """One step, Song 2021 (2010.02502), eq. 12 and 16.

        Args:
            model_output: (B, C, H, W) prediction of v, of the image or of epsilon. sample: (B, C, H, W).
            timestep: one of `timesteps`.
        """
        below = self.timesteps[self.timesteps < timestep]
        abar = self.alphas_cumprod[timestep]
        to = self.alphas_cumprod[below[0]] if len(below) else self.final_alpha_cumprod
        signal, noise = abar**0.5, (1 - abar) ** 0.5
        if self.config.prediction_type == "v_prediction":
            image, epsilon = signal * sample - noise * model_output, signal * model_output + noise * sample
        elif self.config.prediction_type == "sample":
            image, epsilon = model_output, (sample - signal * model_output) / noise
        else:
            image, epsilon = (sample - noise * model_output) / signal, model_output
        if self.config.thresholding:
            image = self._threshold_sample(image)
        elif self.config.clip_sample:
            image = image.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        sigma = eta * ((1 - to) / (1 - abar) * (1 - abar / to)) ** 0.5
        # From pure noise at eta 1 the difference is 0, which float32 may take 6e-8 below.
        sample = to**0.5 * image + (1 - to - sigma**2).clamp(min=0) ** 0.5 * epsilon
        if eta > 0:
            drawn = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            sample = sample + sigma * drawn
        return (sample,)


def guided_steps(sampling: Sampling) -> range:
    """Steps at which guidance is applied; as diffusers' guiders count, `start` and `stop` in fractions of all steps.

    Step 0 is pure noise. None at guidance scale 1, all of them without an interval.
    """
    if sampling.guidance_scale <= 1:
        return range(0)
    start, stop = sampling.guidance_interval or (0.0, 1.0)
    return range(int(start * sampling.steps), int(stop * sampling.steps))


def initial_noise(generators: Sequence[torch.Generator | None], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise of each image from its own generator, zeros where there is none: (B, *shape) float32."""
    return torch.stack(
        [torch.zeros(shape) if g is None else torch.randn(shape, generator=g) for g in generators]
    )


@torch.inference_mode()
def sample(
    unet: Callable[..., Any],
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
    images = initial_noise(generators, shape).to(device).contiguous(memory_format=torch.channels_last)
    # Places without a row draw from generators of their own, so that no other image's noise depends on them.
    noise = [torch.Generator("cpu").manual_seed(0) if g is None else g for g in generators]
    scheduler = make_sampler(scheduler_config, sampling)
    timesteps = scheduler.timesteps.to(device)
    return denoise(unet, scheduler, timesteps, images, conditions, null, noise, sampling).float()


def denoise(
    unet: Callable[..., Any],
    scheduler: Any,
    timesteps: torch.Tensor,
    images: torch.Tensor,
    conditions: torch.Tensor,
    null: torch.Tensor,
    noise: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """From noise to images without the host waiting for the device, except where steps add noise.

    Args:
        unet: called as diffusers' `UNet2DConditionModel`.
        scheduler: from `make_sampler`.
        timesteps: (steps,) int64, the scheduler's, on the network's device.
        images: (B, C, H, W) float32 standard normal noise there.
        conditions: (B, dim) float32 there.
        null: (dim,) float32 there.
        noise: a CPU generator an image, for samplers that add noise.
    """
    device = images.device
    more: dict[str, Any] = {"generator": noise} if sampling.sampler != "dpm++" else {}
    if sampling.sampler == "ddim":
        more["eta"] = sampling.eta
    half = HALF.get(sampling.precision) if device.type == "cuda" else None
    guided = guided_steps(sampling)
    both = torch.cat([null.expand_as(conditions), conditions]) if guided else conditions
    images = images * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(images, timestep)
        told = conditions
        if step in guided:
            x, told = torch.cat([x, x]), both
        with torch.autocast("cuda", half) if half else nullcontext():
            output = unet(x, timesteps[step], None, class_labels=told, return_dict=False)[0]
        output = output.float()
        if step in guided:
            without, conditional = output.chunk(2)
            output = guide(without, conditional, sampling.guidance_scale, sampling.guidance_rescale)
        images = scheduler.step(output, timestep, images, return_dict=False, **more)[0]
    return images


def cast_weights(network: torch.nn.Module, half: torch.dtype) -> None:
    """Casts what autocast would cast at every call, for it remembers no weight without a gradient: same bytes out.

    Convolutions and linear layers only; autocast keeps norms in float32.
    """
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.to(half)


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
