"""Takes images that were made elsewhere through the engine: a renderer that reads instead of rendering.

Input: rows whose `location` says where the image lies (data.reading); output: the stored picture, by the same decoding
and resizing as real images, so that bytes, resume, verify and everything downstream are those of any synthetic set. An
image that cannot be used is an error of its row, in words. Knows nothing of where the listing came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysynth.core.experiment import Data
from raysynth.core.presets import resolve_image
from raysynth.core.schemas import LOCATION
from raysynth.data.images import decode, to_size
from raysynth.data.reading import ImageReader
from raysynth.synth.renderer import Row


class ImportRenderer:
    """Reads the images of one listing.

    Args:
        data: where the listing is and how its images become pixels.
    """

    def __init__(self, data: Data) -> None:
        self.spec, self.reader = resolve_image(data.image), ImageReader(data)
        self.channels = 3 if self.spec.channels == "rgb" else 1

    def facts(self) -> dict[str, Any]:
        """What decides bytes besides the files."""
        return {"renderer": "import", "device": "cpu"}

    def render(self, rows: Sequence[Row | None], micro_batch: int) -> np.ndarray:
        """Reads one micro-batch; a row without a location (the engine's canary) gives a ramp.

        Args:
            rows: `micro_batch` places; None is padding.

        Returns:
            images: (micro_batch, C, H, W) float32 in [-1, 1], exact for 8 bits.

        Raises:
            BadImage: an image cannot be used.
        """
        size = self.spec.size
        images = np.zeros((micro_batch, self.channels, size, size), np.float32)
        for i, row in enumerate(rows):
            if row is None:
                continue
            location = row.columns.get(LOCATION)
            if location is None:
                images[i] = np.linspace(-1, 1, size, dtype=np.float32)
                continue
            array = to_size(decode(self.reader.read(location), self.spec).array, size, str(self.spec.fit))
            images[i] = array.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0
        return images
