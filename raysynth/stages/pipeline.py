"""The stages of one experiment in order, and which of their artifacts are there.

Ray is connected when the first stage needs it, so that a run with nothing to do takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

from raysynth.core.artifacts import Artifact
from raysynth.core.config import Arm, keys_of_arm
from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.progress import say
from raysynth.core.storage import Storage, open_storage
from raysynth.stages import cluster
from raysynth.stages.adoption import adopt, check_given, given_artifact, say_seen
from raysynth.stages.after_ingest import look_ahead
from raysynth.stages.evaluate import evaluate, evaluate_artifact
from raysynth.stages.external import import_artifact, take_listing
from raysynth.stages.fidelity import fidelity, fidelity_artifact
from raysynth.stages.generate import generate, generate_artifact, synthetic_set
from raysynth.stages.ingest import ingest, ingest_artifact
from raysynth.stages.plan import plan, plan_artifact
from raysynth.stages.predictions import ingest_test_sets, open_test_sets
from raysynth.stages.sweep import arm_pipelines, find_trials, sweep, sweep_artifact
from raysynth.stages.train_classifier import Trial, classifier_artifact, needs_generator, prepare, train_classifier
from raysynth.stages.train_generator import generator_artifact, train_generator
from raysynth.synth.sets import SyntheticSet

ARTIFACTS = {
    "ingest": "images", "train-generator": "generator", "plan": "plan", "generate": "generated",
    "train-classifier": "classifier", "sweep": "swept", "evaluate": "evaluated",
}  # fmt: skip
"""Stage -> the property of `Pipeline` that names its artifact."""
NAMED = ("images", "generator", "plan", "generated", "synthetic_set", "arm_pipelines", "trials")
"""Cached properties of `Pipeline`, each resting on those before it."""
QUICK = ("ingest", "plan")
"""Stages that tell what they have even where they are complete."""


def is_sweep(e: Experiment) -> bool:
    """Whether the experiment compares several trials."""
    return e.classifier is not None and (bool(e.sweep.arms or e.sweep.factors) or len(e.sweep.seeds) > 1)


def stages_of(e: Experiment) -> list[str]:
    """What `run` does, in order. A sweep makes the generators, plans and images that its arms need."""
    making = ["train-generator", "plan", "generate"]
    if e.classifier is None:
        return ["ingest", *making]
    if is_sweep(e):
        return ["ingest", "sweep", "evaluate"]
    if not e.training_set.needs_synthetic:
        making = ["train-generator"] if needs_generator(e) else []
    return ["ingest", *making, "train-classifier", "evaluate"]


class Pipeline:
    """One experiment's artifacts. A stage's artifact can be named once those before it are complete."""

    def __init__(self, experiment: Experiment, arm: Arm | None = None) -> None:
        """
        Args:
            arm: whose experiment it is, where it is one of several.
        """
        self.experiment, self.arm = experiment, arm
        self.storage: Storage = open_storage(experiment.root)

    def keys(self) -> AbstractContextManager[None]:
        """What names or makes an artifact of an arm from outside does it within this: see `keys_of_arm`."""
        a = self.arm
        return keys_of_arm(a.of, a.settings, a.factors) if a else nullcontext()

    @cached_property
    def resources(self) -> cluster.Resources:
        """What the cluster has; joins or starts Ray on first use."""
        found = cluster.connect(self.experiment.compute, self.experiment.name)
        cluster.quiet_data_context()
        self._check_shared(found)
        return found

    def _check_shared(self, found: cluster.Resources) -> None:
        if found.nodes > 1 and not self.experiment.root.startswith("s3://"):
            cluster.require_shared_folder(self.experiment.root)

    @cached_property
    def images(self) -> Artifact:
        """The ingest artifact."""
        return ingest_artifact(self.experiment, self.storage)[0]

    @cached_property
    def generator(self) -> Artifact:
        """The train-generator artifact: trained here, given, or the listing of a set that was rendered elsewhere."""
        e = self.experiment
        if e.generator.kind == "external":
            return import_artifact(e, self.storage, self.images)[0]
        if e.generator.path:
            return given_artifact(e, self.storage)
        return generator_artifact(e, self.storage, self.images)

    @cached_property
    def plan(self) -> Artifact:
        """The plan artifact."""
        return plan_artifact(self.experiment, self.storage, self.images)

    @cached_property
    def generated(self) -> Artifact:
        """The generate artifact."""
        return generate_artifact(self.experiment, self.storage, self.generator, self.plan)

    @cached_property
    def synthetic_set(self) -> SyntheticSet:
        """The set the generate artifact's rows live in."""
        return synthetic_set(self.experiment, self.storage, self.generator)

    @property
    def _training_images(self) -> Artifact | None:
        return self.generated if self.experiment.training_set.needs_synthetic else None

    @property
    def classifier(self) -> Artifact:
        """The train-classifier artifact of the experiment itself, whatever its sweep."""
        return classifier_artifact(self.experiment, self.storage, self.images, self._training_images)

    @property
    def swept(self) -> Artifact:
        """The sweep artifact."""
        return sweep_artifact(self, self.experiment, find_trials(self, self.experiment))

    @cached_property
    def trials(self) -> Sequence[Trial]:
        """Every trained classifier of the experiment. Raises EnvironmentFault if one is missing."""
        e = self.experiment
        if is_sweep(e):
            planned = find_trials(self, e)
            sweep_artifact(self, e, planned).digest()
            return planned
        self.classifier.digest()
        return [Trial(e.training_set.strategy, e.classifier.seed if e.classifier else 0, e, self.classifier)]

    @property
    def evaluated(self) -> Artifact:
        """The evaluate artifact."""
        sets = open_test_sets(self.experiment, self.storage, self.images)
        return evaluate_artifact(self.experiment, self.storage, self.trials, sets)

    @cached_property
    def arm_pipelines(self) -> list[tuple[Arm, Pipeline]]:
        """Every arm of the experiment with its own pipeline; without a sweep, the experiment itself."""
        return arm_pipelines(self, self.experiment)

    @property
    def rendered(self) -> dict[str, Pipeline]:
        """Folder of each distinct generate artifact that the classifiers' images are in -> a pipeline that has it."""
        found: dict[str, Pipeline] = {}
        largest: dict[str, int] = {}
        for _, p in self.arm_pipelines:
            if p.experiment.training_set.needs_synthetic:
                run = p.generated.run_info() if p.generated.complete else None
                if run is None:
                    continue
                key, n = run["synthetic_set"], run["counts"]["wanted"]
                # Of several selections from one set, the largest shows the others too.
                if n > largest.get(key, 0):
                    largest[key], found[key] = n, p
        return {p.generated.path: p for p in found.values()}

    def artifact(self, stage: str) -> Artifact:
        """The artifact of a stage; EnvironmentFault if an earlier stage is not complete."""
        return getattr(self, ARTIFACTS[stage])

    def is_complete(self, stage: str) -> bool:
        """Whether a stage's artifact is there."""
        try:
            return self.artifact(stage).complete
        except EnvironmentFault:
            return False

    def found(self) -> dict[str, Artifact | None]:
        """Stage -> its artifact, or None where an earlier stage must finish before it has a name."""
        known: dict[str, Artifact | None] = {}
        for stage in stages_of(self.experiment):
            try:
                known[stage] = self.artifact(stage)
            except EnvironmentFault:
                known[stage] = None
        return known

    def measure_fidelity(self) -> list[Artifact]:
        """How close every synthetic set is to held-out real images, where an extractor is asked for."""
        if self.experiment.evaluation.fidelity.extractor == "none":
            return []
        found = []
        for p in self.rendered.values():
            e = dataclasses.replace(p.experiment, evaluation=self.experiment.evaluation, name=self.experiment.name)
            artifact = fidelity_artifact(e, self.storage, p.images, p.generated)
            if not artifact.complete:
                artifact = fidelity(e, self.storage, p.images, p.generated, self.resources)
            found.append(artifact)
        return found

    def run(self, stages: Sequence[str], retry_failed: bool = False) -> None:
        """`do` of some stages in order. What ingest's table tells against one of them is told before the others."""
        if "ingest" in stages:
            self.do("ingest")
        rest = [stage for stage in stages if stage != "ingest"]
        if "sweep" not in rest and self.images.complete:  # a sweep looks ahead itself, for each of its arms
            look_ahead(self, rest)
        for stage in rest:
            self.do(stage, retry_failed)

    def do(self, stage: str, retry_failed: bool = False) -> Artifact:
        """Runs one stage, or says that it is done.

        Args:
            retry_failed: where the stage renders, rows recorded as failed are rendered once more.
        """
        if stage == "evaluate":
            self._ingest_test_sets()
        artifact = self._do(stage, retry_failed)
        self._keep(ARTIFACTS[stage], artifact)
        if stage == "ingest":
            self._ingest_test_sets()
        return artifact

    def _keep(self, name: str, artifact: Artifact) -> None:
        """What a stage made is its artifact, whatever it was called before: another experiment may have made it under
        its own name meanwhile. What rests on it is named anew."""
        first = NAMED.index(name) if name in NAMED else NAMED.index("arm_pipelines")
        for later in NAMED[first:]:
            self.__dict__.pop(later, None)
        if name in NAMED:
            self.__dict__[name] = artifact

    def _ingest_test_sets(self) -> None:
        if self.arm is None:  # all arms are judged on the sets of the whole experiment
            ingest_test_sets(self.experiment, self.storage, self.images, lambda: self.resources)

    def _do(self, stage: str, retry_failed: bool) -> Artifact:
        e, s = self.experiment, self.storage
        if stage == "sweep":
            return sweep(self, e, retry_failed)
        artifact = self.artifact(stage)
        if stage == "train-generator" and e.generator.path:
            return self._take_generator()
        if artifact.complete and stage not in QUICK and not (retry_failed and stage == "generate"):
            say(f"{stage}: {artifact.path} is complete")
            return artifact
        if stage == "plan":
            return plan(e, s, self.images)
        if stage == "ingest" and artifact.complete:
            return ingest(e, s)
        if stage == "generate":
            if e.generator.path and e.generator.kind != "external":
                check_given(e, s, self.images, self.generator)
            return generate(e, s, self.generator, self.plan, lambda: self.resources, retry_failed)
        resources = self.resources
        if stage == "ingest":
            return ingest(e, s)
        if stage == "train-generator":
            return train_generator(e, s, self.images)
        if stage == "train-classifier":
            return train_classifier(prepare(e, s, self.images, self._training_images, bool(resources.gpus)))
        self.measure_fidelity()
        return evaluate(e, s, self.images, self.trials)

    def _take_generator(self) -> Artifact:
        """A generator that was trained before, or the listing of images that were rendered elsewhere."""
        e, s = self.experiment, self.storage
        if e.generator.kind == "external":
            return take_listing(e, s, self.images)
        found = adopt(e, s)
        check_given(e, s, self.images, found)
        say_seen(e, s, self.images, found)
        return found
