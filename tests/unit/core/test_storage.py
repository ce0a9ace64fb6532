"""The three promises of storage, on local disk and on a real S3 protocol."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray import cloudpickle

from raysynth.core.errors import EnvironmentFault
from raysynth.core.storage import open_storage
from tests.waiting import wait_for


def test_put_get_list_delete(any_root: str) -> None:
    s = open_storage(any_root)
    assert s.list("a") == []
    assert s.folders("") == []
    s.put("a/x", b"1")
    s.put("a/b/y", b"22")
    s.put("ab/z", b"3")
    assert s.get("a/b/y") == b"22"
    assert [(e.path, e.size) for e in s.list("a")] == [("a/b/y", 2), ("a/x", 1)]
    assert s.folders("") == ["a", "ab"]
    before = s.list("a")[1].etag
    # Two writes within one tick of the file system's clock look alike.
    wait_for(lambda: s.put("a/x", b"changed") or s.list("a")[1].etag != before)
    s.delete("a/x")
    s.delete("a/x")
    assert not s.exists("a/x")
    assert s.exists("a/b/y")
    with pytest.raises(FileNotFoundError):
        s.get("a/x")


def test_create_has_one_winner(any_root: str) -> None:
    s = open_storage(any_root)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: s.create("done/00001.json", str(i).encode()), range(16)))
    assert sum(won) == 1
    assert s.get("done/00001.json") == str(won.index(True)).encode()


def test_open_reads_ranges(any_root: str) -> None:
    s = open_storage(any_root)
    s.put("f", bytes(range(256)))
    with s.open("f") as f:
        f.seek(100)
        assert f.read(3) == bytes([100, 101, 102])


def test_storage_pickles(any_root: str) -> None:
    s = open_storage(any_root)
    s.put("f", b"1")
    assert pickle.loads(pickle.dumps(s)).get("f") == b"1"  # noqa: S301 - our own bytes, as Ray ships them


def test_what_ray_train_is_given_goes_to_other_processes(s3_root: str) -> None:
    s = open_storage(s3_root)
    s.put("f", b"1")
    path = s.root.removeprefix("s3://") + "/f"
    assert not s.exists("g")  # the connection has been used, and has met an error
    read = "import pickle, sys; fs, path = pickle.load(sys.stdin.buffer); print(fs.cat_file(path))"
    done = subprocess.run(
        [sys.executable, "-c", read], input=cloudpickle.dumps((s.fs, path)), capture_output=True, check=True
    )
    assert done.stdout.strip() == b"b'1'"


def test_probe_leaves_nothing(any_root: str) -> None:
    s = open_storage(any_root)
    s.probe()
    assert s.list() == []


def test_probe_names_an_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        open_storage(str(tmp_path / "file" / "runs")).probe()


def test_probe_refuses_a_store_without_create_if_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = open_storage(str(tmp_path))
    monkeypatch.setattr(type(s), "create", lambda self, path, data: True)
    with pytest.raises(EnvironmentFault, match="exactly once"):
        s.probe()


def test_half_written_files_are_never_listed(tmp_path: Path) -> None:
    s = open_storage(str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".x.1234.tmp").write_text("half")
    assert s.list("d") == []
