"""What a set's render.json fixes, whatever the experiment says later; what makes another set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment, vary
from raysynth.core.experiment import Compute
from raysynth.core.storage import Storage, open_storage
from raysynth.stages import generate
from raysynth.stages.generate import conclude, fixed, generator_id
from raysynth.stages.generate import synthetic_set as set_of
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.renderer import RENDER_VERSION
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.engine import render_all, synthetic_set, wanted_rows

GENERATOR: Any = SimpleNamespace(digest=lambda: "d", run_info=lambda: {"outputs": {"export/condition.json": "d"}})
DIGITS: dict[str, Any] = {
    "name": "x", "data": {"kind": "digits"}, "sampling": {"sampler": "ddim", "guidance_scale": 2.0},
}  # fmt: skip


def test_threads_and_compilation_are_render_jsons(tmp_path: Path) -> None:
    store = SyntheticSet(open_storage(str(tmp_path)), "x", {})
    typed = Compute(render_threads=3, compile=True, micro_batch=4)
    assert fixed(store, typed) == {"threads": 3, "compiled": True}
    facts = {"threads": 2, "compile": False}
    store.create_json("render.json", {"micro_batch": 4, "rows_per_s": 1.0, "facts": facts})
    assert fixed(store, typed) == {"threads": 2, "compiled": False}


def test_an_artifact_costs_its_rows_share_of_the_shards(tmp_path: Path) -> None:
    store, rows = synthetic_set(str(tmp_path)), wanted_rows()
    render_all(store, rows, FakeRenderer(seconds_a_row=0.01))
    store.create_json("render.json", {"micro_batch": 4, "rows_per_s": 1.0, "facts": {"cuda": "12.8"}})
    seconds = [store.marker(s)["render_seconds"] for s in range(5)]  # type: ignore[index]
    some = Wanted(rows.keys[6:10], rows.ranks[6:10], lambda: [table.slice(6, 4) for table in rows.read()])
    artifact = Artifact.at(store.storage, "generate", "t", 1, {}, {})
    compute = Compute(gpus_per_renderer=0.5, price_per_gpu_hour=3600.0)
    run = conclude(artifact, Ledger(store), some, artifact, compute, {}).run_info()
    share = (seconds[0] * 2 + seconds[1] * 2) / 8
    assert run["render_seconds"] == pytest.approx(share, abs=1e-3)
    assert run["gpu_seconds"] == pytest.approx(share / 2, abs=1e-3)
    assert run["cost"] == pytest.approx(share / 2, abs=1e-3)


EXPORT = (
    "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json", "condition.json",
    "README.md",
)  # fmt: skip


def exported(storage: Storage, changed: str = "") -> Artifact:
    """A generator's artifact; one byte of its file `changed` is another."""
    artifact = Artifact.at(storage, "train-generator", "g", 1, {"changed": changed}, {})
    for name in EXPORT:
        artifact.put(f"export/{name}", name.encode() + (b"2" if name == changed else b"1"))
    artifact.commit({})
    return artifact


@pytest.mark.parametrize("changed", EXPORT)
def test_one_byte_of_what_renders_makes_another_set(tmp_path: Path, changed: str) -> None:
    storage, e = open_storage(str(tmp_path)), build_experiment(DIGITS)
    one, two = exported(storage), exported(storage, changed)
    same = changed == "README.md"
    assert (generator_id(one) == generator_id(two)) == same
    assert (set_of(e, storage, one).path == set_of(e, storage, two).path) == same


@pytest.mark.parametrize("change", [
    {"sampling.sampler": "dpm++"}, {"sampling.steps": 26}, {"sampling.guidance_scale": 2.5},
    {"sampling.guidance_rescale": 0.7}, {"sampling.guidance_interval": [0.2, 0.8]}, {"sampling.eta": 0.5},
    {"sampling.precision": "bf16"}, {"plan.seed": 1},
], ids=str)  # fmt: skip
def test_what_makes_pixels_makes_another_set(tmp_path: Path, change: dict[str, Any]) -> None:
    e, storage = build_experiment(DIGITS), open_storage(str(tmp_path))
    assert set_of(vary(e, change), storage, GENERATOR).path != set_of(e, storage, GENERATOR).path


def test_another_render_version_makes_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e, storage = build_experiment(DIGITS), open_storage(str(tmp_path))
    before = set_of(e, storage, GENERATOR).path
    monkeypatch.setattr(generate, "RENDER_VERSION", RENDER_VERSION + 1)
    assert set_of(e, storage, GENERATOR).path != before


def test_how_and_how_many_are_rendered_makes_no_other_set(tmp_path: Path) -> None:
    e, storage = build_experiment(DIGITS), open_storage(str(tmp_path))
    other = vary(e, {
        "compute": {
            "render_workers": 3, "max_render_workers": 5, "micro_batch": 4, "shard_rows": 7, "shard_seconds": 9.0,
            "render_threads": 3, "compile": True, "gpus_per_renderer": 0.5,
        },
        "plan.replicas": 7,
    })  # fmt: skip
    assert set_of(other, storage, GENERATOR).path == set_of(e, storage, GENERATOR).path
