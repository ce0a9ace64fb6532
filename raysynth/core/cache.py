"""A folder of the root on local disk: the folder itself, or a copy in the cache where the root is remote."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from raysynth.core.storage import LocalStorage, Storage


def local_folder(storage: Storage, folder: str, cache: str, version: str = "") -> Path:
    """Local path with the content of `folder`, which must be complete and never change again.

    A copy is made in a folder of its own and renamed into place, so that a second process on the machine sees all of
    it or nothing; whoever comes second throws its copy away.

    Args:
        folder: relative to the root.
        cache: local folder for copies; `~` is expanded.
        version: digest of the content where a folder of that name may be written anew.

    Raises:
        FileNotFoundError: nothing is stored there.
    """
    if isinstance(storage, LocalStorage):
        if not os.path.isdir(storage.url(folder)):
            raise FileNotFoundError(storage.url(folder))
        return Path(storage.url(folder))
    name = hashlib.sha256(f"{storage.url(folder)} {version}".encode()).hexdigest()[:16]
    place = Path(cache).expanduser() / f"{folder.rstrip('/').rsplit('/', 1)[-1]}-{name}"
    if place.is_dir():
        return place
    entries = storage.list(folder)
    if not entries:
        raise FileNotFoundError(storage.url(folder))
    place.parent.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        for entry in entries:
            target = copy / entry.path[len(folder.rstrip("/")) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.get(entry.path))
        os.rename(copy, place)
    except OSError:
        if not place.is_dir():
            raise
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return place
