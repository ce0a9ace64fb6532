"""`python -m tests.e2e.check_quickstart ROOT`: what `raysynth quickstart` left is what it promises."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from raysynth.core.storage import open_storage
from raysynth.synth.sets import FOLDER, SyntheticSet


def main(root: str) -> None:
    artifacts = {p.parent.parent.name: p.parent for p in Path(root).glob("*/*/_SUCCESS")}
    assert {"ingest", "train-generator", "plan", "generate"} <= set(artifacts), artifacts
    for folder in artifacts.values():
        run = json.loads((folder / "run.json").read_text())
        assert run["digest"], folder
        assert run["versions"]["ray"], folder
    counts = json.loads((artifacts["generate"] / "run.json").read_text())["counts"]
    assert counts["wanted"] == counts["ok"] >= 400, counts
    rows = pq.read_table(artifacts["generate"] / "rows.parquet")
    assert rows.num_rows == counts["wanted"]

    storage = open_storage(root)
    store = SyntheticSet.open(storage, storage.folders(FOLDER)[0])
    part = pq.read_table(io.BytesIO(store.part(rows["part"][0].as_py())))
    row = part.slice(0, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert image.size == (8, 8), image.size
    assert row["generator_id"], "a row stands alone"
    assert row["seed"] is not None

    sheet = Image.open(artifacts["generate"] / "contact_sheet.png")
    assert min(sheet.size) > 300, sheet.size
    began = time.monotonic()
    again = subprocess.run(
        [sys.executable, "-m", "raysynth", "quickstart", "--short", "--root", root], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "images/s" not in again.stdout, "a second run renders nothing"
    print(f"quickstart: {counts['ok']} images, second run {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
