"""How the micro-batch is measured, on a clock that renderers move: no test waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Sampling
from raysynth.synth import settle as module
from raysynth.synth.ddpm import BRIEF_STEPS, DDPMRenderer
from raysynth.synth.renderer import Row, SickWorker, canary_fault, is_out_of_memory
from raysynth.synth.settle import read_settled, settle
from tests.engine import synthetic_set
from tests.generators import exported


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Timed:
    """A step takes `launch_s` and `row_s` a row, whatever comes out."""

    clock: Clock
    steps: int
    launch_s: float = 0.02
    row_s: float = 1e-4
    largest: int = 1 << 30
    facts_: dict[str, Any] = field(default_factory=dict)
    pixel: float = 0.5
    sizes: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return self.facts_

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        self.sizes.append(micro_batch)
        if micro_batch > self.largest:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        self.clock.now += self.steps * (self.launch_s + self.row_s * micro_batch)
        return np.tile(np.array([[[[0.0, self.pixel]]]], np.float32), (micro_batch, 1, 1, 1))

    def release_memory(self) -> None:
        self.released.append(len(self.sizes))


class Brief(Timed):
    def brief(self) -> Timed:
        return Timed(**vars(replace(self, steps=4, pixel=0.0)) | {"sizes": self.sizes})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_many_steps_do_not_end_the_search_early(clock: Clock, tmp_path: Path) -> None:
    renderer = Brief(clock, steps=1000)
    settled = settle(synthetic_set(str(tmp_path)), renderer, None)
    assert settled.micro_batch == 256
    # As fast as with every step, and no more than one sampling of them all was spent on it.
    real = 1000 * (0.02 + 256 * 1e-4)
    assert settled.rows_per_s == pytest.approx(256 / real, rel=1e-3)
    assert clock.now < real + 2 * module.MEASURE_SECONDS
    # A renderer without a brief form runs out of time at the first sizes.
    assert settle(synthetic_set(str(tmp_path / "b")), Timed(clock, 1000), None).micro_batch < 16


def test_a_gpu_is_tried_with_more(clock: Clock, tmp_path: Path) -> None:
    on_gpu = Brief(clock, 25, facts_={"cuda": "13.2"})
    assert settle(synthetic_set(str(tmp_path)), on_gpu, None).micro_batch == 1024


@pytest.mark.parametrize("library", ["PIL", "pyarrow"])
def test_a_set_is_not_gone_on_with_under_another_encoder(
    library: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = synthetic_set(str(tmp_path))
    settled = settle(store, Timed(clock, 25), 4)
    assert settle(store, Timed(clock, 25), 4) == settled
    monkeypatch.setattr(f"{library}.__version__", "0.1")
    with pytest.raises(EnvironmentFault, match=r"(pillow|pyarrow): '.+' there, '0\.1' here"):
        settle(store, Timed(clock, 25), 4)


def test_a_size_that_does_not_fit_ends_the_search_and_its_memory_is_given_back(clock: Clock, tmp_path: Path) -> None:
    renderer = Brief(clock, 25, largest=100)
    assert settle(synthetic_set(str(tmp_path)), renderer, None).micro_batch == 64
    assert max(renderer.sizes) == 128
    assert renderer.released == [renderer.sizes.index(128) + 1]


def test_health_is_judged_with_every_step(clock: Clock, tmp_path: Path) -> None:
    # The brief form's images are constant in every test here, and nobody minds.
    store = synthetic_set(str(tmp_path))
    for typed in (None, 8):
        with pytest.raises(SickWorker, match="constant"):
            settle(store, Brief(clock, 25, pixel=0.0), typed)
    assert read_settled(store) is None


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
])  # fmt: skip
def test_words_of_memory_that_ran_out(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_words_of_torchs_own_allocator() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_the_generators_brief_form_has_few_steps_and_the_same_network(tmp_path: Path) -> None:
    exported(tmp_path)
    sampling = Sampling(steps=9, guidance_scale=2.0, guidance_interval=[0.9, 1.0])
    made = DDPMRenderer(str(tmp_path), sampling, threads=1)
    brief = made.brief()
    seen: list[int] = []
    made.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    brief.render([None] * 3, 3)
    assert seen == [6] * BRIEF_STEPS
    assert (made.sampling, brief.unet) == (sampling, made.unet)
    assert DDPMRenderer(str(tmp_path), Sampling(steps=2), threads=1).brief().sampling.steps == 2


def test_a_gpus_cached_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path)
    made, calls = DDPMRenderer(str(tmp_path), Sampling(steps=2), threads=1), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    made.release_memory()
    assert calls == []
    whole, made.device = made.render, torch.device("cuda")

    def render(rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        if micro_batch > 2:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        made.device = torch.device("cpu")
        return whole(rows, micro_batch)

    monkeypatch.setattr(made, "render", render)
    assert canary_fault(made, 8) is None
    assert calls == ["empty"] * 2


def test_a_broken_gpu_is_told_by_the_canary_not_by_emptying_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    exported(tmp_path)
    made = DDPMRenderer(str(tmp_path), Sampling(steps=2), threads=1)
    made.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    monkeypatch.setattr(made, "render", broken)
    assert "NOT_INITIALIZED" in (canary_fault(made, 4) or "")
