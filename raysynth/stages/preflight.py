"""What can be told of an experiment before its first image is read, and would else end the run after hours.

Looks at names, files and shapes; loads no weights, fetches nothing, starts no Ray. What a later stage finds out within
minutes (a column that is not there, images that cannot be read) is left to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from raysynth.core.config import arms
from raysynth.core.experiment import Classifier, Experiment
from raysynth.core.identity import canonical_json
from raysynth.core.presets import resolve_classifier, resolve_image
from raysynth.core.storage import Storage
from raysynth.stages.adoption import given_artifact
from raysynth.stages.predictions import external_sets
from raysynth.stages.train_classifier import needs_generator


def check_setup(e: Experiment, storage: Storage, stages: Collection[str]) -> None:
    """Checks what the stages will need: every arm's network and given generator, the extractor, test sets.

    Raises:
        ConfigError: no such network, arguments or sizes that it does not take, a file that is not there.
        DataError: no exported generator, no such test set.
    """
    trials = [arm.experiment for arm in arms(e)] if "sweep" in stages else [e]
    if {"sweep", "train-generator"} & set(stages):
        for trial in trials:
            given = trial.generator.path and trial.generator.kind != "external"
            if given and (e.classifier is None or needs_generator(trial)):
                given_artifact(trial, storage)
    if {"sweep", "train-classifier"} & set(stages):
        _check_classifiers(trials)
    if "evaluate" in stages:
        external_sets(e, storage)
        if e.evaluation.fidelity.extractor != "none":
            from raysynth.metrics.features import check_extractor

            check_extractor(e.evaluation.fidelity.extractor)


def _check_classifiers(trials: list[Experiment]) -> None:
    from raysynth.models.classifier_net import check_classifier

    networks: dict[str, tuple[Classifier, int]] = {}
    for e in trials:
        if e.classifier is not None:
            channels = 1 if resolve_image(e.data.image).channels == "grey" else 3
            network = dataclasses.replace(resolve_classifier(e.classifier, e.data.image), seed=0)
            networks[canonical_json([network, channels])] = network, channels
    for network, channels in networks.values():
        check_classifier(network, channels)
