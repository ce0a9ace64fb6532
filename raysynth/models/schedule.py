"""The noise schedule, the prediction targets and the loss weights of the DDPM.

Schedules are diffusers' own: cosine with s = 0.008 (Nichol & Dhariwal 2102.09672, eq. 17), linear (Ho 2020), sigmoid
(GeoDiff); rescaled to zero terminal SNR by Lin 2024 (2305.08891, algorithm 1). Training, plain diffusers and our
renderer read one exported scheduler config, whose `trained_betas` are the betas before that rescale.

Knows nothing of the network or of how images are sampled.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Generator

BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "sigmoid": "sigmoid"}


def make_scheduler(generator: Generator) -> Any:
    """The training scheduler, a diffusers `DDPMScheduler`; its `config` is what the export carries.

    Raises:
        ConfigError: epsilon-prediction with zero terminal SNR.
    """
    if generator.prediction == "epsilon" and generator.zero_terminal_snr:
        raise ConfigError(
            "generator.prediction", "epsilon", "v where generator.zero_terminal_snr is true",
            "At pure noise epsilon says nothing of the image.",
        )  # fmt: skip
    named: Any = DDPMScheduler(generator.timesteps, beta_schedule=BETA_SCHEDULES[generator.schedule])
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
    where `gamma` is None. At zero terminal SNR the weight of v at the last step is 0, as in the paper's formula.
    """
    abar = scheduler.alphas_cumprod.double()
    if gamma is None:
        return torch.ones(len(abar))
    snr = abar / (1.0 - abar)
    return (snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1.0)).float()
