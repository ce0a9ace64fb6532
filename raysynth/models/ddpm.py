"""Training of the conditional pixel-space DDPM: one optimizer step, its random draws, and its whole state.

Loss: w_t || f(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t, c) - target ||^2 (Ho 2020, eq. 14; v: Salimans & Ho 2022),
with the condition c replaced by the null condition now and then (Ho & Salimans 2022).

The noise, timestep, condition dropout and flip of a sample are a pure function of (seed, step, its position in the
global batch), so that any number of processes and accumulation steps gives the gradient of one process. Only the
network's own `dropout` is outside that promise.

Input: uint8 images and condition vectors. Knows nothing of Ray, storage or where images come from.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from raysynth.core.experiment import Generator
from raysynth.models.device import PRECISIONS, deterministic
from raysynth.models.optim import learning_rate, make_ema, make_optimizer
from raysynth.models.schedule import loss_weights, make_scheduler, target
from raysynth.models.unet import build_unet


@dataclass
class Draws:
    """The random part of a batch."""

    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal."""
    timesteps: torch.Tensor
    """(B,) int64 in [0, T)."""
    unconditional: torch.Tensor
    """(B,) bool: the condition is dropped."""
    flip: torch.Tensor
    """(B,) bool: the image is mirrored, where the generator flips."""


def _seed(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def draw(generator: Generator, step: int, positions: Sequence[int] | np.ndarray, channels: int) -> Draws:
    """The random draws of the samples at `positions` of the global batch of `step`, on the CPU."""
    size = generator.size or 0
    noise, timesteps, coins = [], [], []
    for position in positions:
        source = torch.Generator("cpu").manual_seed(_seed(generator.seed, step, int(position)))
        timesteps.append(torch.randint(0, generator.timesteps, (), generator=source))
        coins.append(torch.rand(2, generator=source))
        noise.append(torch.randn(channels, size, size, generator=source))
    coin = torch.stack(coins)
    return Draws(
        torch.stack(noise), torch.stack(timesteps), coin[:, 0] < generator.condition_dropout, coin[:, 1] < 0.5
    )


class DDPMTraining:
    """Network, moving average and optimizer of one training run.

    Args:
        generator: with its preset resolved.
        null: the null condition, (dim,) float32.
        channels: of the images.
        device: torch device; mixed precision is used on CUDA only, a CPU trains in float32.
    """

    def __init__(self, generator: Generator, null: np.ndarray, channels: int, device: str = "cpu") -> None:
        self.generator, self.channels, self.device = generator, channels, torch.device(device)
        deterministic(self.device)
        self.scheduler = make_scheduler(generator)
        self.weights = loss_weights(self.scheduler, generator.prediction, generator.min_snr_gamma)
        self.null = torch.from_numpy(null)
        unet = build_unet(generator, len(null), channels).to(self.device)
        # Channels last is 10 to 25 % faster on a CPU, and what convolutions want on a GPU.
        self.unet: torch.nn.Module = unet.to(memory_format=torch.channels_last)
        # The average is only ever sampled from and exported: without dropout.
        self.ema = make_ema(self.unet, generator.ema_decay).eval()
        self.optimizer = make_optimizer(generator, self.unet.parameters())
        half = PRECISIONS.get(generator.precision) if self.device.type == "cuda" else None
        self.half = half
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)
        self.net: torch.nn.Module = self.unet
        """What is called: the network, or its distributed wrapper."""
        self.step = 0
        """Optimizer steps done."""

    def distribute(self) -> None:
        """Averages gradients over the initialized process group (DDP)."""
        devices = [self.device] if self.device.type == "cuda" else None
        self.net = DistributedDataParallel(
            self.unet, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def loss(
        self, images: np.ndarray, conditions: np.ndarray, positions: Sequence[int] | np.ndarray
    ) -> torch.Tensor:
        """Mean loss of samples of the current step's global batch.

        Args:
            images: (B, H, W, C) uint8.
            conditions: (B, dim) float32.
            positions: (B,) places of the samples in the global batch.
        """
        kind = next(self.unet.parameters()).dtype
        draws = draw(self.generator, self.step, positions, self.channels)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(kind) / 127.5 - 1.0
        if self.generator.flip:
            pixels = torch.where(draws.flip[:, None, None, None], pixels.flip(3), pixels)
        condition = torch.where(draws.unconditional[:, None], self.null, torch.from_numpy(conditions))
        weights, times = self.weights[draws.timesteps].to(self.device, kind), draws.timesteps.to(self.device)
        pixels, noise = pixels.to(self.device), draws.noise.to(self.device, kind)
        condition = condition.to(self.device, kind)
        noisy = self.scheduler.add_noise(pixels, noise, times).to(memory_format=torch.channels_last)
        wanted = target(self.scheduler, self.generator.prediction, pixels, noise, times)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            predicted = self.net(noisy, times, None, class_labels=condition, return_dict=False)[0]
        errors = (predicted.to(kind) - wanted).square().flatten(1).mean(1)
        return (weights * errors).mean()

    def update(
        self, images: np.ndarray, conditions: np.ndarray, positions: np.ndarray, accumulation: int = 1
    ) -> torch.Tensor:
        """One optimizer step on this process's equal share of the global batch.

        Args:
            images: (B, H, W, C) uint8. conditions: (B, dim) float32. positions: (B,) places in the global batch.
            accumulation: equal parts that are put through the network one after the other.

        Returns:
            The mean loss of this share, a scalar on the device.
        """
        loss = self.accumulate(images, conditions, positions, accumulation)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.generator.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.generator, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.unet)
        self.step += 1
        return loss

    def accumulate(
        self, images: np.ndarray, conditions: np.ndarray, positions: np.ndarray, accumulation: int
    ) -> torch.Tensor:
        """Leaves the (scaled) gradient of the global batch in the parameters; arguments as for `update`."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        share = len(positions) // accumulation
        for part in range(accumulation):
            here = slice(part * share, (part + 1) * share)
            last = part + 1 == accumulation
            # Gradients are exchanged once an optimizer step.
            alone: Any = contextlib.nullcontext()
            if isinstance(self.net, DistributedDataParallel) and not last:
                alone = self.net.no_sync()
            with alone, self._dropout_seed(positions[here]):
                loss = self.loss(images[here], conditions[here], positions[here]) / accumulation
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    @contextlib.contextmanager
    def _dropout_seed(self, positions: np.ndarray) -> Iterator[None]:
        # The network's dropout draws from torch's global stream: seeded here, so that a resumed run repeats it.
        if not self.generator.dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_seed(self.generator.seed, self.step, int(positions[0]), "dropout"))
            yield

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain values only."""
        return {
            "unet": self.unet.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "step": self.step,
        }  # fmt: skip

    def save(self, path: str) -> None:
        """Writes the state; `load` reads it."""
        torch.save(self.state(), path)

    def load(self, path: str) -> None:
        """Continues from a saved state."""
        # To the CPU, where AdamW counts its steps: read from the GPU, each count would be waited for at every step.
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
