"""The denoising network: diffusers' U-Net, conditioned by a vector, without cross-attention.

The condition vector is projected and added to the time embedding (`class_embed_type="projection"`), which plain
diffusers saves and loads. Self-attention sits at the feature-map sides asked for (Dhariwal & Nichol 2105.05233).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from raysynth.core.experiment import Generator


def build_unet(generator: Generator, condition_dim: int, channels: int) -> Any:
    """A `UNet2DConditionModel` with fresh weights, which depend on `generator.seed` alone.

    Args:
        generator: with its preset resolved.
        condition_dim: length of the condition vector.
        channels: 1 for grey, 3 for RGB.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.seed)
        return UNet2DConditionModel(**unet_config(generator, condition_dim, channels))


def unet_config(generator: Generator, condition_dim: int, channels: int) -> dict[str, Any]:
    """The arguments of `UNet2DConditionModel`."""
    size, base = generator.size or 0, generator.base_channels or 0
    multipliers, heads = generator.channel_multipliers or [], generator.heads or 1
    widths = [base * m for m in multipliers]
    attends = [size // 2**level in (generator.attention_resolutions or []) for level in range(len(widths))]
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": generator.res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "attention_head_dim": tuple(w // heads for w in widths),
        "norm_num_groups": math.gcd(base // 4, 32),
        "dropout": generator.dropout,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": condition_dim,
    }
