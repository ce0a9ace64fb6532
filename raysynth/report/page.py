"""The report: one self-contained HTML page that asks the question, answers it, and shows what the answer rests on.

Nothing is loaded from anywhere: figures are inline SVG, sheets and tables are data. The page follows the reader's
colour scheme, fits a phone, and prints. Does not know how its numbers were made or where artifacts are.

Input: `ReportData`; output: HTML, and the tables as CSV (see `tables.write_tables`).
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raysynth.report import figures, panels, tables
from raysynth.report.data import ReportData
from raysynth.report.drawing import Drawing
from raysynth.report.tables import Table, write_tables
from raysynth.report.words import answer, count, plural

__all__ = ["render_page", "write_tables"]

MOST_SHEETS = 3_000_000
"""Bytes of contact sheets; those beyond are named, not shown, so that the page can be mailed."""
PLAIN_CSV, MOST_CSV = 100_000, 1_000_000
"""Bytes of a table up to which it is embedded as it is, and up to which gzip's result is; larger ones stand beside
the page."""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[tuple[str, list[Drawing], list[Table]]] = field(default_factory=list)
    """Title, figures and tables of parts that are opened by those who want them."""


@dataclass(frozen=True)
class Download:
    """One table to be saved; `uri` is empty where it is too large to be carried."""

    name: str
    rows: int
    uri: str


def render_page(data: ReportData) -> str:
    """The page.

    Args:
        data: what to show. Parts that are missing leave their section out.

    Returns:
        HTML with every picture and table inside.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sheets, left_out = _sheets(data)
    return environment.get_template("template.html.j2").render(
        data=data, answer=answer(data), sheets=sheets, sheets_left_out=left_out, sections=sections(data),
        downloads=downloads(data), subtitle=_subtitle(data), style=(here / "style.css").read_text(encoding="utf-8"),
    )  # fmt: skip


def _subtitle(data: ReportData) -> str:
    runs = data.metrics["run"].nunique()
    parts = [plural(len(data.arm_names), "arm"), *([plural(runs, "trained classifier")] if runs else [])]
    parts += [plural(len(data.test_sets), "test set")] if data.test_sets else []
    return f"{data.created} · {', '.join(parts)}"


def _sheets(data: ReportData) -> tuple[list[tuple[str, str]], list[str]]:
    """Caption and data URI of the sheets that fit, and captions of the others."""
    shown, left_out, used = [], [], 0
    for caption, png in data.sheets:
        used += len(png)
        if used <= MOST_SHEETS:
            shown.append((caption, "data:image/png;base64," + base64.b64encode(png).decode()))
        else:
            left_out.append(caption)
    return shown, left_out


def sections(data: ReportData) -> list[Section]:
    """Every part of the page below the answer that has something to show."""
    found = [_result(data), _details(data), _subgroups(data), _training(data), _fidelity(data), _generator(data),
             _cost(data), _provenance(data)]  # fmt: skip
    return [s for s in found if s.words or s.drawings or s.tables or s.folded]


def _there(*items: Table | None) -> list[Table]:
    return [i for i in items if i]


def _result(data: ReportData) -> Section:
    drawings = [figures.ratio_curve(data), *(figures.forest(data, t) for t in _primary_first(data))]
    contrasts = tables.contrasts(data)
    return Section(
        "result", "Every arm", [], [d for d in drawings if d], _there(tables.arms(data)),
        [("All paired differences", [], [contrasts])] if contrasts else [],
    )  # fmt: skip


def _primary_first(data: ReportData) -> list[str]:
    """Test sets, the primary one first; also those of comparisons alone."""
    return list(dict.fromkeys([data.test_set, *data.test_sets])) if data.test_sets else []


def _details(data: ReportData) -> Section:
    confusions = panels.confusion(data)
    curve = panels.reliability(data)
    heat = [tables.metrics_by_arm(data, t) for t in _primary_first(data)]
    matrices = tables.confusion_tables(data)
    folded = [("Confusion matrices", confusions, matrices)] if confusions or matrices else []
    folded += [("Reliability", [curve], [])] if curve else []
    return Section(
        "metrics", "All metrics, by arm and by finding", [], [], _there(*heat, tables.findings_by_arm(data)), folded
    )


def _subgroups(data: ReportData) -> Section:
    found = tables.subgroups(data)
    drawing = figures.subgroup_forest(data)
    words = ["Subgroups are exploratory. A difference that is shown in one and not in another is not a difference "
             "between them."] if found else []  # fmt: skip
    return Section("subgroups", "Whom it helps: subgroups", words, [drawing] if drawing else [], found)


def _training(data: ReportData) -> Section:
    return Section("training", "Training", [], panels.training_curves(data))


def _fidelity(data: ReportData) -> Section:
    drawings, table = figures.fidelity(data), tables.fidelity(data)
    words = ["Close to real is not the same as useful for training: the arms above answer that."] if table else []
    return Section("fidelity", "How close the synthetic images are", words, drawings, _there(table))


def _generator(data: ReportData) -> Section:
    table = tables.generator_saw(data)
    words = []
    if table:
        unseen = data.arms["n_unseen"].dropna()
        most = int(unseen.max()) if len(unseen) else 0
        words = [
            f"The generator saw {plural(most, 'real image')} that the classifier did not."
            if most > 0 else "The generator saw no real image that the classifier did not."
        ]  # fmt: skip
    return Section("generator", "What the generator saw", words, [], _there(table))


def _cost(data: ReportData) -> Section:
    return Section("cost", "What it cost", [], [], _there(tables.cost(data)))


def _provenance(data: ReportData) -> Section:
    return Section("provenance", "Where the numbers come from", list(data.notes), [], _there(tables.provenance(data)))


def downloads(data: ReportData) -> list[Download]:
    """Every table as a link that carries it."""
    found = []
    for name, csv in write_tables(data).items():
        rows = csv.count(b"\n") - 1
        if len(csv) <= PLAIN_CSV:
            found.append(Download(name, rows, _uri("text/csv", csv)))
            continue
        packed = gzip.compress(csv, mtime=0)
        small = len(packed) <= MOST_CSV
        found.append(Download(f"{name}.gz" if small else name, rows, _uri("application/gzip", packed) if small else ""))
    return found


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
