"""Trains every arm of an experiment with Ray Tune, on synthetic images rendered once for all of them.

Input: the experiment. First the generators, plans and images of all arms: one synthetic set per generator and sampling
setting, rendered at the largest selection that an arm needs. Then the classifiers, side by side; a trial is a
`train-classifier` artifact, so that a rerun trains what is missing and two sweeps share their arms. Output:
`sweep/<name>-<fp>/trials.parquet` (see `trials_schema`).

Every choice here is made on validation images: no test image is read, nor named to a trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raysynth.core.artifacts import Artifact
from raysynth.core.config import Arm, arms
from raysynth.core.errors import EnvironmentFault, GateFailed
from raysynth.core.experiment import Experiment
from raysynth.core.identity import canonical_json
from raysynth.core.progress import say
from raysynth.core.schemas import from_parquet, to_parquet
from raysynth.stages.after_ingest import check_arms, check_judging
from raysynth.stages.plan import wanted_rows
from raysynth.stages.train_classifier import Trial, classifier_artifact, needs_generator, prepare

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline
    from raysynth.stages.trial import Ending

STAGE = "sweep"
STAGE_VERSION = 1
TABLE = "trials.parquet"


@dataclass(frozen=True)
class Planned(Trial):
    """A trial whose classifier may not exist yet, and what it is to be made of."""

    settings: dict[str, Any]
    """What this arm changes: key -> value."""
    images: Artifact
    generated: Artifact | None
    """The generate artifact that its synthetic images are listed in; None where it trains on none."""


def trials_schema() -> pa.Schema:
    """One row an arm and seed. `state` is done or failed, `seconds` those of training."""
    text = ("arm", "settings", "artifact", "state", "reason", "strategy", "architecture", "init", "monitor")
    whole = ("seed", "n_real", "n_synth", "steps", "best_step")
    real = ("ratio", "value", "seconds")
    kinds = {
        **dict.fromkeys(text, pa.string()), **dict.fromkeys(whole, pa.int64()), **dict.fromkeys(real, pa.float64()),
    }  # fmt: skip
    order = ("arm", "seed", "settings", "artifact", "state", "reason", "strategy", "ratio", "n_real", "n_synth",
             "architecture", "init", "steps", "best_step", "monitor", "value", "seconds")  # fmt: skip
    return pa.schema([(name, kinds[name]) for name in order])


def sweep(pipeline: Pipeline, experiment: Experiment, retry_failed: bool = False) -> Artifact:
    """Makes the images that the arms need, trains the arms that are missing, and writes the table of trials.

    Args:
        retry_failed: render rows recorded as failed once more.

    Raises:
        DataError: an arm cannot be trained or judged as the experiment says; told before anything is trained.
        GateFailed: too many rows failed, or trials did; the other trials are done, and the table says why.
        EnvironmentFault: storage or cluster; the same command continues.
    """
    _ensure(pipeline, "ingest")
    check_judging(experiment, pipeline.storage, pipeline.images)
    if retry_failed or not is_done(pipeline, experiment):
        make_images(pipeline.arm_pipelines, retry_failed)
    trials = find_trials(pipeline, experiment)
    artifact = sweep_artifact(pipeline, experiment, trials)
    if artifact.complete:
        say(f"{STAGE}: {artifact.path} is complete")
        return artifact
    distinct = {t.classifier.path: t for t in reversed(trials)}  # named after the first arm that it is
    missing = [t for t in reversed(distinct.values()) if not t.classifier.complete]
    failed = _train(pipeline, missing, len(distinct) - len(missing)) if missing else {}
    rows = [_row(t, failed.get(t.classifier.path)) for t in trials]
    artifact.put(TABLE, to_parquet(pa.Table.from_pylist(rows, schema=trials_schema())))
    if failed:
        # Without _SUCCESS: the same command trains them again.
        _refuse(failed, distinct, artifact.storage.url(artifact.file(TABLE)))
    artifact.commit({"trials": len(trials), "distinct": len(distinct), "trained": len(missing)})
    say(f"{STAGE}: {len(trials)} trials done ({len(missing)} trained now); {artifact.path}")
    return artifact


def is_done(pipeline: Pipeline, experiment: Experiment) -> bool:
    """Whether every trial is trained, and nothing needs to be looked at again."""
    found = named_trials(pipeline.arm_pipelines)
    named = [t for t in found if t is not None]
    return len(named) == len(found) and sweep_artifact(pipeline, experiment, named).complete


def arm_pipelines(pipeline: Pipeline, experiment: Experiment) -> list[tuple[Arm, Pipeline]]:
    """Every arm with the pipeline of its own experiment; `Pipeline.arm_pipelines` keeps them."""
    found = []
    for arm in arms(experiment):
        own = type(pipeline)(arm.experiment, arm)
        if arm.experiment.data == experiment.data:
            # The source is listed once, not once an arm.
            own.images = pipeline.images
        found.append((arm, own))
    return found


def find_trials(pipeline: Pipeline, experiment: Experiment) -> list[Planned]:
    """The trials of a sweep whose images are made; trains and renders nothing.

    Raises:
        EnvironmentFault: a stage before the classifiers is not complete.
    """
    found = named_trials(pipeline.arm_pipelines)
    named = [t for t in found if t is not None]
    if len(named) < len(found):
        raise EnvironmentFault(
            f"{len(found) - len(named)} of {len(found)} arms wait for their images. Run `raysynth sweep` first."
        )
    return named


def named_trials(own: Sequence[tuple[Arm, Pipeline]]) -> list[Planned | None]:
    """The arms' trials, in order; None for those whose images are not made yet, which have no name before.

    Raises:
        DataError: an arm selects more than its plan has, or trains on what cannot be trained on.
    """
    ready = {i for i, (_, p) in enumerate(own) if is_planned(p)}
    sources = _cover({i: own[i][1] for i in ready if _synthetic(own[i][1])})
    ready -= {i for i, artifact in sources.items() if not artifact.complete}
    return [_trial(arm, p, sources.get(i)) if i in ready else None for i, (arm, p) in enumerate(own)]


def is_planned(p: Pipeline) -> bool:
    """Whether everything is there that an arm's images, or its real ones, are chosen from."""
    with p.keys():
        return (
            p.images.complete and (not needs_generator(p.experiment) or p.generator.complete)
            and (not _synthetic(p) or p.plan.complete)
        )  # fmt: skip


def _synthetic(p: Pipeline) -> bool:
    return p.experiment.training_set.needs_synthetic


def _trial(arm: Arm, p: Pipeline, generated: Artifact | None) -> Planned:
    with p.keys():
        classifier = classifier_artifact(arm.experiment, p.storage, p.images, generated)
    return Planned(arm.name, arm.seed, arm.experiment, classifier, arm.settings, p.images, generated)


def load_trials(artifact: Artifact) -> pa.Table:
    """The sweep's `trials.parquet`."""
    return from_parquet(artifact.storage.get(artifact.file(TABLE)))


def sweep_artifact(pipeline: Pipeline, experiment: Experiment, trials: Sequence[Planned]) -> Artifact:
    """The sweep's artifact: which classifier each arm and seed is."""
    inputs = {t.name: t.classifier.fp for t in trials}
    return Artifact.at(pipeline.storage, STAGE, experiment.name, STAGE_VERSION, {}, inputs)


def make_images(own: Sequence[tuple[Arm, Pipeline]], retry_failed: bool = False) -> None:
    """Runs every stage before the classifiers that some arm needs and that is missing, or may have failed rows.

    Raises:
        DataError: no arm is trained and nothing is rendered where one of them cannot be: see `check_arms`.
    """
    for _, p in own:
        _ensure(p, "ingest")
    check_arms(own)
    for _, p in own:
        if needs_generator(p.experiment):
            _ensure(p, "train-generator")
    for _, p in own:
        if _synthetic(p):
            _ensure(p, "plan")
    for p in rendering(own):
        _ensure(p, "generate", retry_failed)


def rendering(own: Sequence[tuple[Arm, Pipeline]]) -> list[Pipeline]:
    """The pipelines whose generate artifacts list all that the arms train on; of a set and plan, the largest first, so
    that what follows finds its rows rendered.

    Raises:
        NotReady: a generator or plan is not there yet.
    """
    needing = {i: p for i, (_, p) in enumerate(own) if _synthetic(p)}
    return [needing[i] for i, artifact in _cover(needing).items() if needing[i].generated is artifact]


def _ensure(p: Pipeline, stage: str, again: bool = False) -> None:
    with p.keys():
        if again or not p.artifact(stage).complete:
            p.do(stage, again)


def set_key(p: Pipeline) -> str:
    """What arms have in common whose images are of one synthetic set; known before the generator is trained."""
    return f"{p.generator.path} {canonical_json([p.experiment.plan.seed, p.experiment.sampling])}"


def _cover(needing: Mapping[int, Pipeline]) -> dict[int, Artifact]:
    """Arm -> the generate artifact that lists its rows: the largest of its synthetic set and plan.

    An arm that trains on all that it renders has no selection of its own to cut a larger one by: its artifact lists
    exactly its rows, and renders none of them again.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    ranks: dict[str, np.ndarray] = {}
    for i, p in needing.items():
        with p.keys():
            groups.setdefault((set_key(p), p.plan.path), []).append(i)
            if p.generated.path not in ranks:
                ranks[p.generated.path] = wanted_ranks(p)
    found: dict[int, Artifact] = {}
    for members in groups.values():
        listed: list[Artifact] = []
        for i in sorted(members, key=lambda i: -len(ranks[needing[i].generated.path])):
            p = needing[i]
            mine, selects = ranks[p.generated.path], _selects(p.experiment)
            found[i] = next((a for a in listed if _covers(ranks[a.path], mine, selects)), p.generated)
            if found[i] is p.generated:
                listed.append(p.generated)
    return found


def wanted_ranks(p: Pipeline) -> np.ndarray:
    """Ranks (N,) of the plan's rows that the experiment renders."""
    return wanted_rows(p.experiment, p.storage, p.plan).ranks


def _selects(e: Experiment) -> bool:
    """Whether the training set says itself which of the rendered images it takes."""
    t = e.training_set
    return t.ratio is not None or t.n_synth is not None or bool(t.quota)


def _covers(larger: np.ndarray, smaller: np.ndarray, subset: bool) -> bool:
    return bool(np.isin(smaller, larger, assume_unique=True).all() and (subset or len(smaller) == len(larger)))


def _train(pipeline: Pipeline, missing: Sequence[Planned], before: int) -> dict[str, Ending]:
    """Trains the missing classifiers. Returns path -> how it failed, for those that did."""
    from raysynth.stages.sweep_table import Row, SweepTable
    from raysynth.stages.trial import run_trials

    gpu = bool(pipeline.resources.gpus)
    tasks = [prepare(t.experiment, pipeline.storage, t.images, t.generated, gpu) for t in missing]
    say(f"{STAGE}: {len(missing)} classifiers to train, {before} done before; curves: "
        f"tensorboard --logdir {pipeline.storage.url('train-classifier')}")  # fmt: skip
    rows = [Row(t.arm, t.seed, sum(task.phase_steps)) for t, task in zip(missing, tasks, strict=True)]
    with SweepTable(rows, before) as table:
        endings = run_trials(tasks, pipeline.experiment.compute, gpu, table)
    return {t.classifier.path: ending for t, ending in zip(missing, endings, strict=True) if ending.reason}


def _row(trial: Planned, failed: Ending | None) -> dict[str, Any]:
    row = {
        "arm": trial.arm, "seed": trial.seed, "settings": json.dumps(trial.settings),
        "artifact": trial.classifier.path, "state": "failed" if failed else "done",
        "reason": failed.reason if failed else "",
        "strategy": trial.experiment.training_set.strategy,
    }  # fmt: skip
    if failed:
        return row
    run = trial.classifier.run_info()
    facts = {name: run["facts"][name] for name in ("ratio", "n_real", "n_synth", "architecture", "init")}
    return row | facts | {
        "steps": run["counts"]["steps"], "best_step": run["best_step"], "monitor": run["monitor"],
        "value": run["value"], "seconds": run["train_seconds"],
    }  # fmt: skip


def _refuse(failed: Mapping[str, Ending], distinct: Mapping[str, Planned], table: str) -> None:
    words = [f"{distinct[path].name} ({ending.reason.splitlines()[0]})" for path, ending in failed.items()]
    text = f"sweep: {len(failed)} of {len(distinct)} classifiers failed: {'; '.join(words)} See {table}."
    if any(ending.environment for ending in failed.values()):
        raise EnvironmentFault(text)
    raise GateFailed(text)
