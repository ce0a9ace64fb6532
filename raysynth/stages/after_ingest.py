"""What ingest's table tells of an experiment, and would else end it after generators are trained and images rendered.

Input: experiments whose ingest is complete. Output: nothing, or the error that a later stage would raise, with the key
where it is typed. Every planned image counts as rendered. What only a generator from elsewhere tells, or the listing of
a set that was rendered elsewhere, is left to the stage that reads it. Reads no pixels, starts no Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from raysynth.core.artifacts import Artifact
from raysynth.core.config import Arm
from raysynth.core.experiment import Experiment
from raysynth.core.identity import canonical_json
from raysynth.core.schemas import attribute_names
from raysynth.core.storage import Storage
from raysynth.data.balance import cells_of
from raysynth.data.plans import keys_of_selection, plan_rows, plan_sources, select, selected_by, selection
from raysynth.data.training_sets import check_validation, choose, validation_ids
from raysynth.metrics.samples import require_known
from raysynth.stages.ingest import load_table, load_vocabulary
from raysynth.stages.predictions import external_sets
from raysynth.stages.train_generator import learned

if TYPE_CHECKING:
    from raysynth.stages.pipeline import Pipeline

MAKING = ("train-generator", "plan", "generate", "train-classifier")


def look_ahead(p: Pipeline, stages: Collection[str]) -> None:
    """Whether these stages can be done for an experiment that is no sweep, or for its own trial whatever its sweep.

    Raises:
        DataError: as `check_arms` and `check_judging`.
    """
    if set(MAKING) & set(stages):
        _check(p, stages)
    if {"train-classifier", "evaluate"} & set(stages):
        check_judging(p.experiment, p.storage, p.images)


def check_arms(own: Sequence[tuple[Arm, Pipeline]]) -> None:
    """Whether generator, plan and training set of every arm can be made; arms that differ in none are looked at once.

    Raises:
        DataError: too few real images of a class for `training_set`; more synthetic images than the plan has, or of a
            class that there is not; a plan, generator or classifier that these images do not allow.
    """
    looked_at = set()
    for _, p in own:
        e, g = p.experiment, p.experiment.generator
        parts = [p.images.path, e.training_set, e.plan, e.data.labels, g.kind, g.path, g.train_on, g.conditions,
                 e.classifier and e.classifier.steps]  # fmt: skip
        content = canonical_json(parts)
        if content not in looked_at:
            looked_at.add(content)
            with p.keys():
                _check(p, MAKING)


def _check(p: Pipeline, stages: Collection[str]) -> None:
    e, trained = p.experiment, "train-classifier" in stages
    g, t, policy = e.generator, e.training_set, e.data.labels.policy
    table = load_table(p.storage, p.images)
    sources, rows = plan_sources(table, e), None
    rendered = not trained or t.needs_synthetic
    # Then nothing is lost by what is told where images are chosen from the plan; a million rows take 800 MB to look at.
    planned = rendered and g.kind != "external" and p.generator.complete and p.plan.complete
    if rendered and "train-generator" in stages and not g.path:
        learned(e, table, load_vocabulary(p.storage, p.images))
    if rendered and g.kind != "external" and not planned:
        cells_of(sources, e.plan.over, e.data.labels)
        rows = plan_rows(sources, e)
        with keys_of_selection(selected_by(e)):
            select(rows, sources.num_rows, selection(e), policy)
    if not trained:
        return
    elsewhere = g.kind == "external" if t.needs_synthetic else bool(g.path) and t.strategy == "upper_bound"
    if elsewhere or planned:
        check_validation(table, validation_ids(table, t, sources["image_id"].to_pylist(), policy), policy)
    else:
        choose(e, table, rows, listed=rows)


def check_judging(e: Experiment, storage: Storage, images: Artifact) -> None:
    """Whether there is what `evaluation.findings` and `evaluation.subgroups` name: an attribute in some test set, which
    the others may lack.

    Args:
        images: the complete ingest artifact of `data`.

    Raises:
        DataError: there is not.
    """
    v = e.evaluation
    if v.findings:
        require_known("evaluation.findings", v.findings, load_vocabulary(storage, images)["classes"])
    if set(v.subgroups) <= {"*"}:
        return
    known = ["*", *attribute_names(load_table(storage, images).schema), "site"]
    for external, artifact in external_sets(e, storage).values():
        there = artifact.complete
        known += attribute_names(load_table(storage, artifact).schema) if there else external.data.columns.attributes
    require_known("evaluation.subgroups", v.subgroups, list(dict.fromkeys(known)))
