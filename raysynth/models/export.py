"""Writes a trained generator as a folder that plain diffusers loads, with what it was told and what it has seen.

    unet/            UNet2DConditionModel, moving-average weights, safetensors
    scheduler/       DDPMScheduler config with `trained_betas`
    condition.json   layout of the condition vector (raysynth.data.conditions)
    generator.json   training images (digest, count), size, channels, licence, weights' sha256
    README.md        model card with a sampling loop in plain diffusers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raysynth.core.experiment import Generator
from raysynth.core.identity import file_digest
from raysynth.data.conditions import ConditionSpec
from raysynth.models.schedule import make_scheduler
from raysynth.models.unet import build_unet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def export_generator(
    folder: str | Path, generator: Generator, unet: torch.nn.Module, spec: ConditionSpec, facts: dict[str, Any]
) -> dict[str, str]:
    """Writes the exported folder.

    Args:
        generator: with its preset resolved.
        unet: the network whose weights are exported, the moving average.
        facts: what `generator.json` says besides: `n_real_generator`, `train_on`, `images_digest`, `channels`,
            `licence`, `dataset`.

    Returns:
        sha256 of every file written, by its path in the folder.
    """
    place = Path(folder)
    channels = int(facts["channels"])
    plain = build_unet(generator, spec.dim, channels)
    plain.load_state_dict({k: v.detach().cpu().contiguous() for k, v in unet.state_dict().items()})
    plain.save_pretrained(place / "unet", safe_serialization=True)
    make_scheduler(generator).save_pretrained(place / "scheduler")
    (place / "condition.json").write_text(spec.to_json(), encoding="utf-8")
    weights = file_digest(place / WEIGHTS)
    content = {
        **facts, "size": generator.size, "prediction": generator.prediction, "schedule": generator.schedule,
        "timesteps": generator.timesteps, "zero_terminal_snr": generator.zero_terminal_snr, "steps": generator.steps,
        "batch_size": generator.batch_size, "conditions": list(generator.conditions), "weights_sha256": weights,
    }  # fmt: skip
    (place / "generator.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (place / "README.md").write_text(model_card(content, spec), encoding="utf-8")
    files = sorted(p for p in place.rglob("*") if p.is_file())
    return {p.relative_to(place).as_posix(): file_digest(p) for p in files}


LOOP = """\
import json
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

folder = "."
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
entries = json.load(open(f"{folder}/condition.json"))["entries"]
condition = torch.zeros(1, len(entries))
condition[0, entries.index("ENTRY")] = 1.0
scheduler.set_timesteps(50)
x = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator("cpu").manual_seed(0))
for t in scheduler.timesteps:
    with torch.no_grad():
        v = unet(x, t, None, class_labels=condition).sample
    x = scheduler.step(v, t, x).prev_sample
image = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
"""
"""The model card's sampling loop; a test runs it."""


def model_card(facts: dict[str, Any], spec: ConditionSpec) -> str:
    """The exported README.md."""
    loop = LOOP.replace("ENTRY", spec.entries[0]).replace("CHANNELS", str(facts["channels"]))
    loop = loop.replace("SIZE", str(facts["size"]))
    entries = "\n".join(f"| {i} | `{name}` |" for i, name in enumerate(spec.entries))
    return f"""---
library_name: diffusers
license: other
tags: [medical, synthetic, ddpm]
---
# Pixel-space conditional DDPM

{facts["size"]} x {facts["size"]} pixels, {facts["channels"]} channel(s), trained by raysynth for {facts["steps"]}
steps of {facts["batch_size"]} on {facts["n_real_generator"]:,} real images of {facts.get("dataset") or "one data set"}
(`train_on: {facts["train_on"]}`, train split only). {facts["prediction"]}-prediction, {facts["schedule"]} schedule,
T = {facts["timesteps"]}; the weights are the moving average.
Licence of the images: {facts.get("licence") or "not stated"}.
Synthetic images of a model that has seen patients may resemble them: check for copies before any release.

## Condition vector
| entry | meaning |
|---|---|
{entries}

Unknown is an entry of its own; the null condition of classifier-free guidance sets `unconditional` alone.

## Sampling with plain diffusers
```python
{loop}```
"""
