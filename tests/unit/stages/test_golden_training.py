"""Outputs under today's stage versions: other numbers without another version would reuse old artifacts silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import open_storage
from raysynth.data.images import encode_png
from raysynth.models.ddpm import DDPMTraining
from raysynth.stages import train_generator, views
from tests.digits import digit_images
from tests.generators import BATCH, NULL, batch, small

BUMP = "Bump the stage's version, then write the new numbers down here."

VIEW: dict[int, dict[tuple[int, str], str]] = {
    2: {(8, "pad"): "78913538409b3fae", (20, "pad"): "9779c100cee8eea2", (5, "crop"): "c14b1ae3f08a27a8"},
}
"""Stage version -> (size, fit) -> first digits of the pixels' sha256."""
LOSSES: dict[int, dict[tuple[str, str], list[float]]] = {
    2: {
        ("v", "cosine"): [0.9030, 0.7205, 0.7827], ("v", "linear"): [0.5885, 0.6816, 0.6575],
        ("epsilon", "sigmoid"): [0.6515, 0.8438, 0.8712],
    },
}  # fmt: skip
"""Stage version -> (prediction, schedule) -> loss of the first steps."""


@pytest.mark.parametrize(("size", "fit"), [(8, "pad"), (20, "pad"), (5, "crop")])
def test_pixels_of_a_view(size: int, fit: str, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    images = [image[:, :6] for image in digit_images()[0][:3]]
    rows = [{"image": {"bytes": encode_png(image), "path": None}} for image in images]
    storage.put("part.parquet", to_parquet(pa.Table.from_pylist(rows)))
    row = {"part": "part.parquet", "rows": [0, 2], "chunk": "c.npy", "size": size, "fit": fit}
    views.write_chunk(row, storage)
    assert sha256_bytes(np.load(tmp_path / "c.npy").tobytes())[:16] == VIEW[views.STAGE_VERSION][size, fit], BUMP


@pytest.mark.parametrize(("prediction", "schedule", "gamma"), [
    ("v", "cosine", None), ("v", "linear", 5.0), ("epsilon", "sigmoid", 5.0),
])  # fmt: skip
def test_losses_of_a_training_run(prediction: str, schedule: str, gamma: float | None) -> None:
    generator = small(
        prediction=prediction, schedule=schedule, min_snr_gamma=gamma, zero_terminal_snr=prediction == "v", timesteps=50
    )
    training = DDPMTraining(generator, NULL, 1)
    losses = [float(training.update(*batch(step), np.arange(BATCH))) for step in range(3)]
    expected = LOSSES[train_generator.STAGE_VERSION][prediction, schedule]
    # Three decimals hold across kinds of CPU.
    np.testing.assert_allclose(losses, expected, atol=2e-3, err_msg=BUMP)
