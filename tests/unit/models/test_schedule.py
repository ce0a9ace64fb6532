"""Noise schedules, targets and loss weights, against formulas and plain diffusers."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Generator
from raysynth.models.schedule import loss_weights, make_scheduler, target


def cosine_abar(steps: int) -> np.ndarray:
    """Nichol & Dhariwal, eq. 17, betas cut at 0.999."""
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return np.cumprod([1 - min(1 - b / a, 0.999) for a, b in itertools.pairwise(f)])


def test_cosine_is_the_papers() -> None:
    scheduler = make_scheduler(Generator(zero_terminal_snr=False))
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), cosine_abar(1000), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise(schedule: Any) -> None:
    plain = make_scheduler(Generator(schedule=schedule, zero_terminal_snr=False)).alphas_cumprod.double().sqrt()
    scheduler = make_scheduler(Generator(schedule=schedule))
    root = scheduler.alphas_cumprod.double().sqrt()
    assert scheduler.alphas_cumprod[-1] == 0
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])  # Lin 2024, algorithm 1
    torch.testing.assert_close(root, expected, rtol=0, atol=2e-3)
    assert (root.diff() <= 1e-6).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
def test_an_exported_config_gives_plain_diffusers_the_same_schedule(schedule: Any, tmp_path: Any) -> None:
    scheduler = make_scheduler(Generator(schedule=schedule, timesteps=250))
    scheduler.save_pretrained(tmp_path)
    for plain in (DDPMScheduler, DDIMScheduler):
        loaded: Any = plain.from_pretrained(tmp_path)
        assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
        assert loaded.config.prediction_type == "v_prediction"
        loaded.set_timesteps(10)
        assert int(loaded.timesteps[0]) == 249  # trailing spacing starts at pure noise


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_target_leads_back_to_the_image(prediction: Literal["v", "epsilon"]) -> None:
    scheduler = make_scheduler(Generator(prediction=prediction, zero_terminal_snr=False))
    images, noise = torch.rand(2, 3, 1, 4, 4).mul(2).sub(1)
    times = torch.tensor([0, 400, 900])
    noisy = scheduler.add_noise(images, noise, times)
    abar = scheduler.alphas_cumprod[times][:, None, None, None]
    wanted = target(scheduler, prediction, images, noise, times)
    if prediction == "v":
        back = abar.sqrt() * noisy - (1 - abar).sqrt() * wanted
    else:
        back = (noisy - (1 - abar).sqrt() * wanted) / abar.sqrt()
    torch.testing.assert_close(back, images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_min_snr_weights_are_one_rule_on_the_images_error(prediction: Literal["v", "epsilon"]) -> None:
    scheduler = make_scheduler(Generator(prediction=prediction, zero_terminal_snr=False))
    abar = scheduler.alphas_cumprod.double()
    snr = abar / (1 - abar)
    # |x0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (SNR + 1); on it the weight is min(SNR, gamma).
    on_image = loss_weights(scheduler, prediction, 5.0).double() * (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(on_image, snr.clamp(max=5.0), rtol=1e-5, atol=1e-7)
    assert (loss_weights(scheduler, prediction, None) == 1).all()


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generator.prediction.*epsilon"):
        make_scheduler(Generator(prediction="epsilon"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("timesteps", [2, 5, 10, 50, 100, 250, 1000, 4000])
def test_every_schedule_ends_near_noise_for_any_number_of_timesteps(schedule: Any, timesteps: int) -> None:
    abar = make_scheduler(Generator(schedule=schedule, timesteps=timesteps, zero_terminal_snr=False)).alphas_cumprod
    assert 0 < abar[-1] < 1e-2
    assert (abar.diff() < 0).all()
    rescaled = make_scheduler(Generator(schedule=schedule, timesteps=timesteps)).alphas_cumprod
    assert rescaled[-1] == 0
    assert rescaled.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
def test_another_number_of_timesteps_is_the_same_curve(schedule: Any) -> None:
    fine, coarse = (
        make_scheduler(Generator(schedule=schedule, timesteps=t, zero_terminal_snr=False)).alphas_cumprod
        for t in (1000, 250)
    )
    torch.testing.assert_close(coarse, fine[3::4], rtol=0, atol=0.02)


def test_timesteps_that_do_not_reach_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"generator.timesteps: got 1, must be enough for a linear schedule"):
        make_scheduler(Generator(schedule="linear", timesteps=1))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
def test_with_zero_terminal_snr_every_step_is_trained(schedule: Any, gamma: float) -> None:
    scheduler = make_scheduler(Generator(schedule=schedule))
    weights = loss_weights(scheduler, "v", gamma)
    assert (weights > 0).all()
    assert weights[-1] == pytest.approx(min(1.0, gamma))
    abar = scheduler.alphas_cumprod.double()
    # SNR + 1 = 1 / (1 - abar)
    torch.testing.assert_close(weights.double(), (gamma * (1 - abar)).clamp(max=1.0), rtol=1e-5, atol=1e-7)
