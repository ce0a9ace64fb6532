"""A report's data as an experiment of seven arms, three seeds and ten classes would leave it: drawn numbers, real
shapes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits

from raysynth.report.data import COLUMNS, ReportData

ARMS = {
    "real": ("real", None, 0, 0.912), "duplicate x3": ("duplicate", 3, 300, 0.915), "mix x1": ("mix", 1, 100, 0.921),
    "mix x3": ("mix", 3, 300, 0.936), "mix x10": ("mix", 10, 1000, 0.941),
    "pretrain x10": ("pretrain", 10, 1000, 0.939),
    "upper bound": ("upper_bound", None, 0, 0.972),
}  # fmt: skip
"""Name -> strategy, ratio, synthetic images, AUROC."""
METRICS = (
    "auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "precision", "recall", "specificity", "brier", "ece",
)  # fmt: skip
SUBGROUPS = ("sex=F", "sex=M", "age_bin=18-39", "age_bin=40-59", "age_bin=>=80", "site=north")
PRIMARY = {"arm": "mix x3", "against": "real", "metric": "auroc", "test_set": "test"}


def report_data(**changes: Any) -> ReportData:
    """The experiment, with `changes` to its fields."""
    rng = np.random.default_rng(0)
    classes = [str(i) for i in range(10)]
    fields: dict[str, Any] = {
        "name": "digits: do synthetic images help?", "created": "2026-11-22",
        "experiment_yaml": "name: digits\nsweep:\n  seeds: [0, 1, 2]\n", "metrics": metrics(rng, classes),
        "comparisons": comparisons(rng), "confusion": {a: (_counts(rng, v[3]), classes) for a, v in ARMS.items()},
        "curves": _curves(rng), "reliability": _reliability(rng), "fidelity": _fidelity(rng, classes), "cost": _cost(),
        "arms": arms(), "provenance": _provenance(), "notes": ["2 of 1,000 images were quarantined: cannot be decoded.",
                                                               "scikit-learn digits: CC BY 4.0."],
        "sheets": [("Ten classes, real on the left, synthetic on the right.", sheet())], "primary": dict(PRIMARY),
    }  # fmt: skip
    return ReportData(**{**fields, **changes})


def metrics(rng: np.random.Generator, classes: list[str]) -> pd.DataFrame:
    """Two test sets; subgroups of the first; `age_bin=>=80` withheld."""
    rows = []
    for arm, (strategy, ratio, n_synth, auroc) in ARMS.items():
        for seed in range(3):
            shared = {"run": f"train-classifier/{arm}-{seed}", "arm": arm, "strategy": strategy, "ratio": ratio,
                      "n_real": 100, "n_synth": n_synth, "n_real_generator": 500, "architecture": "resnet18",
                      "init": "scratch", "gradient_steps": 600, "seed_split": 0, "seed_subset": 0, "seed_generator": 0,
                      "seed_classifier": seed, "generator_id": "0a1b2c3d4e5f" if n_synth else None}  # fmt: skip
            for test_set, offset in (("test", 0.0), ("external", -0.06)):
                for group in ["", *SUBGROUPS] if test_set == "test" else [""]:
                    n = 720 if not group else 90
                    for metric in METRICS:
                        for finding in ["macro", *classes] if not group else ["macro"]:
                            low = metric in ("brier", "ece")
                            value = (0.2 if low else auroc) + (1 - auroc if low else offset) + rng.normal(0, 0.008)
                            value = np.nan if group == "age_bin=>=80" else value
                            rows.append({**shared, "test_set": test_set, "finding": finding, "subgroup": group,
                                         "metric": metric, "value": value, "ci_low": value - 0.015,
                                         "ci_high": value + 0.013, "n": n, "n_patients": n,
                                         "n_pos": None if finding == "macro" else 72})  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS["metrics"]))


def comparisons(rng: np.random.Generator, **primary: Any) -> pd.DataFrame:
    """Every arm against real, on both test sets and two metrics; `primary` overrides the primary row."""
    rows = []
    for arm, (*_, auroc) in ARMS.items():
        if arm == "real":
            continue
        for test_set in ("test", "external"):
            for metric in ("auroc", "balanced_accuracy"):
                d = auroc - 0.912 + rng.normal(0, 0.003)
                is_primary = (arm, test_set, metric) == (PRIMARY["arm"], "test", "auroc")
                row = {"arm": arm, "against": "real", "metric": metric, "test_set": test_set, "finding": "macro",
                       "subgroup": "", "difference": d, "ci_low": d - 0.014, "ci_high": d + 0.014,
                       "p": 0.002 if abs(d) > 0.014 else 0.3, "p_holm": 0.012 if abs(d) > 0.014 else 0.9, "seeds": 3,
                       "n": 720, "n_patients": 720, "minimum_detectable_difference": 0.020,
                       "primary": is_primary}  # fmt: skip
                rows.append({**row, **(primary if is_primary else {})})
    return pd.DataFrame(rows)


def arms() -> pd.DataFrame:
    """The table of arms: the generator saw 400 real images that the classifiers did not."""
    rows = [
        {"arm": arm, "strategy": strategy, "ratio": ratio, "n_real": 500 if strategy == "upper_bound" else 100,
         "n_synth": n_synth if strategy != "duplicate" else 0, "n_validation": 180,
         "n_real_generator": 500 if strategy in ("mix", "pretrain") else None, "train_on": "donor",
         "n_unseen": 400 if strategy in ("mix", "pretrain") else 0, "gradient_steps": 600, "most_steps": 600,
         "step_budget": 600, "batch_size": 64,
         "architecture": "resnet18", "init": "scratch", "seeds": 3, "changes": f"training_set.strategy: {strategy}"}
        for arm, (strategy, ratio, n_synth, _) in ARMS.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _counts(rng: np.random.Generator, auroc: float) -> np.ndarray:
    wrong = rng.poisson((1 - auroc) * 60, (10, 10))
    return np.where(np.eye(10, dtype=bool), 216 - (wrong.sum(axis=1) - wrong.diagonal())[:, None], wrong)


def _curves(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for arm, (strategy, *_, auroc) in ARMS.items():
        for seed in range(3):
            for step in range(10, 601, 10):
                done, second = step / 600, strategy == "pretrain" and step > 300
                checked = step % 60 == 0
                rows.append({
                    "arm": arm, "seed": seed, "step": step, "phase": int(second), "monitor": "auroc",
                    "loss": 2.3 * np.exp(-3 * done) + rng.normal(0, 0.05),
                    "val_loss": 2.3 * np.exp(-2 * done) + 0.2 if checked else np.nan,
                    "val_metric": auroc - 0.4 * np.exp(-5 * done) + rng.normal(0, 0.01) if checked else np.nan,
                })  # fmt: skip
    return pd.DataFrame(rows)


def _reliability(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for arm in ARMS:
        for finding in ("0", "1"):
            for low in np.arange(0, 1, 0.1):
                p = low + 0.05
                rows.append({"arm": arm, "finding": finding, "bin_low": low, "bin_high": low + 0.1, "predicted": p,
                             "observed": np.clip(p**1.3 + rng.normal(0, 0.03), 0, 1),
                             "n": int(400 * abs(p - 0.5) + 20)})  # fmt: skip
    return pd.DataFrame(rows)


def _fidelity(rng: np.random.Generator, classes: list[str]) -> pd.DataFrame:
    shared = {"generator_id": "0a1b2c3d4e5f", "synthetic_set": "9f8e7d6c5b4a", "extractor": "pixels",
              "generator": "tiny ddpm, 3,000 steps"}  # fmt: skip
    rows = []
    for metric, size, floor in (("frechet", 1.9, 0.8), ("real_vs_synthetic_auroc", 0.71, 0.5)):
        for name in ["all", *classes]:
            v = size * (1 if name == "all" else rng.uniform(0.9, 1.3))
            few = name == "9"
            rows.append({**shared, "class": name, "metric": metric, "value": np.nan if few else v, "floor": floor,
                         "ci_low": 0.93 * v, "ci_high": 1.08 * v, "n_real": 360 if name == "all" else 36,
                         "n_synth": 360 if name == "all" else 36,
                         "note": "withheld: 9 images of a side" if few else ""})  # fmt: skip
    return pd.DataFrame(rows)


def _cost() -> pd.DataFrame:
    rows = [("train-generator", "", 141.2, 96_000, 680.0), ("generate", "", 66.0, 1000, 15.2)]
    rows += [("train-classifier", arm, 21.0 + i, 38_400, 1750.0) for i, arm in enumerate(ARMS)]
    columns = ("stage", "arm", "seconds", "images", "images_per_s")
    return pd.DataFrame(rows, columns=columns).assign(gpu_seconds=0.0, cost=np.nan)


def _provenance() -> pd.DataFrame:
    rows = [
        {"stage": s, "folder": f"runs/{s}/digits-{i:012x}", "digest": "c0ffee" * 10, "git commit": "0b90f8d" + "0" * 33,
         "dirty": False, "versions": '{"ray": "2.60.0", "torch": "2.15.0"}', "seconds": 20.5 * i}
        for i, s in enumerate(("ingest", "train-generator", "plan", "generate", "sweep", "evaluate"), 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def sheet() -> bytes:
    """PNG of real digits, five a class."""
    digits = load_digits()
    enlarged = np.kron(digits.images, np.ones((10, 10)))
    rows = [np.hstack(enlarged[digits.target == c][:13]) for c in range(5)]
    sink = io.BytesIO()
    Image.fromarray((255 - np.vstack(rows) * 15.9).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()
