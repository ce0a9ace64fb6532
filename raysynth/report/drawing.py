"""Makes matplotlib draw for a page: one width, colours that follow the reader's scheme, text that stays text.

Figures are drawn `WIDTH` units wide, a phone's width, and stretched by the page; a unit of text is then never smaller
on paper or screen than on the phone. Colours are drawn as marker values, replaced by CSS variables afterwards, so
that one picture serves light, dark and paper.

Does not know what is drawn. Input: a matplotlib Figure; output: an `<svg>` element.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 360
"""Units (CSS pixels on a phone)."""
TEXT, SMALL = 11.5, 10.0
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
"""Colour, marker and dash go together, so that colour is never alone."""
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
_VARIABLES = {
    INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)",
    **{c: f"var(--c{i})" for i, c in enumerate(SERIES, 1)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "raysynth", "font.family": "sans-serif", "font.size": TEXT,
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "axes.titlesize": TEXT, "axes.labelsize": TEXT,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "axes.titlelocation": "left",
    "lines.linewidth": 1.6, "lines.markersize": 6, "axes.unicode_minus": True, "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One figure of the page."""

    key: str
    """Its id on the page."""
    svg: str
    alt: str
    """What it shows, for those who do not see it."""
    caption: str

    @property
    def element(self) -> str:
        """The picture with its words for screen readers."""
        return self.svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.alt)}" ', 1)


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """A figure `WIDTH` wide and `height` high, units, in the page's style."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def small_multiples(figure: Figure, n: int) -> list[Axes]:
    """`n` axes in two columns; the places left over are empty."""
    grid = figure.subplots(math.ceil(n / 2), 2, squeeze=False, sharex=True, sharey=True)
    for left_over in grid.flat[n:]:
        left_over.set_visible(False)
    if n % 2 and n > 1:
        # The last panel of the right column carries the ticks that the empty place would have.
        grid[-2, 1].tick_params(labelbottom=True)
    return list(grid.flat[:n])


def series(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the index-th line."""
    i = index % len(SERIES)
    return {"color": SERIES[i], "marker": MARKERS[i], "linestyle": DASHES[i]}


def short(text: str, most: int) -> str:
    """`text` in at most `most` characters, cut with an ellipsis."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """`text` in at most `lines` lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="…"))


def thinned(x: np.ndarray, y: np.ndarray, most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A line as the means of at most `most` runs of neighbouring points; NaN points are left out."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def svg_of(figure: Figure, key: str) -> str:
    """The figure as an element for a page: no metadata, ids that are unique under `key`, CSS colours and fonts."""
    sink = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    root = ET.fromstring(sink.getvalue())
    parents = [(parent, child) for parent in root.iter() for child in parent]
    for parent, child in parents:
        if _name(child.tag) in ("metadata", "style"):
            parent.remove(child)
    used = set(re.findall(r"(?:url\(#|\"#)([^)\"]+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        element.tag = _name(element.tag)
        attributes = {_name(k): v for k, v in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({k: _attribute(k, v, key) for k, v in attributes.items()})
        element.text, element.tail = _stripped(element.text), _stripped(element.tail)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return ET.tostring(root, encoding="unicode")


def _name(tag: str) -> str:
    return tag.rpartition("}")[2]


def _stripped(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _attribute(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "href":
        return value.replace("#", f"#{key}-", 1)
    value = value.replace("url(#", f"url(#{key}-")
    if name == "style":
        value = re.sub(r"font: ((?:bold|[0-9]+) )?([\d.]+)px [^;]*", _font, value)
        # The page's own font: none can be relied on to be there.
        value = re.sub(r"font-family: [^;]*(; |$)", "", value)
        value = re.sub(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", lambda m: _VARIABLES.get(m[0], m[0]), value)
    if name == "d":
        # A tenth of a pixel is enough, and a third of the bytes.
        value = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}", value)
    return value


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2]}px" + (f"; font-weight: {found[1].strip()}" if found[1] else "")


IntervalRow = tuple[str, str, float, float, float, bool, bool]
"""Name, numbers in words, value, low, high, whether marked (diamond, bold), whether filled."""
NAME = 34
"""Characters of a name that fit beside its numbers."""


def row_height(rows: Sequence[IntervalRow]) -> float:
    """Units that `interval_rows` needs for each row: long names take the whole width, and two lines."""
    return 72 if any(len(name) > NAME for name, *_ in rows) else 44


def interval_rows(figure: Figure, rows: Sequence[IntervalRow], label: str, zero: float | None = 0) -> Axes:
    """Points with intervals, one row each, the name and the numbers above the line so that long names fit a phone.

    Args:
        zero: where the reference line stands.
    """
    axes, height = figure.subplots(), row_height(rows)
    for i, (name, words, value, low, high, marked, filled) in enumerate(rows):
        y = len(rows) - 1 - i
        colour = SERIES[0] if marked else INK
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([low, high], [y, y], color=colour, linewidth=2.4 if marked else 1.6, solid_capstyle="butt")
        if np.isfinite(value):
            axes.plot(
                [value], [y], marker="D" if marked else "o", color=colour, markersize=8 if marked else 6.5,
                markerfacecolor=colour if filled else PAPER, markeredgewidth=1.6,
            )  # fmt: skip
        # On a ground of paper, or the grid would run through the words.
        style: dict[str, Any] = {
            "transform": axes.get_yaxis_transform(), "fontweight": "bold" if marked else "normal", "va": "bottom",
            "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
        }  # fmt: skip
        above = y + 11 / height
        if height > 44:
            axes.text(0, above, wrapped(name, 58) + f"\n{words}", fontsize=SMALL, **style)
        else:
            axes.text(0, above, name, **style)
            axes.text(1, above, words, ha="right", fontsize=SMALL, **style)
    if zero is not None:
        axes.axvline(zero, color=MUTED, linewidth=1, zorder=1)
    axes.set(ylim=(-0.6, len(rows) - 0.1), yticks=[], xlabel=label)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.04)
    return axes
