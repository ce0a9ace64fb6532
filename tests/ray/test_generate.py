"""The generate stage: a real exported generator rendered by actors, what the artifact says, and its gates."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import GateFailed
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import synthetic_schema
from raysynth.core.storage import Storage, open_storage
from raysynth.stages.cluster import Resources
from raysynth.stages.generate import generate, make_renderer, synthetic_set
from raysynth.stages.generated import load_index, read_images
from raysynth.stages.plan import plan, wanted_rows
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import verify
from raysynth.synth.wanted import unpack
from tests.digits import CLASSES, digit_artifact
from tests.engine import images
from tests.generators import exported

pytestmark = pytest.mark.ray
CLUSTER = Resources(cpus=4, gpus=0, nodes=1)


def experiment(root: str, cache: Path, **sections: dict) -> Experiment:
    content = {
        "name": "digits", "root": root, "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 2}, "plan": {"replicas": 3}, "sampling": {"steps": 3},
        "compute": {"render_workers": 1, "micro_batch": 5, "shard_rows": 10, "cache": str(cache)},
    }  # fmt: skip
    for section, keys in sections.items():
        content[section] = content[section] | keys
    return build_experiment(content)


def trained(storage: Storage, folder: Path) -> Artifact:
    """A train-generator artifact around a generator of three steps."""
    exported(folder)
    artifact = Artifact.at(storage, "train-generator", "digits", 1, {"steps": 3}, {"images": "x"})
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        artifact.put(f"export/{file.relative_to(folder).as_posix()}", file.read_bytes())
    artifact.commit({"n_real_generator": 8})
    return artifact


def test_a_real_generator_on_s3(ray_session: None, s3_root: str, tmp_path: Path) -> None:
    storage = open_storage(s3_root)
    e = experiment(s3_root, tmp_path / "cache", plan={"ratio": 2})
    generator = trained(storage, tmp_path / "export")
    planned = plan(e, storage, digit_artifact(storage))
    artifact = generate(e, storage, generator, planned, CLUSTER)
    index = load_index(artifact)
    assert len(index) == 40  # 20 real images at ratio 2
    assert index["rank"].tolist() == list(range(40))
    table = pa.concat_tables(read_images(artifact, index))
    schema = synthetic_schema(CLASSES, ["sex"])
    assert table.schema.names == schema.names
    first = table.slice(0, 1).to_pylist()[0]
    assert Image.open(io.BytesIO(first["image"]["bytes"])).size == (8, 8)
    assert (first["sampler"], first["steps"], first["guidance_scale"]) == ("dpm++", 3, 1.0)
    assert first["derived_from_real"] is False
    assert first["generator_id"]
    info = artifact.run_info()
    assert info["counts"] == {"wanted": 40, "ok": 40, "failed": 0, "rejected": 0}
    assert info["render"]["facts"]["device"] == "cpu"

    # A larger ratio is another artifact over the same set: only the new rows are rendered.
    more = experiment(s3_root, tmp_path / "cache")
    before = images(synthetic_set(more, storage, generator))
    grown = generate(more, storage, generator, planned, CLUSTER)
    assert grown.path != artifact.path
    assert grown.run_info()["this_run"]["ok"] == 20
    assert before.items() <= images(synthetic_set(more, storage, generator)).items()
    # One process without Ray renders the first shard to the same pixels.
    store = synthetic_set(more, storage, generator)
    renderer = make_renderer(storage, generator.path, store.identity["generator_id"], more, gpu=False, threads=1)
    from raysynth.synth.shards import ShardRunner

    alone = synthetic_set(more, open_storage(str(tmp_path / "alone")), generator)
    rows = alone.put_rows(store.shard_rows(store.waves()[0], 0))
    wave = alone.add_wave([], [rows], [10], "test")
    assert wave is not None
    ShardRunner(alone, renderer, 5).run(wave, 0)
    assert images(alone).items() <= images(store).items()


def test_gate_then_retry_failed(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(str(tmp_path / "runs"))
    e = experiment(str(tmp_path / "runs"), tmp_path / "cache")
    generator = trained(storage, tmp_path / "export")
    planned = plan(e, storage, digit_artifact(storage))
    wanted = wanted_rows(e, storage, planned)
    bad = tuple(unpack(wanted.keys[:3]).to_pylist())
    broken = partial(FakeRenderer, broken=bad)
    with pytest.raises(GateFailed, match=r"3 of 60 rows failed, allowed 1.00%.*--retry-failed"):
        generate(e, storage, generator, planned, CLUSTER, factory=broken)
    lenient = experiment(str(tmp_path / "runs"), tmp_path / "cache", compute={"max_failed_fraction": 0.1})
    artifact = generate(lenient, storage, generator, planned, CLUSTER, factory=broken)
    assert artifact.run_info()["counts"]["failed"] == 3
    table = storage.url(artifact.file("failed.parquet"))
    assert f"the failed rows, with reasons: {table}\n" in capsys.readouterr().out
    assert set(pd.read_parquet(table)["row_key"]) == set(bad)
    failed = load_index(artifact).query("status == 'failed'")
    assert set(failed["row_key"]) == set(bad)
    assert failed["reason"].str.contains("not finite").all()
    mended = generate(e, storage, generator, planned, CLUSTER, retry_failed=True, factory=FakeRenderer)
    assert mended.run_info()["counts"] == {"wanted": 60, "ok": 60, "failed": 0, "rejected": 0}
    assert verify(synthetic_set(e, storage, generator), wanted).clean
