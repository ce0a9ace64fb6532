"""Every shipped experiment loads, says what it is, and asks for what its comments promise."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysynth.core.config import load_experiment, resolved
from raysynth.data.splits import assign_splits
from raysynth.data.subsets import generator_rows

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.glob("*/*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(JOBS)) for f in FILES])
def test_shipped_experiments_load(file: Path) -> None:
    experiment = resolved(load_experiment(str(file)))
    assert file.read_text().startswith("# "), "the first line tells a researcher what it is"
    assert not Path(experiment.data.path).is_absolute()
    assert experiment.data.licence


def test_topics() -> None:
    names = {str(f.relative_to(JOBS)) for f in FILES}
    assert {f"{topic}/{size}.yaml" for topic in ("xray", "skin", "xray_article") for size in ("mini", "gpu")} <= names


def test_the_paper_recipe() -> None:
    """Synthetically Enhanced, arXiv 2311.09402."""
    e = resolved(load_experiment(str(JOBS / "xray/gpu.yaml")))
    g = e.generator
    assert (g.size, g.base_channels, g.channel_multipliers) == (256, 128, [1, 1, 2, 2, 4, 4])
    assert (g.attention_resolutions, g.res_blocks, g.heads) == ([8, 16, 32], 2, 4)
    assert (g.optimizer, g.lr, g.batch_size, g.ema_decay, g.precision) == ("lion", 1e-5, 144, 0.9999, "bf16")
    assert g.batch_size * g.steps >= 40e6
    assert (e.sampling.sampler, e.sampling.steps, e.sampling.guidance_scale) == ("ddim", 200, 1)
    assert e.plan.replicas == 10


def test_skin_on_gpus_leaves_the_generator_images_of_every_diagnosis(shared_data: Path) -> None:
    e = load_experiment(str(JOBS / "skin/gpu.yaml"))
    with open(shared_data / "ham10000" / "metadata.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    lesions = [row["lesion_id"] for row in rows]
    present = np.array([[row["dx"] == c for c in e.data.labels.classes] for row in rows])
    splits = assign_splits(np.array(lesions), lesions, [None] * len(rows), present, e.data.split).split
    labels = {f"label_{c}": present[:, i].astype(np.int8) for i, c in enumerate(e.data.labels.classes)}
    ids = [row["image_id"] for row in rows]
    table = pa.table({"image_id": ids, "patient_id": lesions, "split": list(splits), **labels})
    seen = set(generator_rows(table, e))
    rarest = min(Counter(row["dx"] for row in rows if row["image_id"] in seen).values())
    assert rarest == 37
