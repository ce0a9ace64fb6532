"""Both sides of a benchmark get the same devices, and plain diffusers its own flags."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raysynth.core.experiment import Sampling
from raysynth.synth.ddpm import DDPMRenderer
from raysynth.synth.renderer import Row, noise_seed
from tests.generators import SPEC, exported

BENCH = Path(__file__).parents[2] / "jobs" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.mark.parametrize(("workers", "gpus"), [(1, 1), (2, 1), (2, 2), (3, 2), (2, 4), (5, 2), (7, 3)])
def test_bare_loops_and_workers_share_gpus_alike(bench: Any, workers: int, gpus: int) -> None:
    throughput = bench("throughput")
    found = throughput.devices(workers, gpus)
    share = throughput.gpu_share(workers, gpus)
    assert set(found) <= {f"cuda:{i}" for i in range(gpus)}
    assert max(found.count(device) for device in found) == round(1 / share)
    # Ray gives a worker a part of one GPU only: all of them start.
    assert gpus * math.floor(1 / share + 1e-9) >= workers


def test_without_gpus_everybody_is_on_the_cpu(bench: Any) -> None:
    throughput = bench("throughput")
    assert throughput.devices(2, 0) == ["cpu", "cpu"]
    assert throughput.gpu_share(2, 0) == 1.0


def test_plain_diffusers_runs_under_torchs_own_flags(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = bench("variants")
    monkeypatch.setattr(variants, "DEVICE", "cpu")
    exported(tmp_path)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def flags() -> tuple[bool, bool, bool]:
        return cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32

    plain = variants.Diffusers(str(tmp_path), Sampling(steps=2))
    DDPMRenderer(str(tmp_path), Sampling(steps=2), threads=1)
    ours, seen = flags(), []
    plain.unet.register_forward_hook(lambda *_: seen.append(flags()))
    plain([Row("0", noise_seed(0, "0", 0), {f"label_{c}": int(c == "0") for c in SPEC.classes})])
    assert seen == [(False, True, False)] * 2
    assert flags() == ours == (True, False, False)
