"""Every shipped experiment loads, says what it is, and asks for what its comments promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.core.config import load_experiment, resolved

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
    assert {"xray/mini.yaml", "xray/gpu.yaml", "skin/mini.yaml", "skin/gpu.yaml"} <= names


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
