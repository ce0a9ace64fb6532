"""A renderer of cheap noise images, with faults on order: for benchmarks of the engine and for chaos tests.

Real in all the engine sees (same protocol, seeds, shapes); only the pixels cost nothing. Must be importable by Ray
workers, so it lives here and not in the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from raysynth.synth.renderer import Row

HELD: list[IO[str]] = []
"""Locks of sick devices, kept until the process ends."""


@dataclass
class FakeRenderer:
    """Noise from each row's seed, brightened by its labels."""

    size: int = 8
    channels: int = 1
    seconds_a_row: float = 0.0
    deadly: tuple[str, ...] = ()
    """Row keys that end the process while they are rendered."""
    broken: tuple[str, ...] = ()
    """Row keys that come out as NaN."""
    raising: tuple[str, ...] = ()
    """Row keys that raise ValueError."""
    breaking: tuple[str, ...] = ()
    """Row keys after which the process renders nothing but errors (a broken CUDA context)."""
    largest: int = 1 << 30
    """A larger micro-batch is out of memory."""
    sick_file: str = ""
    """The first process to create this file is sick for life: every image is NaN at once."""
    sick_device: str = ""
    """File of a sick device: whichever process holds its lock gives NaN, and the next one after its death."""
    flavour: int = 0
    """Another number gives other bytes for the same seeds (a zombie on other hardware)."""
    log: str = ""
    """File that gets one line a rendered row: key and process id."""
    gate: str = ""
    """File without which a process stops after `gate_after` rows and waits: an event where a test would sleep."""
    gate_after: int = 0

    def __post_init__(self) -> None:
        self.sick = self.context_lost = False
        self.rendered = 0
        if self.sick_file:
            try:
                with open(self.sick_file, "x") as f:
                    f.write(str(os.getpid()))
                self.sick = True
            except FileExistsError:
                self.sick = Path(self.sick_file).read_text() == str(os.getpid())

        if self.sick_device:
            held = open(self.sick_device, "a")  # noqa: SIM115 - held for the life of the process
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.sick = True
                HELD.append(held)

    def facts(self) -> dict[str, Any]:
        return {"device": "fake", "flavour": self.flavour}

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        if micro_batch > self.largest:
            raise MemoryError(f"out of memory: micro-batch {micro_batch} > {self.largest}")
        images = np.zeros((micro_batch, self.channels, self.size, self.size), np.float32)
        if self.sick:
            return images * np.nan
        if any(row is not None and row.key in self.breaking for row in rows):
            self.context_lost = True
        if self.context_lost:
            raise RuntimeError("device-side assert triggered")
        if self.gate and self.rendered >= self.gate_after:
            self.wait_at_gate()
        time.sleep(self.seconds_a_row * micro_batch)
        for i, row in enumerate(rows):
            if row is None:
                continue
            if row.key in self.deadly:
                os._exit(1)
            if row.key in self.raising:
                raise ValueError(f"row {row.key} cannot be rendered")
            noise = np.random.Generator(np.random.Philox(row.seed + self.flavour)).standard_normal(images.shape[1:])
            level = sum(v or 0 for k, v in row.columns.items() if k.startswith("label_"))
            images[i] = np.nan if row.key in self.broken else np.tanh(0.3 * noise + 0.1 * level)
        keys = [row.key for row in rows if row is not None and row.key != "canary"]
        self.rendered += len(keys)
        if self.log:
            with open(self.log, "a") as f:
                f.writelines(f"{key} {os.getpid()}\n" for key in keys)
        return images

    def wait_at_gate(self, limit_s: float = 300.0) -> None:
        end = time.monotonic() + limit_s
        while not os.path.exists(self.gate):
            if time.monotonic() > end:
                raise RuntimeError(f"nobody opened the gate {self.gate} within {limit_s:.0f} s")
            time.sleep(0.01)
