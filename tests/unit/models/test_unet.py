"""The network's shape for every preset, without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysynth.core.experiment import Generator, ImageSpec
from raysynth.core.presets import resolve_generator
from raysynth.models.unet import build_unet, unet_config


def resolved(**keys: Any) -> Generator:
    return resolve_generator(Generator(**keys), ImageSpec(size=8))


@pytest.mark.parametrize(("preset", "size", "millions"), [
    ("tiny", 16, (0.5, 1.5)), ("small", 32, (1.5, 4)), ("base", 128, (30, 120)), ("paper", 256, (60, 150)),
])  # fmt: skip
def test_presets_build_with_attention_where_asked(preset: Any, size: int, millions: tuple[float, float]) -> None:
    generator = resolved(preset=preset, size=size)
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel(**unet_config(generator, 22, 1))
    count = sum(p.numel() for p in unet.parameters()) / 1e6
    assert millions[0] < count < millions[1], count
    for level, kind in enumerate(unet.config.down_block_types):
        assert (kind == "AttnDownBlock2D") == (size // 2**level in generator.attention_resolutions)
    for block in unet.down_blocks:
        for attention in getattr(block, "attentions", []):
            assert attention.heads == generator.heads


def test_condition_changes_the_output() -> None:
    unet = build_unet(resolved(base_channels=8, channel_multipliers=[1, 2]), 5, 3)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    told = [unet(x, 3, None, class_labels=torch.eye(5)[i : i + 1]).sample for i in range(2)]
    assert told[0].shape == x.shape
    assert not torch.equal(told[0], told[1])


def test_weights_depend_on_the_seed_alone_and_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    nets = [build_unet(resolved(base_channels=8, seed=s), 5, 1) for s in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    first = [n.conv_in.weight for n in nets]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
