"""What the page's numbers cost and where they come from: every artifact behind them, each once.

Input: a pipeline whose `evaluate` is complete. Output: the tables `cost` and `provenance` of `ReportData`. Reads
`run.json` and which rows a generate artifact lists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from raysynth.core.artifacts import STAGES, Artifact
from raysynth.core.errors import NotReady
from raysynth.stages.generated import index_tables
from raysynth.stages.predictions import open_test_sets, predictions_artifact
from raysynth.stages.train_classifier import needs_generator
from raysynth.synth.wanted import held_by, pack

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline


@dataclass(frozen=True)
class Made:
    """One artifact behind the page."""

    stage: str
    arm: str
    """Of a classifier, the first that it was trained for; empty for what arms share."""
    artifact: Artifact
    run: dict[str, Any]
    """Its run.json."""


def behind(pipeline: Pipeline, evaluated: Artifact, fidelities: Sequence[Artifact]) -> list[Made]:
    """Every artifact behind the numbers, by stage; views that were deleted since are left out."""
    sets = open_test_sets(pipeline.experiment, pipeline.storage, pipeline.images)
    named = [("", a) for a in (pipeline.images, *(t.images for t in sets), evaluated, *fidelities)]
    for _, p in pipeline.arm_pipelines:
        named.append(("", p.images))
        if needs_generator(p.experiment):
            named.append(("", p.generator))
        if p.experiment.training_set.needs_synthetic:
            named += [("", p.plan), ("", p.generated)]
    for trial in pipeline.trials:
        named.append((trial.arm, trial.classifier))
        named += [("", predictions_artifact(trial, t)) for t in sets]
    found: dict[str, Made] = {}
    for arm, a in named:
        if a.path not in found and a.complete:
            found[a.path] = Made(a.stage, arm, a, a.run_info())
    for made in list(found.values()):
        for path in made.run.get("views", ()):
            with suppress(NotReady):
                view = Artifact.open(pipeline.storage, path)
                found[path] = Made(view.stage, "", view, view.run_info())
    return sorted(found.values(), key=lambda m: STAGES.index(m.stage))


def cost(made: Sequence[Made], price: float | None) -> pd.DataFrame:
    """Seconds, images and price by stage and, for classifiers, arm."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    shares = _shares(made)
    for m in made:
        counts, share = m.run["counts"], shares.get(m.artifact.path, 1.0)
        seconds = m.run.get("train_seconds") or m.run.get("render_seconds") or m.run["seconds"]
        images = {"ingest": counts.get("images"), "generate": counts.get("ok")}.get(m.stage)
        empty = {"stage": m.stage, "arm": m.arm, "seconds": 0.0, "images": 0, "gpu_seconds": 0.0}
        row = rows.setdefault((m.stage, m.arm), empty)
        row["seconds"] += seconds * share
        row["images"] += round((images or 0) * share)
        row["gpu_seconds"] += (m.run["gpu_seconds"] or 0.0) * share
    for row in rows.values():
        row["images_per_s"] = row["images"] / row["seconds"] if row["images"] and row["seconds"] else None
        row["images"] = row["images"] or None
        row["cost"] = row["gpu_seconds"] / 3600 * price if price is not None else None
    return pd.DataFrame(rows.values())


def _shares(made: Sequence[Made]) -> dict[str, float]:
    """Folder of each generate artifact -> the share of its rows that no larger one of the same set has: a row that
    several plans want was rendered once."""
    known: dict[str, np.ndarray] = {}
    shares = {}
    generated = [m for m in made if m.stage == "generate"]
    for m in sorted(generated, key=lambda m: m.run["counts"]["wanted"], reverse=True):
        keys = pack(pa.concat_tables(index_tables(m.artifact, ["row_key"]))["row_key"])
        earlier = known.get(m.run["synthetic_set"], keys[:0])
        shares[m.artifact.path] = float((~held_by(keys, earlier)).sum() / max(1, len(keys)))
        known[m.run["synthetic_set"]] = np.union1d(earlier, keys)
    return shares


def provenance(made: Sequence[Made]) -> pd.DataFrame:
    """Folder, digest, commit, versions and seconds of each artifact."""
    return pd.DataFrame([
        {"stage": m.stage, "folder": m.artifact.path, "digest": m.run["digest"], "git commit": m.run["git"]["commit"],
         "dirty": m.run["git"]["dirty"], "versions": json.dumps(m.run["versions"]), "seconds": m.run["seconds"]}
        for m in made
    ])  # fmt: skip
