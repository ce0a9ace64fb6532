"""One optimizer step: its gradient does not depend on how the batch is divided, and a saved run goes on bit by bit."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raysynth.models.ddpm import DDPMTraining, draw
from raysynth.stages.training_loop import sample_grid
from tests.generators import BATCH, NULL, batch, small
from tests.ports import free_port


def gradient(accumulation: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    training = DDPMTraining(small(min_snr_gamma=5.0), NULL, 1)
    training.unet.to(dtype)
    training.step = 3
    training.accumulate(*batch(0), np.arange(BATCH), accumulation)
    return torch.cat([p.grad.flatten() for p in training.unet.parameters() if p.grad is not None])


def one_rank(rank: int, port: int, accumulation: int, out: str) -> None:
    """Half of the global batch in a process group of two; rank 0 writes the gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training = DDPMTraining(small(min_snr_gamma=5.0), NULL, 1)
    training.unet.to(torch.float64)
    training.step = 3
    training.distribute()
    mine = np.arange(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    images, conditions = batch(0)
    training.accumulate(images[mine], conditions[mine], mine, accumulation)
    if rank == 0:
        torch.save(torch.cat([p.grad.flatten() for p in training.unet.parameters() if p.grad is not None]), out)
    dist.destroy_process_group()


def test_two_ranks_that_accumulate_give_the_gradient_of_one_process(tmp_path: Path) -> None:
    port = free_port()
    out = str(tmp_path / "gradient.pt")
    # Forked: a fresh interpreter would spend a quarter of a minute on imports.
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_rank, args=(rank, port, 2, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    torch.testing.assert_close(torch.load(out, weights_only=True), gradient(1), rtol=1e-9, atol=1e-12)


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    torch.testing.assert_close(gradient(4), gradient(1), rtol=1e-9, atol=1e-12)


def test_draws_belong_to_the_place_in_the_global_batch() -> None:
    generator = small()
    whole, part = draw(generator, 5, range(8), 1), draw(generator, 5, [6, 2], 1)
    assert torch.equal(part.noise, whole.noise[[6, 2]])
    assert torch.equal(part.timesteps, whole.timesteps[[6, 2]])
    assert torch.equal(part.unconditional, whole.unconditional[[6, 2]])
    other = draw(generator, 6, range(8), 1)
    assert not torch.equal(other.noise, whole.noise)


def test_draws_have_their_distributions() -> None:
    found = [draw(small(), step, range(64), 1) for step in range(30)]
    noise = torch.cat([d.noise for d in found])
    times = torch.cat([d.timesteps for d in found]).float()
    dropped = torch.cat([d.unconditional for d in found]).float()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float(times.mean()) - 499.5) < 25
    assert times.min() >= 0
    assert times.max() <= 999
    assert abs(float(dropped.mean()) - 0.3) < 0.04


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_saved_run_goes_on_to_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    generator = small(optimizer=optimizer, dropout=0.1, flip=True)
    whole, first, second = (DDPMTraining(generator, NULL, 1) for _ in range(3))
    for step in range(4):
        whole.update(*batch(step), np.arange(BATCH))
    for step in range(2):
        first.update(*batch(step), np.arange(BATCH))
    first.save(str(tmp_path / "state.pt"))
    torch.manual_seed(77)  # nothing may depend on the global stream
    second.load(str(tmp_path / "state.pt"))
    for step in range(2, 4):
        second.update(*batch(step), np.arange(BATCH))
    for key in ("unet", "ema"):
        a, b = whole.state()[key], second.state()[key]
        assert all(torch.equal(a[k], b[k]) for k in a), key


def test_every_condition_dropped_means_the_null_condition_alone() -> None:
    training = DDPMTraining(small(), NULL, 1)
    images, conditions = batch(0)
    nulls = np.repeat(NULL[None], BATCH, axis=0)
    kept = training.loss(images, conditions, np.arange(BATCH)).item()
    assert kept != training.loss(images, nulls, np.arange(BATCH)).item()
    training.generator = small(condition_dropout=0.999999)
    assert training.loss(images, conditions, np.arange(BATCH)).item() == pytest.approx(
        training.loss(images, nulls, np.arange(BATCH)).item()
    )


def test_loss_is_the_formula() -> None:
    training = DDPMTraining(small(condition_dropout=0.0), NULL, 1)
    images, conditions = batch(0)
    draws = draw(training.generator, 0, range(BATCH), 1)
    abar = training.scheduler.alphas_cumprod[draws.timesteps][:, None, None, None]
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * draws.noise
    v = abar.sqrt() * draws.noise - (1 - abar).sqrt() * x0
    with torch.no_grad():
        told = torch.from_numpy(conditions)
        predicted = training.unet(noisy, draws.timesteps, None, class_labels=told).sample  # type: ignore[operator]
        loss = training.loss(images, conditions, np.arange(BATCH))
    torch.testing.assert_close(loss, (predicted - v).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_gradients_are_clipped_to_their_norm(clip: float) -> None:
    training = DDPMTraining(small(grad_clip=clip), NULL, 1)
    training.accumulate(*batch(0), np.arange(BATCH), 1)
    before = float(torch.nn.utils.get_total_norm([p.grad for p in training.unet.parameters() if p.grad is not None]))
    assert 1e-2 < before < 1e3
    training.update(*batch(0), np.arange(BATCH))
    after = float(torch.nn.utils.get_total_norm([p.grad for p in training.unet.parameters() if p.grad is not None]))
    assert after == pytest.approx(min(before, clip), rel=1e-3)


def test_the_moving_average_is_sampled_without_dropout() -> None:
    training = DDPMTraining(small(dropout=0.1), NULL, 1)
    conditions = batch(0)[1][:2]
    assert sample_grid(training, conditions, NULL) == sample_grid(training, conditions, NULL)
    training.update(*batch(0), np.arange(BATCH))
    assert training.unet.training
    assert not any(module.training for module in training.ema.module.modules())


def mixed(dtype: torch.dtype, init_scale: float = 2.0**16, **keys: Any) -> DDPMTraining:
    """A training whose arithmetic is what a GPU's is at that precision; a CPU trains in float32 unless made to."""
    training = DDPMTraining(small(**keys), NULL, 1)
    training.half = dtype
    training.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=dtype is torch.float16)
    return training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_half_keeps_float32_weights_and_goes_on_from_a_saved_state(
    dtype: torch.dtype, tmp_path: Path, own_kernels: None
) -> None:
    training, resumed, full = mixed(dtype, lr=1e-3), mixed(dtype, lr=1e-3), DDPMTraining(small(lr=1e-3), NULL, 1)
    seen: set[torch.dtype] = set()
    convolution = next(m for m in training.unet.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    before = [p.detach().clone() for p in training.unet.parameters()]
    for step in range(3):
        half, whole = (float(t.update(*batch(step), np.arange(BATCH), 2)) for t in (training, full))
        assert half == pytest.approx(whole, rel=5e-2)
    assert seen == {dtype}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.unet.parameters())
    assert all(p.dtype == torch.float32 for p in training.ema.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, training.unet.parameters(), strict=True))
    training.save(str(tmp_path / "state.pt"))
    resumed.load(str(tmp_path / "state.pt"))
    for t in (training, resumed):
        t.update(*batch(3), np.arange(BATCH))
    assert all(torch.equal(a, b) for a, b in zip(training.unet.parameters(), resumed.unet.parameters(), strict=True))


def test_a_step_that_overflows_float16_is_left_out_and_the_next_scaled_less() -> None:
    training = mixed(torch.float16, init_scale=2.0**60)
    before = [p.detach().clone() for p in training.unet.parameters()]
    training.update(*batch(0), np.arange(BATCH))
    assert all(torch.equal(a, b) for a, b in zip(before, training.unet.parameters(), strict=True))
    assert training.scaler.get_scale() == 2.0**59
    assert training.step == 1
