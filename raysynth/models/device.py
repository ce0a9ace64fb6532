"""What training and prediction ask of a GPU's arithmetic: repeatable convolutions, half precision, full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def deterministic(device: torch.device) -> None:
    """On CUDA, convolutions by algorithms that repeat their bits, and that no measurement chooses."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 inside the block, where CUDA would round the factors of convolutions to TF32's ten bits."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
