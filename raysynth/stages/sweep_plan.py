"""What a sweep would do, for `--dry-run`: trials, rows to render, hours, cost, and the smallest effect it could show.

Input: the experiment and what is stored. Output: `SweepPlan`, and its lines for a person. Starts no Ray, reads no
pixels, trains nothing. What cannot be known before an earlier stage is done is null and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysynth.core.experiment import Compute, Experiment
from raysynth.core.presets import resolve_classifier
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage
from raysynth.data.plans import keys_of_selection, plan_rows, plan_sources, select, selected_by, selection
from raysynth.data.predictions import arrays, truth
from raysynth.stages.external import external_plan
from raysynth.stages.ingest import load_table, load_vocabulary
from raysynth.stages.plan import wanted_rows
from raysynth.stages.predictions import external_set, open_test_set
from raysynth.stages.sweep import named_trials, set_key
from raysynth.stages.train_classifier import STAGE as CLASSIFIERS
from raysynth.synth.ledger import Ledger
from raysynth.synth.settle import read_settled
from raysynth.synth.wanted import pack

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline


@dataclass(frozen=True)
class SetWork:
    """One synthetic set: what the arms together want of it, at their largest."""

    sampling: str
    wanted: int
    left: int
    """Rows that are not rendered yet."""
    hours: float | None
    """Of one worker; null before the first worker has measured a rate."""
    cost: float | None


@dataclass(frozen=True)
class Detectable:
    """The smallest true difference of two arms that would probably show, with one seed each."""

    metric: str
    test_set: str
    findings: list[str]
    """Of the macro: those with enough test images."""
    n_pos: list[int]
    n_neg: list[int]
    """Test images with and without each finding."""
    difference: float
    """See metrics.power: before any training, images counted as independent, seeds not counted."""


@dataclass(frozen=True)
class SweepPlan:
    """What is known of a sweep before it runs."""

    trials: int
    """Arms times seeds."""
    done: int | None
    """Of these, trained before; null while it cannot be known."""
    sets: list[SetWork] | None
    """Null before ingest is done."""
    trial_hours: float | None
    """Of training what is left, one trial after the other; null where no such classifier was trained in this root."""
    trial_cost: float | None
    detectable: Detectable | None
    """Null before ingest, or where no finding has enough test images."""

    def lines(self) -> list[str]:
        """For people."""
        done = "not known before their images are made" if self.done is None else f"{self.done} done"
        found = [f"sweep: {self.trials} trials, {done}"]
        if self.sets is None:
            return [*found, "sweep: rows and smallest detectable difference are known once ingest is done"]
        for s in self.sets:
            hours = "no rate is known before the first worker has measured one"
            if s.hours is not None:
                hours = f"{s.hours:.2f} worker hours" + (f", cost {s.cost:,.2f}" if s.cost is not None else "")
            found.append(f"generate: {s.left:,} of {s.wanted:,} rows to render ({s.sampling}); {hours}")
        if self.trial_hours is None:
            found.append("sweep: hours of training are known once a classifier like these has been trained")
        elif self.trial_hours:
            cost = f", cost {self.trial_cost:,.2f}" if self.trial_cost is not None else ""
            found.append(f"sweep: {self.trial_hours:.2f} trial hours of training{cost}")
        d = self.detectable
        if d is not None:
            found.append(
                f"sweep: smallest detectable difference about {d.difference:.3f} in {d.metric} on {d.test_set}, macro "
                f"over {len(d.findings)} finding(s) with {min(d.n_pos):,} to {max(d.n_pos):,} positive images"
            )
        return found


def plan_of_sweep(pipeline: Pipeline, experiment: Experiment) -> SweepPlan:
    """What `sweep` would do with what is stored now."""
    own = pipeline.arm_pipelines
    if not all(p.images.complete for _, p in own):
        return SweepPlan(len(own), None, None, None, None, None)
    trials = named_trials(own)
    done = [t is not None and t.classifier.complete for t in trials]
    left = {t.classifier.path if t else str(i): own[i][0].experiment for i, t in enumerate(trials) if not done[i]}
    hours, cost = _training(list(left.values()), pipeline.storage)
    return SweepPlan(
        len(own), sum(done), _sets([p for _, p in own if p.experiment.training_set.needs_synthetic]), hours, cost,
        detectable(pipeline, experiment),
    )  # fmt: skip


def _sets(needing: Sequence[Pipeline]) -> list[SetWork]:
    rows: dict[str, dict[str, np.ndarray]] = {}
    one: dict[str, Pipeline] = {}
    for p in needing:
        with p.keys():
            key, s = set_key(p), selection(p.experiment)
            one.setdefault(key, p)
            # The same selection of the same plan is read once, not once a seed.
            choice = f"{p.plan.path} {s.ratio} {s.n_synth} {s.quota}"
            if choice not in rows.setdefault(key, {}):
                rows[key][choice] = _wanted(p)
    return [_work(one[key], np.unique(np.concatenate(list(parts.values())))) for key, parts in rows.items()]


def _wanted(p: Pipeline) -> np.ndarray:
    """Packed row keys that an experiment renders; from the plan if it is there, else planned now in memory."""
    e = p.experiment
    if p.plan.complete:
        return wanted_rows(e, p.storage, p.plan).keys
    sources = plan_sources(from_parquet(p.storage.get(p.images.file("table.parquet"))), e)
    rows = external_plan(e, p.storage, p.images) if e.generator.kind == "external" else plan_rows(sources, e)
    with keys_of_selection(selected_by(e)):
        mask = select(rows, sources.num_rows, selection(e), e.data.labels.policy)
    return pack(rows.filter(pa.array(mask))["row_key"])


def _work(p: Pipeline, wanted: np.ndarray) -> SetWork:
    e, left, settled = p.experiment, len(wanted), None
    if p.generator.complete:
        settled = read_settled(p.synthetic_set)
        left -= int(Ledger(p.synthetic_set).committed(wanted).sum())
    s = e.sampling
    words = p.generator.path.rpartition("/")[2]
    words += f", {s.sampler} {s.steps} steps, guidance {s.guidance_scale:g}" if e.generator.kind == "ddpm" else ""
    if settled is None:
        return SetWork(words, len(wanted), left, None, None)
    hours = left / settled.rows_per_s / 3600
    gpus = 0.0 if settled.facts.get("device") == "cpu" else e.compute.gpus_per_renderer
    return SetWork(words, len(wanted), left, hours, _cost(hours * gpus, e.compute))


def _cost(gpu_hours: float, compute: Compute) -> float | None:
    price = compute.price_per_gpu_hour
    return gpu_hours * price if price is not None and gpu_hours else None


def _training(left: Sequence[Experiment], storage: Storage) -> tuple[float | None, float | None]:
    """(hours, cost) of training these, at the pace of this root's finished classifiers of the same shape."""
    if not left:
        return 0.0, None
    paces = _paces(storage)
    hours = gpu_hours = 0.0
    for e in left:
        assert e.classifier is not None
        pace = paces.get(_shape(asdict(resolve_classifier(e.classifier, e.data.image))))
        if pace is None:
            return None, None
        hours += pace[0] * e.classifier.steps / 3600
        gpu_hours += pace[1] * e.classifier.steps / 3600
    return hours, _cost(gpu_hours, left[0].compute)


def _shape(classifier: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(classifier[k] for k in ("architecture", "size", "batch_size"))


def _paces(storage: Storage) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Shape of classifier -> (seconds, GPU seconds) a step, medians over those finished."""
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for folder in storage.folders(CLASSIFIERS):
        if storage.exists(f"{CLASSIFIERS}/{folder}/_SUCCESS"):
            run = json.loads(storage.get(f"{CLASSIFIERS}/{folder}/run.json"))
            steps = run["counts"]["steps"]
            pace = run["train_seconds"] / steps, run["gpu_seconds"] / steps
            found.setdefault(_shape(run["config"]["classifier"]), []).append(pace)
    return {shape: (median(a for a, _ in paces), median(b for _, b in paces)) for shape, paces in found.items()}


def detectable(pipeline: Pipeline, experiment: Experiment) -> Detectable | None:
    """The smallest detectable difference of the primary contrast's metric on its test set."""
    from raysynth.metrics.power import minimum_detectable_difference

    v, kind = experiment.evaluation, experiment.data.labels.kind
    name, storage, images, of = v.primary.test_set, pipeline.storage, pipeline.images, experiment
    if name != "test":
        of, images = external_set(experiment, storage, name)
    if not (images.complete and pipeline.images.complete):
        return None
    table = load_table(storage, images)
    if name == "test":
        table = table.filter(pc.equal(table["split"], "test"))
    else:
        ids = open_test_set(experiment, storage, pipeline.images, name).ids
        table = table.filter(pc.is_in(table["image_id"], value_set=pa.array(ids, pa.string())))
    classes = load_vocabulary(storage, pipeline.images)["classes"]
    labels, _ = arrays(truth(table, name, classes, of.data.labels.policy, kind), classes)
    counts = {finding: (int((column == 1).sum()), int((column == 0).sum()))
              for column, finding in zip(labels.T, classes, strict=True)
              if not v.findings or finding in v.findings}  # fmt: skip
    counts = {finding: n for finding, n in counts.items() if min(n) >= v.min_positives}
    if not counts:
        return None
    n_pos, n_neg = ([n[i] for n in counts.values()] for i in (0, 1))
    difference = minimum_detectable_difference(v.primary.metric, n_pos, n_neg, kind)
    return Detectable(v.primary.metric, name, list(counts), n_pos, n_neg, difference)
