"""Local copies of remote folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.core.cache import local_folder
from raysynth.core.storage import open_storage


def test_folder_has_the_stored_files_and_is_fetched_once(any_root: str, tmp_path: Path) -> None:
    storage, cache = open_storage(any_root), str(tmp_path / "cache")
    storage.put("export/x/unet/w.bin", b"1")
    storage.put("export/x/a.json", b"2")
    place = local_folder(storage, "export/x", cache)
    assert (place / "unet" / "w.bin").read_bytes() == b"1"
    assert (place / "a.json").read_bytes() == b"2"
    assert local_folder(storage, "export/x", cache) == place
    if any_root.startswith("s3://"):
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [place.name]  # no half copies left


def test_two_roots_do_not_share_a_copy(s3_root: str, tmp_path: Path) -> None:
    places = []
    for i in range(2):
        storage = open_storage(f"{s3_root}{i}")
        storage.put("export/a.json", str(i).encode())
        places.append(local_folder(storage, "export", str(tmp_path)) / "a.json")
    assert [p.read_text() for p in places] == ["0", "1"]


def test_what_is_not_stored_is_not_found(s3_root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        local_folder(open_storage(s3_root), "export", str(tmp_path))
