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
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush

import numpy as np
import pyarrow as pa

from raysynth.core.schemas import LABEL, label_names

NONE, UNKNOWN = "none", "unknown"
"""Strata of images without any positive label: every finding is known to be absent, or some may be there."""


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


def used_labels(table: pa.Table, policy: Mapping[str, str] | None = None) -> np.ndarray:
    """Labels (N, L) int8 under the policy: 1, 0, and -1 for uncertain or not annotated where it says `ignore`."""
    raw = np.maximum(raw_labels(table), -1)
    for j, name in enumerate(label_names(table.schema)):
        choice = (policy or {}).get(name, "ignore")
        if choice != "ignore":
            raw[raw[:, j] < 0, j] = choice == "ones"
    return raw


def primary_label(table: pa.Table, policy: Mapping[str, str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Each image's rarest positive label: its class (single-label), its rarest finding (multi-label).

    Whole label vectors would be mostly strata of one image.

    Args:
        policy: finding -> what an uncertain or missing annotation means, as `data.labels.policy`.

    Returns:
        (N,) int64 indices into the names, and the names: the table's labels, then "none" and "unknown".
    """
    labels = used_labels(table, policy)
    positive = labels == 1
    names = [*label_names(table.schema), NONE, UNKNOWN]
    rarest = np.where(positive, positive.sum(axis=0), len(positive) + 1)
    rest = np.where((labels < 0).any(axis=1), len(names) - 1, len(names) - 2)
    if not positive.shape[1]:
        return rest, names
    return np.where(positive.any(axis=1), rarest.argmin(axis=1), rest), names


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
    stratum = np.repeat(np.arange(len(size)), size)
    nth = np.arange(n) - np.repeat(np.cumsum(size) - size, size)
    # A stratum's next row may come once it is 1 / edge of a row behind its share, and must before it is 1 - 1 / edge
    # behind; of those that may, the one that must be served soonest goes first.
    release = -(-(n * nth * edge + n) // (edge * size[stratum]))
    deadline = n * (1 - 1 / edge + nth) / size[stratum]
    by_deadline = np.lexsort((stratum, deadline))
    priority = np.empty(n, dtype=np.int64)
    priority[by_deadline] = np.arange(n)
    arrivals = priority[np.argsort(release, kind="stable")].tolist()
    until = np.searchsorted(np.sort(release), np.arange(1, n + 1), side="right").tolist()
    ready: list[int] = []
    served, arrived = [], 0
    for stop in until:
        for row in arrivals[arrived:stop]:
            heappush(ready, row)
        arrived = stop
        served.append(heappop(ready))
    return np.tile(present[stratum[by_deadline[served]]], periods)


def stratified_order(
    table: pa.Table, order: np.ndarray, policy: Mapping[str, str] | None = None
) -> np.ndarray:
    """Positions (N,) whose every prefix keeps the shares of the labels; rows alike stay in the given order.

    Single-label: the classes are interleaved, so that each is within one row of its share. With findings this
    repeats inside each stratum for the next rarest finding: the rarest is within one row of its share and the
    others within a few, where plain shuffling is off by the square root of the rows.

    Args:
        order: (N,) positions of rows, best first, such as `seeded_order`.
        policy: as `primary_label`'s. Images that are positive for nothing known are a stratum of their own.
    """
    labels = used_labels(table, policy)
    positive = labels == 1
    rarest_first = positive.sum(axis=0).argsort(kind="stable")
    unknown = (labels < 0).any(axis=1) & ~positive.any(axis=1)
    return _stratified(np.column_stack([positive[:, rarest_first], unknown]), order)


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
