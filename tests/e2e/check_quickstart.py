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

import raysynth as raysynth_package
from raysynth.cli import SHORT
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
    again = raysynth("quickstart", "--short", "--root", root)
    assert "images/s" not in again, "a second run renders nothing"
    print(f"quickstart: {counts['ok']} images, second run {time.monotonic() - began:.1f} s")
    repair_a_corrupt_shard(root, store)


def repair_a_corrupt_shard(root: str, store: SyntheticSet) -> None:
    """One flipped byte is found, its shard alone is rendered again, to the same image hashes."""
    words = [str(Path(raysynth_package.__file__).parent / "quickstart.yaml"), f"root={root}", *SHORT]
    assert "400/400 committed" in raysynth("status", *words)
    assert "clean" in raysynth("verify", *words)
    shard = max(store.done())
    before = pq.read_table(io.BytesIO(store.part(store.marker(shard)["part"]))).column("sha256").to_pylist()
    file = store.file(store.marker(shard)["part"])
    data = bytearray(store.storage.get(file))
    data[100] ^= 1
    store.storage.put(file, bytes(data))
    assert "is not what was committed" in raysynth("verify", *words, code=3)
    assert "generate/quickstart-short-" in raysynth("verify", *words, "--repair")
    assert f"{len(before)} rows" in raysynth("generate", *words)
    assert "clean" in raysynth("verify", *words)
    new = max(store.done())
    assert pq.read_table(io.BytesIO(store.part(store.marker(new)["part"]))).column("sha256").to_pylist() == before
    assert "synthetic-sets/" in raysynth("ls", root)
    assert "0 orphan files" in raysynth("gc", root)
    print("quickstart: one corrupt shard found, rendered again to the same bytes")


def raysynth(*words: str, code: int = 0) -> str:
    """Output of a command that must end with `code`."""
    done = subprocess.run([sys.executable, "-m", "raysynth", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
