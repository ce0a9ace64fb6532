"""What the engine asks of a renderer, and how a row's noise is named.

A renderer turns a micro-batch of rows into images. It knows nothing of shards, storage or other micro-batches. The
engine holds it to two promises: a row's result does not depend on the other rows of the micro-batch, and the same
micro-batch gives the same pixels wherever `facts()` are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import PIL
import pyarrow as pa

RENDER_VERSION = 2
"""Bumped when the same weights, rows and settings would give other pixels; part of a synthetic set's identity."""


def noise_seed(plan_seed: int, row_key: str, attempt: int) -> int:
    """Seed of a row's own random generator, 56 bits.

    A pure function of the plan's seed, the row and the attempt: neither guidance nor steps nor batch enter, so that
    arms with another guidance scale share noise and a row alone has the noise it has in a batch.
    """
    text = f"{plan_seed}:{row_key}:{attempt}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Row:
    """One image to render: its key, its noise seed, and the plan's `label_*` and `attr_*` values."""

    key: str
    seed: int
    columns: dict[str, Any] = field(default_factory=dict)


class Renderer(Protocol):
    """Renders micro-batches on one device.

    It may also have `brief()`, a renderer of the same micro-batches that is quicker and speeds up alike as they grow,
    and `release_memory()`, called after it ran out.
    """

    def facts(self) -> dict[str, Any]:
        """What decides pixels besides the set's identity: device, threads, precision, flags, library versions."""

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        """Renders one micro-batch of constant shape.

        Args:
            rows: `micro_batch` places; None is padding, whose output is ignored.
            micro_batch: images rendered at once.

        Returns:
            images: (micro_batch, C, H, W) float32 in [-1, 1]; not finite where rendering went wrong.
        """


def facts_of(renderer: Renderer) -> dict[str, Any]:
    """What decides a part's bytes besides the set's identity: the renderer's facts, and what encodes pictures and
    tables."""
    return {**renderer.facts(), "pillow": PIL.__version__, "pyarrow": pa.__version__}


def to_uint8(image: np.ndarray) -> np.ndarray:
    """(C, H, W) float in [-1, 1] -> (H, W, C) uint8, rounded once, clipped."""
    return np.floor((np.clip(image, -1.0, 1.0) + 1.0) * 127.5 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def fault_in(image: np.ndarray) -> str | None:
    """Why an image (C, H, W) cannot be one, or None."""
    if not np.isfinite(image).all():
        return "pixels are not finite"
    if image.size > 1 and float(image.max()) == float(image.min()):
        return "image is constant"
    return None


class SickWorker(Exception):
    """The canary failed: this process must not judge rows."""


CANARY = Row(key="canary", seed=noise_seed(0, "canary", 0))


def canary_fault(renderer: Renderer, micro_batch: int) -> str | None:
    """Renders one unconditional row, in a smaller micro-batch where memory is short. Why this renderer is unfit for
    work, or None."""
    while True:
        try:
            return fault_in(renderer.render([CANARY] + [None] * (micro_batch - 1), micro_batch)[0])
        except Exception as error:  # noqa: BLE001 - any error here means the worker is sick
            if not is_out_of_memory(error) or micro_batch == 1:
                return f"{type(error).__name__}: {error}"
            micro_batch //= 2
        release_memory(renderer)


def release_memory(renderer: Renderer) -> None:
    """Lets the renderer drop cached memory after it ran out; call it outside the except clause, whose traceback keeps
    the failed batch's tensors alive."""
    release = getattr(renderer, "release_memory", None)
    if release:
        release()


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on a CPU
    "alloc_failed", "allocation_failed",  # status codes of cuBLAS and cuDNN
    "cublas_status_not_initialized",  # cuBLAS found no room for its handle
    "unable to find an engine",  # cuDNN: no algorithm's workspace fits
)  # fmt: skip
"""What messages of memory that ran out have in them, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch may help. Some of the messages have other causes too; then size 1 fails as well."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)
