"""The contact sheet on real digits, chest films and lesions; blends of two real images stand for synthetic ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raysynth.core.artifacts import Artifact
from raysynth.core.config import build_experiment
from raysynth.core.experiment import Experiment, ImageSpec
from raysynth.core.presets import resolve_image
from raysynth.core.schemas import from_parquet, image_schema, to_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.images import decode_png, encode_png, prepare
from raysynth.data.pictures import StoredPictures
from raysynth.data.plans import build_plan
from raysynth.report.sheet import _Cells, _nearest, contact_sheet

Rows = list[dict]


def image_artifact(storage: Storage, rows: Rows, classes: Sequence[str], attributes: Sequence[str] = ()) -> Artifact:
    """An ingest artifact of `rows`: label, image (PNG bytes), attr_*; every fifth image is a test image."""
    full = []
    for i, row in enumerate(rows):
        labels = {f"label_{c}": int(row["label"] == c) for c in classes}
        full.append({"image_id": f"i{i:04d}", "patient_id": f"p{i}", "split": "test" if i % 5 == 4 else "train",
                     **labels, **row, "image": {"bytes": row["image"], "path": None}})  # fmt: skip
    table = pa.Table.from_pylist(full, schema=image_schema(classes, attributes))
    artifact = Artifact.at(storage, "ingest", "t", 1, {}, {})
    artifact.put("images/part-00000.parquet", to_parquet(table))
    artifact.put("table.parquet", to_parquet(table.drop_columns(["image", "report"])))
    artifact.commit({})
    return artifact


def digits(n: int) -> Rows:
    real = load_digits()
    pictures = np.kron(np.round(real.images[:n] * 15.9375), np.ones((2, 2))).astype(np.uint8)[..., None]
    return [{"label": str(t), "image": encode_png(p)} for t, p in zip(real.target[:n], pictures)]


def files(folder: Path, n: int, label: str, spec: ImageSpec) -> Rows:
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    rows = rows[:: len(rows) // n]
    return [
        {"label": r[label], "image": prepare((folder / r["file"]).read_bytes(), resolve_image(spec)).png,
         "attr_sex": {"F": "F", "M": "M", "female": "F", "male": "M"}.get(r.get("sex", ""))}
        for r in rows
    ]  # fmt: skip


def sheet(root: Path, rows: Rows, experiment: Experiment, attributes: Sequence[str] = ()) -> np.ndarray:
    storage = open_storage(str(root))
    classes = sorted({r["label"] for r in rows})
    images = image_artifact(storage, rows, classes, attributes)
    table = pa.Table.from_pylist(
        [{"image_id": f"i{i:04d}", "patient_id": f"p{i}", "split": "test" if i % 5 == 4 else "train",
          **{f"label_{c}": int(r["label"] == c) for c in classes},
          **{f"attr_{a}": r[f"attr_{a}"] for a in attributes}} for i, r in enumerate(rows)],
    )  # fmt: skip
    plan = build_plan(table, experiment)
    source = dict(zip(plan["row_key"].to_pylist(), plan["source_image_id"].to_pylist()))

    def read(keys: Sequence[str]) -> Mapping[str, bytes]:
        found = {}
        for key in keys:
            one = int(source[key][1:])
            two = next(i for i in range(one + 1, one + len(rows)) if rows[i % len(rows)]["label"] == rows[one]["label"])
            pair = [decode_png(rows[i % len(rows)]["image"]).astype(np.float32) for i in (one, two)]
            found[key] = encode_png(((pair[0] + pair[1]) / 2).astype(np.uint8))
        return found

    png = contact_sheet(experiment, storage, images, plan, read, "synthetic/t-0123456789ab")
    (root / "sheet.png").write_bytes(png)
    return np.asarray(Image.open(io.BytesIO(png)))


def experiment(size: int, preset: str = "general", **generator: object) -> Experiment:
    return build_experiment({
        "name": "example", "training_set": {"n_per_class": 2}, "plan": {"replicas": 6},
        "data": {"kind": "csv", "path": "x", "image": {"size": size, "preset": preset},
                 "columns": {"label": "label", "attributes": {"sex": "sex"}}},
        "generator": {"train_on": "donor", **generator},
    })  # fmt: skip


def test_digits(tmp_path: Path) -> None:
    page = sheet(tmp_path, digits(160), experiment(16))
    assert page.shape[0] > 10 * 80
    assert page.shape[1] > 15 * 80
    # Enlarged by a whole factor: thumbnails are made of 5 x 5 blocks of one colour.
    assert (page == 255).mean() > 0.3
    assert len(np.unique(page)) > 50


def test_chest_films(tmp_path: Path, shared_data: Path) -> None:
    rows = files(shared_data / "nih_cxr_256", 60, "label", ImageSpec(preset="chest", size=32))
    two = experiment(32, "chest", conditions=["label", "sex"])
    page = sheet(tmp_path, rows, two, ["sex"])
    # A row for each class and sex.
    assert 4 * 90 < page.shape[0] - 132 < 5 * 110
    plain = sheet(tmp_path / "plain", rows, experiment(32, "chest"), ["sex"])
    assert plain.shape[0] < page.shape[0]


def test_seven_classes_of_both_sexes_have_a_row_each(tmp_path: Path) -> None:
    rows = [r | {"attr_sex": "FM"[i % 2]} for i, r in enumerate(digits(500)) if int(r["label"]) < 7]
    page = sheet(tmp_path, rows, experiment(16, conditions=["label", "sex"]), ["sex"])
    assert page.shape[0] > 14 * 84 + 6 * 12
    # Blank paper from edge to edge: between rows 4 px, between classes 16.
    blank = "".join("-" if (line == 255).all() else "x" for line in page[132:])
    assert [len(gap) for gap in blank.strip("-").split("x") if gap][:13] == [4, 16] * 6 + [4]
    table = pa.table({f"label_{i}": pa.array(np.eye(7)[i].repeat(5), pa.int8()) for i in range(7)}
                     | {"attr_sex": list("FMXYZ") * 7})  # fmt: skip
    assert {value for _, value in _Cells.of(table, table, experiment(16, conditions=["label", "sex"])).order} == {""}


def test_images_of_unknown_sex_have_rows_of_their_own() -> None:
    labels = {f"label_{c}": pa.array(np.eye(2)[i].repeat(3), pa.int8()) for i, c in enumerate("ab")}
    real = pa.table(labels | {"attr_sex": ["F", "M", None, None, None, None]})
    synthetic = pa.table(labels | {"attr_sex": ["F", "F", "F", None, "X", None]})
    cells = _Cells.of(real, synthetic, experiment(16, conditions=["label", "sex"]))
    assert cells.order == [("a", "F"), ("a", "M"), ("a", ""), ("b", "X"), ("b", "")]
    assert {*cells.names(real), *cells.names(synthetic)} == {*cells.order}, "every image has a row"
    assert cells.words(("b", ""), 3, 2) == ("b, sex unknown", "3 real, 2 synthetic")


def test_skin(tmp_path: Path, shared_data: Path) -> None:
    rows = files(shared_data / "ham10000", 100, "dx", ImageSpec(preset="skin", size=256))
    one = experiment(256, "skin")
    rows = [r for r in rows if sum(r["label"] == q["label"] for q in rows) >= 6]
    page = sheet(tmp_path, rows, one, ["sex"])
    assert page[..., 0].astype(int).max() - page[..., 2].astype(int).min() > 100
    assert (page[..., 0] != page[..., 2]).mean() > 0.2, "skin keeps its colour"


def test_the_nearest_training_image_finds_a_copy() -> None:
    stored = {f"i{i}": r["image"] for i, r in enumerate(digits(100))}
    copy = decode_png(stored["i42"]).astype(np.int16)
    noisy = np.clip(copy + np.random.default_rng(0).integers(-20, 20, copy.shape), 0, 255).astype(np.uint8)
    assert _nearest([noisy], list(stored), stored) == ["i42"]
    assert _nearest([noisy], [i for i in stored if i != "i42"], stored) != ["i42"]
    # A generator of another size than the stored images.
    assert _nearest([noisy[::2, ::2]], list(stored), stored) == ["i42"]


def test_rows_of_the_sheet_follow_the_label_policy() -> None:
    table = pa.table({f"label_{n}": pa.array(v, pa.int8()) for n, v in {"a": [1, 0, -1, 0], "b": [1, 1, 0, 0]}.items()})
    for policy, names in (("ignore", ["a", "b", "unknown", "none"]), ("zeros", ["a", "b", "none", "none"])):
        labels = {"kind": "multi", "policy": {"a": policy}}
        e = build_experiment({"name": "x", "data": {"path": "x", "columns": {"findings": {"a": "a", "b": "b"}},
                                                    "labels": labels}})  # fmt: skip
        cells = _Cells.of(table, table, e)
        assert [name for name, _ in cells.names(table)] == names
        assert [name for name, _ in cells.order] == [n for n in ("a", "b", "none", "unknown") if n in names]


def test_only_the_row_groups_of_the_pictures_shown_are_read(tmp_path: Path) -> None:
    rows = digits(120)
    storage = open_storage(str(tmp_path))
    images = image_artifact(storage, rows, [str(i) for i in range(10)])
    whole = from_parquet(storage.get(images.file("images/part-00000.parquet")))
    storage.put(images.file("images/part-00000.parquet"), to_parquet(whole.slice(0, 60), [20] * 3))
    storage.put(images.file("images/part-00001.parquet"), to_parquet(whole.slice(60), [20] * 3))
    ids = whole["image_id"].to_pylist()
    pictures = StoredPictures(storage, images.file("images"), ids)
    asked = {"i0005", "i0041", "i0119"}
    assert pictures.read(asked) == {i: rows[int(i[1:])]["image"] for i in asked}
    assert pictures.sample(ids[:30], 30) == ids[:30]
    drawn = pictures.sample(ids[::2], 20)
    assert len({int(i[1:]) // 20 for i in drawn}) == 2
    assert len(set(drawn)) == 20
    # A damaged group that holds none of the pictures asked for is not noticed.
    column = pq.ParquetFile(tmp_path / images.file("images/part-00000.parquet")).metadata.row_group(1).column(5)
    assert column.path_in_schema == "image.bytes"
    path = tmp_path / images.file("images/part-00000.parquet")
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert pictures.read({"i0005", "i0059"}).keys() == {"i0005", "i0059"}
    with pytest.raises(OSError):  # noqa: PT011 - Arrow's words differ by version
        pictures.read({"i0025"})


@pytest.mark.parametrize("train_on", ["donor", "classifier_subset"])
def test_neighbours_come_from_what_the_generator_saw(tmp_path: Path, train_on: str) -> None:
    """With the classifier's own images in training, a synthetic copy of its source stands beside that source."""
    rows = digits(160)
    storage = open_storage(str(tmp_path))
    classes = [str(i) for i in range(10)]
    images = image_artifact(storage, rows, classes)
    e = experiment(16, train_on=train_on)
    table = pa.Table.from_pylist(
        [{"image_id": f"i{i:04d}", "patient_id": f"p{i}", "split": "test" if i % 5 == 4 else "train",
          **{f"label_{c}": int(r["label"] == c) for c in classes}} for i, r in enumerate(rows)],
    )  # fmt: skip
    plan = build_plan(table, e)
    source = dict(zip(plan["row_key"].to_pylist(), plan["source_image_id"].to_pylist()))
    copies = lambda keys: {k: rows[int(source[k][1:])]["image"] for k in keys}  # noqa: E731
    page = np.asarray(Image.open(io.BytesIO(contact_sheet(e, storage, images, plan, copies))))
    side, step, top = 80, 84, 132
    left = page.shape[1] - 36 - 3 * step + 4
    first_synthetic = page[top : top + side, left - 28 - 8 * step + 4 :][:, :side]
    first_neighbour = page[top : top + side, left : left + side]
    assert (first_synthetic == first_neighbour).all() == (train_on == "classifier_subset")
