"""Files under one root, on local disk or S3, with the three promises the engine needs.

* `put` is atomic: a reader sees the whole object or none.
* `create` succeeds for exactly one of any number of writers whose bytes differ (hard link locally, conditional put on
  S3); writers of equal bytes may all be told that they succeeded.
* `list` is never served from a cache.

Knows nothing of artifacts or images. Paths are relative to the root and use `/`. S3 itself is in `s3.py`.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from raysynth.core.errors import EnvironmentFault
from raysynth.core.faults import storage_words

STAGED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""Names of files that `LocalStorage` has not finished."""


@dataclass(frozen=True)
class Entry:
    """One stored object: `path` relative to the root, `size` in bytes, `etag` that changes with content, `modified`
    in seconds since 1970."""

    path: str
    size: int
    etag: str
    modified: float = 0.0


class Storage:
    """One root folder. Picklable: holds the root's name only and opens connections where it is used."""

    root: str

    def __reduce__(self) -> tuple:
        return open_storage, (self.root,)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def url(self, path: str = "") -> str:
        """Full name of `path`, as a person or another library would open it."""
        return f"{self.root}/{path}" if path else self.root

    def get(self, path: str) -> bytes:
        """Content of `path`. Raises FileNotFoundError."""
        raise FileNotFoundError(path)

    def put(self, path: str, data: bytes) -> None:
        """Writes `path` whole, replacing what was there."""
        raise EnvironmentFault(f"{self.root} cannot be written")

    def create(self, path: str, data: bytes) -> bool:
        """Writes `path` if nothing is there. Returns whether this call wrote it."""
        raise EnvironmentFault(f"{self.root} cannot be written")

    def exists(self, path: str) -> bool:
        """Whether an object is there now."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of the object at `path`. Raises FileNotFoundError."""
        raise FileNotFoundError(path)

    def list(self, folder: str = "") -> list[Entry]:
        """Every object below `folder`, sorted by path; empty if there is no such folder."""
        return sorted(self._walk(folder.rstrip("/")), key=lambda e: e.path)

    def _walk(self, folder: str) -> Iterator[Entry]:
        raise FileNotFoundError(folder)

    def staged(self, folder: str) -> Sequence[Entry]:
        """What writers have not finished below `folder`, now or ever, sorted by path; `list` hides it. On S3 it is
        not an object."""
        return []

    def folders(self, folder: str = "") -> Sequence[str]:
        """Names of the folders directly below `folder`, sorted."""
        raise FileNotFoundError(folder)

    def delete(self, path: str) -> None:
        """Removes one object; removing what is not there is no error."""
        raise EnvironmentFault(f"{self.root} cannot be written")

    def open(self, path: str) -> IO[bytes]:
        """A seekable reader, for formats that read a part of a large file (parquet row groups)."""
        raise FileNotFoundError(path)

    def probe(self) -> None:
        """Proves that the root can be written and that `create` refuses a second writer.

        Raises:
            EnvironmentFault: the store is not writable, or ignores conditional puts, in which case two drivers
                could commit the same shard.
        """
        name = f".probe/{uuid.uuid4().hex}"
        try:
            first, second = self.create(name, b"1"), self.create(name, b"2")
            self.delete(name)
        except EnvironmentFault:
            raise
        except Exception as error:
            raise EnvironmentFault(
                f"root {self.root} cannot be written ({storage_words(error)}). "
                "Check that it exists, and AWS_ENDPOINT_URL for stores other than AWS."
            ) from error
        if not first or second:
            raise EnvironmentFault(
                f"root {self.root} ignores create-if-absent (conditional put); commits would not be exactly once. "
                "Use AWS S3, a recent MinIO, Ceph or GCS interop, or a shared file system."
            )


class LocalStorage(Storage):
    """A folder on this machine or on a shared file system."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).expanduser().absolute())

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path)

    def get(self, path: str) -> bytes:
        with open(self._full(path), "rb") as f:
            return f.read()

    def _staged(self, path: str, data: bytes) -> tuple[str, str]:
        target = self._full(path)
        folder, name = os.path.split(target)
        os.makedirs(folder, exist_ok=True)
        # Same folder, so that rename and link stay on one file system; the leading dot hides it from listings.
        staged = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(staged, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            if os.path.exists(staged):
                os.unlink(staged)
            raise
        return staged, target

    def put(self, path: str, data: bytes) -> None:
        staged, target = self._staged(path, data)
        os.replace(staged, target)

    def create(self, path: str, data: bytes) -> bool:
        if os.path.exists(self._full(path)):
            return False
        staged, target = self._staged(path, data)
        try:
            os.link(staged, target)
        except FileExistsError:
            return False
        finally:
            os.unlink(staged)
        return True

    def size(self, path: str) -> int:
        return os.stat(self._full(path)).st_size

    def _walk(self, folder: str) -> Iterator[Entry]:
        return self._files(folder, lambda name: not (name.startswith(".") and name.endswith(".tmp")))

    def staged(self, folder: str) -> Sequence[Entry]:
        return sorted(self._files(folder, STAGED.fullmatch), key=lambda e: e.path)

    def _files(self, folder: str, shown: Callable[[str], object]) -> Iterator[Entry]:
        top = self._full(folder)
        for here, _, names in os.walk(top, onerror=self._unreadable):
            for name in names:
                if not shown(name):
                    continue
                full = os.path.join(here, name)
                try:
                    stat = os.stat(full)
                except FileNotFoundError:  # deleted since the folder was read, or a dangling link
                    continue
                relative = os.path.relpath(full, self.root).replace(os.sep, "/")
                yield Entry(relative, stat.st_size, f"{stat.st_mtime_ns:x}", stat.st_mtime)

    def _unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    def folders(self, folder: str = "") -> Sequence[str]:
        top = self._full(folder)
        if not os.path.isdir(top):
            return []
        return sorted(e.name for e in os.scandir(top) if e.is_dir())

    def delete(self, path: str) -> None:
        # Empty folders stay: removing them would race with a writer that has just made one.
        with suppress(FileNotFoundError):
            os.unlink(self._full(path))

    def open(self, path: str) -> IO[bytes]:
        return open(self._full(path), "rb")


def open_storage(root: str) -> Storage:
    """The storage behind `root`: `s3://bucket/prefix` or a local folder (made when first written)."""
    if root.startswith("s3://"):
        from raysynth.core.s3 import S3Storage

        return S3Storage(root)
    return LocalStorage(root.removeprefix("file://"))
