"""Renders rows with an exported pixel-space DDPM.

Input: a folder written by `train-generator` (diffusers U-Net, scheduler config, `condition.json`) and rows with a
seed and `label_*` / `attr_*` values. Output: float images in [-1, 1]; the caller looks for faults and rounds to
uint8 once. Knows nothing of shards, storage or training.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysynth.core.experiment import Sampling
from raysynth.data.conditions import ConditionSpec
from raysynth.synth.renderer import Row
from raysynth.synth.samplers import HALF, cast_weights, sample

COMPILE_OPTIONS: dict[str, Any] = {"deterministic": True}
"""No kernel is chosen by timing, so that every process compiles the same arithmetic."""
SHAPES = 32
"""Shapes compiled at most: halvings of the micro-batch, each with and without guidance. Beyond it torch
raises."""
BRIEF_STEPS = 4
"""Sampling steps that tell how speed grows with the micro-batch; all steps cost the same."""


def compile_network(unet: torch.nn.Module, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """The network compiled as one graph a shape; torch raises where it cannot. Threads call `allow_shapes` first."""
    options = COMPILE_OPTIONS if backend == "inductor" else None
    return torch.compile(unet, backend=backend, dynamic=False, fullgraph=True, options=options)


def allow_shapes() -> None:
    """Lets the calling thread compile `SHAPES` shapes: torch's own default is 8, and a value set counts in no other
    thread."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = SHAPES


class DDPMRenderer:
    """One generator on one device. Sets this process's torch threads and determinism flags.

    Args:
        folder: local path of the exported generator.
        sampling: sampler, steps, guidance, precision (half precision on CUDA only; a CPU renders in float32).
        device: torch device.
        threads: torch threads on a CPU.
        compiled: compile the network for the shapes it meets; every new shape costs a compilation.
    """

    def __init__(
        self, folder: str, sampling: Sampling, device: str = "cpu", threads: int = 1, compiled: bool = False
    ) -> None:
        from diffusers import UNet2DConditionModel

        self.sampling, self.device = sampling, torch.device(device)
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        place = Path(folder)
        self.spec = ConditionSpec.from_json((place / "condition.json").read_bytes())
        self.scheduler_config = json.loads((place / "scheduler" / "scheduler_config.json").read_bytes())
        unet: Any = UNet2DConditionModel.from_pretrained(place / "unet", local_files_only=True, use_safetensors=True)
        self.unet = unet.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        half = HALF.get(sampling.precision) if self.device.type == "cuda" else None
        if half:
            cast_weights(self.unet, half)
        self.compiled = compiled
        self.network: Callable[..., Any] = compile_network(self.unet) if compiled else self.unet
        config = self.unet.config
        self.shape = (int(config.in_channels), int(config.sample_size), int(config.sample_size))

    def facts(self) -> dict[str, Any]:
        """What decides bytes besides weights and sampling."""
        import diffusers

        cuda = self.device.type == "cuda"
        return {
            "renderer": "ddpm",
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "dtype": self.sampling.precision if cuda and self.sampling.precision in HALF else "fp32",
            "memory_format": "channels_last",
            "compile": self.compiled,
            "cudnn_deterministic": True,
            "tf32": False,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "cuda": torch.version.cuda if cuda else None,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        """Renders one micro-batch of constant shape.

        A row without columns, and padding, get the null condition; padding starts from zeros instead of noise.

        Args:
            rows: `micro_batch` places; None is padding, whose output means nothing.
            micro_batch: images rendered at once.

        Returns:
            images: (micro_batch, C, H, W) float32 in [-1, 1]; NaN where the network gave NaN.

        Raises:
            DataError: a row asks for what the generator has never seen.
        """
        if len(rows) != micro_batch:
            raise ValueError(f"{len(rows)} rows for a micro-batch of {micro_batch}; pad with None")
        if self.compiled:
            allow_shapes()
        conditions = np.stack([self._condition(row) for row in rows])
        generators = [None if row is None else torch.Generator("cpu").manual_seed(row.seed) for row in rows]
        images = sample(
            self.network, self.scheduler_config, torch.from_numpy(conditions).to(self.device),
            torch.from_numpy(self.spec.null).to(self.device), generators, self.shape, self.sampling,
        )  # fmt: skip
        return images.clamp(-1.0, 1.0).cpu().contiguous().numpy()

    def brief(self) -> DDPMRenderer:
        """The same network with few steps, all of them guided where any is, which needs the most memory."""
        made = copy.copy(self)
        steps = min(self.sampling.steps, BRIEF_STEPS)
        made.sampling = replace(self.sampling, steps=steps, guidance_interval=None)
        return made

    def release_memory(self) -> None:
        """Gives the memory that torch keeps for later back to the GPU."""
        gc.collect()
        if self.device.type == "cuda":
            # A device that is broken, not full, says so at the next micro-batch, where it is judged.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _condition(self, row: Row | None) -> np.ndarray:
        if row is None or not row.columns:
            return self.spec.null
        return self.spec.encode({name: [value] for name, value in row.columns.items()})[0]
