"""What names an ingest artifact, and how the source is cut; no Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from raysynth.core.config import build_experiment
from raysynth.core.experiment import Data, ImageSpec
from raysynth.core.storage import open_storage
from raysynth.data.quarantine import reason_kind
from raysynth.data.reading import ImageReader
from raysynth.stages.ingest import _slices, ingest_artifact, part_rows


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


@pytest.mark.parametrize("rows_per_task", [1, 7, 100, 5000])
def test_slices_cover_all_rows_and_no_part_boundary_cuts_them(rows_per_task: int) -> None:
    cut = _slices(1000, 300, rows_per_task)
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(1000))
    assert all(start // 300 == (stop - 1) // 300 and stop - start <= rows_per_task for start, stop in cut)


def test_parts_hold_fewer_large_pictures() -> None:
    sizes = [part_rows(ImageSpec(size=s, channels="rgb")) for s in (8, 256, 512, 2048)]
    assert sizes == [4096, 682, 170, 64]


def test_reasons_are_counted_by_kind() -> None:
    assert reason_kind("blank: every pixel is 7") == "blank"
    assert reason_kind("label 'x: y' is not in data.labels.classes (near 'z')") == (
        "label ... is not in data.labels.classes (near ...)"
    )
