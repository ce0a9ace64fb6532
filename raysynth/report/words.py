"""How the page writes numbers, names and lists, and what counts as shown.

A difference counts as shown when the interval excludes 0 and, where there is a test, p is below 1 - confidence.

Knows no table and no sentence. Input: values; output: words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

METRICS = {
    "auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "ece": "calibration error (ECE)", "brier": "Brier score",
    "loss": "loss", "log_loss": "log loss", "nll": "negative log likelihood", "mcc": "MCC", "fid": "FID",
    "kid": "KID", "frechet": "Fréchet distance", "kernel": "kernel distance (MMD²)",
    "real_vs_synthetic_auroc": "real-against-synthetic AUROC", "fpr": "false positive rate",
    "fnr": "false negative rate", "underdiagnosis": "underdiagnosis rate",
}  # fmt: skip
"""Words for metrics whose key is not already one."""
LOWER_IS_BETTER = ("ece", "mce", "brier", "loss", "log_loss", "nll", "fpr", "fnr", "underdiagnosis", "overdiagnosis")


def metric_words(metric: str) -> str:
    """A metric's name as a person writes it."""
    return METRICS.get(metric, metric.replace("_", " "))


def higher_is_better(metric: str) -> bool:
    """Whether more of the metric is better; gaps and errors are better low."""
    return not (metric.startswith(LOWER_IS_BETTER) or metric.endswith(("_gap", "_error", "_loss")))


def group_words(subgroup: str) -> str:
    """`age bin: 18-39 & sex: F` of `age_bin=18-39 & sex=F`; the empty group is everyone."""
    parts = (p.partition("=") for p in subgroup.split(" & "))
    return " & ".join(f"{a.replace('_', ' ')}: {v}" if v else a for a, _, v in parts) or "everyone"


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with a true minus; `-` where there is none."""
    if value is None or pd.isna(value):
        return "-"
    text = f"{float(value):{'+' if sign else ''},.{digits}f}"
    # A difference of -0.0004 is not "-0.000".
    text = text.lstrip("+-") if float(text.replace(",", "")) == 0 else text
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    """A whole number with thousands separated; `-` where there is none."""
    return number(value, 0)


def interval(low: Any, high: Any, sign: bool = False) -> str:
    """`0.812 to 0.844`; `-` where there is none."""
    return "-" if pd.isna(low) or pd.isna(high) else f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def p_words(p: Any) -> str:
    """`p = 0.034`, `p < 0.001`; `-` where there is none."""
    if p is None or pd.isna(p):
        return "-"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def plural(n: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def quoted(names: Sequence[str]) -> str:
    """`“a”, “b” and “c”`."""
    return listed([f"“{a}”" for a in names])


def is_shown(row: Any, confidence: float, p: str = "p") -> bool:
    """Whether the interval and, where there is one, the test exclude a difference of 0."""
    if pd.isna(row["difference"]):
        return False
    known = not (pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]))
    outside = row["ci_low"] > 0 or row["ci_high"] < 0
    if pd.isna(row[p]):
        return bool(known and outside)
    return bool(row[p] < 1 - confidence and (outside or not known))
