"""What a set's render.json fixes, whatever the experiment says later; what makes another set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raysynth.core.config import build_experiment
from raysynth.core.experiment import Compute
from raysynth.core.storage import open_storage
from raysynth.stages.generate import fixed, synthetic_set
from raysynth.synth.sets import SyntheticSet

GENERATOR: Any = SimpleNamespace(digest=lambda: "d", run_info=lambda: {"outputs": {"export/condition.json": "d"}})


def test_threads_and_compilation_are_render_jsons(tmp_path: Path) -> None:
    store = SyntheticSet(open_storage(str(tmp_path)), "x", {})
    typed = Compute(render_threads=3, compile=True, micro_batch=4)
    assert fixed(store, typed) == {"threads": 3, "compiled": True}
    facts = {"threads": 2, "compile": False}
    store.create_json("render.json", {"micro_batch": 4, "rows_per_s": 1.0, "facts": facts})
    assert fixed(store, typed) == {"threads": 2, "compiled": False}


def test_a_guidance_interval_makes_another_set_and_compilation_does_not(tmp_path: Path) -> None:
    def fp(sampling: dict[str, Any], compute: dict[str, Any]) -> str:
        e = build_experiment({"name": "x", "data": {"kind": "digits"}, "sampling": sampling, "compute": compute})
        return synthetic_set(e, open_storage(str(tmp_path)), GENERATOR).fp

    guided: dict[str, Any] = {"guidance_scale": 2.0}
    assert fp(guided, {}) == fp(guided, {"compile": True, "micro_batch": 4})
    assert fp(guided, {}) != fp(guided | {"guidance_interval": [0.2, 0.8]}, {})
