"""Collects what the stages left into a `ReportData`, and writes the page with its tables.

Input: a pipeline whose `evaluate` is complete. Output: `report/<name>-<fp>/index.html` and one CSV a table. Reads
artifacts only: no number is computed here that a table does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import yaml
from rich.table import Table

from raysynth.core.artifacts import Artifact
from raysynth.core.config import resolved
from raysynth.core.experiment import Compute, Experiment
from raysynth.core.identity import plain
from raysynth.core.progress import console, say
from raysynth.core.schemas import from_parquet
from raysynth.report.costs import behind, cost, provenance
from raysynth.report.data import ReportData
from raysynth.report.downloads import write_tables
from raysynth.report.page import render_page
from raysynth.report.sheet import write_contact_sheet
from raysynth.report.words import count, number

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline
    from raysynth.stages.train_classifier import Trial

STAGE = "report"
STAGE_VERSION = 4


def write_report(pipeline: Pipeline) -> Artifact:
    """Writes page and tables unless they are there. Raises EnvironmentFault if `evaluate` is not complete."""
    evaluated, fidelities = pipeline.evaluated, pipeline.measure_fidelity()
    inputs = {"evaluate": evaluated.digest(), **{f"fidelity {i}": a.digest() for i, a in enumerate(fidelities)}}
    e = pipeline.experiment
    artifact = Artifact.at(pipeline.storage, STAGE, e.name, STAGE_VERSION, {"experiment": shown_of(e)}, inputs)
    if artifact.complete:
        return artifact
    data = gather(pipeline, evaluated, fidelities)
    for name, content in write_tables(data).items():
        artifact.put(name, content)
    artifact.put("index.html", render_page(data).encode())
    artifact.commit({"arms": len(data.arms), "metrics": len(data.metrics)})
    return artifact


def shown_of(e: Experiment) -> Experiment:
    """What the page shows of the experiment itself: all but the place and the resources, which make no other page."""
    return replace(e, root="", compute=Compute(price_per_gpu_hour=e.compute.price_per_gpu_hour))


def gather(pipeline: Pipeline, evaluated: Artifact, fidelities: Sequence[Artifact]) -> ReportData:
    """Everything the page shows."""
    e, trials = pipeline.experiment, pipeline.trials
    facts = [t.facts for t in trials]
    metrics, p = _table(evaluated, "metrics.parquet"), e.evaluation.primary
    rendered = pipeline.rendered
    made = behind(pipeline, evaluated, fidelities)
    return ReportData(
        name=e.name,
        created=datetime.now(UTC).date().isoformat(),
        experiment_yaml=yaml.safe_dump(plain(resolved(e), "experiment"), sort_keys=False),
        metrics=metrics,
        comparisons=_table(evaluated, "comparisons.parquet"),
        confusion=_confusion(pipeline, trials),
        curves=_curves(trials),
        reliability=_reliability(pipeline, trials),
        fidelity=_fidelity(fidelities, rendered),
        cost=cost(made, e.compute.price_per_gpu_hour),
        arms=_arms(pipeline, trials, facts),
        provenance=provenance(made),
        notes=_notes(pipeline, metrics, facts, evaluated.run_info().get("left_out", {})),
        sheets=[(_sheet_words(q), q.storage.get(write_contact_sheet(q))) for q in rendered.values()],
        primary={"arm": p.arm, "against": p.against, "metric": p.metric, "test_set": p.test_set} if p.arm else None,
        confidence=e.evaluation.confidence,
    )


def _table(artifact: Artifact, name: str) -> pd.DataFrame:
    return from_parquet(artifact.storage.get(artifact.file(name))).to_pandas()


def _by_arm(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for t in trials:
        found.setdefault(t.arm, []).append(t)
    return found


def _arms(pipeline: Pipeline, trials: Sequence[Trial], facts: Sequence[dict[str, Any]]) -> pd.DataFrame:
    known = {id(t): f for t, f in zip(trials, facts, strict=True)}
    settings = {arm.name: arm.settings for arm, _ in pipeline.arm_pipelines}
    rows = []
    for name, mine in _by_arm(trials).items():
        first, steps = known[id(mine[0])], [known[id(t)]["gradient_steps"] for t in mine]
        classifier = mine[0].experiment.classifier
        ratio = _repeated(mine[0]) if first["strategy"] == "duplicate" else first["ratio"]
        changes = ", ".join(f"{k} {plain(v, k)}" for k, v in settings.get(name, {}).items())
        rows.append({**{k: v for k, v in first.items() if k != "notes"}, "arm": name, "ratio": ratio,
                     "changes": changes, "seeds": ", ".join(str(t.seed) for t in mine), "gradient_steps": min(steps),
                     "most_steps": max(steps), "step_budget": classifier.steps if classifier else None})  # fmt: skip
    return pd.DataFrame(rows)


def _repeated(trial: Trial) -> float:
    """Copies of its real images that a classifier trained on beside them, per real image."""
    members = from_parquet(trial.classifier.storage.get(trial.classifier.file("members.parquet")), ["id"])["id"]
    return len(members) / pc.count_distinct(members).as_py() - 1


def _confusion(pipeline: Pipeline, trials: Sequence[Trial]) -> dict[str, tuple[np.ndarray, list[str]]]:
    from raysynth.metrics.metric_table import confusion

    found: dict[str, tuple[np.ndarray, list[str]]] = {}
    for trial, predictions, thresholds in _predicted(pipeline, trials):
        name = trial.arm
        counts, names = confusion(predictions, thresholds, pipeline.experiment.data.labels.kind)
        found[name] = (counts + found[name][0] if name in found else counts, names)
    return found


def _predicted(pipeline: Pipeline, trials: Sequence[Trial]) -> list[tuple[Trial, Any, dict[str, float]]]:
    """Every trial with its predictions on the primary test set and its thresholds."""
    from raysynth.stages.predictions import load_predictions, open_test_sets, thresholds_of

    e = pipeline.experiment
    sets = open_test_sets(e, pipeline.storage, pipeline.images)
    primary = next(t for t in sets if t.name == e.evaluation.primary.test_set)
    return [(t, load_predictions(t, primary), thresholds_of(t, e.evaluation)) for t in trials]


def _reliability(pipeline: Pipeline, trials: Sequence[Trial]) -> pd.DataFrame:
    """Each seed by itself: its images, counted once, are what the intervals take as independent."""
    from raysynth.core.schemas import TRUE
    from raysynth.metrics.calibration import reliability

    frames = []
    confidence = pipeline.experiment.evaluation.confidence
    for trial, predictions, _ in _predicted(pipeline, trials):
        for finding in (n.removeprefix(TRUE) for n in predictions.column_names if n.startswith(TRUE)):
            frame = reliability(predictions, finding, confidence=confidence).to_pandas()
            frame = frame.rename(columns={"mean_probability": "predicted"})
            frames.append(frame.assign(arm=trial.arm, seed=trial.seed, finding=finding))
    return pd.concat(frames, ignore_index=True)


def _curves(trials: Sequence[Trial]) -> pd.DataFrame:
    rows = []
    for t in trials:
        text = t.classifier.storage.get(t.classifier.file("log/history.jsonl")).decode()
        for row in map(json.loads, text.splitlines()):
            kept = {k: row[k] for k in ("step", "phase", "loss", "val_loss", "monitor")}
            rows.append({"arm": t.arm, "seed": t.seed, **kept, "val_metric": row["value"]})
    return pd.DataFrame(rows)


def _fidelity(fidelities: Sequence[Artifact], rendered: dict[str, Pipeline]) -> pd.DataFrame:
    if not fidelities:  # extractor: none
        return pd.DataFrame()
    frames = []
    for artifact, p in zip(fidelities, rendered.values(), strict=True):
        frame = _table(artifact, "fidelity.parquet")
        frames.append(frame.assign(generator=_sheet_words(p)))
    return pd.concat(frames, ignore_index=True)


def _sheet_words(p: Pipeline) -> str:
    g, s = p.experiment.generator, p.experiment.sampling
    if g.kind == "external":
        return f"rendered elsewhere, listed in {g.path.rstrip('/').rpartition('/')[2]}"
    counts = p.generator.run_info()["counts"]
    n, steps = (f"{counts[k]:,}" if counts[k] is not None else "unknown" for k in ("n_real_generator", "steps"))
    on = f" ({g.train_on.replace('_', ' ')})" if not g.path else ""
    return (f"{g.kind} trained on {n} real images{on}, {steps} steps; "
            f"{s.sampler}, {s.steps} steps, guidance {s.guidance_scale:g}")  # fmt: skip


def _notes(
    pipeline: Pipeline, metrics: pd.DataFrame, facts: Sequence[dict[str, Any]], left_out: dict[str, dict[str, int]]
) -> list[str]:
    e = pipeline.experiment
    counts = pipeline.images.run_info()["counts"]
    used, quarantined = counts["images"], sum(counts["quarantined"].values())
    notes = [f"Real images: {used:,} used, {quarantined:,} quarantined with a reason. "
             f"Licence: {e.data.licence or 'not given'}."]  # fmt: skip
    least, most = (f(known["n_validation"] for known in facts) for f in (min, max))
    chosen_on = f"{least:,} real validation images"
    if least != most:
        chosen_on = f"{least:,} to {most:,} real validation images an arm"
    notes.append(f"Checkpoints and thresholds were chosen on {chosen_on}, which count as real data used; no test image "
                 "was read for any choice.")  # fmt: skip
    notes += [f"Test set “{name}”: {n:,} images {why} are left out of every metric."
              for why, sets in left_out.items() for name, n in sets.items()]  # fmt: skip
    withheld = metrics[metrics["value"].isna()]
    if len(withheld):
        groups = withheld.drop_duplicates(["finding", "subgroup", "test_set"])
        notes.append(f"{len(groups):,} combinations of finding, subgroup and test set have fewer than "
                     f"{e.evaluation.min_positives} positives or negatives and are withheld.")  # fmt: skip
    notes += list(dict.fromkeys(note for known in facts for note in known.get("notes", [])))
    if "duplicate" in {known["strategy"] for known in facts} and len({known["gradient_steps"] for known in facts}) == 1:
        notes.append("All arms take the same number of optimizer steps: repeating the real images then changes their "
                     "order and little else, and the duplicate arm measures that little.")  # fmt: skip
    return notes


def show_answer(pipeline: Pipeline, report: Artifact) -> None:
    """A small table of the arms, the answer in words, and where page and sheets are."""
    from raysynth.report.answer import answer

    data, p = gather_answer(pipeline, pipeline.evaluated), pipeline.experiment.evaluation.primary
    there = list(dict.fromkeys(data.metrics["metric"]))
    shown = list(dict.fromkeys(m for m in (p.metric, "auroc", "balanced_accuracy", "accuracy") if m in there))[:3]
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{p.test_set}: mean (sd over seeds)")
    for column in ("arm", "real", "synthetic", *shown, "seeds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    whole = data.averages(test_set=p.test_set, subgroup="").set_index(["arm", "metric"])
    for arm, rows in data.metrics.groupby("arm", sort=False):
        found = whole.reindex([(arm, m) for m in shown]).itertuples()
        cells = [number(v.value) + ("" if pd.isna(v.sd) else f" ({number(v.sd)})") for v in found]
        first = rows.iloc[0]
        table.add_row(str(arm), count(first["n_real"]), count(first["n_synth"]), *cells, str(rows["run"].nunique()))
    console.print(table)
    say(answer(data).headline)
    for q in pipeline.rendered.values():
        say(f"contact sheet: {q.storage.url(write_contact_sheet(q))}")
    say(f"report: {report.storage.url(report.file('index.html'))}")


def gather_answer(pipeline: Pipeline, evaluated: Artifact) -> ReportData:
    """Only what the answer in words needs."""
    e, trials = pipeline.experiment, pipeline.trials
    p = e.evaluation.primary
    return ReportData(
        name=e.name, created="", metrics=_table(evaluated, "metrics.parquet"),
        comparisons=_table(evaluated, "comparisons.parquet"),
        arms=_arms(pipeline, trials, [t.facts for t in trials]),
        primary={"arm": p.arm, "against": p.against, "metric": p.metric, "test_set": p.test_set} if p.arm else None,
        confidence=e.evaluation.confidence,
    )  # fmt: skip
