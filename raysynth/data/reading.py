"""How a worker reads the bytes of one real image, given the location that `sources.list_source` wrote for its row.

A location is a path below the image folder (csv, class_folders, parquet with paths), `file.parquet#row`, or
`digits#17`. Knows no labels.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raysynth.core.experiment import Data
from raysynth.core.storage import LocalStorage, Storage, open_storage
from raysynth.data.images import BadImage, encode_png
from raysynth.data.metadata import damage, open_parquet, parquet_files, split_url


def image_storage(data: Data) -> Storage:
    """The folder that image paths are relative to, and that none may leave."""
    if data.images or data.kind == "class_folders":
        return open_storage(data.images or data.path)
    return split_url(data.path)[0] if data.kind == "csv" else parquet_files(data.path)[0]


def inside(storage: Storage, path: str) -> str | None:
    """`path` normalised and relative to the storage's root, or None if it leaves it.

    Names only: links are judged by `link_leaves`, because on S3 there are none.
    """
    relative = posixpath.normpath(path.removeprefix(storage.root + "/"))
    return None if relative.startswith(("/", "../")) or relative in ("..", ".") or "\0" in relative else relative


def link_leaves(storage: Storage, path: str) -> bool:
    """Whether `path` (relative, normalised) is led out of the root by a symbolic link."""
    if not isinstance(storage, LocalStorage):
        return False
    root = os.path.realpath(storage.root)
    return not os.path.realpath(os.path.join(root, path)).startswith(root.rstrip("/") + "/")


def digit_values() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images (1797, 8, 8) float 0..16 and targets (1797,)."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    return found.images, found.target


class ImageReader:
    """Reads images of one source; keeps the last parquet row group, so read locations in order."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._group: tuple[str, int, int, list | str] | None = None

    @cached_property
    def _digits(self) -> np.ndarray:
        return np.round(digit_values()[0] * (255 / 16)).astype(np.uint8)

    @cached_property
    def storage(self) -> Storage:
        """Where image paths start."""
        return image_storage(self.data)

    def read(self, location: str) -> bytes:
        """Encoded bytes of the image at `location`.

        Raises:
            BadImage: the file is gone or may not be read, or the parquet around it is damaged. Storage that fails
                otherwise raises its own error: that is the environment's fault, not the image's.
        """
        if self.data.kind == "digits":
            return encode_png(self._digits[int(location.rpartition("#")[2])])
        if self.data.kind == "parquet" and re.search(r"\.parquet#\d+$", location):
            return self._from_parquet(location)
        return self._from_file(location)

    def _from_file(self, path: str) -> bytes:
        relative = inside(self.storage, path)
        if relative is None or link_leaves(self.storage, relative):
            raise BadImage("path leaves the image folder")
        try:
            return self.storage.get(relative)
        except FileNotFoundError as error:
            raise BadImage("row without file") from error
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise BadImage(f"unreadable: {error.strerror or error}") from error

    def _from_parquet(self, location: str) -> bytes:
        name, _, number = location.rpartition("#")
        cell = self._cell(name, int(number))
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                return self._from_file(cell["path"])
            cell = cell.get("bytes")
        if cell is None:
            raise BadImage("row without image")
        return cell

    def _cell(self, name: str, row: int) -> Any:
        if self._group is None or not (self._group[0] == name and self._group[1] <= row < self._group[2]):
            if self._file is None or self._file[0] != name:
                self._file = (name, open_parquet(self._tables, name))
            file, start = self._file[1], 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if row < stop:
                    self._group = (name, start, stop, self._cells(file, group))
                    break
                start = stop
        assert self._group is not None
        _, start, _, cells = self._group
        if isinstance(cells, str):
            raise BadImage(cells)
        return cells[row - start]

    def _cells(self, file: pq.ParquetFile, group: int) -> list | str:
        """Cells of one row group, or why it has none: one damaged page takes all of it along."""
        try:
            return file.read_row_group(group, columns=[self.data.columns.file])[self.data.columns.file].to_pylist()
        except Exception as error:
            if why := damage(error):
                return why
            raise

    @cached_property
    def _tables(self) -> Storage:
        return parquet_files(self.data.path)[0]
