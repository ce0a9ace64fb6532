"""The stages of one experiment in order, and which of their artifacts are there.

Ray is connected when the first stage needs it, so that a run with nothing to do takes seconds.
"""

from __future__ import annotations

from functools import cached_property

from raysynth.core.artifacts import Artifact
from raysynth.core.errors import EnvironmentFault
from raysynth.core.experiment import Experiment
from raysynth.core.progress import say
from raysynth.core.storage import Storage, open_storage
from raysynth.stages import cluster
from raysynth.stages.generate import generate, generate_artifact, synthetic_set
from raysynth.stages.ingest import ingest, ingest_artifact
from raysynth.stages.plan import plan, plan_artifact
from raysynth.stages.train_generator import generator_artifact, train_generator
from raysynth.synth.sets import SyntheticSet

ARTIFACTS = {"ingest": "images", "train-generator": "generator", "plan": "plan", "generate": "generated"}
"""Stage -> the property of `Pipeline` that names its artifact, in order of running."""


class Pipeline:
    """One experiment's artifacts. A stage's artifact can be named once those before it are complete."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.storage: Storage = open_storage(experiment.root)

    @cached_property
    def resources(self) -> cluster.Resources:
        """What the cluster has; joins or starts Ray on first use."""
        found = cluster.connect(self.experiment.compute)
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
        """The train-generator artifact."""
        return generator_artifact(self.experiment, self.storage, self.images)

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

    def artifact(self, stage: str) -> Artifact:
        """The artifact of a stage; EnvironmentFault if an earlier stage is not complete."""
        return getattr(self, ARTIFACTS[stage])

    def found(self) -> dict[str, Artifact | None]:
        """Stage -> its artifact, or None where an earlier stage must finish before it has a name."""
        known: dict[str, Artifact | None] = {}
        for stage in ARTIFACTS:
            try:
                known[stage] = self.artifact(stage)
            except EnvironmentFault:
                known[stage] = None
        return known

    def do(self, stage: str, retry_failed: bool = False) -> Artifact:
        """Runs one stage, or says that it is done."""
        e, s = self.experiment, self.storage
        artifact = self.artifact(stage)
        if artifact.complete and stage in ("train-generator", "generate") and not retry_failed:
            say(f"{stage}: {artifact.path} is complete")
            return artifact
        if stage == "plan":
            return plan(e, s, self.images)
        if stage == "ingest" and artifact.complete:
            return ingest(e, s)
        resources = self.resources
        if stage == "ingest":
            return ingest(e, s)
        if stage == "train-generator":
            return train_generator(e, s, self.images)
        return generate(e, s, self.generator, self.plan, resources, retry_failed)
