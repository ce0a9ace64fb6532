"""Strata of labelled images, seeded orders, and an order whose every prefix keeps the shares.

Knows label columns and counts; does not know splits, plans or experiments. Input: Arrow tables with
`label_<name>` columns (core.schemas); output: numpy index arrays. No global random state: orders come from
keyed hashes of ids, so they do not depend on the order of a table's rows.

`interleave` is the chairman assignment of Tijdeman, "The chairman assignment problem" (Discrete Math. 32,
1980): with shares p_s of S strata and x_s(k) rows of stratum s among the first k,

    |x_s(k) - p_s k| <= 1 - 1 / (2 S - 2)    for every s and every k.

Sorting by (j + 1/2) / m_s is simpler but drifts by m_s S / (2 n) rows, which long tails make large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from raysynth.core.schemas import LABEL, label_names

NONE = "none"
"""Stratum of images without any positive label."""


def seeded_hash(purpose: str, seed: int, ids: Iterable[str]) -> np.ndarray:
    """A uniform 64-bit number an id, (N,) uint64; `purpose` keeps orders of different uses independent."""
    base = hashlib.blake2b(f"{purpose}\0{seed}\0".encode(), digest_size=8)

    def one(name: str) -> bytes:
        h = base.copy()
        h.update(name.encode())
        return h.digest()

    return np.frombuffer(b"".join(map(one, ids)), dtype=">u8").astype(np.uint64)


def seeded_order(purpose: str, seed: int, ids: Sequence[str]) -> np.ndarray:
    """Positions (N,) that put `ids` in a seeded order, the same whatever order they come in."""
    return np.lexsort((np.asarray(ids, dtype=np.str_), seeded_hash(purpose, seed, ids)))


def raw_labels(table: pa.Table) -> np.ndarray:
    """Raw labels (N, L) int8 in column order; null as -2."""
    names = label_names(table.schema)
    columns = [table[LABEL + n].fill_null(-2).to_numpy() for n in names]
    return np.stack(columns, axis=1) if columns else np.zeros((table.num_rows, 0), np.int8)


def primary_label(table: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Each image's rarest positive label: its class (single-label), its rarest finding (multi-label).

    Whole label vectors would be mostly strata of one image.

    Returns:
        (N,) int64 indices into the names, and the names: the table's labels, then "none".
    """
    positive = raw_labels(table) == 1
    names = [*label_names(table.schema), NONE]
    rarity = np.where(positive, positive.sum(axis=0), len(positive) + 1)
    rarity = np.column_stack([rarity, np.full(len(positive), len(positive) + 0.5)])
    return rarity.argmin(axis=1), names


def interleave(counts: Sequence[int]) -> np.ndarray:
    """Stratum of every place in an order whose every prefix keeps the shares to less than one row a stratum.

    Args:
        counts: rows of each stratum.

    Returns:
        (sum(counts),) int64; stratum s appears counts[s] times.
    """
    present = np.flatnonzero(counts)
    size = np.asarray(counts, dtype=np.int64)[present]
    if len(present) < 2:
        return np.repeat(present, size)
    # Shares repeat with the counts' common divisor: a balanced plan is one short period, many times.
    periods = int(np.gcd.reduce(size))
    size //= periods
    n, edge = int(size.sum()), 2 * len(size) - 2
    lead = np.zeros(len(size), dtype=np.int64)  # n * (p_s k - x_s): integers, so no rounding decides an order
    places = np.empty(n, dtype=np.int64)
    inverse = 1.0 / size
    for k in range(n):
        lead += size
        # Eligible strata are behind by 1 / edge of a row; the one that must be served soonest goes first.
        deadline = np.where(lead * edge >= n, (n - n / edge - lead) * inverse, np.inf)
        chosen = int(deadline.argmin())
        lead[chosen] -= n
        places[k] = chosen
    return np.tile(present[places], periods)


def stratified_order(table: pa.Table, order: np.ndarray) -> np.ndarray:
    """Positions (N,) whose every prefix keeps the shares of the labels; rows alike stay in the given order.

    Single-label: the classes are interleaved, so that each is within one row of its share. With findings this
    repeats inside each stratum for the next rarest finding: the rarest is within one row of its share and the
    others within a few, where plain shuffling is off by the square root of the rows.

    Args:
        order: (N,) positions of rows, best first, such as `seeded_order`.
    """
    positive = raw_labels(table) == 1
    rarest_first = positive.sum(axis=0).argsort(kind="stable")
    return _stratified(positive[:, rarest_first], order)


def _stratified(positive: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows` interleaved by the rarest positive of columns (N, F), then within each stratum by the columns
    left."""
    findings = positive.shape[1]
    if not findings or not positive[rows].any():
        return rows
    first = np.where(positive[rows].any(axis=1), positive[rows].argmax(axis=1), findings)
    places = interleave(np.bincount(first, minlength=findings + 1).tolist())
    result = np.empty_like(rows)
    for stratum in np.unique(first):
        result[places == stratum] = _stratified(positive[:, stratum + 1 :], rows[first == stratum])
    return result
