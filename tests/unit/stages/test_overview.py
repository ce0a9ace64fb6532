"""`verify` and `--repair` of a set that artifacts were made on. The engine in one process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import GateFailed
from raysynth.core.storage import LocalStorage, open_storage
from raysynth.stages import generate
from raysynth.stages.cluster import Resources
from raysynth.stages.overview import verify_set
from raysynth.stages.pipeline import Pipeline
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.digits import digit_artifact
from tests.engine import render_all

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
