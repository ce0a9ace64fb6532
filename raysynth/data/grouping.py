"""Which images belong to one patient, from a column or from the pictures, and which may not be parted by a split.

Perceptual hashes within a Hamming distance d are found by banding: of d + 1 bands of the 64 bits, two such hashes
share at least one (pigeonhole), so only images in one bucket are compared. Knows no splits and no labels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_BITS = 64
LONE = "image:"
"""Begins the patient of an image that names none, where others do."""


def close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Pairs of 64-bit hashes at most `distance` bits apart.

    Args:
        hashes: (N,) uint64, distinct.

    Returns:
        (P, 2) int64 indices, smaller first; a pair may occur more than once.
    """
    bands = distance + 1
    edges = np.linspace(0, HASH_BITS, bands + 1).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        for bucket in _buckets(band):
            for i in range(len(bucket) - 1):
                others = bucket[i + 1 :]
                near = np.bitwise_count(hashes[bucket[i]] ^ hashes[others]) <= distance
                found.append(np.stack([np.full(near.sum(), bucket[i]), others[near]], axis=1))
    return np.sort(np.concatenate(found), axis=1)


def _buckets(band: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.diff(band[order])) + 1
    yield from (bucket for bucket in np.split(order, starts) if len(bucket) > 1)


def components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components of n nodes under (P, 2) pairs: (N,) int64 labels."""
    ones = np.ones(len(pairs), bool)
    return connected_components(coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(n, n)), directed=False)[1]


def chain(keys: Sequence[Hashable]) -> np.ndarray:
    """(P, 2) pairs that join the positions holding equal keys, each to the first."""
    first: dict[Hashable, int] = {}
    return np.array([(first.setdefault(k, i), i) for i, k in enumerate(keys)], np.int64).reshape(-1, 2)


def group_by_hash(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Groups of images alike: (N,) uint64 perceptual hashes -> (N,) int64 group numbers."""
    distinct, inverse = np.unique(hashes, return_inverse=True)
    return components(len(distinct), close_pairs(distinct, distance))[inverse]


def patients_and_units(
    ids: Sequence[str], column: Sequence[str | None] | None, pixels: Sequence[str],
    hashes: np.ndarray | None, distance: int,
) -> tuple[list[str], np.ndarray]:
    """Who each image shows, and which images no split may part.

    Args:
        ids: (N) image ids, which name patients that nothing else names.
        column: patient per image where the data names them, null for its own.
        pixels: (N) pixel hashes: equal pictures stay together, whatever patient they are filed under.
        hashes: (N,) uint64 perceptual hashes to join images by; null: not joined.

    Returns:
        patient ids (N) and unit numbers (N,) int64; a patient lies in exactly one unit.
    """  # fmt: skip
    n = len(ids)
    if column is not None:
        patients = [f"{LONE}{ids[i]}" if p is None else p for i, p in enumerate(column)]
        return patients, components(n, np.concatenate([chain(patients), chain(pixels)]))
    if hashes is None:
        return list(ids), np.arange(n)
    alike = chain(group_by_hash(hashes, distance).tolist())
    units = components(n, np.concatenate([alike, chain(pixels)]))
    _, first = np.unique(units, return_index=True)
    return [f"group:{ids[first[u]]}" for u in units], units
