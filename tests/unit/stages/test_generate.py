"""What a set's render.json fixes, whatever the experiment says later; what makes another set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Compute
from raysynth.core.storage import open_storage
from raysynth.stages.generate import conclude, fixed
from raysynth.stages.generate import synthetic_set as set_of
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.engine import render_all, synthetic_set, wanted_rows

GENERATOR: Any = SimpleNamespace(digest=lambda: "d", run_info=lambda: {"outputs": {"export/condition.json": "d"}})


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


def test_a_guidance_interval_makes_another_set_and_compilation_does_not(tmp_path: Path) -> None:
    def fp(sampling: dict[str, Any], compute: dict[str, Any]) -> str:
        e = build_experiment({"name": "x", "data": {"kind": "digits"}, "sampling": sampling, "compute": compute})
        return set_of(e, open_storage(str(tmp_path)), GENERATOR).fp

    guided: dict[str, Any] = {"guidance_scale": 2.0}
    assert fp(guided, {}) == fp(guided, {"compile": True, "micro_batch": 4})
    assert fp(guided, {}) != fp(guided | {"guidance_interval": [0.2, 0.8]}, {})
