"""How close synthetic images are to held-out real ones, beside how close other real images are to them.

Knows no images, extractors or storage: input are the features, labels and units of three samples of n images each
(held-out real, other real, synthetic); output is a tidy table, one row a class and metric.

* `frechet`, `kernel`: see raysynth.metrics.distances. `real_vs_synthetic_auroc`: raysynth.metrics.discriminator.
* `floor` is the same number with the other real images in place of the synthetic ones, at the same n. A distance cannot
  be read without it: the Frechet distance of two halves of one set is above zero, the more so the fewer they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raysynth.metrics.discriminator import two_sample_auroc
from raysynth.metrics.distances import (
    GROUPS,
    Gaussian,
    Moments,
    frechet_distance,
    frechet_standard_error,
    groups_of_units,
    interval,
    kernel_distance,
)
from raysynth.metrics.features import INCEPTION

ALL = "all"
FRECHET, KERNEL, AUROC = "frechet", "kernel", "real_vs_synthetic_auroc"
KEPT = 10_000
"""Features kept of each sample. The Frechet distance of all classes together streams over every image; its interval and
the other numbers are those of the first `KEPT`, in an order that keeps the classes' shares."""
SHARES_DIFFER = 0.1
"""Difference in the prevalence of a class above which the overall numbers carry a note."""


@dataclass(frozen=True)
class Sample:
    """One of the three sets of images."""

    moments: Moments
    """Of every image."""
    features: np.ndarray
    """(N, D) float32 of the first `KEPT` images."""
    labels: np.ndarray
    """(N, L) labels in use: 1, 0, -1 not known."""
    units: Sequence[str]
    """(N,) patient, or source image of a synthetic one."""

    def of_class(self, column: int, n: int) -> Sample:
        """The first n images positive for a class."""
        rows = np.flatnonzero(self.labels[:, column] == 1)[:n]
        features = self.features[rows]
        return Sample(Moments.of(features), features, self.labels[rows], [self.units[i] for i in rows])


@dataclass(frozen=True)
class Settings:
    """What of `evaluation` the comparison depends on."""

    classes: Sequence[str]
    """Names of the label columns to judge one by one; empty: none."""
    min_images: int
    bootstraps: int
    confidence: float
    seed: int
    note: str = ""
    """Said of every number."""


def fidelity_schema() -> pa.Schema:
    """The fidelity table. `value` is null where withheld; `ratio` is value / floor of a Frechet distance."""
    return pa.schema([
        ("generator_id", pa.string()), ("synthetic_set", pa.string()), ("extractor", pa.string()),
        ("class", pa.string()), ("metric", pa.string()), ("value", pa.float64()), ("floor", pa.float64()),
        ("ratio", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("n_real", pa.int64()),
        ("n_synth", pa.int64()), ("note", pa.string()),
    ])  # fmt: skip


def metric_name(metric: str, extractor: str) -> str:
    """A metric for people. Only clean-fid's Inception makes a Frechet distance FID and a kernel distance KID."""
    if metric == AUROC:
        return f"Real-against-synthetic AUROC, {extractor} features"
    if extractor == INCEPTION:
        return f"{'FID' if metric == FRECHET else 'KID'} ({INCEPTION})"
    return f"{'Frechet' if metric == FRECHET else 'Kernel'} distance, {extractor} features"


def compare(held_out: Sample, real: Sample, synthetic: Sample, settings: Settings) -> list[dict[str, Any]]:
    """Rows of the table (without generator, set and extractor), all classes first.

    Args:
        held_out: real images that no generator saw.
        real: as many other real images.
        synthetic: as many synthetic images.
    """
    apart = _shares_apart(held_out.labels, synthetic.labels)
    shares = ""
    if apart > SHARES_DIFFER:
        shares = f"class shares of real and synthetic images differ by up to {apart:.0%}, which counts as distance here"
    samples = (held_out, real, synthetic)
    rows = _rows(ALL, samples, settings, shares)
    for column, name in enumerate(settings.classes):
        n = min(int((s.labels[:, column] == 1).sum()) for s in samples)
        if n < max(2, settings.min_images):
            rows += _withheld(name, n, f"withheld: {n} images of a side, fewer than {settings.min_images}")
        else:
            rows += _rows(name, [s.of_class(column, n) for s in samples], settings, "")
    return rows


def _rows(name: str, samples: Sequence[Sample], settings: Settings, shares: str) -> list[dict[str, Any]]:
    held_out, real, synthetic = samples
    groups = min(GROUPS, *(len(set(s.units)) for s in samples))
    of_held_out, of_real, of_synthetic = (groups_of_units(s.units, groups) for s in samples)
    x, other, y = (s.features for s in samples)

    def row(metric: str, value: float | None, floor: float | None, ci: tuple, n: int, *notes: str) -> dict[str, Any]:
        about = "; ".join(text for text in (settings.note, shares, *notes) if text)
        return {"class": name, "metric": metric, "value": value, "floor": floor, "ratio": None, "ci_low": ci[0],
                "ci_high": ci[1], "n_real": n, "n_synth": n, "note": about}  # fmt: skip

    gaussians = [_gaussian(s) for s in samples]
    value, floor = frechet_distance(gaussians[0], gaussians[2]), frechet_distance(gaussians[0], gaussians[1])
    low, high = interval(value, frechet_standard_error(x, y, of_held_out, of_synthetic), groups, settings.confidence)
    n, dimensions = held_out.moments.n, len(held_out.moments.mean)
    singular = f"{n:,} images in {dimensions:,} dimensions: covariances are singular; read it against the floor"
    part = f"interval from the first {len(x):,} images: too wide rather than too narrow"
    frechet = row(FRECHET, value, floor, (None if low is None else max(0.0, low), high), n,
                  singular if n <= dimensions else "", part if n > len(x) else "")  # fmt: skip
    frechet["ratio"] = value / floor if floor else None

    value, error = kernel_distance(x, y, of_held_out, of_synthetic)
    floor, _ = kernel_distance(x, other, of_held_out, of_real)
    kernel = row(KERNEL, value, floor, interval(value, error, groups, settings.confidence), len(x))

    judge = partial(
        two_sample_auroc, x, units_a=held_out.units, bootstraps=settings.bootstraps, confidence=settings.confidence,
        seed=settings.seed,
    )  # fmt: skip
    told, control = judge(b=y, units_b=synthetic.units), judge(b=other, units_b=real.units)
    one = "withheld: all images of a side are of one patient or source image" if told.value is None else ""
    return [frechet, kernel, row(AUROC, told.value, control.value, (told.ci_low, told.ci_high), len(x), one)]


def _gaussian(sample: Sample) -> Gaussian:
    # The thin factor where it will do: no eigenvectors of a (D, D) matrix of low rank.
    if sample.moments.n == len(sample.features):
        return Gaussian.of(sample.features)
    return sample.moments.gaussian()


def _withheld(name: str, n: int, why: str) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("value", "floor", "ratio", "ci_low", "ci_high"))
    return [{"class": name, "metric": m, **empty, "n_real": n, "n_synth": n, "note": why}
            for m in (FRECHET, KERNEL, AUROC)]  # fmt: skip


def _shares_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between the prevalences of any class in two label matrices."""
    if not a.shape[1]:
        return 0.0
    with np.errstate(invalid="ignore"):
        shares = [((x == 1).sum(axis=0) / (x >= 0).sum(axis=0)) for x in (a, b)]
    gap = np.nanmax(np.abs(shares[0] - shares[1]), initial=0.0)
    return float(gap) if math.isfinite(gap) else 0.0
