"""Presets: what an experiment's null fields stand for. A preset is a word for its values: typed out, they are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from raysynth.core.evidence import Classifier
from raysynth.core.experiment import Generator, ImageSpec

IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    "general": {"channels": "rgb", "fit": "pad", "value_range": "full"},
    "chest": {"channels": "grey", "fit": "pad", "value_range": "percentile"},
    "skin": {"channels": "rgb", "fit": "crop", "value_range": "full"},
}

GENERATOR_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"base_channels": 32, "channel_multipliers": [1, 2, 2], "res_blocks": 1,
             "attention_resolutions": [8], "heads": 2},
    "small": {"base_channels": 32, "channel_multipliers": [1, 2, 3], "res_blocks": 2,
              "attention_resolutions": [8], "heads": 4},
    "base": {"base_channels": 96, "channel_multipliers": [1, 2, 2, 4], "res_blocks": 2,
             "attention_resolutions": [8, 16], "heads": 4},
    "paper": {"base_channels": 128, "channel_multipliers": [1, 1, 2, 2, 4, 4], "res_blocks": 2,
              "attention_resolutions": [8, 16, 32], "heads": 4},
}  # fmt: skip


def _filled(section: Any, preset: dict[str, Any]) -> Any:
    return dataclasses.replace(section, **{k: v for k, v in preset.items() if getattr(section, k) is None})


def resolve_image(spec: ImageSpec) -> ImageSpec:
    """`spec` with every null replaced by its preset's value."""
    return _filled(spec, IMAGE_PRESETS[spec.preset])


def resolve_generator(generator: Generator, image: ImageSpec) -> Generator:
    """`generator` with every null replaced by its preset's value, `size` by the stored image's side."""
    return _filled(generator, {**GENERATOR_PRESETS[generator.preset], "size": image.size})


def resolve_classifier(classifier: Classifier, image: ImageSpec) -> Classifier:
    """`classifier` with null fields replaced: `size` by the stored image's side, `validate_every` by a tenth."""
    return _filled(classifier, {"size": image.size, "validate_every": max(1, classifier.steps // 10)})
