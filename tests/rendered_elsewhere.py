"""A set rendered elsewhere for tests: its listing as a CSV or parquet beside its pictures, and its way into a set."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Experiment
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import open_storage
from raysynth.data.images import encode_png
from raysynth.stages.external import by_location, listing_data, take_listing
from raysynth.stages.generate import synthetic_set
from raysynth.stages.plan import plan, wanted_rows
from raysynth.synth.importing import ImportRenderer
from raysynth.synth.ledger import rows_of
from tests.digits import CLASSES, digit_artifact, digit_images
from tests.engine import render_all

N = 40
IMAGES, LABELS = digit_images()


def listing(n: int = N) -> list[dict[str, Any]]:
    """Digits that the real set of 120 does not have, as if they had been made from its train images."""
    return [
        {"file": f"pics/{i:02d}.png", "digit": str(LABELS[200 + i]), "sex": ("M", "F")[i % 2],
         "made_from": f"digit-{4 * (i // 4):04d}", "cfg": 1.5, "noise": 1000 + i, "text": f"a {LABELS[200 + i]}"}
        for i in range(n)
    ]  # fmt: skip


def to_csv(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join([",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)]).encode()


def as_csv(root: str, rows: list[dict[str, Any]] | None = None) -> str:
    """The listing as a CSV with pictures twice the size, some of them JPEG-free PNG; its path."""
    storage, rows = open_storage(root), rows or listing()
    for i, row in enumerate(rows):
        storage.put(row["file"], encode_png(np.kron(IMAGES[200 + i], np.ones((2, 2, 1), np.uint8))))
    storage.put("made.csv", to_csv(rows))
    return f"{root}/made.csv"


def as_parquet(root: str) -> str:
    rows = [r | {"file": {"bytes": encode_png(IMAGES[200 + i]), "path": None}} for i, r in enumerate(listing())]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=16)
    open_storage(root).put("made.parquet", sink.getvalue())
    return f"{root}/made.parquet"


COLUMNS = {"label": "digit", "attributes": {"sex": "sex"}, "source": "made_from", "guidance": "cfg", "seed": "noise",
           "prompt": "text"}  # fmt: skip


def experiment(root: str, path: str, columns: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    content: dict[str, Any] = {
        "name": "ext", "root": f"{root}/runs",
        "data": {"kind": "csv", "path": "unused.csv", "image": {"size": 8, "channels": "grey"},
                 "columns": {"label": "y", "attributes": {"sex": "sex"}}},
        "generator": {"kind": "external", "path": path, "columns": columns or COLUMNS},
    }  # fmt: skip
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    return build_experiment(content)


def taken(e: Experiment, workers: int = 2) -> tuple[Artifact, Any, Any, list[dict[str, Any]]]:
    """The listing taken, planned and read by the engine: (artifact, set, wanted, statistics)."""
    storage = open_storage(e.root)
    images = digit_artifact(storage)
    listed = take_listing(e, storage, images)
    planned = plan(e, storage, images)
    wanted = wanted_rows(e, storage, planned)
    store = synthetic_set(e, storage, listed)
    reader = ImportRenderer(listing_data(e, CLASSES))
    return listed, store, wanted, render_all(store, by_location(wanted), reader, 4, 8, workers)


def rows_by_key(store: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for part in rows_of(store)["part"].unique():
        found |= {r["row_key"]: r for r in from_parquet(store.part(part)).to_pylist()}
    return found
