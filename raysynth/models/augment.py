"""Augmentation of training images and their mixing in pairs, as tensors of a whole batch.

Ranges by modality (rotation in degrees, shift as a share of the side, the rest on [0, 1]; drawn evenly within +-):

    modality  strength  mirror         rotation  scale  shift  brightness  contrast  noise std  erased
    general   standard  never          10        .10    .08    .10         .10       0          never
    general   heavy     never          20        .20    .12    .25         .30       .05        half of the images
    chest     standard  never          10        .10    .05    .10         .10       .02        never
    chest     heavy     never          20        .20    .10    .25         .30       .05        half of the images
    skin      standard  both axes, .5  180       .15    .05    .15         .15       0          never
    skin      heavy     both axes, .5  180       .30    .10    .25         .30       .05        half of the images

Chest films are not mirrored: the heart is on the left. Skin keeps its hue: brightness adds one number to every channel,
contrast scales all by one. Noise is in half of the images. What comes in from outside is black, on skin (which fills
its image) the reflected image. Erasing: a rectangle of 2 to 20 % in mid grey (Zhong 2020, 1708.04896).
Mixing: x' = l x + (1 - l) x2 with l ~ Beta(alpha, alpha) (mixup, Zhang 2018, 1710.09412), or a rectangle of 1 - l of
the other image (CutMix, Yun 2019, 1905.04899), between places 2k and 2k + 1 of the global batch.

Every draw is a pure function of (seed, step, place in the global batch). Knows nothing of networks or labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from raysynth.core.evidence import Classifier


@dataclass(frozen=True)
class Ranges:
    """How far an image is changed; the table of the module says it all at once."""

    mirror: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    """Share of the images that lose a rectangle."""
    padding: str = "zeros"


RANGES: dict[tuple[str, str], Ranges] = {
    ("general", "standard"): Ranges(False, 10, 0.10, 0.08, 0.10, 0.10),
    ("general", "heavy"): Ranges(False, 20, 0.20, 0.12, 0.25, 0.30, 0.05, 0.5),
    ("chest", "standard"): Ranges(False, 10, 0.10, 0.05, 0.10, 0.10, 0.02),
    ("chest", "heavy"): Ranges(False, 20, 0.20, 0.10, 0.25, 0.30, 0.05, 0.5),
    ("skin", "standard"): Ranges(True, 180, 0.15, 0.05, 0.15, 0.15, padding="reflection"),
    ("skin", "heavy"): Ranges(True, 180, 0.30, 0.10, 0.25, 0.30, 0.05, 0.5, padding="reflection"),
}

AUGMENT, MIX, DROPOUT, NOISE, NETWORK, HEAD = range(6)
"""Streams of one step."""
DRAWS = 14


def stream(seed: int, step: int, kind: int) -> np.random.Generator:
    """The random numbers of one kind of a step, for the whole global batch: a sample takes the row of its place."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, kind])))


def augment(
    images: torch.Tensor, classifier: Classifier, modality: str, step: int, positions: np.ndarray
) -> torch.Tensor:
    """Changed copies of images, each by its own draws.

    Args:
        images: (B, C, H, W) float in [0, 1].
        modality: general, chest or skin.
        step: optimizer step.
        positions: (B,) places in the global batch.
    """
    if classifier.augmentation == "none":
        return images
    ranges = RANGES[modality, classifier.augmentation]
    uniform = stream(classifier.seed, step, AUGMENT).random((classifier.batch_size, DRAWS))[positions]
    u = torch.from_numpy(uniform.T.copy()).to(images.device, images.dtype)
    images = _move(images, u, ranges)
    brightness, contrast = ranges.brightness * _even(u[5]), 1 + ranges.contrast * _even(u[6])
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * _column(contrast) + mean + _column(brightness)
    if ranges.noise:
        images = images + ranges.noise * _noise(images, classifier, step, positions, uniform[:, 7] < 0.5)
    if ranges.erase:
        images = torch.where(_rectangle(images, u[9:13]) & _column(u[8] < ranges.erase), 0.5, images)
    return images.clamp(0, 1)


def _even(u: torch.Tensor) -> torch.Tensor:
    return 2 * u - 1


def _column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _move(images: torch.Tensor, u: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    angle = _even(u[0]) * math.radians(ranges.rotation)
    size = 1 + ranges.scale * _even(u[1])
    mirror_x, mirror_y = (torch.where(u[i] < 0.5, -1.0, 1.0) if ranges.mirror else 1.0 for i in (13, 4))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    # One affine map of output to input coordinates in [-1, 1]; images are square.
    theta = torch.stack([
        torch.stack([cos * mirror_x, -sin * mirror_y, 2 * ranges.shift * _even(u[2])], 1),
        torch.stack([sin * mirror_x, cos * mirror_y, 2 * ranges.shift * _even(u[3])], 1),
    ], 1)  # fmt: skip
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode=ranges.padding, align_corners=False)


def _noise(
    images: torch.Tensor, classifier: Classifier, step: int, positions: np.ndarray, noisy: np.ndarray
) -> torch.Tensor:
    keys = stream(classifier.seed, step, NOISE).integers(2**62, size=classifier.batch_size)
    noise, source = torch.zeros_like(images), torch.Generator(images.device)
    for i in np.flatnonzero(noisy).tolist():
        noise[i].normal_(generator=source.manual_seed(int(keys[positions[i]])))
    return noise


def _rectangle(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: a rectangle of 2 to 20 % of the area, its sides within 1:3, anywhere."""
    area, ratio = 0.02 + 0.18 * u[0], torch.exp(_even(u[1]) * math.log(3.0) / 2)
    return _box(images, torch.sqrt(area * ratio), torch.sqrt(area / ratio), u[2], u[3])


def _box(
    images: torch.Tensor, height: torch.Tensor, width: torch.Tensor, y: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Boxes of the given shares of the sides, rounded to pixels; y and x in [0, 1) place them within the image."""
    masks = []
    for side, share, place in ((images.shape[2], height, y), (images.shape[3], width, x)):
        length = (share.clamp(max=1) * side).round()
        start = (place * (side - length + 1)).floor()
        pixel = torch.arange(side, device=images.device)[None]
        masks.append((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))
    return (masks[0][:, :, None] & masks[1][:, None, :])[:, None]


def mix(
    images: torch.Tensor, classifier: Classifier, step: int, positions: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images mixed in pairs by mixup or CutMix, and how much of itself each kept.

    Args:
        images: (B, C, H, W) float.
        positions: (B,) places in the global batch: pairs (2k, 2k + 1) side by side.

    Returns:
        (B, C, H, W) images, and (B,) shares in [0, 1] of an image's own labels, None where nothing is mixed.
    """
    if not (classifier.mixup or classifier.cutmix):
        return images, None
    if len(positions) % 2 or (positions[::2] % 2).any() or (positions[1::2] != positions[::2] + 1).any():
        raise ValueError("with mixup or cutmix a share of the batch holds whole pairs (2k, 2k + 1), side by side")
    source, pairs = stream(classifier.seed, step, MIX), classifier.batch_size // 2
    coins, places = source.random((pairs, 2)), source.random((pairs, 2))
    blend = source.beta(classifier.mixup, classifier.mixup, pairs) if classifier.mixup else np.ones(pairs)
    cut = source.beta(classifier.cutmix, classifier.cutmix, pairs) if classifier.cutmix else np.ones(pairs)
    cuts = coins[:, 1] < 0.5 if classifier.mixup and classifier.cutmix else np.full(pairs, classifier.cutmix > 0)
    mixed = coins[:, 0] < classifier.mix_probability
    mine = positions[::2] // 2

    def each(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values[mine], 2, axis=0)).to(images.device, images.dtype)

    other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    side, place = torch.sqrt(1 - each(np.where(mixed & cuts, cut, 1.0))), each(places)
    box = _box(images, side, side, place[:, 0], place[:, 1]).to(images.dtype)
    kept = each(np.where(mixed & ~cuts, blend, 1.0))
    # Without a box or a blend the other image's share is 0: one formula for all.
    shares = box + (1 - box) * _column(1 - kept) if classifier.cutmix else _column(1 - kept)
    images = images + shares * (other - images)
    return images, 1 - shares.mean((1, 2, 3))


def dropout_mask(classifier: Classifier, width: int, step: int, positions: np.ndarray) -> np.ndarray | None:
    """(B, width) factors of inverted dropout before the last layer: 0 or 1 / (1 - p); None without dropout."""
    if not classifier.dropout:
        return None
    uniform = stream(classifier.seed, step, DROPOUT).random((classifier.batch_size, width), np.float32)[positions]
    return (uniform >= classifier.dropout).astype(np.float32) / np.float32(1 - classifier.dropout)
