"""The rows a plan wants, small enough for a driver of a hundred million: keys as 16 bytes, everything else streamed.

Row keys are 128-bit hashes written as 32 hex digits; in memory they are numpy `S16`, which sorts and searches.
Knows nothing of sets, shards or where the rows come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

CHUNK = 16_384
"""Rows that are held at once where a whole plan is gone through."""
DIGITS = 32
DIGIT_OF = np.frombuffer(b"0123456789abcdef", np.uint8)
VALUE_OF = np.full(256, 255, np.uint8)
VALUE_OF[DIGIT_OF] = np.arange(16)


def pack(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Hex row keys as (N,) `S16`.

    Raises:
        ValueError: a key is not 32 lower-case hex digits.
    """
    chunks = keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]
    return np.concatenate([np.zeros(0, "S16"), *(_pack(c.slice(i, CHUNK)) for c in chunks
                                                 for i in range(0, len(c), CHUNK))])  # fmt: skip


def _pack(keys: pa.Array) -> np.ndarray:
    whole = keys.cast(pa.binary(DIGITS)) if not keys.null_count else None
    if whole is None:
        raise ValueError("a row key is null")
    digits = np.frombuffer(whole.buffers()[1], np.uint8)[whole.offset * DIGITS : (whole.offset + len(whole)) * DIGITS]
    values = VALUE_OF[digits]
    if (values > 15).any():
        raise ValueError("row keys are 32 lower-case hex digits each")
    return (values[::2] << 4 | values[1::2]).view("S16")


def unpack(keys: np.ndarray) -> pa.Array:
    """The hex digits of packed keys, as a string array."""
    values = np.ascontiguousarray(keys).view(np.uint8)
    digits = DIGIT_OF[np.stack([values >> 4, values & 15], 1)]
    return pa.Array.from_buffers(pa.binary(DIGITS), len(keys), [None, pa.py_buffer(digits)]).cast(pa.string())


def held_by(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each key is among the sorted keys `ordered`: (N,) bool."""
    if not len(ordered):
        return np.zeros(len(keys), bool)
    at = np.searchsorted(ordered, keys)
    at[at == len(ordered)] = 0
    return ordered[at] == keys


@dataclass(frozen=True)
class Wanted:
    """Rows wanted in a synthetic set, by rank."""

    keys: np.ndarray
    """(N,) packed row keys."""
    ranks: np.ndarray
    """(N,) int32 places in the plan's order, ascending."""
    read: Callable[[], Iterable[pa.Table]]
    """Goes through the rows' tables (core.schemas.plan_schema) in the order of `keys`, any number at a time."""

    @classmethod
    def of(cls, table: pa.Table) -> Wanted:
        """All rows of a plan's table that is in memory anyway."""
        ranks = table["rank"].to_numpy().astype(np.int32)
        return cls(pack(table["row_key"]), ranks, lambda: [table])

    def __len__(self) -> int:
        return len(self.keys)

    def tables(self, mask: np.ndarray) -> Iterator[pa.Table]:
        """The rows where `mask` (N,) is true, in order, up to `CHUNK` at a time."""
        waiting: list[pa.Table] = []
        at = held = 0
        for table in self.read() if mask.any() else ():
            for start in range(0, table.num_rows, CHUNK):
                piece = table.slice(start, CHUNK)
                piece = piece.filter(pa.array(mask[at : at + piece.num_rows]))
                at += min(CHUNK, table.num_rows - start)
                waiting.append(piece)
                held += piece.num_rows
                while held >= CHUNK:
                    whole = pa.concat_tables(waiting)
                    yield whole.slice(0, CHUNK).combine_chunks()
                    waiting, held = [whole.slice(CHUNK)], held - CHUNK
        if held:
            yield pa.concat_tables(waiting).combine_chunks()
