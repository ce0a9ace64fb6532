"""Judges trained classifiers on test sets: predictions stored once, and everything else derived from them.

Input: train-classifier artifacts and the test sets' images. Output: `evaluate/<name>-<fp>/` with `metrics.parquet`
(core.schemas.metric_schema) and `comparisons.parquet` over all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import DataError
from raysynth.core.evidence import Evaluation
from raysynth.core.experiment import Experiment
from raysynth.core.progress import Progress, say
from raysynth.core.schemas import metric_schema, to_parquet
from raysynth.core.storage import Storage
from raysynth.metrics.comparisons import Scored, compare, holm
from raysynth.metrics.metric_table import evaluate as judge
from raysynth.metrics.samples import groups, read_sample
from raysynth.metrics.underdiagnosis import underdiagnosis
from raysynth.stages.ingest import ingest_artifact, load_table
from raysynth.stages.predictions import (
    TestSet,
    load_predictions,
    open_test_sets,
    predict_missing,
    predictions_artifact,
    thresholds_of,
)
from raysynth.stages.train_classifier import Trial

STAGE = "evaluate"
STAGE_VERSION = 2
CONTROLS = ("duplicate", "permuted", "real_real")
"""Strategies that tell the effect of synthetic images from that of more steps, more epochs or more noise."""
COMPARED = ("auroc", "auprc", "accuracy", "balanced_accuracy", "f1")


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Two arms on one test set."""

    arm: str
    against: str
    test_set: str
    pairs: list[tuple[Trial, Trial]]
    """(arm, against) of every seed that both have."""
    confirmatory: str | None
    """Metric of `evaluation.primary` where this is its contrast and test set."""


def evaluate_artifact(e: Experiment, storage: Storage, trials: Sequence[Trial], sets: Sequence[TestSet]) -> Artifact:
    """The stage's artifact for these classifiers, whether or not it exists yet."""
    inputs = {f"{x.arm}, seed {x.seed}, {t.name}": predictions_artifact(x, t).fp for x in trials for t in sets}
    evaluation = {k: v for k, v in dataclasses.asdict(e.evaluation).items() if k not in ("fidelity", "test_sets")}
    return Artifact.at(storage, STAGE, e.name, STAGE_VERSION, {"evaluation": evaluation}, inputs)


def evaluate(e: Experiment, storage: Storage, images: Artifact, trials: Sequence[Trial]) -> Artifact:
    """Predicts what is not predicted yet, and writes the metric table and the paired comparisons.

    Ray must be connected.

    Raises:
        DataError: as `require_one_test_split`, or `evaluation.primary` names an arm that is not there.
    """
    sets = open_test_sets(e, storage, images)
    require_one_test_split(e, storage, images, trials)
    artifact = evaluate_artifact(e, storage, trials, sets)
    if artifact.complete:
        say(f"{STAGE}: {artifact.path} is complete")
        return artifact
    predict_missing(e, storage, trials, sets)
    artifact.started = time.time()  # predictions have their own seconds
    kind = e.data.labels.kind
    with Progress(STAGE, len(trials), "classifiers") as progress:
        metrics = pa.concat_tables(_judged(e, trials, sets, kind, progress))
    artifact.put("metrics.parquet", to_parquet(metrics))
    comparisons = compare_arms(e, trials, sets, kind)
    artifact.put("comparisons.parquet", to_parquet(pa.Table.from_pandas(comparisons, preserve_index=False)))
    said = [{t.name: predictions_artifact(x, t) for t in sets} for x in trials]
    judged = {name: a.run_info()["counts"]["judged"] for name, a in said[0].items()}
    seen = {t.name: t.seen for t in sets if t.seen}
    strange = {t.name: n for t in sets if (n := len(t.ids) - judged[t.name])}
    artifact.commit(
        {"classifiers": len(trials), "test_images": sum(judged.values()), "metrics": metrics.num_rows},
        trials={f"{x.arm}, seed {x.seed}": {"classifier": x.classifier.path,
                                            "predictions": {name: a.path for name, a in found.items()}}
                for x, found in zip(trials, said, strict=True)},
        left_out={"seen in training": seen, "of no class that was trained": strange},
    )  # fmt: skip
    where = ", ".join(f"{name} ({n:,}{f'; {seen[name]:,} seen in training are left out' if name in seen else ''})"
                      for name, n in judged.items())  # fmt: skip
    say(f"{STAGE}: {len(trials)} classifiers on {where}; {artifact.path}")
    return artifact


def require_one_test_split(e: Experiment, storage: Storage, images: Artifact, trials: Sequence[Trial]) -> None:
    """Raises DataError where a trial with images of its own may have trained on what all trials are judged on: a test
    image of `images`, or another image of such a patient, is not a test image among the trial's."""
    tested = load_table(storage, images).to_pandas()
    tested = tested[tested["split"] == "test"]
    looked_at = [e.data]
    for trial in trials:
        if trial.experiment.data in looked_at:
            continue
        looked_at.append(trial.experiment.data)
        own = ingest_artifact(trial.experiment, storage)[0]
        if own.path == images.path:
            continue
        own.digest()
        table = load_table(storage, own).to_pandas()
        held_out = table["split"] == "test"
        of_patients = table["patient_id"].isin(tested["patient_id"].dropna())
        apart = [*tested.loc[~tested["image_id"].isin(table.loc[held_out, "image_id"]), "image_id"],
                 *table.loc[of_patients & ~held_out, "image_id"]]  # fmt: skip
        if apart:
            raise DataError(
                f"data of the arm {trial.arm}", f"{len(set(apart)):,} images of test patients, such as {apart[0]}, in "
                "another split or in none", f"the test split of {images.path}, on which every arm is judged",
                f"data.split.keep={storage.url(images.path)} keeps every arm to the splits of these images.",
            )  # fmt: skip


def _judged(
    e: Experiment, trials: Sequence[Trial], sets: Sequence[TestSet], kind: str, progress: Progress
) -> list[pa.Table]:
    """The metric table of each trial; the bootstraps run side by side in Ray tasks."""
    import ray

    remote = ray.remote(max_retries=3)(judge_trial).options(num_cpus=1)
    waiting = {remote.remote(t, list(sets), e.evaluation, kind): i for i, t in enumerate(trials)}
    tables: dict[int, pa.Table] = {}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=5)
        for reference in done:
            tables[waiting.pop(reference)] = ray.get(reference)
            progress.advance(1)
    return [tables[i] for i in range(len(trials))]


def judge_trial(trial: Trial, sets: Sequence[TestSet], evaluation: Evaluation, kind: str) -> pa.Table:
    """One classifier's rows of the metric table."""
    thresholds = thresholds_of(trial, evaluation)
    said = [load_predictions(trial, t) for t in sets]
    tables = [judge(p, thresholds, evaluation, kind) for p in said]
    tables += [underdiagnosis(p, thresholds, evaluation, kind) for p in said]
    rows = pa.concat_tables(tables)
    facts = {**trial.facts, "run": trial.classifier.path, "arm": trial.arm}
    schema = metric_schema()
    columns = {}
    for f in schema:
        given = f.name in rows.column_names
        columns[f.name] = rows[f.name].cast(f.type) if given else pa.array([facts.get(f.name)] * len(rows), f.type)
    return pa.table(columns, schema=schema)


def reference_arm(e: Experiment, trials: Sequence[Trial]) -> str:
    """The arm that others are compared with: the primary contrast's, else the first trained on real images alone."""
    if e.evaluation.primary.against:
        return e.evaluation.primary.against
    alone = [t.arm for t in trials if t.experiment.training_set.strategy == "real"]
    return (alone or [t.arm for t in trials])[0]


def pairs_of(e: Experiment, trials: Sequence[Trial]) -> list[tuple[str, str]]:
    """Every arm against the reference, and the primary arm against the controls that tell its effect from others."""
    strategies = {t.arm: t.experiment.training_set.strategy for t in trials}
    against, primary = reference_arm(e, trials), e.evaluation.primary.arm
    pairs = [(name, against) for name in strategies if name != against]
    controls = [n for n, s in strategies.items() if s in CONTROLS and n not in (against, primary)]
    return pairs + [(primary, control) for control in controls if primary]


def compare_arms(e: Experiment, trials: Sequence[Trial], sets: Sequence[TestSet], kind: str) -> pd.DataFrame:
    """Paired differences of `pairs_of` on every test set, and of the primary pair in every subgroup of its test set.

    Holm's adjustment is within the exploratory differences of one test set and metric. Two arms are compared on the
    seeds that both have.

    Raises:
        DataError: `evaluation.primary` names an arm that is not there.
    """
    import ray

    asked, named = contrasts(e, trials, sets), {t.name: t for t in sets}
    remote = ray.remote(max_retries=3)(compare_pair).options(num_cpus=1)
    return comparison_table(asked, ray.get([remote.remote(c, named[c.test_set], e.evaluation, kind) for c in asked]))


def contrasts(e: Experiment, trials: Sequence[Trial], sets: Sequence[TestSet]) -> list[Contrast]:
    """What `compare_arms` compares, on every test set. Raises DataError as it does."""
    p = e.evaluation.primary
    names = list(dict.fromkeys(t.arm for t in trials))
    for key, arm in (("arm", p.arm), ("against", p.against)):
        if arm and arm not in names:
            raise DataError(f"evaluation.primary.{key}", arm, f"one of {', '.join(names)}")
    found = []
    for (arm, other), t in itertools.product(pairs_of(e, trials), sets):
        mine, theirs = ({x.seed: x for x in trials if x.arm == name} for name in (arm, other))
        pairs = [(mine[s], theirs[s]) for s in sorted(mine.keys() & theirs.keys())]
        confirmatory = p.metric if (arm, other, t.name) == (p.arm, p.against, p.test_set) else None
        if pairs:
            found.append(Contrast(arm, other, t.name, pairs, confirmatory))
    return found


def comparison_table(asked: Sequence[Contrast], found: Sequence[Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """`comparisons.parquet` of what `compare_pair` found for each contrast."""
    frame = pd.DataFrame([
        {"arm": c.arm, "against": c.against, **row, "primary": row["metric"] == c.confirmatory and not row["subgroup"]}
        for c, rows in zip(asked, found, strict=True) for row in rows
    ])  # fmt: skip
    if frame.empty:
        return frame
    frame["p_holm"] = frame["p"].astype(float)
    for _, group in frame[~frame["primary"]].groupby(["test_set", "metric"]):
        adjusted = holm([None if pd.isna(p) else p for p in group["p"]])
        frame.loc[group.index, "p_holm"] = pd.Series(adjusted, group.index, dtype=float)
    return frame


def compare_pair(contrast: Contrast, test_set: TestSet, evaluation: Evaluation, kind: str) -> list[dict[str, Any]]:
    """The paired differences of one contrast, of the confirmatory metric also in every subgroup; runs in a Ray task."""

    def scored(trial: Trial) -> Scored:
        return Scored(load_predictions(trial, test_set), thresholds_of(trial, evaluation))

    mine, theirs = ([scored(pair[i]) for pair in contrast.pairs] for i in (0, 1))
    wanted = [(metric, "") for metric in COMPARED]
    if contrast.confirmatory:
        found = groups(read_sample(mine[0].predictions, kind), evaluation.subgroups)
        wanted += [(contrast.confirmatory, name) for name in found if name]
    return [
        dataclasses.asdict(compare(mine, theirs, metric, evaluation, kind, subgroup=name)) for metric, name in wanted
    ]
