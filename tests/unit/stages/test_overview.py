"""`verify` and `--repair` of a set that artifacts were made on. The engine in one process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import GateFailed, NotReady
from raysynth.core.storage import LocalStorage, open_storage
from raysynth.stages import generate
from raysynth.stages.cluster import Resources
from raysynth.stages.overview import verify_set
from raysynth.stages.pipeline import Pipeline
from raysynth.stages.sweep import make_images
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.digits import digit_artifact
from tests.engine import render_all
from tests.unit.stages.test_sweep import experiment, ingested, planned

WRITES = ("delete", "create", "put")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are rendered in this process, in shards of 8 rows."""

    def render(store: SyntheticSet, wanted: Wanted, *_: Any) -> dict[str, float]:
        render_all(store, wanted, FakeRenderer())
        return {}

    monkeypatch.setattr(generate, "render", render)
    monkeypatch.setattr(Pipeline, "resources", Resources(cpus=1, gpus=0, nodes=1))


def pipeline(root: Path, ratio: float = 1) -> Pipeline:
    """As in a new process; ingest, generator and plan are done."""
    e = build_experiment({
        "name": "digits", "root": str(root), "data": {"kind": "digits", "image": {"size": 8, "channels": "grey"}},
        "training_set": {"n_per_class": 2}, "plan": {"replicas": 3, "ratio": ratio},
    })  # fmt: skip
    found = Pipeline(e)
    found.images = digit_artifact(open_storage(e.root))
    if not found.generator.complete:
        found.generator.put("export/condition.json", b"{}")
        found.generator.commit({})
    if not found.plan.complete:
        found.do("plan")
    return found


def rendered(root: Path, ratio: float = 1) -> SyntheticSet:
    p = pipeline(root, ratio)
    p.do("generate")
    verify_set(p, repair=False)
    return p.synthetic_set


def spoil(store: SyntheticSet, *shards: int) -> None:
    for shard in shards:
        marker = store.marker(shard)
        assert marker
        store.storage.put(store.file(marker["part"]), b"rot")


def mended(root: Path, *ratios: float) -> None:
    """Every artifact is made again and its rows are all there."""
    for ratio in ratios:
        pipeline(root, ratio).do("generate")
    for ratio in ratios:
        p = pipeline(root, ratio)
        verify_set(p, repair=False)
        assert p.generated.complete


def killed_at(write: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A repair killed just before its so-many-th write; whether it came so far."""
    p, left = pipeline(root), [write]
    with monkeypatch.context() as patch:
        for name in WRITES:
            plain = getattr(LocalStorage, name)

            def call(self: LocalStorage, *given: Any, plain: Any = plain) -> Any:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return plain(self, *given)

            patch.setattr(LocalStorage, name, call)
        try:
            verify_set(p, repair=True)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("write", range(4))
def test_a_killed_repair_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    rendered(tmp_path)
    store = rendered(tmp_path, 2)
    spoil(store, 0, 1)
    assert killed_at(write, tmp_path, monkeypatch), "two artifacts and two shards are four writes"
    verify_set(pipeline(tmp_path), repair=True)
    assert not pipeline(tmp_path).generated.complete
    mended(tmp_path, 1, 2)
    assert store.void() == {0, 1}


def test_only_artifacts_that_list_what_is_gone_are_unmade(tmp_path: Path) -> None:
    small = rendered(tmp_path)
    shards = small.done()
    store = rendered(tmp_path, 2)
    spoil(store, max(store.done() - shards))
    with pytest.raises(GateFailed, match=r"`--repair`, then `raysynth generate` mends it"):
        verify_set(pipeline(tmp_path, 2), repair=False)
    verify_set(pipeline(tmp_path, 2), repair=True)
    assert pipeline(tmp_path, 1).generated.complete
    assert not pipeline(tmp_path, 2).generated.complete
    mended(tmp_path, 1, 2)


@pytest.mark.parametrize("loss", ["marker", "void"])
def test_a_complete_artifact_of_missing_rows_is_unmade(tmp_path: Path, loss: str) -> None:
    """A marker is lost, or a driver ended its artifact just after a repair."""
    store = rendered(tmp_path)
    if loss == "marker":
        store.storage.delete(store.file("done/00001.json"))
    else:
        store.create_json("void/00001.json", {"why": "rot"})
    with pytest.raises(GateFailed, match=r"`--repair`, then `raysynth generate` mends it"):
        verify_set(pipeline(tmp_path), repair=False)
    verify_set(pipeline(tmp_path), repair=True)
    mended(tmp_path, 1)


def test_rows_that_were_never_rendered_unmake_nothing(tmp_path: Path) -> None:
    rendered(tmp_path)
    for repair in (False, True):
        with pytest.raises(GateFailed, match=r"wants\. `raysynth generate` mends it"):
            verify_set(pipeline(tmp_path, 2), repair)
    assert pipeline(tmp_path, 1).generated.complete
    mended(tmp_path, 1, 2)


def sweep_of(root: Path, arms: dict[str, Any]) -> Pipeline:
    """As in a new process; ingest, generators and plans of all arms are done."""
    found = ingested(experiment(root, arms))
    planned(found)
    return found


def sets_of(sweep: Pipeline) -> dict[str, SyntheticSet]:
    return {arm.name: p.synthetic_set for arm, p in sweep.arm_pipelines}


TWO_SETS = {"x3": {"training_set.ratio": 3}, "x3 guided": {"training_set.ratio": 3, "sampling.guidance_scale": 2},
            "real": {"training_set.strategy": "real"}}  # fmt: skip


def test_every_set_of_a_sweep_is_verified_and_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = sweep_of(tmp_path, TWO_SETS)
    make_images(made.arm_pipelines)
    sets = sets_of(made)
    one, other = sets["x3"], sets["x3 guided"]
    spoil(other, 0, 2)
    capsys.readouterr()
    remedy = r"`--repair`, then `raysynth run` mends it\."
    with pytest.raises(GateFailed, match=rf"^verify: {other.path} is not what the plan wants\. {remedy}$"):
        verify_set(sweep_of(tmp_path, TWO_SETS), repair=False)
    said = capsys.readouterr().out
    assert f"verify: clean, {one.path}" in said
    assert f"{other.path}: 60 wanted: 44 ok, 0 failed, 0 rejected, 16 missing" in said
    assert f"{other.path}: corrupt shard 2: parts/00002-" in said
    spoil(one, 1)
    with pytest.raises(GateFailed, match=rf"{one.path} is not .* {other.path} is not"):
        verify_set(sweep_of(tmp_path, TWO_SETS), repair=False)
    verify_set(sweep_of(tmp_path, TWO_SETS), repair=True)
    assert (one.void(), other.void()) == ({1}, {0, 2})
    make_images(sweep_of(tmp_path, TWO_SETS).arm_pipelines)
    verify_set(sweep_of(tmp_path, TWO_SETS), repair=False)


def test_of_a_sweep_what_its_arms_render_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the whole plan of four replicas, and what is of another plan in the same set too."""
    arms = {"x1": {"training_set.ratio": 1}, "x3": {"training_set.ratio": 3},
            "x5 of five": {"training_set.ratio": 5, "plan.replicas": 5}}  # fmt: skip
    make_images(sweep_of(tmp_path, arms).arm_pipelines)
    capsys.readouterr()
    verify_set(sweep_of(tmp_path, arms), repair=False)
    said = capsys.readouterr().out
    store = sets_of(sweep_of(tmp_path, arms))["x3"]
    assert said.count("verify: clean") == 1
    assert f"{store.path}: 100 wanted: 100 ok" in said
    assert "0 rows of other plans" in said
    with pytest.raises(GateFailed, match=r"wants\. `raysynth run` mends it"):
        verify_set(sweep_of(tmp_path, arms | {"x6": {"training_set.ratio": 6, "plan.replicas": 6}}), repair=False)


def test_images_that_generate_made_for_a_sweeps_file_are_verified(tmp_path: Path) -> None:
    arms = {"x3 guided": TWO_SETS["x3 guided"]}
    made = sweep_of(tmp_path, arms | {"x3": TWO_SETS["x3"]})
    make_images(sweep_of(tmp_path, arms).arm_pipelines)
    made.do("generate")
    verify_set(sweep_of(tmp_path, arms), repair=False)
    spoil(made.synthetic_set, 0)
    with pytest.raises(GateFailed, match=rf"verify: {made.synthetic_set.path} is not"):
        verify_set(sweep_of(tmp_path, arms), repair=False)


def test_arms_whose_images_have_no_name_yet_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(sweep_of(tmp_path, TWO_SETS).arm_pipelines)
    arms = TWO_SETS | {"x3 late": {"training_set.ratio": 3, "generator.seed": 1}}
    capsys.readouterr()
    with pytest.raises(NotReady, match=r"verify: Images of x3 late have no generator or plan yet: `raysynth run`\."):
        verify_set(ingested(experiment(tmp_path, arms)), repair=False)
    assert capsys.readouterr().out.count("verify: clean") == 2
    spoil(sets_of(sweep_of(tmp_path, TWO_SETS))["x3 guided"], 0)
    with pytest.raises(GateFailed, match=r"`raysynth run` mends it\. Images of x3 late have no generator or plan yet"):
        verify_set(ingested(experiment(tmp_path, arms)), repair=False)
    real = {"real": TWO_SETS["real"]}
    verify_set(ingested(experiment(tmp_path / "other", real)), repair=False)
    assert capsys.readouterr().out.endswith("verify: no arm trains on synthetic images\n")
