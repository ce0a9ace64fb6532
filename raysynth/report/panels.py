"""Figures of each arm on its own: training curves, confusion matrices, reliability.

Do not know how their numbers were made. Input: `ReportData`; output: `Drawing`s, or none where there is nothing to
draw.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from raysynth.report.data import ReportData
from raysynth.report.drawing import (  # fmt: skip
    GRID,
    INK,
    MUTED,
    SERIES,
    SMALL,
    Drawing,
    canvas,
    short,
    small_multiples,
    svg_of,
    thinned,
    wrapped,
)
from raysynth.report.words import listed, metric_words, number

DARKEST = 0.5
"""Opacity of a full cell, so that the number in it keeps its contrast in either scheme."""
MOST_NUMBERS = 12
"""Classes of a confusion matrix up to which its cells have numbers."""
PANEL = 104
"""Height of a small multiple."""


def training_curves(data: ReportData) -> list[Drawing]:
    """The monitored validation metric, and the losses: a panel an arm."""
    return [d for d in (_metric_curves(data), _loss_curves(data)) if d]


def _arms_of(data: ReportData, table: pd.DataFrame) -> list[str]:
    there = set(table["arm"])
    return [a for a in data.arm_names if a in there] + sorted(there - set(data.arm_names))


def _along(run: pd.DataFrame) -> pd.DataFrame:
    """One run in the order of training; a second stage that counts its steps anew goes on where the first ended."""
    run = run.sort_values(["phase", "step"])
    last = 0.0
    parts = []
    for _, part in run.groupby("phase"):
        x = part["step"] + (last if part["step"].min() < last else 0)
        last = float(x.max())
        parts.append(part.assign(x=x))
    return pd.concat(parts)


def _boundary(runs: list[pd.DataFrame]) -> float | None:
    """Where the second training stage starts, optimizer steps."""
    starts = [r.loc[r["phase"] > r["phase"].min(), "x"].min() for r in runs]
    return float(np.nanmin(starts)) if np.isfinite(starts).any() else None


def _metric_curves(data: ReportData) -> Drawing | None:
    table = data.curves.dropna(subset="val_metric")
    arms = _arms_of(data, table)
    if not arms:
        return None
    monitor = listed([metric_words(m) for m in dict.fromkeys(table["monitor"].dropna())]) or "metric"
    said = []
    with canvas(50 + PANEL * -(-len(arms) // 2)) as figure:
        for arm, axes in zip(arms, small_multiples(figure, len(arms))):
            runs = [_along(run) for _, run in table[table["arm"] == arm].groupby("seed", dropna=False)]
            for run in runs:
                x, y = thinned(run["x"].to_numpy(float), run["val_metric"].to_numpy(float))
                axes.plot(x, y, color=SERIES[0], linewidth=1.3, alpha=0.85, marker="." if len(x) < 3 else None)
            if (start := _boundary(runs)) is not None:
                axes.axvline(start, color=MUTED, linewidth=1, linestyle=":")
            axes.set_title(wrapped(arm, 24), fontsize=SMALL)
            last = [r["val_metric"].iloc[-1] for r in runs]
            said.append(f"{arm} ends at {number(np.mean(last))}")
        figure.supxlabel("optimizer steps", fontsize=SMALL)
        figure.supylabel(f"{monitor}, validation", fontsize=SMALL)
        svg = svg_of(figure, "curves-metric")
    return Drawing(
        "curves-metric", svg, f"Validation {monitor} during training, one line a seed: {'; '.join(said)}.",
        f"Validation {monitor} during training, on real images; a panel an arm, a line a seed. Dotted: the second "
        "training stage starts.",
    )  # fmt: skip


def _loss_curves(data: ReportData) -> Drawing | None:
    table = data.curves[data.curves["loss"].notna() | data.curves["val_loss"].notna()]
    arms = _arms_of(data, table)
    if not arms:
        return None
    said = []
    with canvas(66 + PANEL * -(-len(arms) // 2)) as figure:
        panels = small_multiples(figure, len(arms))
        for arm, axes in zip(arms, panels):
            runs = pd.concat([_along(run) for _, run in table[table["arm"] == arm].groupby("seed", dropna=False)])
            mean = runs.groupby("x")[["loss", "val_loss"]].mean()
            for column, words, style in (("loss", "training", "-"), ("val_loss", "validation", "--")):
                x, y = thinned(mean.index.to_numpy(float), mean[column].to_numpy(float))
                colour = SERIES[0] if column == "loss" else SERIES[1]
                if len(x):
                    axes.plot(x, y, color=colour, linestyle=style, label=words, marker="." if len(x) < 3 else None)
            axes.set_title(wrapped(arm, 24), fontsize=SMALL)
            ends = mean.ffill().iloc[-1]
            said.append(f"{arm} ends at {number(ends['loss'])} in training, {number(ends['val_loss'])} in validation")
        lines = {words: line for axes in panels for line, words in zip(*axes.get_legend_handles_labels())}
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=2)
        figure.supxlabel("optimizer steps", fontsize=SMALL)
        figure.supylabel("loss", fontsize=SMALL)
        svg = svg_of(figure, "curves-loss")
    return Drawing(
        "curves-loss", svg, f"Loss during training, mean over the seeds: {'; '.join(said)}.",
        "Loss during training, mean over the seeds; a panel an arm. Long curves are drawn as means of neighbouring "
        "steps. Losses of arms with mixing or label smoothing are not comparable with the others.",
    )  # fmt: skip


def multilabel(counts: np.ndarray, names: list[str]) -> np.ndarray | None:
    """(F, 2, 2) counts where each finding has a table of its own; None for one table of K classes."""
    counts = np.asarray(counts)
    if counts.ndim == 2 and counts.shape == (len(names), len(names)):
        return None
    return counts.reshape(len(names), 2, 2)


def confusion(data: ReportData) -> list[Drawing]:
    """A confusion matrix an arm; none for arms with several labels an image (see `tables.confusion_tables`)."""
    drawings = []
    arms = [a for a in data.arm_names if a in data.confusion] + [a for a in data.confusion if a not in data.arm_names]
    for i, arm in enumerate(arms):
        counts, names = data.confusion[arm]
        if multilabel(counts, names) is None:
            drawings.append(_confusion(f"confusion-{i}", arm, np.asarray(counts, dtype=float), list(names)))
    return drawings


def _confusion(key: str, arm: str, counts: np.ndarray, names: list[str]) -> Drawing:
    k, totals = len(names), counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    longest = max(map(len, names))
    with canvas(340 + 4 * min(longest, 16)) as figure:
        axes = figure.subplots()
        cells = [Rectangle((j, i), 1, 1) for i in range(k) for j in range(k)]
        colours = [to_rgba(SERIES[0], DARKEST * s) for s in shares.ravel()]
        axes.add_collection(PatchCollection(cells, facecolors=colours, edgecolors=GRID, linewidths=0.5))
        if k <= MOST_NUMBERS:
            for i, j in np.ndindex(k, k):
                if counts[i, j]:
                    axes.text(j + 0.5, i + 0.5, f"{counts[i, j]:g}", ha="center", va="center", color=INK,
                              fontsize=SMALL if k <= 10 else SMALL - 2)  # fmt: skip
        ticks = np.arange(k) + 0.5
        crowded = k > 25
        labels = [short(n, 16) for n in names]
        turned = 90 if longest > 2 and k > 3 else 0
        axes.set_xticks([] if crowded else ticks, [] if crowded else labels, rotation=turned)
        axes.set_yticks([] if crowded else ticks, [] if crowded else labels)
        axes.set(xlim=(0, k), ylim=(k, 0), xlabel="predicted", ylabel="true", aspect="equal")
        axes.grid(False)
        axes.tick_params(length=0)
        svg = svg_of(figure, key)
    right = np.trace(counts) / counts.sum() if counts.sum() else float("nan")
    off = counts * (1 - np.eye(k))
    alt = f"Confusion matrix of {arm}: {number(100 * right, 1)} % on the diagonal"
    if off.any():
        true, said = np.unravel_index(off.argmax(), off.shape)
        alt += f"; the most frequent mistake is {names[true]} taken for {names[said]}, {off[true, said]:g} times"
    caption = f"{arm}: counts summed over the seeds, shaded by share of the true class; empty: 0."
    return Drawing(key, svg, f"{alt}.", caption)


def reliability(data: ReportData) -> Drawing | None:
    """Observed frequency against predicted probability, pooled over the findings: a panel an arm."""
    table = data.reliability.dropna(subset=["predicted", "observed"])
    table = table[table["n"] > 0]
    arms = _arms_of(data, table)
    if not arms:
        return None
    said = []
    with canvas(50 + 150 * -(-len(arms) // 2)) as figure:
        for arm, axes in zip(arms, small_multiples(figure, len(arms))):
            mine = table[table["arm"] == arm]
            mine = mine.assign(p=mine["predicted"] * mine["n"], o=mine["observed"] * mine["n"])
            bins = mine.groupby(["bin_low", "bin_high"])[["p", "o", "n"]].sum()
            predicted, observed, n = bins["p"] / bins["n"], bins["o"] / bins["n"], bins["n"]
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
            axes.plot(predicted, observed, color=SERIES[0], linewidth=1.2)
            axes.scatter(predicted, observed, s=6 + 60 * n / n.max(), color=SERIES[0], linewidth=0, clip_on=False)
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            axes.set_title(wrapped(arm, 24), fontsize=SMALL)
            gap = float(((predicted - observed).abs() * n).sum() / n.sum())
            said.append(f"{arm} is off by {number(gap)}")
        figure.supxlabel("predicted probability", fontsize=SMALL)
        figure.supylabel("observed frequency", fontsize=SMALL)
        svg = svg_of(figure, "reliability")
    several = table["finding"].nunique() > 1
    return Drawing(
        "reliability", svg, f"Reliability, mean distance from the diagonal: {'; '.join(said)}.",
        "Observed frequency by predicted probability" + (", pooled over the findings" if several else "")
        + "; on the diagonal a probability means what it says. Larger dots hold more predictions.",
    )  # fmt: skip
