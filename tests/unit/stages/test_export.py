"""Exports without Ray: each format opened by the library it is for, resumed, refused where it must be."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.errors import ConfigError, Damaged, NotReady
from raysynth.core.experiment import Compute
from raysynth.core.schemas import synthetic_schema
from raysynth.core.storage import Storage, open_storage
from raysynth.data.images import decode_png
from raysynth.data.plans import build_plan
from raysynth.stages.cluster import Resources
from raysynth.stages.export import Export, Group, begin, cut, export, finish, write_group, written
from raysynth.stages.export_formats import FORMATS, Vocabulary, export_rows, features_of, folder_name
from raysynth.stages.generate import conclude
from raysynth.synth.fake import FakeRenderer
from raysynth.synth.ledger import Ledger
from raysynth.synth.sets import SyntheticSet
from raysynth.synth.wanted import Wanted
from tests.engine import SAMPLING, image_table, images, keys_of, render_all

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(tmp_path_factory.mktemp("single")))


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(tmp_path_factory.mktemp("multi")), "multi")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def no_ray() -> Resources:
    raise AssertionError("Ray was asked for")


def tree(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_huggingface_folder(made: Made, tmp_path: Path) -> None:
    import datasets

    made.export("huggingface", str(tmp_path / "out"))
    rows = datasets.load_dataset(str(tmp_path / "out"))
    assert list(rows) == ["train"]
    rows = rows["train"]
    stored = images(made.store)
    assert dict(zip(rows["row_key"], rows["sha256"])) == stored
    assert len(rows) == 34
    assert rows.features["label"].names == CLASSES
    assert [rows.features["label"].int2str(r["label"]) == "a" for r in rows] == [v == 1 for v in rows["label_a"]]
    assert rows[0]["image"].size == (8, 8)
    raw = rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    assert hashlib.sha256(raw).hexdigest() == rows[0]["sha256"]
    assert set(rows.column_names) == {"label", *synthetic_schema(CLASSES, ["sex"]).names} - {"status", "reason"}


def test_findings_are_lists_of_class_labels(multi: Made, tmp_path: Path) -> None:
    import datasets

    multi.export("huggingface", str(tmp_path / "out"))
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    names = rows.features["labels"].feature.names
    for row in rows:
        assert [names[i] for i in row["labels"]] == [c for c in CLASSES if row[f"label_{c}"] == 1]
    by_source = {r["source_image_id"]: r for r in rows}
    assert by_source["img-000"]["labels"] == [0, 1]
    assert by_source["img-002"]["label_a"] == -1
    assert by_source["img-011"]["label_b"] is None


def test_webdataset_tars(made: Made, tmp_path: Path) -> None:
    import datasets
    import webdataset

    made.export("webdataset", str(tmp_path / "out"))
    tars = sorted(str(p) for p in (tmp_path / "out").glob("data/*.tar"))
    stored = images(made.store)
    seen = {}
    for row in webdataset.WebDataset(tars, shardshuffle=False).decode("pil"):
        seen[row["__key__"]] = row["json"]["sha256"]
        assert row["png"].size == (8, 8)
        assert row["json"]["generator_id"] == "g"
        assert row["json"]["label"] == CLASSES.index("a" if row["json"]["label_a"] else "b")
    assert seen == stored
    # By its folder, with the data card: the first rows' unknown sex alone would make the column null for ever.
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert {r["__key__"] for r in rows} == set(stored)
    assert {r["json"]["attr_sex"] for r in rows} == {None, "F", "M"}
    assert rows[0]["png"].size == (8, 8)


def test_webdataset_features_are_those_of_its_rows(multi: Made, tmp_path: Path) -> None:
    import datasets

    multi.export("webdataset", str(tmp_path / "out"))
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    vocabulary = Vocabulary(tuple(CLASSES), ("sex",), single=False)
    assert set(rows[0]["json"]) == {f["name"] for f in features_of(vocabulary)[0]["struct"]}
    both = {tuple(r["json"]["labels"]) for r in rows}
    assert both == {(), (1,), (0, 1)}


def test_class_folders(made: Made, tmp_path: Path) -> None:
    import datasets
    from torchvision.datasets import ImageFolder

    made.export("folders", str(tmp_path / "out"))
    folder = ImageFolder(str(tmp_path / "out" / "train"))
    assert folder.classes == CLASSES
    assert {Path(p).stem for p, _ in folder.samples} == set(images(made.store))
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert len(rows) == 34
    for row in rows:
        assert (row["label"] == "a") == (row["label_a"] == 1)
        png = (tmp_path / "out/train" / row["label"] / f"{row['row_key']}.png").read_bytes()
        assert hashlib.sha256(png).hexdigest() == row["sha256"]
        assert np.array_equal(np.asarray(row["image"]), decode_png(png)[..., 0])
    assert set(rows["attr_sex"]) == {"unknown", "F", "M"}


def test_folders_of_label_sets(multi: Made, tmp_path: Path) -> None:
    import datasets

    multi.export("folders", str(tmp_path / "out"))
    names = {p.name for p in (tmp_path / "out/train").iterdir() if p.is_dir()}
    assert names == {"a+b", "b", "none"}
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    assert {r["labels"] for r in rows} == {None, "b", "a|b"}


def test_folder_names_stay_inside_and_apart() -> None:
    names = [folder_name(n) for n in (
        ["../x"], [".."], ["a/b"], ["a", "b"], ["a+b"], [], ["none"], ["Lung Opacity (any)"])]  # fmt: skip
    assert not any("/" in n or n.startswith(".") for n in names)
    assert len(set(names)) == len(names)
    assert names[-3:] == ["none", "%6Eone", "Lung Opacity (any)"]


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_same_bytes_again_and_only_what_is_missing(made: Made, tmp_path: Path, to: str) -> None:
    job, groups = begin(made.generated, made.images, to, str(tmp_path / "one"))
    assert len(groups) == 1
    small = cut_small(made, job)
    assert len(small) == 5
    books = {g.number: write_group(job, g) for g in small}
    finish(job, made.generated, made.images, books)
    again = made.begin(to, str(tmp_path / "two"), 500)[0]
    finish(again, made.generated, made.images, {g.number: write_group(again, g) for g in reversed(small)})
    first = tree(tmp_path / "one")
    different = {".export/export.json"}  # it names the file size asked for
    assert {k: v for k, v in first.items() if k not in different} == {
        k: v for k, v in tree(tmp_path / "two").items() if k not in different}  # fmt: skip
    # What a kill leaves: a book missing, a file missing, a file cut short.
    assert set(written(job, small)) == {0, 1, 2, 3, 4}
    assert written(job, small) == json.loads(json.dumps(books), object_hook=_int_keys)
    files = [sorted(books[n]["files"])[0] for n in range(5)]
    (tmp_path / "one/.export/00000.json").unlink()
    (tmp_path / "one" / files[1]).unlink()
    (tmp_path / "one" / files[2]).write_bytes(b"cut")
    left = [g for g in small if g.number not in written(job, small)]
    assert [g.number for g in left] == [0, 1, 2]
    untouched = (tmp_path / "one" / files[4]).stat().st_mtime_ns
    for group in left:
        write_group(job, group)
    assert tree(tmp_path / "one") == first
    assert (tmp_path / "one" / files[4]).stat().st_mtime_ns == untouched


KILLED = """
import os, signal, sys
from raysynth.core.artifacts import Artifact
from raysynth.core.storage import LocalStorage, open_storage
from raysynth.stages.export import begin, cut, write_group

root, generated, images, out, file_bytes, writes = sys.argv[1:]
storage = open_storage(root)
generated, images = (Artifact.open(storage, path) for path in (generated, images))
job, _ = begin(generated, images, "webdataset", out, 1)
put, left = LocalStorage._staged, int(writes)

def staged(*args):
    global left
    found = put(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

LocalStorage._staged = staged
for group in cut(generated, job.store, int(file_bytes)):
    write_group(job, group)
"""
"""An export that kills its process in the middle of a write: staged, not yet in place."""


def test_killed_and_resumed_is_uninterrupted(made: Made, tmp_path: Path) -> None:
    job, _ = made.begin("webdataset", str(tmp_path / "whole"))
    small = cut_small(made, job)
    for group in small:
        write_group(job, group)
    part = max(e.size for e in made.storage.list(made.store.file("parts")))
    words = [made.storage.root, made.generated.path, made.images.path, str(tmp_path / "out"), str(part), "6"]
    command = [sys.executable, "-c", KILLED, *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    job, _ = made.begin("webdataset", str(tmp_path / "out"))
    there = written(job, small)
    assert set(there) == {0, 1}  # the third one's tar was in place, its book was not
    for group in small[2:]:
        write_group(job, group)
    assert {n: d for n, d in tree(tmp_path / "out").items() if not n.endswith(".tmp")} == tree(tmp_path / "whole")


def _int_keys(found: dict) -> dict:
    return {int(k) if k.isdigit() else k: v for k, v in found.items()}


def cut_small(made: Made, job: Export) -> list[Group]:
    """The artifact cut as if files held about one part: 36 rows in shards of 8 are 5 groups."""
    part = max(e.size for e in made.storage.list(made.store.file("parts")))
    return list(cut(made.generated, made.store, part))


def test_a_part_larger_than_a_file_is_shared_out(made: Made) -> None:
    part = max(e.size for e in made.storage.list(made.store.file("parts")))
    groups = list(cut(made.generated, made.store, part // 3))
    assert len(groups) > 10
    assert sum(g.rows for g in groups) == 34
    rows = {(part, place) for g in groups for part, places in g.parts for place in places.tolist()}
    assert len(rows) == 34


def test_a_complete_export_needs_no_ray(made: Made, tmp_path: Path) -> None:
    job, groups = begin(made.generated, made.images, "huggingface", str(tmp_path / "out"))
    finish(job, made.generated, made.images, {g.number: write_group(job, g) for g in groups})
    before = tree(tmp_path / "out")
    assert export(made.generated, made.images, "huggingface", str(tmp_path / "out"), no_ray) == str(tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_data_card(made: Made, tmp_path: Path) -> None:
    made.export("huggingface", str(tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["size_categories"] == ["n<1K"]
    assert head["pretty_name"] == "t: 34 synthetic medical images"
    assert head["task_categories"] == ["image-classification"]
    for words in (
        "Not for clinical use", "8 real images of films (`train_on: classifier_subset`)", "| sampler | ddim |",
        "| sampling steps | 2 |", "| guidance scale | 1 |", "| wanted | 36 | 100.00 |",
        "| accepted, exported here | 34 | 94.44 |", "| failed to render | 2 | 5.56 |", f"`{'w' * 64}`",
        made.generated.digest(), made.images.digest(), "load_dataset(", "@misc{t,", "`CC BY 4.0`",
    ):  # fmt: skip
        assert words in text, words
    lines = [line.split(" | ") for line in text.splitlines() if line.count("|") == 4]
    index = {cells[0].strip("| "): cells[1] for cells in lines}
    assert int(index["a"]) + int(index["b"]) == 34
    assert int(index["unknown"]) + int(index["F"]) + int(index["M"]) == 34


def test_a_part_rendered_before_a_class_was_added() -> None:
    old = pa.Table.from_pylist([{"row_key": "k", "label_a": 1, "image": {"bytes": b"x"}}],
                               schema=synthetic_schema(["a"], []))  # fmt: skip
    rows = export_rows(old, Vocabulary(("z", "a"), ("sex",), single=True)).to_pylist()
    assert (rows[0]["label"], rows[0]["label_a"], rows[0]["label_z"], rows[0]["attr_sex"]) == (1, 1, None, None)


def test_refusals_have_four_parts(made: Made, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--to: got 'webdatset', must be one of huggingface, .* mean webdataset\?"):
        made.begin("webdatset", out)
    with pytest.raises(ConfigError, match=r"--out: got '', must be a folder or s3"):
        made.begin("folders", "")
    with pytest.raises(ConfigError, match=r"--file-mb: got 0, must be >= 1"):
        made.begin("folders", out, 0)
    assert not (tmp_path / "out").exists()
    made.begin("folders", out)
    with pytest.raises(ConfigError, match=r"--out: got .*'folders' there, 'webdataset' asked for.*another folder"):
        made.begin("webdataset", out)
    with pytest.raises(ConfigError, match=r"file_mb: 1 there, 2 asked for"):
        made.begin("folders", out, 2)
    for name in ("photo.png", "deep/photo.png"):
        mine = tmp_path / name.replace("/", "-")
        (mine / name).parent.mkdir(parents=True)
        (mine / name).write_bytes(b"x")
        with pytest.raises(ConfigError, match=r"--out: got .*, must be empty, or hold this export. Choose another"):
            made.begin("folders", str(mine))
        assert [p.name for p in mine.rglob("*") if p.is_file()] == ["photo.png"]


def test_unfinished_or_damaged_images_say_what_to_run_first(tmp_path: Path) -> None:
    assert (NotReady.exit_code, Damaged.exit_code) == (2, 3), "repeating the same command would not help"
    made = Made(str(tmp_path / "runs"))
    job, groups = made.begin("huggingface", str(tmp_path / "out"))
    part = groups[0].parts[0][0]
    made.storage.put(made.store.file(part), b"flipped")
    with pytest.raises(Damaged, match=rf"{part} is not what was committed. `raysynth verify --repair`"):
        write_group(job, groups[0])
    made.storage.delete(made.store.file(part))
    with pytest.raises(Damaged, match="is not what was committed"):
        write_group(job, groups[0])
    assert not list((tmp_path / "out").glob("data/*"))
    made.storage.delete(made.generated.file("_SUCCESS"))
    with pytest.raises(NotReady, match=r"is not complete. Run `raysynth generate`"):
        export(made.generated, made.images, "huggingface", str(tmp_path / "new"), no_ray)


def test_s3_to_s3(s3_root: str, tmp_path: Path) -> None:
    made = Made(s3_root)
    out = f"{s3_root}/../shared".replace("/runs/..", "")
    job = made.export("webdataset", out)
    local = Made(str(tmp_path / "runs")).export("webdataset", str(tmp_path / "out"))
    assert _data(job.out) == _data(local.out)
    assert begin(made.generated, made.images, "webdataset", out, 1)[0].out.root == out


def _data(out: Storage) -> dict[str, str]:
    return {e.path: hashlib.sha256(out.get(e.path)).hexdigest() for e in out.list("data")}
