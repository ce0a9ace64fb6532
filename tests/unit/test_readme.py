"""What the pages for people name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = re.compile(r"(?<![\w./-])(?:tests|jobs)(?:/[\w./-]*\w|(?:\.\w+)+)")
"""`tests/unit/data`, `jobs/xray/mini.yaml`, and modules such as `tests.ray.chaos`."""


def named(page: str) -> list[str]:
    """Every path below tests/ and jobs/ that the page names; those in capitals stand for the reader's own."""
    found = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    return [name for name in dict.fromkeys(found) if not re.search("[A-Z]{3}", name)]


@pytest.mark.parametrize("page", ["README.md", "cluster/README.md"])
def test_every_path_named_is_there(page: str) -> None:
    paths = named(page)
    assert paths
    files = [p if "/" in p else p.replace(".", "/") + ".py" for p in paths]
    assert not [p for p in files if not (ROOT / p).exists()]
