"""The noise schedule, the prediction targets and the loss weights of the DDPM.

Schedules are diffusers' own: cosine with s = 0.008 (Nichol & Dhariwal 2102.09672, eq. 17), linear (Ho 2020), sigmoid
(GeoDiff), the last two with betas of 1e-4 to 0.02 at T = 1000 that scale with 1000 / T, so that every T ends near
pure noise; rescaled to zero terminal SNR by Lin 2024 (2305.08891, algorithm 1). Training, plain diffusers and our
renderer read one exported scheduler config, whose `trained_betas` are the betas before that rescale.

Knows nothing of the network or of how images are sampled.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Generator

MAX_TERMINAL_ABAR = 1e-2
"""Largest abar_T before the rescale: sampling starts from pure noise, which training must have come near."""
MAX_BETA = 0.999
BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "sigmoid": "sigmoid"}


def make_scheduler(generator: Generator) -> Any:
    """The training scheduler, a diffusers `DDPMScheduler`; its `config` is what the export carries.

    Raises:
        ConfigError: epsilon-prediction with zero terminal SNR; too few timesteps to reach noise.
    """
    if generator.prediction == "epsilon" and generator.zero_terminal_snr:
        raise ConfigError(
            "generator.prediction", "epsilon", "v where generator.zero_terminal_snr is true",
            "At pure noise epsilon says nothing of the image.",
        )  # fmt: skip
    stretch = 1000 / generator.timesteps
    named: Any = DDPMScheduler(
        generator.timesteps, beta_start=1e-4 * stretch, beta_end=min(0.02 * stretch, MAX_BETA),
        beta_schedule=BETA_SCHEDULES[generator.schedule],
    )  # fmt: skip
    if not named.alphas_cumprod[-1] <= MAX_TERMINAL_ABAR:
        raise ConfigError(
            "generator.timesteps", generator.timesteps,
            f"enough for a {generator.schedule} schedule to reach noise (abar_T <= {MAX_TERMINAL_ABAR})",
        )  # fmt: skip
    return DDPMScheduler(
        num_train_timesteps=generator.timesteps,
        # Written out because diffusers' DDIM and DPM-Solver do not know every schedule by name.
        trained_betas=named.betas.tolist(),
        rescale_betas_zero_snr=generator.zero_terminal_snr,
        prediction_type="v_prediction" if generator.prediction == "v" else "epsilon",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def target(
    scheduler: Any, prediction: str, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict: epsilon, or v = sqrt(abar) epsilon - sqrt(1 - abar) x0 (Salimans & Ho 2022).

    Args:
        images: (B, C, H, W) in [-1, 1]. noise: (B, C, H, W). timesteps: (B,) int64.
    """
    return noise if prediction == "epsilon" else scheduler.get_velocity(images, noise, timesteps)


def loss_weights(scheduler: Any, prediction: str, gamma: float | None) -> torch.Tensor:
    """Weight of the squared error at every timestep: (T,) float32.

    Min-SNR-gamma (Hang 2023, 2303.09556, section 3.4): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v; ones
    where `gamma` is None. With zero terminal SNR that would be exactly 0 at the last step, which samplers start
    from and which nothing would then train; there it is min(SNR + 1, gamma) / (SNR + 1), the same cut on v's own
    SNR + 1, whose last weight is min(1, gamma).
    """
    abar = scheduler.alphas_cumprod.double()
    if gamma is None:
        return torch.ones(len(abar))
    snr = abar / (1.0 - abar)
    if prediction == "epsilon":
        return (snr.clamp(max=gamma) / snr).float()
    shift = 1.0 if scheduler.config.rescale_betas_zero_snr else 0.0
    return ((snr + shift).clamp(max=gamma) / (snr + 1.0)).float()
