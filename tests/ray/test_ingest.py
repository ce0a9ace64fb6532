"""Ingest as a whole, on real Ray tasks: pictures in, image table out, bad input quarantined, crashes survived."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from raysynth.cli import environment_fault
from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError, GateFailed
from raysynth.core.experiment import Data, Experiment
from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import from_parquet
from raysynth.core.storage import Storage, open_storage
from raysynth.data.images import decode_png, pixel_sha256
from raysynth.data.reading import ImageReader
from raysynth.stages import ingest as stage
from raysynth.stages.ingest import ingest, load_table, load_vocabulary

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SMALL = {"size": 8, "channels": "grey"}
OUTPUTS = ["_SUCCESS", "config.yaml", "quarantine.parquet", "run.json", "table.parquet", "vocabulary.json"]


def picture(i: int) -> bytes:
    return ImageReader(Data(kind="digits")).read(f"digits#{i}")


def bitmap(i: int) -> bytes:
    """The same picture as BMP, whose length does not depend on its content."""
    sink = io.BytesIO()
    Image.open(io.BytesIO(picture(i))).save(sink, "BMP")
    return sink.getvalue()


def experiment(**data: Any) -> Experiment:
    return build_experiment({"name": "x", "data": {"image": SMALL, **data}})


def with_rows(e: Experiment, rows: int) -> Experiment:
    return dataclasses.replace(e, compute=dataclasses.replace(e.compute, ingest_rows=rows))


def source(root: str, n: int = 30) -> Storage:
    """n digits, two classes, two images a patient."""
    storage = open_storage(root)
    lines = ["file,dx,who,Sex"]
    for i in range(n):
        storage.put(f"pics/{i:02d}.png", picture(i))
        lines.append(f"pics/{i:02d}.png,{'ab'[i // 2 % 2]},p{i // 2},{'FM?'[i % 3]}")
    storage.put("table.csv", "\n".join(lines).encode())
    return storage


def csv_experiment(root: str, **more: Any) -> Experiment:
    columns = {"label": "dx", "patient": "who", "attributes": {"sex": "Sex"}}
    return experiment(**{"path": f"{root}/table.csv", "columns": columns, **more})


def files(storage: Storage, folder: str) -> dict[str, str]:
    """Every file below a folder with the hash of its content."""
    return {e.path.removeprefix(folder + "/"): sha256_bytes(storage.get(e.path)) for e in storage.list(folder)}


def test_csv_to_image_table(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    source(any_root)
    storage = open_storage(f"{any_root}/out")
    e = with_rows(csv_experiment(any_root, dataset="D", licence="CC0"), 7)
    artifact = ingest(e, storage)
    assert sorted(files(storage, artifact.path)) == sorted([*OUTPUTS, "images/part-00000.parquet"])

    table = load_table(storage, artifact)
    assert table["image_id"].to_pylist() == [f"pics/{i:02d}.png" for i in range(30)]
    assert table["patient_id"][3].as_py() == "p1"
    assert table["attr_sex"][:3].to_pylist() == ["F", "M", None]
    where = dict(zip(table["patient_id"].to_pylist(), table["split"].to_pylist()))
    assert [where[p] for p in table["patient_id"].to_pylist()] == table["split"].to_pylist()

    content = storage.get(artifact.file("images/part-00000.parquet"))
    images = from_parquet(content)
    assert images.drop_columns(["image", "report"]).equals(table)
    for i, row in enumerate(images.to_pylist()):
        png = row["image"]["bytes"]
        assert sha256_bytes(png) == row["sha256"]
        assert pixel_sha256(decode_png(png)) == row["pixel_sha256"]
        assert np.array_equal(decode_png(png), decode_png(picture(i)))

    vocabulary = load_vocabulary(storage, artifact)
    assert vocabulary["classes"] == ["a", "b"]
    assert vocabulary["attributes"] == {"sex": ["F", "M"]}
    assert sum(vocabulary["counts"][s]["a"] for s in ("train", "val", "test")) == 16
    run = artifact.run_info()
    assert run["outputs"] == {k: v for k, v in files(storage, artifact.path).items() if k in run["outputs"]}
    assert set(run["outputs"]) == {"images/part-00000.parquet", "table.parquet", "vocabulary.json"}
    assert run["data"] == {"path": e.data.path, "images": ""}
    assert run["licence"] == "CC0"
    assert run["counts"]["images"] == 30
    assert "30 images of 15 patients" in capsys.readouterr().out

    moved = open_storage(f"{any_root}/moved")
    more = csv_experiment(any_root, dataset="D", images=any_root, licence="CC-BY", labels={"policy": {"a": "ones"}})
    open_storage(any_root).put("pics/stray.png", b"no row names this")
    other = ingest(more, moved)
    assert (other.path, other.digest()) == (artifact.path, artifact.digest())
    assert other.run_info()["counts"]["quarantined"] == {"file without row": 1}
    capsys.readouterr()

    again = ingest(e, storage)
    assert again.path == artifact.path
    assert "is complete" in capsys.readouterr().out


def test_compute_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LARGEST_PART", 500)  # four parts
    e = experiment(kind="digits")
    stores = [open_storage(str(tmp_path / str(rows))) for rows in (90, 256)]
    found = [files(s, ingest(with_rows(e, rows), s).path) for s, rows in zip(stores, (90, 256))]
    assert [f"images/part-0000{i}.parquet" in found[0] for i in range(5)] == [True] * 4 + [False]
    assert found[0].pop("run.json") != found[1].pop("run.json")  # it holds times
    assert found[0] == found[1]


def test_the_viewer_of_datasets_shows_pictures(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source(str(tmp_path))
    storage = open_storage(str(tmp_path / "out"))
    artifact = ingest(csv_experiment(str(tmp_path)), storage)
    shown = datasets.load_dataset(
        "parquet", data_files=storage.url(artifact.file("images/*.parquet")), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert shown[4]["image"].size == (8, 8)
    assert np.array_equal(np.asarray(shown[4]["image"]), decode_png(picture(4))[..., 0])


def test_bad_images_are_quarantined_with_their_reasons(any_root: str) -> None:
    storage = source(any_root)
    bomb = io.BytesIO()
    Image.new("1", (2000, 2000)).save(bomb, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(jpeg, "JPEG")
    bad = {"00": b"", "05": jpeg.getvalue()[:9000], "11": b"<html>404</html>", "12": bomb.getvalue()}
    for name, content in bad.items():
        storage.put(f"pics/{name}.png", content)
    storage.delete("pics/29.png")
    image = {**SMALL, "max_megapixels": 1}
    artifact = ingest(csv_experiment(any_root, image=image, max_quarantined_fraction=0.2), storage)
    left_out = from_parquet(storage.get(artifact.file("quarantine.parquet"))).to_pylist()
    assert [(r["image_id"], r["reason"].split(":")[0]) for r in left_out] == [
        ("pics/29.png", "row without file"),
        ("pics/00.png", "zero bytes"),
        ("pics/05.png", "truncated"),
        ("pics/11.png", "undecodable"),
        ("pics/12.png", "decompression bomb"),
    ]
    assert left_out[0]["source_uri"] == "pics/29.png"
    counts = artifact.run_info()["counts"]
    assert counts["images"] == 25
    assert sum(counts["quarantined"].values()) == 5
    kept = load_table(storage, artifact)["image_id"].to_pylist()
    assert kept == [f"pics/{i:02d}.png" for i in range(29) if f"{i:02d}" not in bad]


def test_too_many_bad_images_end_with_a_list_and_nothing_is_decoded_twice(tmp_path: Path) -> None:
    root = tmp_path / "src"
    storage = source(str(root))
    for i in (3, 9):
        storage.put(f"pics/{i:02d}.png", b"not a picture")
    for i in (5, 15):
        storage.put(f"pics/{i:02d}.png", bitmap(i))
    out = open_storage(str(tmp_path / "out"))
    e = with_rows(csv_experiment(str(root)), 10)
    with pytest.raises(GateFailed, match=r"6\.7% of 30 rows .*undecodable 2.*quarantine\.csv") as caught:
        ingest(e, out)
    listed = next(p for p in out.list() if p.path.endswith("quarantine.csv")).path
    assert out.url(listed) in str(caught.value)
    assert b'"pics/03.png"' in out.get(listed)

    # Other pictures of the same size and time: only a slice that is decoded again can show them.
    work = [p.path for p in out.list() if "work" in p.path.split("/")]
    assert len(work) == 3
    out.delete(work[1])
    for i in (5, 15):
        path = root / "pics" / f"{i:02d}.png"
        stat = path.stat()
        path.write_bytes(bitmap(i + 1))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    artifact = ingest(with_rows(csv_experiment(str(root), max_quarantined_fraction=0.1), 10), out)
    assert artifact.fp in listed
    pixels = dict(zip(*(load_table(out, artifact)[c].to_pylist() for c in ("image_id", "pixel_sha256"))))
    assert pixels["pics/05.png"] == pixel_sha256(decode_png(picture(5)))
    assert pixels["pics/15.png"] == pixel_sha256(decode_png(picture(16)))
    assert "quarantine.csv" not in files(out, artifact.path)


def test_interrupted_between_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(str(tmp_path))
    e = with_rows(csv_experiment(str(tmp_path)), 10)
    whole = open_storage(str(tmp_path / "whole"))
    expected = files(whole, ingest(e, whole).path)
    broken = open_storage(str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ingest(e, broken)
    # One slice as a worker leaves it that a picture has ended.
    slices = [p.path for p in broken.list() if "work" in p.path.split("/")]
    broken.delete(slices[1])
    broken.put(slices[1] + ".begun", b"")
    artifact = ingest(e, broken)
    found = files(broken, artifact.path)
    assert found.keys() == expected.keys()
    assert {k: v for k, v in found.items() if k != "run.json"} == {
        k: v for k, v in expected.items() if k != "run.json"
    }


def test_copies_without_a_patient_column_share_a_split(tmp_path: Path) -> None:
    storage = source(str(tmp_path))
    photo = load_sample_image("flower.jpg")
    lines = ["file,dx"] + [f"pics/{i:02d}.png,{'ab'[i % 2]}" for i in range(30)]
    for i in range(6):
        cut = photo[20 * i : 20 * i + 200, 60 * i : 60 * i + 200]
        for quality in (95, 60):
            sink = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(cut)).save(sink, "JPEG", quality=quality)
            storage.put(f"pics/f{i}-{quality}.jpg", sink.getvalue())
            lines.append(f"pics/f{i}-{quality}.jpg,{'ab'[i % 2]}")
    storage.put("table.csv", "\n".join(lines).encode())
    artifact = ingest(csv_experiment(str(tmp_path), columns={"label": "dx"}), storage)
    rows = {r["image_id"]: r for r in load_table(storage, artifact).to_pylist()}
    for i in range(6):
        first, copy = rows[f"pics/f{i}-95.jpg"], rows[f"pics/f{i}-60.jpg"]
        assert first["patient_id"] == copy["patient_id"]
        assert first["split"] == copy["split"]
    run = artifact.run_info()
    assert run["counts"]["patients_by"] == "hash"
    assert any("map data.columns.patient" in note for note in run["notes"])


def test_patient_in_two_fixed_splits(tmp_path: Path) -> None:
    storage = source(str(tmp_path))
    lines = ["file,dx,who,part"] + [
        f"pics/{i:02d}.png,{'ab'[i // 2 % 2]},p{i // 2},{('train', 'val', 'test')[i // 2 % 3]}" for i in range(30)
    ]
    lines[1] = "pics/00.png,a,p0,test"
    storage.put("table.csv", "\n".join(lines).encode())
    columns = {"label": "dx", "patient": "who", "split": "part"}
    with pytest.raises(DataError, match="patient 'p0' is in two fixed splits, train and test"):
        ingest(csv_experiment(str(tmp_path), columns=columns), storage)
    artifact = ingest(
        csv_experiment(str(tmp_path), columns=columns, split={"on_conflict": "quarantine"}), storage
    )
    left_out = from_parquet(storage.get(artifact.file("quarantine.parquet"))).to_pylist()
    assert [(r["image_id"], r["reason"]) for r in left_out] == [
        ("pics/01.png", "patient 'p0' is in two fixed splits, train and test")
    ]
    assert artifact.run_info()["counts"]["quarantined"] == {"patient ... is in two fixed splits, train and test": 1}
    assert load_table(storage, artifact).num_rows == 29


def test_class_whose_images_are_all_bad_is_refused(tmp_path: Path) -> None:
    storage = source(str(tmp_path), 8)
    for i in (2, 3, 6, 7):
        storage.put(f"pics/{i:02d}.png", b"")
    with pytest.raises(DataError, match=r"'b: no usable images that can be decoded'.* All 4 .* first as: zero"):
        ingest(csv_experiment(str(tmp_path), max_quarantined_fraction=0.9), storage)


def test_images_inside_parquet(any_root: str) -> None:
    source(any_root)
    storage = open_storage(any_root)
    first = ingest(csv_experiment(any_root), storage)
    columns = {"file": "image", "id": "image_id", "findings": {"a": "label_a", "b": "label_b"}, "split": "split"}
    again = ingest(
        experiment(
            kind="parquet", path=storage.url(first.file("images")), columns=columns, labels={"kind": "multi"}
        ),
        storage,
    )
    for name in ("image_id", "sha256", "pixel_sha256", "split", "label_a", "label_b"):
        assert load_table(storage, again)[name].equals(load_table(storage, first)[name])
    assert json.loads(storage.get(again.file("vocabulary.json")))["kind"] == "multi"


def test_a_fault_of_storage_inside_a_task_is_told_from_a_bug() -> None:
    import ray.data

    def refused(batch: dict) -> dict:
        raise PermissionError(1, "Operation not permitted", "/sys/x")

    def wrong(batch: dict) -> dict:
        raise KeyError("rank")

    for work, words in ((refused, "PermissionError: [Errno 1] Operation not permitted: '/sys/x'"), (wrong, None)):
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.data.range(2).map_batches(work).materialize()
        assert environment_fault(raised.value) == words
