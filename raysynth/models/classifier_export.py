"""Writes a trained classifier as a folder, and reads it back to predict.

    model.safetensors   backbone (names as timm's, behind `backbone.`), head, mean and std of the input
    classifier.json     architecture, arguments, head, classes, channels, size, normalisation, kind, weights' sha256,
                        and what the caller knows of the training

Knows nothing of how it was trained. `init: FOLDER/model.safetensors` starts another training from the backbone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from raysynth.core.errors import DataError
from raysynth.core.evidence import Classifier
from raysynth.core.identity import sha256_bytes
from raysynth.models.classifier import ClassifierTraining, predict
from raysynth.models.classifier_net import ClassifierNet, build_classifier

WEIGHTS, FACTS = "model.safetensors", "classifier.json"


def export_classifier(folder: str | Path, training: ClassifierTraining, facts: dict[str, Any]) -> dict[str, str]:
    """Writes the exported folder.

    Args:
        training: its moving average is exported where there is one, else its network.
        facts: what `classifier.json` says besides, such as the classes' names.

    Returns:
        sha256 of every file written, by its name.
    """
    place, network, classifier = Path(folder), training.best, training.classifier
    place.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    safetensors.torch.save_file(state, place / WEIGHTS)
    digests = {WEIGHTS: sha256_bytes((place / WEIGHTS).read_bytes())}
    content = {
        **facts, "architecture": classifier.architecture, "arguments": classifier.arguments,
        "drop_path": classifier.drop_path, "head": list(classifier.head), "n_classes": training.n_classes,
        "channels": training.channels, "size": classifier.size, "kind": training.kind, "init": classifier.init,
        "normalisation": {k: getattr(network, k).flatten().tolist() for k in ("mean", "std")},
        "steps": training.step, "weights_sha256": digests[WEIGHTS],
    }  # fmt: skip
    text = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    (place / FACTS).write_bytes(text)
    return {**digests, FACTS: sha256_bytes(text)}


class Predictor:
    """An exported classifier.

    Args:
        network: with its weights, in eval mode.
        facts: of `classifier.json`.
    """

    def __init__(self, network: ClassifierNet, facts: dict[str, Any]) -> None:
        self.network, self.facts = network, facts

    def predict(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """(N, H, W, C) uint8 -> (N, L) float32 probabilities: of classes adding up to 1, or of each finding."""
        return predict(self.network, images, self.facts["kind"], batch_size)


def load_classifier(folder: str | Path, device: str = "cpu") -> Predictor:
    """Reads an exported folder.

    Raises:
        DataError: the weights are not those that were exported.
    """
    place = Path(folder)
    facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    weights = (place / WEIGHTS).read_bytes()
    found = sha256_bytes(weights)
    if found != facts["weights_sha256"]:
        raise DataError(
            str(place / WEIGHTS), found[:12], f"the exported weights ({facts['weights_sha256'][:12]})",
            "The file was changed or is not whole: export it again.",
        )  # fmt: skip
    classifier = Classifier(
        architecture=facts["architecture"], arguments=facts["arguments"], drop_path=facts["drop_path"],
        size=facts["size"], head=facts["head"],
    )  # fmt: skip
    network = build_classifier(classifier, facts["n_classes"], facts["channels"], weights=False)
    # The normalisation's shape is the weights' own: one value, or one a channel.
    state = safetensors.torch.load(weights)
    network.mean, network.std = state["mean"], state["std"]
    network.load_state_dict(state)
    return Predictor(network.to(device).to(memory_format=torch.channels_last).eval(), facts)
