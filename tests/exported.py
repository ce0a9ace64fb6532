"""A small finished synthetic set to be exported, and what an export leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Compute
from raysynth.core.storage import open_storage
from raysynth.data.plans import build_plan
from raysynth.stages.cluster import Resources
from raysynth.stages.export import Export, Group, begin, cut, finish, write_group
from raysynth.stages.generate import conclude
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.engine import SAMPLING, image_table, keys_of, render_all

REAL = 12
CLASSES = ["a", "b"]


class Made:
    """A complete generate artifact of 36 wanted images of which two failed, and the real images' artifact."""

    def __init__(self, root: str, kind: str = "single") -> None:
        self.storage = open_storage(root)
        table = image_table(REAL)
        if kind == "multi":  # img-000 has both findings, img-001 none, img-002 an uncertain one
            a, b = [1, 0, -1] + [0] * 9, [1, 0, 0] + [1] * 8 + [None]
            for at, values in ((3, a), (4, b)):
                table = table.set_column(at, table.schema.names[at], pa.array(values, pa.int8()))
        sex = [None, None, None, "M", "F", "F"] * 2
        table = table.set_column(table.schema.get_field_index("attr_sex"), "attr_sex", pa.array(sex))
        vocabulary = {"kind": kind, "classes": CLASSES, "attributes": {"sex": ["F", "M"]}}
        self.images = self._artifact("ingest", "vocabulary.json", json.dumps(vocabulary).encode(), licence="CC BY 4.0")
        facts = {"n_real_generator": 8, "train_on": "classifier_subset", "dataset": "films", "licence": "CC BY 4.0",
                 "weights_sha256": "w" * 64, "size": 8, "channels": 1, "steps": 30, "batch_size": 4}  # fmt: skip
        generator = self._artifact("train-generator", "export/generator.json", json.dumps(facts).encode())
        data = {"kind": "digits", "labels": {"kind": kind}}
        content: dict[str, Any] = {"name": "t", "data": data, "plan": {"replicas": 3}}
        self.wanted = Wanted.of(build_plan(table, build_experiment(content)))
        self.store = SyntheticSet(self.storage, "t", SAMPLING | {"generator_id": "g", "render_version": 1, "seed": 0})
        self.failed = keys_of(self.wanted)[:2]
        self.generated = Artifact.at(self.storage, "generate", "t", 1, {}, {"plan": "p"})
        render_all(self.store, self.wanted, FakeRenderer(broken=tuple(self.failed)))
        compute = Compute(max_failed_fraction=0.1)
        conclude(self.generated, Ledger(self.store), self.wanted, generator, compute, sums={})

    def _artifact(self, stage: str, name: str, data: bytes, **facts: Any) -> Artifact:
        artifact = Artifact.at(self.storage, stage, "t", 1, {}, {})
        artifact.put(name, data)
        artifact.commit({}, **facts)
        return artifact

    def begin(self, to: str, out: str, file_mb: int = 1) -> tuple[Export, list[Group]]:
        return begin(self.generated, self.images, to, out, file_mb)

    def export(self, to: str, out: str) -> Export:
        """All of it, in this process."""
        job, groups = self.begin(to, out)
        finish(job, self.generated, self.images, {g.number: write_group(job, g) for g in groups})
        return job


def no_ray() -> Resources:
    raise AssertionError("Ray was asked for")


def tree(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def cut_small(made: Made, job: Export) -> list[Group]:
    """The artifact cut as if files held about one part: 36 rows in shards of 8 are 5 groups."""
    part = max(e.size for e in made.storage.list(made.store.file("parts")))
    return list(cut(made.generated, made.store, part))
