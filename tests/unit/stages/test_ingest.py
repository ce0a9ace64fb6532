"""What names an ingest artifact, and how the source is cut; no Ray."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError
from raysynth.core.experiment import Data, ImageSpec
from raysynth.core.identity import sha256_bytes
from raysynth.core.schemas import to_parquet
from raysynth.core.storage import open_storage
from raysynth.data.images import prepare
from raysynth.data.quarantine import reason_kind
from raysynth.data.reading import ImageReader
from raysynth.stages import ingest as stage
from raysynth.stages.ingest import STAGE_VERSION, _dark, _slices, ingest_artifact, part_rows
from raysynth.stages.ingest_tasks import decode_slice, guarded
from tests.dying import ends_its_process


@pytest.fixture
def root(tmp_path: Path) -> str:
    storage = open_storage(str(tmp_path))
    for i in range(4):
        storage.put(f"pics/{'ab'[i % 2]}/{i}.png", ImageReader(Data(kind="digits")).read(f"digits#{i}"))
    return str(tmp_path)


def fp(root: str, *overrides: str, **data: Any) -> str:
    content = {"name": "x", "data": {"kind": "class_folders", "path": f"{root}/pics", **data}}
    return ingest_artifact(build_experiment(content, overrides), open_storage(root))[0].fp


SAME = ["compute.ingest_rows=7", "data.max_quarantined_fraction=0.5", "generator.seed=3", "data.dataset=x",
        "data.image.channels=rgb", "plan.replicas=3", "root=elsewhere", "data.licence=CC-BY",
        "data.labels.policy.a=ones"]  # fmt: skip
DIFFERENT = ["data.image.size=32", "data.image.preset=chest", "data.split.seed=1", "data.labels.classes=[b,a]",
             "data.dataset=other", "data.image.fit=crop"]  # fmt: skip


@pytest.mark.parametrize("override", SAME)
def test_same_artifact(root: str, override: str) -> None:
    assert fp(root, override) == fp(root)


@pytest.mark.parametrize("override", DIFFERENT)
def test_other_artifact(root: str, override: str) -> None:
    assert fp(root, override) != fp(root)


def test_the_earlier_table_is_known_by_its_content(root: str) -> None:
    storage, table = open_storage(root), pa.table({"image_id": ["a/0.png"], "split": ["test"]})
    for folder in ("one", "two"):
        storage.put(f"{folder}/table.parquet", to_parquet(table))
    storage.put("three/table.parquet", to_parquet(table.slice(0, 0)))
    kept = fp(root, f"data.split.keep={root}/one")
    assert kept != fp(root)
    assert fp(root, f"data.split.keep={root}/two/table.parquet") == kept
    assert fp(root, f"data.split.keep={root}/three") != kept
    with pytest.raises(DataError, match=r"data.split.keep: got '.*none/table.parquet', must be an ingest artifact"):
        fp(root, f"data.split.keep={root}/none")


def test_one_more_image_is_another_artifact(root: str) -> None:
    before = fp(root)
    open_storage(root).put("pics/a/9.png", b"new")
    assert fp(root) != before


def test_where_the_data_lies_and_stray_files_change_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(root)
    lines = [f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}" for i in range(4)]
    storage.put("pics/table.csv", "\n".join(["file,dx", *lines]).encode())
    os.symlink(root, f"{root}-mounted")
    monkeypatch.chdir(root)
    columns = {"label": "dx"}
    csv = {"kind": "csv", "columns": columns, "path": f"{root}/pics/table.csv"}
    places = [
        csv, {**csv, "path": "pics/table.csv"}, {**csv, "path": f"{root}-mounted/pics/table.csv"},
        {**csv, "images": f"{root}/pics"},
    ]  # fmt: skip
    before = fp(root, **csv), fp(root)
    assert {fp(root, **p) for p in places} == {before[0]}
    assert fp(root, path="pics") == before[1]
    storage.put("pics/a/stray.txt", b"a note")
    assert fp(root) == before[1]
    storage.put("pics/a/stray.png", b"a picture that no row names")
    assert fp(root, **csv) == before[0]


def split_in_two(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`data` of one picture that its source has in train and in test: of class folders, and of a table."""
    storage, pixels = open_storage(root), np.zeros((8, 8), np.uint8)
    lines = ["file,dx,fold"]
    for top, name, value in (("train", "a", 1), ("test", "a", 1), ("train", "b", 2), ("test", "b", 3)):
        sink = io.BytesIO()
        Image.fromarray(pixels + np.arange(8, dtype=np.uint8) * np.uint8(value)).save(sink, "PNG")
        storage.put(f"split/{top}/{name}/{value}.png", sink.getvalue())
        lines.append(f"split/{top}/{name}/{value}.png,{name},{top}")
    storage.put("split.csv", "\n".join(lines).encode())
    columns = {"label": "dx", "split": "fold"}
    return {"kind": "class_folders", "path": f"{root}/split"}, {"path": f"{root}/split.csv", "columns": columns}


@pytest.mark.parametrize("kind", [0, 1])
def test_a_test_set_from_elsewhere_has_no_splits(root: str, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    def here(items: list[dict[str, Any]], task: Any, **given: Any) -> list[pa.Table]:
        return [task(pa.Table.from_pylist([item]), **given) for item in items]

    monkeypatch.setattr(stage, "_run_tasks", here)
    data = {**split_in_two(root)[kind], "image": {"size": 8}, "split": {"keep": f"{root}/gone"}}
    e = build_experiment({"name": "x", "root": f"{root}/runs", "data": data})
    own = build_experiment({"name": "x", "root": f"{root}/runs", "data": {**data, "split": {}}})
    storage = open_storage(e.root)
    with pytest.raises(DataError, match=r"data\.columns\.split: .*is in two fixed splits, train and test"):
        stage.ingest(own, storage)
    found = stage.ingest(e, storage, tested=True)
    assert stage.load_table(storage, found)["split"].to_pylist() == ["test"] * 4
    assert found.path != ingest_artifact(own, storage)[0].path
    # Whoever asks for other fractions, or has no column of splits, tests the same images.
    free = {**data, "split": {"val": 0.1}, "columns": {**data.get("columns", {}), "split": None}}
    same = build_experiment({"name": "x", "root": f"{root}/runs", "data": free})
    assert ingest_artifact(same, storage, tested=True)[0].path == found.path


@pytest.mark.parametrize("rows_per_task", [1, 7, 100, 5000])
def test_slices_cover_all_rows_and_no_part_boundary_cuts_them(rows_per_task: int) -> None:
    cut = _slices(1000, 300, rows_per_task)
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(1000))
    assert all(start // 300 == (stop - 1) // 300 and stop - start <= rows_per_task for start, stop in cut)


def test_parts_hold_fewer_large_pictures() -> None:
    sizes = [part_rows(ImageSpec(size=s, channels="rgb")) for s in (8, 256, 512, 2048)]
    assert sizes == [4096, 682, 170, 64]


def test_a_picture_that_ends_the_process_is_given_a_reason_and_the_others_are_decoded() -> None:
    found = guarded(ends_its_process, ["a", "segfault", "b", "lost"])
    assert [next(found) for _ in range(3)] == [
        {"png": b"a"},
        {"reason": f"undecodable: it ended the decoding process (exit code {-signal.SIGSEGV})"},
        {"png": b"b"},
    ]
    with pytest.raises(ConnectionError, match="the store is gone"):
        next(found)


def test_a_slice_that_was_begun_before_is_decoded_to_the_same_bytes(root: str) -> None:
    data, files = Data(kind="class_folders", path=f"{root}/pics", image=ImageSpec(size=16)), []
    batch = pa.Table.from_pylist([{"file": "work/s.parquet", "start": 0, "locations": ["a/0.png", "b/1.png"]}])
    for name in ("first", "again"):
        storage = open_storage(f"{root}/{name}")
        if name == "again":
            storage.put("work/s.parquet.begun", b"")
        facts = decode_slice(batch, storage, data)
        assert facts["reason"].null_count == 2
        assert [e.path for e in storage.list()] == ["work/s.parquet"]
        files.append(storage.get("work/s.parquet"))
    assert files[0] == files[1]


def test_dark_16_bit_images_are_noted() -> None:
    def facts(*images: tuple[float, float]) -> pa.Table:
        return pa.table({
            "value_hi": pa.array([i[0] for i in images], pa.float32()),
            "highest": pa.array([i[1] for i in images], pa.float32()),
        })  # fmt: skip

    bright = [(255.0, 40.0), (65535.0, 65535.0), (4000.0, 4095.0)]
    assert _dark(facts(*bright)) == []
    (note,) = _dark(facts(*bright, (65535.0, 4095.0), (65535.0, 900.0)))
    assert note.startswith("2 of 3 16-bit images stay below a quarter of their range (none above 4095)")
    assert "data.image.value_range=percentile" in note


GOLDEN = {4: "19e8167b3defd0713e6423fc50a696731a7a4ccdde314c8214301688797d8fd0"}
"""Ingest's version -> the pixels it stores. Other pixels need another version: artifacts are named by it."""


def test_stored_pixels_change_only_with_the_version() -> None:
    reader = ImageReader(Data(kind="digits"))
    ramp = (np.add.outer(np.arange(40) * 1500, np.arange(30) * 60) % 65536).astype(np.uint16)
    wide = [io.BytesIO(), io.BytesIO()]
    for kind, sink in zip(("PNG", "PPM"), wide):
        Image.fromarray(ramp).save(sink, kind)
    found = [
        prepare(data, ImageSpec(**spec)).pixel_sha256
        for data in (*(reader.read(f"digits#{i}") for i in range(3)), *(sink.getvalue() for sink in wide))
        for spec in ({"size": 20}, {"size": 6, "preset": "chest"}, {"size": 12, "preset": "skin"})
    ]
    assert sha256_bytes("".join(found).encode()) == GOLDEN[STAGE_VERSION]


def test_reasons_are_counted_by_kind() -> None:
    assert reason_kind("blank: every pixel is 7") == "blank"
    assert reason_kind("label 'x: y' is not in data.labels.classes (near 'z')") == (
        "label ... is not in data.labels.classes (near ...)"
    )
