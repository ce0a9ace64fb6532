"""A set rendered elsewhere, from its listing to the report, on real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.core.config import build_experiment
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import open_storage
from raysynth.report import write_contact_sheet, write_report
from raysynth.stages.generated import load_index
from raysynth.stages.overview import show_dry_run, verify_set
from raysynth.stages.pipeline import Pipeline, stages_of
from raysynth.stages.status import show_status
from tests.rendered_elsewhere import as_csv

pytestmark = pytest.mark.ray


def test_a_sweep_over_an_imported_set(
    ray_session: None, s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_csv(s3_root)
    open_storage(s3_root).put("pics/07.png", b"no image")
    e = build_experiment({
        "name": "ext", "root": f"{s3_root}/runs", "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 3}, "sampling": {"steps": 7},
        "generator": {"kind": "external", "path": path,
                      "columns": {"label": "digit", "guidance": "cfg", "seed": "noise", "prompt": "text"}},
        "classifier": {"architecture": "test_resnet", "steps": 60, "batch_size": 16, "validate_every": 30},
        "sweep": {"arms": {"real": {"training_set.strategy": "real"}, "mix": {"training_set.strategy": "mix"}}},
        "evaluation": {"bootstraps": 100},
        "compute": {"cache": str(tmp_path), "render_workers": 2, "shard_rows": 10, "max_failed_fraction": 0.05},
    })  # fmt: skip
    pipeline = Pipeline(e)
    show_dry_run(pipeline)
    for stage in stages_of(e):
        pipeline.do(stage)
    show_status(pipeline)
    said = " ".join(capsys.readouterr().out.split())
    assert "generate: 39 ok, 1 failed" in said
    mix = {arm.name: p for arm, p in pipeline.arm_pipelines}["mix"]
    failed = load_index(mix.generated).query("status == 'failed'")
    assert failed["reason"].tolist() == ["BadImage: undecodable: no known image format"]
    verify_set(mix, repair=False)
    arms = {t.arm: t.classifier.run_info() for t in pipeline.trials}
    assert arms["mix"]["counts"]["n_synth"] == 39
    assert arms["mix"]["facts"]["n_real_generator"] is None
    assert arms["mix"]["facts"]["n_unseen"] is None
    metrics = from_parquet(pipeline.storage.get(pipeline.evaluated.file("metrics.parquet"))).to_pandas()
    assert set(metrics["arm"]) == {"real", "mix"}
    page = pipeline.storage.get(write_report(pipeline).file("index.html")).decode()
    assert "Which real images the generator saw is not known." in page
    assert "rendered elsewhere, listed in made.csv" in page
    assert pipeline.storage.exists(write_contact_sheet(mix))
