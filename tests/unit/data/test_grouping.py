"""Patients by column and by picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysynth.core.config import build_experiment
from raysynth.data.grouping import close_pairs, group_by_hash, patients_and_units
from raysynth.data.images import decode, perceptual_hash
from raysynth.data.reading import ImageReader
from raysynth.data.sources import list_source


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12),
    st.lists(st.sets(st.integers(0, 63), max_size=6), max_size=30),
    st.integers(0, 10),
)
@settings(max_examples=150, deadline=None)
def test_banding_finds_exactly_the_pairs_that_comparing_all_finds(
    seeds: list[int], flips: list[set[int]], distance: int
) -> None:
    near = [seeds[i % len(seeds)] ^ sum(1 << bit for bit in bits) for i, bits in enumerate(flips)]
    hashes = np.unique(np.array(seeds + near, np.uint64))
    every = {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
    }
    assert {(int(i), int(j)) for i, j in close_pairs(hashes, distance)} == every


def test_groups_are_chains_of_close_hashes() -> None:
    hashes = np.array([0b0, 0b11, 0b1111, 0b0, 1 << 40 | 0b11110000], np.uint64)
    groups = group_by_hash(hashes, 2)
    assert groups[0] == groups[1] == groups[2] == groups[3] != groups[4]
    assert len(set(group_by_hash(hashes, 0))) == 4


def test_patients_of_a_column_with_identical_pictures_are_one_unit() -> None:
    patients, units = patients_and_units(["a", "b", "c", "d"], ["p", "q", None, "q"], list("xxyz"), None, 2)
    assert patients == ["p", "q", "image:c", "q"]
    assert units[0] == units[1] == units[3] != units[2]


def test_without_column_or_hash_every_image_is_a_patient() -> None:
    patients, units = patients_and_units(["a", "b"], None, ["x", "x"], None, 2)
    assert patients == ["a", "b"]
    assert len(set(units)) == 2


def test_hash_groups_are_named_by_their_first_image() -> None:
    hashes = np.array([0, 2**50 - 1, 1], np.uint64)
    patients, units = patients_and_units(["a", "b", "c"], None, ["x", "y", "z"], hashes, 2)
    assert patients == ["group:a", "group:b", "group:a"]
    assert units[0] == units[2] != units[1]


def test_a_hundred_thousand_hashes_take_seconds() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:] = hashes[:50_000] ^ np.uint64(1)
    assert len(set(group_by_hash(hashes, 2))) == 50_000


def test_hash_finds_copies_of_chest_films_and_few_strangers(shared_data: Path) -> None:
    # Measured on all 2,918 films: at distance 0, 2, 4 bits 0, 6, 82 images are joined to a stranger's.
    data = build_experiment({"name": "x", "data": {
        "path": str(shared_data / "kermany_cxr_224" / "metadata.csv"),
        "columns": {"label": "label", "patient": "patient_id"}, "image": {"preset": "chest", "size": 64},
    }}).data  # fmt: skip
    rows = list_source(data, "x").rows.slice(0, 400)
    reader = ImageReader(data)
    hashes = [perceptual_hash(decode(reader.read(p), data.image).array) for p in rows["location"].to_pylist()]
    groups = group_by_hash(np.array(hashes, np.uint64), data.split.hash_distance)
    joined: dict[int, set[str]] = {}
    for group, patient in zip(groups, rows["patient"].to_pylist()):
        joined.setdefault(int(group), set()).add(patient)
    assert sum(len(p) > 1 for p in joined.values()) <= 2
    assert len(joined) > 390


@pytest.mark.parametrize("distance", [0, 10])
def test_one_image_is_one_group(distance: int) -> None:
    assert group_by_hash(np.array([7], np.uint64), distance).tolist() == [0]
