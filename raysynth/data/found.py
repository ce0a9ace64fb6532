"""What reading a source finds, before labels and splits are judged; shared by every kind of source."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from raysynth.core.errors import DataError
from raysynth.core.identity import content_digest
from raysynth.core.storage import Entry, Storage
from raysynth.data.images import SUFFIXES
from raysynth.data.labels import Annotations
from raysynth.data.metadata import Cells

NO_FILE, NO_ROW, LEAVES = "row without file", "file without row", "path leaves the image folder"
NOT_IMAGE = "not an image file"


@dataclass
class Found:
    """Columns of a source as read, one entry a row."""

    locations: list[str]
    uris: list[str]
    """Where each image is, relative to the image folder (or the folder of the parquet files), so that a moved data
    set is the same data set."""
    ids: list[str]
    annotations: Annotations
    digest: str
    attributes: dict[str, Cells] = field(default_factory=dict)
    site: Cells | None = None
    patient: Cells | None = None
    split: Cells | None = None
    report: Cells | None = None
    bad: dict[int, str] = field(default_factory=dict)
    extra: list[tuple[str, str, str]] = field(default_factory=list)
    """(id, uri, reason) of files that are no row."""
    notes: list[str] = field(default_factory=list)
    """What a person should know, one sentence each."""


def listed(storage: Storage, folder: str, key: str, named: Collection[str] = ()) -> list[Entry]:
    """Files below `folder` that are `named` or not hidden. Raises DataError where it cannot be read."""
    try:
        entries = storage.list(folder)
    except OSError as error:
        raise DataError(
            key, storage.url(folder), "a folder that can be read", f"The system says: {error.strerror or error}."
        ) from error
    return [e for e in entries if e.path in named or not any(part.startswith(".") for part in e.path.split("/"))]


def is_image(path: str) -> bool:
    """Whether the name ends like an image that can be decoded."""
    return any(path.lower().endswith(s) for s in SUFFIXES)


def digest(entries: list[Entry], *more: tuple[str, str]) -> str:
    """Digest of path, size and etag of each file, and of (name, digest) pairs."""
    return content_digest([*((e.path, f"{e.size}:{e.etag}") for e in entries), *more])
