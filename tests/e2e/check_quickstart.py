"""`python -m tests.e2e.check_quickstart ROOT`: what `raysynth quickstart` left is what it promises."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

import raysynth as raysynth_package
from raysynth.cli import SHORT
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import open_storage
from raysynth.synth.sets import FOLDER, SyntheticSet

STAGES = (
    "ingest", "train-generator", "plan", "generate", "train-classifier", "sweep", "evaluate", "fidelity", "report",
)  # fmt: skip


def main(root: str) -> None:
    artifacts: dict[str, list[Path]] = {}
    for done in sorted(Path(root).glob("*/*/_SUCCESS")):
        artifacts.setdefault(done.parent.parent.name, []).append(done.parent)
    assert set(STAGES) <= set(artifacts), artifacts
    for folder in (f for folders in artifacts.values() for f in folders):
        run = json.loads((folder / "run.json").read_text())
        assert run["digest"], folder
        assert run["versions"]["ray"], folder
    assert len(artifacts["train-generator"]) == 2, "a donor's, and one of the classifier's own images"
    rows = rendered_once(root)
    check_answer(artifacts)
    check_page(artifacts["report"][0])
    for folder in artifacts["generate"]:
        if (folder / "contact_sheet.png").exists():
            assert min(Image.open(folder / "contact_sheet.png").size) > 300, folder
    began = time.monotonic()
    again = raysynth("quickstart", "--short", "--root", root)
    assert "images/s" not in again, "a second run renders nothing"
    assert "classifiers to train" not in again, "a second run trains nothing"
    took = time.monotonic() - began
    assert took < 60, "a second run takes seconds"
    print(f"quickstart: {rows} images, second run {took:.1f} s")
    repair_corrupt_shards(root)


def rendered_once(root: str) -> int:
    """Each set holds the largest arm's rows, 10 x 100, each once, and a row stands alone."""
    storage = open_storage(root)
    sets = [SyntheticSet.open(storage, name) for name in storage.folders(FOLDER)]
    assert len(sets) == 2, sets
    for store in sets:
        markers = store.markers(store.done())
        assert sum(m["rows"] for m in markers.values()) == 1000, store.path
        row = from_parquet(store.part(markers[0]["part"])).slice(0, 1).to_pylist()[0]
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (8, 8)
        assert row["generator_id"]
        assert row["seed"] is not None
    return 2000


def check_answer(artifacts: dict[str, list[Path]]) -> None:
    """Eight arms, two seeds; more real images make a better classifier; both contrasts carry an interval."""
    trials = from_parquet((artifacts["sweep"][0] / "trials.parquet").read_bytes()).to_pandas()
    assert len(trials) == 16, trials
    assert (trials["state"] == "done").all()
    metrics = from_parquet((artifacts["evaluate"][0] / "metrics.parquet").read_bytes()).to_pandas()
    whole = metrics[(metrics["finding"] == "macro") & (metrics["subgroup"] == "") & (metrics["metric"] == "accuracy")]
    accuracy = whole.groupby("arm")["value"].mean()
    assert len(accuracy) == 8
    assert accuracy["upper bound"] > accuracy["real"], accuracy
    assert accuracy.min() > 0.2, "ten classes: chance is 0.1"
    comparisons = from_parquet((artifacts["evaluate"][0] / "comparisons.parquet").read_bytes()).to_pandas()
    primary = comparisons[comparisons["primary"]]
    assert list(primary["arm"]) == ["mix x10"]
    assert (primary["ci_low"] < primary["difference"]).all()
    print(accuracy.round(3).to_string())


def check_page(folder: Path) -> None:
    """One page without a network, and its tables beside it."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://[^"]+"', page)
    assert "the generator saw" in page.lower()
    assert {"metrics.csv", "comparisons.csv", "arms.csv"} <= {p.name for p in folder.iterdir()}


def repair_corrupt_shards(root: str) -> None:
    """One flipped byte in each synthetic set is found; they alone are rendered again, to the same hashes."""
    from raysynth.core.config import load_experiment
    from raysynth.stages.pipeline import Pipeline

    words = [str(Path(raysynth_package.__file__).parent / "quickstart.yaml"), f"root={root}", *SHORT]
    status = raysynth("status", *words)
    assert "1,000/1,000 images" in status
    assert "trials: 16/16 trained" in status
    arms = Pipeline(load_experiment(words[0], words[1:])).arm_pipelines
    stores = {p.synthetic_set.path: p.synthetic_set for _, p in arms if p.experiment.training_set.needs_synthetic}
    assert len(stores) == 2, "the donor's and the own generator's"
    assert raysynth("verify", *words).count("verify: clean, ") == 2

    def last_shard(store: SyntheticSet) -> list[str]:
        part = store.part(store.marker(max(store.done()))["part"])
        return from_parquet(part).column("sha256").to_pylist()

    before = {path: last_shard(store) for path, store in stores.items()}
    for store in stores.values():
        file = store.file(store.marker(max(store.done()))["part"])
        data = bytearray(store.storage.get(file))
        data[100] ^= 1
        store.storage.put(file, bytes(data))
    assert raysynth("verify", *words, code=3).count("is not what was committed") == 2
    assert raysynth("verify", *words, "--repair").count("generate/quickstart-short-") >= 2
    again = raysynth("run", *words)
    for path, hashes in before.items():
        assert f"of {path}: {len(hashes)} rows in 1 shards" in again
    assert raysynth("verify", *words).count("verify: clean, ") == 2
    assert {path: last_shard(store) for path, store in stores.items()} == before
    assert "synthetic-sets/" in raysynth("ls", root)
    assert "0 orphan files" in raysynth("gc", root)
    print("quickstart: a corrupt shard in each set found, rendered again to the same bytes")


def raysynth(*words: str, code: int = 0) -> str:
    """Output of a command that must end with `code`."""
    done = subprocess.run([sys.executable, "-m", "raysynth", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
