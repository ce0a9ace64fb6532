"""Short names that change exactly when a stage's output may change.

`fp12` is 12 hex digits of the sha256 of a canonical JSON. The encoder refuses what it does not know instead of
guessing, so that no memory address or unordered set ever enters a name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any


def plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value} has no canonical form")
        # 1.0 and 1 are the same setting in a YAML file.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
        return {k: plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} has no canonical form")


def canonical_json(value: Any) -> str:
    """One text for one meaning: sorted keys, no spaces, `1.0` as `1`. Raises TypeError on unknown types."""
    return json.dumps(plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fp12(value: Any) -> str:
    """12 hex digits naming `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: str | Path) -> str:
    """Hex sha256 of a local file; read once a process while it does not change. Raises FileNotFoundError."""
    found = os.stat(path)
    return _file_digest(os.path.abspath(path), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content_digest(files: Iterable[tuple[str, str]]) -> str:
    """One digest over (name, content hash) pairs, whatever their order. Used for folders and listings."""
    return hashlib.sha256(canonical_json(sorted([name, digest] for name, digest in files)).encode()).hexdigest()
