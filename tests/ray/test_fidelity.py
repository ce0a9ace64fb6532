"""The fidelity stage: a rendered set on S3 against held-out digits, and when it is measured again."""

from __future__ import annotations

import io
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import open_storage
from raysynth.metrics.distances import Gaussian, frechet_distance
from raysynth.metrics.features import pixel_features
from raysynth.stages import fidelity as stage
from raysynth.stages.fidelity import fidelity, fidelity_artifact
from raysynth.stages.generate import generate
from raysynth.stages.plan import plan
from raysynth.stages.views import build_synthetic_view, build_view, open_view
from tests.digits import CLASSES, digit_artifact
from tests.ray.test_generate import CLUSTER, experiment, trained

pytestmark = pytest.mark.ray


def asked(root: str, cache: Path, **keys: Any) -> Experiment:
    e = experiment(root, cache)
    wanted = replace(e.evaluation.fidelity, **keys)
    return replace(e, evaluation=replace(e.evaluation, bootstraps=100, min_positives=4, fidelity=wanted))


@pytest.fixture(scope="module")
def rendered(ray_session: None, s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Storage, its root, cache, and 200 digits with 60 synthetic ones of a generator of three steps."""
    import s3fs

    folder = tmp_path_factory.mktemp("fidelity")
    bucket = f"b{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir(bucket)
    root = f"s3://{bucket}/runs"
    storage = open_storage(root)
    images = digit_artifact(storage, n=200)
    e = experiment(root, folder / "cache")
    generated = generate(e, storage, trained(storage, folder / "export"), plan(e, storage, images), CLUSTER)
    return storage, root, folder / "cache", images, generated


def test_the_table_is_that_of_the_images(rendered: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, root, cache, images, generated = rendered
    monkeypatch.setattr(stage, "PIECE", 16)  # several tasks a side
    e = asked(root, cache)
    artifact = fidelity(e, storage, images, generated, CLUSTER)
    table = from_parquet(storage.get(artifact.file("fidelity.parquet")))
    assert set(table["class"].to_pylist()) == {"all", *CLASSES}
    assert set(table["extractor"].to_pylist()) == {"pixels"}
    assert table["generator_id"].unique().to_pylist() == [generated.identity["config"]["set"]["generator_id"]]
    assert generated.run_info()["synthetic_set"].endswith(table["synthetic_set"][0].as_py())
    whole = {r["metric"]: r for r in table.to_pylist() if r["class"] == "all"}
    # 50 test images; the same numbers, without Ray and from whole views.
    assert whole["frechet"]["n_real"] == whole["frechet"]["n_synth"] == 50
    index = from_parquet(storage.get(images.file("table.parquet")))
    test = index.filter(pc.equal(index["split"], "test"))["image_id"].to_pylist()
    held_out = open_view(build_view(e, storage, images, 8, test), str(cache))
    synthetic = open_view(build_synthetic_view(e, storage, generated, 8), str(cache))
    chosen = stage._chosen(synthetic.index, 50, {})["image_id"].to_pylist()
    x, y = (pixel_features(v.images(v.positions(ids))) for v, ids in ((held_out, test), (synthetic, chosen)))
    expected = frechet_distance(Gaussian.of(x), Gaussian.of(y))
    assert whole["frechet"]["value"] == pytest.approx(expected, rel=1e-9)
    # A generator of three steps makes noise.
    assert whole["frechet"]["ratio"] > 3
    assert whole["kernel"]["ci_low"] > 0
    assert whole["real_vs_synthetic_auroc"]["value"] > 0.9
    assert whole["real_vs_synthetic_auroc"]["floor"] == pytest.approx(0.5, abs=0.2)
    withheld = table.filter(pc.is_null(table["value"]))
    assert all("withheld" in note for note in withheld["note"].to_pylist())
    csv = pd.read_csv(io.BytesIO(storage.get(artifact.file("fidelity.csv"))))
    assert list(csv.columns) == table.column_names
    assert np.allclose(csv["value"], table["value"].to_numpy(), equal_nan=True)
    info = artifact.run_info()
    assert info["extractor"] == "pixels"
    assert set(info["inputs"]) == {"images", "generated"}


def test_images_of_a_side_and_no_classes(rendered: tuple) -> None:
    storage, root, cache, images, generated = rendered
    artifact = fidelity(asked(root, cache, images=20, classes=False), storage, images, generated, CLUSTER)
    table = from_parquet(storage.get(artifact.file("fidelity.parquet"))).to_pylist()
    assert [(r["class"], r["n_real"], r["n_synth"]) for r in table] == [("all", 20, 20)] * 3
    started = artifact.run_info()["seconds"]
    again = fidelity(asked(root, cache, images=20, classes=False), storage, images, generated, CLUSTER)
    assert again.run_info()["seconds"] == started, "returned at once"


def test_what_is_measured_again(rendered: tuple) -> None:
    storage, root, cache, images, generated = rendered

    def path(e: Experiment, real: Artifact = images) -> str:
        return fidelity_artifact(e, storage, real, generated).path

    base = asked(root, cache)
    assert path(base) == path(replace(base, compute=replace(base.compute, train_threads=1)))
    assert path(base) == path(replace(base, sampling=replace(base.sampling, steps=9))), "the images say it"
    changed = [
        asked(root, cache, extractor="inception"), asked(root, cache, images=20), asked(root, cache, classes=False),
        replace(base, evaluation=replace(base.evaluation, bootstraps=101)),
    ]  # fmt: skip
    others = [path(e) for e in changed] + [path(base, digit_artifact(storage, n=100))]
    assert len({path(base), *others}) == len(others) + 1


def test_a_fault_in_a_worker_arrives_in_words(rendered: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, root, cache, images, generated = rendered

    def fails(*_: object) -> None:
        raise ConfigError("evaluation.fidelity.extractor", "timm:x", "the name of a timm model")

    monkeypatch.setattr(stage, "extract_piece", fails)
    with pytest.raises(ConfigError) as caught:
        fidelity(asked(root, cache, images=10), storage, images, generated, CLUSTER)
    assert str(caught.value) == "evaluation.fidelity.extractor: got 'timm:x', must be the name of a timm model."
    with pytest.raises(ConfigError, match="an extractor where"):
        fidelity(asked(root, cache, extractor="none"), storage, images, generated, CLUSTER)
