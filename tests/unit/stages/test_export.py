"""What an export writes, without Ray: each format opened by the library it is for, and the data card."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from raysynth.core.schemas import synthetic_schema
from raysynth.data.images import decode_png
from raysynth.stages.export_formats import Vocabulary, export_rows, features_of, folder_name
from tests.engine import images
from tests.exported import CLASSES, Made


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
