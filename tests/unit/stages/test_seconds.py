"""The seconds in run.json are a stage's own: what it waited for has an artifact of its own, with seconds of its own."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.schemas import metric_schema, to_parquet
from raysynth.core.storage import open_storage
from raysynth.metrics.distances import Moments
from raysynth.stages import evaluate, fidelity
from raysynth.stages.cluster import Resources
from tests.digits import digit_artifact

E = build_experiment({
    "name": "d", "data": {"kind": "digits"}, "evaluation": {"fidelity": {"extractor": "pixels"}},
})  # fmt: skip
WAIT = 1.0


def waits(result: object = None) -> Any:
    def wait(*_: object) -> object:
        time.sleep(WAIT)
        return result

    return wait


def test_evaluation_does_not_count_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    said = SimpleNamespace(fp="x", path="predictions/x", run_info=lambda: {"counts": {"judged": 1}})
    trial: Any = SimpleNamespace(arm="real", seed=0, classifier=said)
    for name, does in {
        "open_test_sets": lambda *_: [SimpleNamespace(name="test", ids=[], seen=0)],
        "require_one_test_split": lambda *_: None, "predictions_artifact": lambda *_: said, "predict_missing": waits(),
        "_judged": lambda *_: [metric_schema().empty_table()], "compare_arms": lambda *_: pd.DataFrame(),
    }.items():  # fmt: skip
        monkeypatch.setattr(evaluate, name, does)
    done = evaluate.evaluate(E, storage, None, [trial])  # type: ignore[arg-type]
    assert done.run_info()["seconds"] < WAIT


def test_fidelity_does_not_count_views_and_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    images = digit_artifact(storage, 60)
    generated = Artifact.at(storage, "generate", "d", 1, {}, {})
    generated.commit({}, synthetic_set="synthetic-sets/d-0")
    storage.put("synthetic-sets/d-0/set.json", b'{"generator_id": "g"}')
    ids = [f"s{i}" for i in range(30)]
    labels = {f"label_{c}": pa.array([int(i % 10 == c) for i in range(30)], pa.int8()) for c in range(10)}
    index = pa.table({"image_id": ids, "source_image_id": ids} | labels)
    storage.put("view/synthetic/index.parquet", to_parquet(index))
    features = np.random.default_rng(0).random((12, 4))
    side = (Moments.of(features), features)
    monkeypatch.setattr(fidelity, "build_view", lambda *_: SimpleNamespace(path="view/real"))
    view = SimpleNamespace(path="view/synthetic", file=lambda name: f"view/synthetic/{name}")
    monkeypatch.setattr(fidelity, "build_synthetic_view", waits(view))
    monkeypatch.setattr(fidelity, "_extract", lambda *_: ([side] * 3, "pixels", "", 0.0))
    monkeypatch.setattr(fidelity, "compare", lambda *_: [])
    run = fidelity.fidelity(E, storage, images, generated, Resources(cpus=2, gpus=0, nodes=1)).run_info()
    assert (run["seconds"] < WAIT, run["views"]) == (True, ["view/real", "view/real", "view/synthetic"])
