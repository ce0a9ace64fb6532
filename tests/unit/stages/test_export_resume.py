"""Exports killed, resumed, repeated and refused, on disk and on S3."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysynth.core.errors import ConfigError, Damaged, NotReady
from raysynth.core.storage import Storage
from raysynth.stages.export import begin, cut, export, finish, write_group, written
from raysynth.stages.export_formats import FORMATS
from tests.exported import Made, cut_small, no_ray, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(str(tmp_path_factory.mktemp("single")))


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
