"""What a generator is told about an image: labels and attributes -> one float vector, and back to words.

Entries of the vector, in order: for each class (single-label) one entry and one for "missing"; for each finding
(multi-label) a value entry and a "missing" entry; for each attribute one entry a category and one "missing"; for
`age` the decade and a "missing" entry; last the "unconditional" entry, which only the null condition of
classifier-free guidance sets (Ho & Salimans 2022). Age in decades and unknown-as-a-value follow the Synthetically
Enhanced recipe (2311.09402).

Input: `label_*` and `attr_*` columns as annotated. Output: float32 vectors. The layout travels with the exported
generator as `condition.json`. Knows nothing of models, nor how often a condition is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from raysynth.core.errors import ConfigError, DataError
from raysynth.core.schemas import ATTRIBUTE, LABEL

AGE = "age"
DECADES = 10.0
"""Divisor that brings a decade (age // 10) to about [0, 1]."""


@dataclass(frozen=True)
class ConditionSpec:
    """Layout of the condition vector and what the generator has seen of it."""

    kind: Literal["single", "multi"]
    """single: one class an image; multi: any number of findings."""
    classes: list[str]
    """Classes or findings in vector order; empty where the generator is not told the label."""
    seen: list[str]
    """The classes that had at least one positive training image."""
    policy: dict[str, str] = field(default_factory=dict)
    """Finding -> ignore (missing), zeros or ones for an uncertain (-1) or absent annotation; default ignore."""
    attributes: dict[str, list[str]] = field(default_factory=dict)
    """Attribute -> the categories the generator has seen, in vector order."""
    age: bool = False
    """Whether `attr_age`, in years, enters as a decade."""

    @classmethod
    def build(
        cls,
        vocabulary: Mapping[str, Any],
        conditions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        policy: Mapping[str, str],
    ) -> ConditionSpec:
        """The layout for `generator.conditions` over a data set's vocabulary.

        Args:
            vocabulary: ingest's `vocabulary.json`: kind, classes, attributes.
            conditions: `label` and attribute names.
            columns: the training images' `label_*` and `attr_*` columns: what the generator will see.
            policy: the experiment's `data.labels.policy`.

        Raises:
            ConfigError: an attribute that the data does not have.
        """
        classes: list[str] = list(vocabulary["classes"]) if "label" in conditions else []
        seen = [c for c in classes if (_labels(columns, c, policy.get(c, "ignore")) == 1).any()]
        known: Mapping[str, Sequence[str]] = vocabulary.get("attributes") or {}
        attributes: dict[str, list[str]] = {}
        for i, name in enumerate(conditions):
            if name in ("label", AGE):
                continue
            if name not in known or ATTRIBUTE + name not in columns:
                raise ConfigError(
                    f"generator.conditions[{i}]", name, f"one of {', '.join(['label', *sorted(known)])}",
                    "Map the attribute under data.columns.attributes.",
                )  # fmt: skip
            present = {str(v) for v in columns[ATTRIBUTE + name] if not _absent(v)}
            attributes[name] = [c for c in known[name] if c in present]
        if AGE in conditions and ATTRIBUTE + AGE not in columns:
            raise ConfigError(
                "generator.conditions", AGE, "an attribute of the data", "Map data.columns.attributes.age."
            )
        return cls(vocabulary["kind"], classes, seen, dict(policy), attributes, AGE in conditions)

    @property
    def entries(self) -> list[str]:
        """Name of every entry of the vector, in order."""
        names: list[str] = []
        if self.kind == "multi":
            for finding in self.classes:
                names += [f"label={finding}", f"label={finding} missing"]
        elif self.classes:
            names += [*(f"label={c}" for c in self.classes), "label missing"]
        for attribute, categories in self.attributes.items():
            names += [*(f"{attribute}={c}" for c in categories), f"{attribute} missing"]
        if self.age:
            names += ["age decade / 10", "age missing"]
        return [*names, "unconditional"]

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return len(self.entries)

    @property
    def columns(self) -> list[str]:
        """The table columns that `encode` reads."""
        attributes = [*self.attributes, *([AGE] if self.age else [])]
        return [LABEL + c for c in self.classes] + [ATTRIBUTE + a for a in attributes]

    @property
    def null(self) -> np.ndarray:
        """The null condition of classifier-free guidance: (dim,) float32."""
        vector = np.zeros(self.dim, np.float32)
        vector[-1] = 1.0
        return vector

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Condition vectors of rows.

        Args:
            columns: `label_*` (1, 0, -1, null) and `attr_*` (text, null) columns of equal length N. A class of the
                generator that these rows' data do not have, while they have others, is not annotated.

        Returns:
            conditions: (N, dim) float32.

        Raises:
            DataError: a column is absent, or a row asks for a class or category that the generator never saw.
        """
        some = any(LABEL + c in columns for c in self.classes)
        for name in self.columns:
            if name not in columns and not (some and name.startswith(LABEL)):
                raise DataError(name, None, "a column of the rows", f"The generator was told {self.columns}.")
        n = len(next(iter(columns.values()), []))
        parts = [self._encode_labels(columns, n)]
        for attribute, categories in self.attributes.items():
            parts.append(self._encode_attribute(attribute, categories, columns[ATTRIBUTE + attribute]))
        if self.age:
            parts.append(_encode_age(columns[ATTRIBUTE + AGE]))
        return np.concatenate([*parts, np.zeros((n, 1), np.float32)], axis=1)

    def _encode_labels(self, columns: Mapping[str, Sequence[Any]], n: int) -> np.ndarray:
        if not self.classes:
            return np.zeros((n, 0), np.float32)
        values = np.stack([
            _labels(columns, c, self.policy.get(c, "ignore")) if LABEL + c in columns else np.full(n, -1, np.int8)
            for c in self.classes
        ], axis=1)  # fmt: skip
        for i, name in enumerate(self.classes):
            if name not in self.seen and (values[:, i] == 1).any():
                raise DataError(
                    "label", name, f"a class the generator has seen: {', '.join(self.seen) or 'none'}",
                    "Use another generator.train_on or a smaller training_set, or leave it out of data.labels.",
                )  # fmt: skip
        positive, missing = (values == 1).astype(np.float32), (values == -1).astype(np.float32)
        if self.kind == "multi":
            return np.stack([positive, missing], axis=2).reshape(n, -1)
        return np.concatenate([positive, 1.0 - positive.max(axis=1, keepdims=True)], axis=1)

    def _encode_attribute(self, name: str, categories: list[str], values: Sequence[Any]) -> np.ndarray:
        places = {category: i for i, category in enumerate(categories)}
        encoded = np.zeros((len(values), len(categories) + 1), np.float32)
        for row, value in enumerate(values):
            if _absent(value):
                encoded[row, -1] = 1.0
            elif str(value) in places:
                encoded[row, places[str(value)]] = 1.0
            else:
                raise DataError(
                    ATTRIBUTE + name, value, f"a category the generator has seen: {', '.join(categories) or 'none'}",
                    "Use another generator.train_on, or leave it out of generator.conditions.",
                )  # fmt: skip
        return encoded

    def to_json(self) -> str:
        """Text of `condition.json`; `entries` is there for readers of the file."""
        return json.dumps({**asdict(self), "entries": self.entries}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> ConditionSpec:
        """The spec in a `condition.json`."""
        content = json.loads(text)
        content.pop("entries", None)
        return cls(**content)


def _absent(value: Any) -> bool:
    # NaN, which is what pandas makes of a null, differs from itself.
    return value is None or value == "" or value != value


def _labels(columns: Mapping[str, Sequence[Any]], name: str, policy: str) -> np.ndarray:
    """(N,) int8 in {1, 0, -1}: -1 is missing, after the policy."""
    raw = np.array([-1 if _absent(v) else int(v) for v in columns[LABEL + name]], np.int8)
    if policy != "ignore":
        raw[raw == -1] = 1 if policy == "ones" else 0
    return raw


def _encode_age(values: Sequence[Any]) -> np.ndarray:
    encoded = np.zeros((len(values), 2), np.float32)
    for row, value in enumerate(values):
        if _absent(value):
            encoded[row, 1] = 1.0
            continue
        try:
            encoded[row, 0] = (float(value) // 10) / DECADES
        except ValueError:
            raise DataError(ATTRIBUTE + AGE, value, "years as a number, or nothing") from None
    return encoded
