"""What the process that holds the device is told before it makes its renderer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raysynth.core.config import build_experiment
from raysynth.core.storage import open_storage
from raysynth.stages import generate
from raysynth.synth import ddpm


@pytest.mark.parametrize(("share", "gpu", "told"), [(0.5, True, [0.475]), (1.0, True, []), (0.5, False, [])])
def test_renderers_of_one_gpu_share_its_memory(
    share: float, gpu: bool, told: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", order.append)
    monkeypatch.setattr(ddpm, "DDPMRenderer", lambda folder, sampling, device, *_: order.append(device))
    monkeypatch.setattr(generate, "local_folder", lambda *_: tmp_path)
    e = build_experiment({"name": "x", "data": {"kind": "digits"}, "compute": {"gpus_per_renderer": share}})
    generate.make_renderer(open_storage(str(tmp_path)), "g", "v", e, gpu, threads=1)
    assert order == [*told, "cuda" if gpu else "cpu"]
