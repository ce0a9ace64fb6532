"""Training and rendering on a real GPU; skipped, saying so, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysynth.core.experiment import Sampling
from raysynth.models.ddpm import DDPMTraining
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row, canary_fault, is_out_of_memory, noise_seed
from raysynth.synth.samplers import denoise, make_sampler
from tests.generators import BATCH, NULL, SPEC, batch, exported, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]
N = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported generator of a few real steps on digits."""
    place = tmp_path_factory.mktemp("export")
    exported(place)
    return str(place)


def rows() -> list[Row | None]:
    return [
        Row(str(i), noise_seed(0, str(i), 0), {f"label_{c}": int(c == str(i)) for c in SPEC.classes}) for i in range(N)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_steps_are_finite_and_go_on_from_a_saved_state(precision: Any, tmp_path: Path) -> None:
    generator = small(precision=precision, dropout=0.1, lr=1e-3)
    training, resumed = DDPMTraining(generator, NULL, 1, "cuda"), DDPMTraining(generator, NULL, 1, "cuda")
    before = [p.detach().clone() for p in training.unet.parameters()]
    losses = [float(training.update(*batch(step), np.arange(BATCH), 2)) for step in range(4)]
    assert np.isfinite(losses).all()
    assert training.half == {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.unet.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, training.unet.parameters(), strict=True))
    training.save(str(tmp_path / "state.pt"))
    resumed.load(str(tmp_path / "state.pt"))
    one, two = (float(t.update(*batch(4), np.arange(BATCH))) for t in (training, resumed))
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_the_first_loss_is_the_cpus(precision: Any, within: float) -> None:
    on_gpu, on_cpu = (DDPMTraining(small(precision=precision), NULL, 1, device) for device in ("cuda", "cpu"))
    losses = [float(t.loss(*batch(0), np.arange(BATCH))) for t in (on_gpu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=within)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_alone_has_the_bytes_it_has_in_a_batch(folder: str, sampler: Any, precision: Any) -> None:
    sampling = Sampling(sampler=sampler, steps=4, guidance_scale=2.0, precision=precision)
    made = DDPMRenderer(folder, sampling, "cuda")
    assert made.facts()["dtype"] == precision
    assert canary_fault(made, N) is None
    whole = made.render(rows(), N)
    for place, wanted in enumerate(rows()):
        alone: list[Row | None] = [None] * N
        alone[place] = wanted
        assert made.render(alone, N)[place].tobytes() == whole[place].tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_a_row_keeps_its_bytes(folder: str, precision: Any) -> None:
    sampling = Sampling(sampler="ddim", steps=3, guidance_scale=2.0, guidance_interval=[0.0, 0.7], precision=precision)
    made = DDPMRenderer(folder, sampling, "cuda", compiled=True)
    whole = made.render(rows(), N)
    assert made.render([None, None, rows()[2], None], N)[2].tobytes() == whole[2].tobytes()
    plain = DDPMRenderer(folder, sampling, "cuda").render(rows(), N)
    np.testing.assert_allclose(whole, plain, atol=1e-3 if precision == "fp32" else 1e-1)


def test_half_precision_weights_are_cast_once_to_the_bytes_of_autocast(folder: str) -> None:
    half = Sampling(sampler="ddim", steps=3, precision="bf16")
    made, by_autocast = DDPMRenderer(folder, half, "cuda"), DDPMRenderer(folder, Sampling(), "cuda")
    by_autocast.sampling = half
    assert {p.dtype for p in made.unet.parameters()} == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in by_autocast.unet.parameters()} == {torch.float32}
    assert made.render(rows(), N).tobytes() == by_autocast.render(rows(), N).tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_never_waits_between_the_first_step_and_the_last(folder: str, sampler: Any, precision: Any) -> None:
    made = DDPMRenderer(folder, Sampling(sampler=sampler, steps=3, guidance_scale=2.0, precision=precision), "cuda")
    made.render(rows(), N)
    told = torch.zeros((N, SPEC.dim), device="cuda")
    scheduler = make_sampler(made.scheduler_config, made.sampling)
    timesteps, images = scheduler.timesteps.cuda(), torch.randn((N, *made.shape), device="cuda")
    noise = [torch.Generator()] * N
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            denoise(made.unet, scheduler, timesteps, images, told, told[0], noise, made.sampling)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_that_ran_out_is_recognised_and_given_back(folder: str) -> None:
    made, allowed = DDPMRenderer(folder, Sampling(sampler="ddim", steps=1), "cuda"), 64 << 20
    made.render(rows(), N)
    made.release_memory()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(Exception, match=r".") as error:
            made.render([None] * (1 << 14), 1 << 14)
        assert is_out_of_memory(error.value)
        del error
        assert canary_fault(made, 1 << 14) is None
        made.release_memory()
        assert torch.cuda.memory_reserved() < allowed / 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_pixels_are_the_cpus_within_tolerance(folder: str, sampler: Any) -> None:
    sampling = Sampling(sampler=sampler, steps=5)
    on_gpu, on_cpu = (DDPMRenderer(folder, sampling, device).render(rows(), N) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)
