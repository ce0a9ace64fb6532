"""Real data that grow, from ingest to images: only what is new is rendered, and nobody changes sides."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Experiment
from raysynth.core.storage import Storage, open_storage
from raysynth.data.reading import digit_values
from raysynth.stages.cluster import Resources
from raysynth.stages.generate import generate, synthetic_set
from raysynth.stages.ingest import ingest, load_table
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.plan import plan, wanted_rows
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.verify import verify
from tests.engine import images, rendered
from tests.ray.test_generate import trained
from tests.ray.test_ingest import picture

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
CLUSTER = Resources(cpus=4, gpus=0, nodes=1)
TARGETS = digit_values()[1]


def put_digits(root: str, classes: str, each: int) -> None:
    """Class folders with the first `each` digits of each class."""
    for digit in classes:
        of_class = [i for i, t in enumerate(TARGETS) if str(t) == digit][:each]
        for i in of_class:
            open_storage(root).put(f"data/{digit}/{i:04d}.png", picture(i))


def experiment(root: str, generator: Artifact, keep: Artifact | None = None, **sections: Any) -> Experiment:
    split = {"keep": keep.storage.url(keep.path)} if keep else {}
    return build_experiment({
        "name": "grow", "root": f"{root}/runs",
        "data": {"kind": "class_folders", "path": f"{root}/data", "image": {"size": 8, "channels": "grey"},
                 "split": {"patients": "none", **split}},
        "generator": {"path": generator.path}, "plan": {"replicas": 2}, "sampling": {"steps": 3},
        "compute": {"render_workers": 1, "micro_batch": 5, "shard_rows": 20}, **sections,
    })  # fmt: skip


def run(e: Experiment, storage: Storage, generator: Artifact, log: Path) -> tuple[Artifact, Artifact, set[str]]:
    """Ingest, plan and generate: (images, generated, keys rendered)."""
    log.unlink(missing_ok=True)
    ingested = ingest(e, storage)
    planned = plan(e, storage, ingested)
    factory = partial(FakeRenderer, log=str(log))
    return ingested, generate(e, storage, generator, planned, CLUSTER, factory=factory), rendered(log)


def test_grown_data_render_only_what_is_new(any_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_digits(any_root, "01", 12)
    storage, log = open_storage(f"{any_root}/runs"), tmp_path / "log"
    generator = trained(storage, tmp_path / "export")
    e = experiment(any_root, generator)
    first, generated, keys = run(e, storage, generator, log)
    n_train = load_table(storage, first)["split"].to_pylist().count("train")
    store = synthetic_set(e, storage, generator)
    before = images(store)
    assert keys == before.keys()
    assert len(keys) == 2 * n_train
    assert ": first rows" in capsys.readouterr().out

    # Eight more images of the old classes, a new class, and three replicas instead of two.
    put_digits(any_root, "01", 16)
    put_digits(any_root, "2", 12)
    grown = experiment(any_root, generator, first, plan={"replicas": 3})
    second, artifact, new = run(grown, storage, generator, log)
    was = dict(zip(*(load_table(storage, first)[c].to_pylist() for c in ("image_id", "split"))))
    now = dict(zip(*(load_table(storage, second)[c].to_pylist() for c in ("image_id", "split"))))
    assert was.items() <= now.items()
    for digit in "012":
        assert {s for i, s in now.items() if i.startswith(f"{digit}/")} == {"train", "val", "test"}
    added = sum(s == "train" for s in now.values()) - n_train
    assert len(new) == n_train + 3 * added
    assert not new & keys
    after = images(store)
    assert before.items() <= after.items()
    assert artifact.run_info()["this_run"]["ok"] == len(new)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{n_train} more replicas, {3 * added} of {added} new source images; new: 2" in said
    wanted = wanted_rows(grown, storage, plan(grown, storage, second))
    assert verify(store, wanted).clean

    # The first experiment again: other rows of the set are none of its business, and nothing is rendered.
    capsys.readouterr()
    called: list[int] = []
    storage.delete(generated.file("_SUCCESS"))
    planned = plan(grown, storage, second)
    smaller = experiment(any_root, generator, first, plan={"replicas": 3, "n_synth": 10})
    generate(smaller, storage, generator, planned, lambda: called.append(1) or CLUSTER)
    assert called == []  # Ray is not even asked for
    said = " ".join(capsys.readouterr().out.split())
    assert f"the set holds {len(after) - 10} rows that this plan does not want; they stay" in said
    assert "nothing to render" in said


def test_a_complete_experiment_needs_no_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_digits(str(tmp_path), "01", 12)
    storage = open_storage(f"{tmp_path}/runs")
    generator = trained(storage, tmp_path / "export")
    e = experiment(str(tmp_path), generator)
    run(e, storage, generator, tmp_path / "log")
    pipeline = Pipeline(e)
    for stage in ("ingest", "train-generator", "plan", "generate"):
        pipeline.do(stage)
    assert "resources" not in pipeline.__dict__
    assert "generate: generate/grow-" in capsys.readouterr().out
