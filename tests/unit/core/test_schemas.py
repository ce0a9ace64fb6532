"""Parquet in memory: what goes in comes out, and no thread outlives the reading."""

from __future__ import annotations

import io
import subprocess
import sys

import pyarrow as pa
import pytest

from raysynth.core.schemas import from_parquet, to_parquet

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"], "image": [{"bytes": b"1", "path": ""}] * 3})

READ = """
import os
from raysynth.core.schemas import from_parquet, to_parquet
import pyarrow as pa
data = to_parquet(pa.table({name: [1.0] * 100_000 for name in "abcdefgh"}))
before = set(os.listdir("/proc/self/task"))
from_parquet(data)
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_a_table_comes_back_from_bytes_and_from_a_file() -> None:
    data = to_parquet(TABLE)
    assert from_parquet(data).equals(TABLE)
    assert from_parquet(io.BytesIO(data), ["a"]).equals(TABLE.select(["a"]))
    assert from_parquet(to_parquet(TABLE.slice(0, 0))).schema == TABLE.schema


def test_columns_come_in_the_order_asked_for() -> None:
    assert from_parquet(to_parquet(TABLE), ("image", "a")).column_names == ["image", "a"]
    with pytest.raises(KeyError, match="nothing"):
        from_parquet(to_parquet(TABLE), ["a", "nothing"])


def test_reading_leaves_no_thread_that_could_abort_the_interpreters_end() -> None:
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
