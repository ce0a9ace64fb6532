"""Samplers driven by the best denoiser there can be, of images whose pixels are normal with a known deviation."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from raysynth.core.experiment import Sampling
from raysynth.core.generator import Generator
from raysynth.models.schedule import make_scheduler
from raysynth.synth.samplers import make_sampler

SAMPLERS: list[Any] = ["ddim", "dpm++", "ddpm"]
DEVIATION = 0.5
SIDE = 64


def rendered(generator: Generator, sampler: Literal["ddim", "dpm++", "ddpm"], steps: int, error: float = 0.0) -> float:
    """Standard deviation of an image rendered by the ideal denoiser, whose outputs are off by `error` of themselves."""
    trained = make_scheduler(generator)
    scheduler = make_sampler(dict(trained.config), Sampling(sampler=sampler, steps=steps))
    source = torch.Generator().manual_seed(0)
    x = torch.randn((1, 1, SIDE, SIDE), generator=source)
    more: dict[str, Any] = {} if sampler == "dpm++" else {"generator": [source]}
    for t in scheduler.timesteps:
        abar = trained.alphas_cumprod[t].double()
        image = DEVIATION**2 * abar.sqrt() * x / (abar * DEVIATION**2 + 1 - abar)
        epsilon = (x - abar.sqrt() * image) / (1 - abar).sqrt()
        output = epsilon if generator.prediction == "epsilon" else abar.sqrt() * epsilon - (1 - abar).sqrt() * image
        output = output * (1 + error * torch.randn((), generator=source))
        x = scheduler.step(output.float(), t, x, return_dict=False, **more)[0]
    return float(x.std())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("timesteps", "counts"), [(100, range(1, 101)), (1000, (1, 16, 61, 103, 121, 501, 997, 1000))]
)
def test_as_many_timesteps_as_steps(sampler: Any, timesteps: int, counts: Any) -> None:
    config = dict(make_scheduler(Generator(timesteps=timesteps)).config)
    for steps in counts:
        found = make_sampler(config, Sampling(sampler=sampler, steps=steps)).timesteps.tolist()
        assert len(found) == len(set(found)) == steps
        assert found == sorted(found, reverse=True)
        assert found[0] == timesteps - 1
        assert found[-1] >= 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_deviation_is_the_datas_whatever_the_steps(sampler: Any) -> None:
    # 61: of those where rounding gives a timestep too many; 300 and 501: steps that do not divide the timesteps.
    for steps in (50, 60, 61, 62, 300, 501, 999):
        assert rendered(Generator(), sampler, steps) == pytest.approx(DEVIATION, abs=0.06), steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_a_network_that_errs_a_little_renders_a_little_wrong(sampler: Any, schedule: Any, prediction: Any) -> None:
    generator = Generator(prediction=prediction, schedule=schedule, zero_terminal_snr=prediction == "v")
    for steps in (25, 50):
        assert rendered(generator, sampler, steps, error=0.03) == pytest.approx(DEVIATION, abs=0.12), steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "sigmoid"])
def test_all_of_ddims_noise_from_pure_noise_on(schedule: Any) -> None:
    config = dict(make_scheduler(Generator(schedule=schedule)).config)
    x, output = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for steps in range(2, 1001):  # float32 takes what is left below 0 at 191 to 278 of them, 20 and 25 among these
        scheduler = make_sampler(config, Sampling(sampler="ddim", steps=steps, eta=1.0))
        first = scheduler.timesteps[0]
        assert scheduler.step(output, first, x, eta=1.0, generator=[torch.Generator()])[0].isfinite().all(), steps


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("more", [
    {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}, {"prediction_type": "sample"},
    {"prediction_type": "sample", "thresholding": True, "clip_sample": False},
])  # fmt: skip
def test_ddim_is_diffusers_where_steps_divide_the_timesteps(more: dict[str, Any], eta: float) -> None:
    from diffusers import DDIMScheduler

    trained = make_scheduler(Generator(zero_terminal_snr=False)).config
    config = {k: v for k, v in trained.items() if not k.startswith("_")} | more
    ours = make_sampler(config, Sampling(sampler="ddim", steps=20))
    theirs: Any = DDIMScheduler.from_config(config)
    theirs.set_timesteps(20)
    x, output = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in theirs.timesteps:
        drawn = [[torch.Generator().manual_seed(i) for i in (1, 2)] for _ in range(2)]
        expected = theirs.step(output, t, x, eta=eta, generator=drawn[0], return_dict=False)[0]
        torch.testing.assert_close(ours.step(output, t, x, eta=eta, generator=drawn[1])[0], expected)
