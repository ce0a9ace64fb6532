"""Real digits as a small ingest artifact, for tests of the stages that follow ingest."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from sklearn.datasets import load_digits

from raysynth.core.artifacts import Artifact
from raysynth.core.schemas import image_schema, to_parquet
from raysynth.core.storage import Storage
from raysynth.data.images import encode_png

CLASSES = [str(c) for c in range(10)]


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: (1797, 8, 8, 1) uint8 and (1797,) labels."""
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target


def digit_artifact(storage: Storage, n: int = 120, parts: int = 2, val: bool = False) -> Artifact:
    """An ingest artifact of the first `n` digits; every fourth is a test image, with `val` every other fourth is a
    validation image; `attr_sex` is unknown now and then."""
    def split(i: int) -> str:
        return "test" if i % 4 == 3 else "val" if val and i % 4 == 1 else "train"

    images, labels = digit_images()
    rows = []
    for i in range(n):
        rows.append({
            "image_id": f"digit-{i:04d}", "dataset": "digits", "split": split(i),
            "patient_id": f"p{i}", "image": {"bytes": encode_png(images[i]), "path": None},
            **{f"label_{c}": int(labels[i] == int(c)) for c in CLASSES},
            "attr_sex": (None, "F", "M")[i % 3], "height": 8, "width": 8,
        })  # fmt: skip
    config = {"n": n, "val": val} if val else {"n": n}
    artifact = Artifact.at(storage, "ingest", "digits", 1, config, {"source": "sklearn"})
    table = pa.Table.from_pylist(rows, schema=image_schema(CLASSES, ["sex"]))
    share = -(-n // parts)
    for part in range(parts):
        artifact.put(f"images/part-{part:05d}.parquet", to_parquet(table.slice(part * share, share)))
    artifact.put("table.parquet", to_parquet(table.drop_columns(["image", "report"])))
    vocabulary = {"kind": "single", "classes": CLASSES, "policy": {}, "attributes": {"sex": ["F", "M"]}}
    artifact.put("vocabulary.json", json.dumps(vocabulary).encode())
    artifact.commit({"images": n})
    return artifact
